"""The training text of the shipped model: seeded, made from short lists.

Indirect-object sentences, subject-verb agreement, and repeated random sequences. A fifth of the
pairs of names, of the opening clauses and of the closing clauses are held out of training.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

NAMES = (
    "Mary John Alice Tom Anna Peter Lucy Mark Emma Paul Sarah David Laura James Julia Simon Kate "
    "Daniel Clara Henry Rose Jack Nina Oscar Eva Felix Helen Victor Irene Walter Maria Robert "
    "Susan Frank Grace Adam Olivia Leo Sophie Max Diana George Linda Martin Carol Kevin Amy Brian "
    "Ruth Steven Ellen Gary Jane Scott Lisa Bruce Karen Philip Nancy Arthur Judy Ralph Megan Louis"
).split()
PLACES = (
    "store park school market library station beach garden office museum bakery restaurant "
    "hospital castle farm zoo theater river bridge church house harbor village hotel"
).split()
OBJECTS = (
    "drink book ring ball letter key flower gift cup hat coin map box bottle cake lamp picture "
    "basket ticket watch bag pen sandwich kite"
).split()
ADJECTIVES = "old red small new green big blue clean heavy broken".split()

# N and M are the two names in order of mention, P a place, Q another, O an object.
STARTS = ("When", "After", "While", "As", "Once", "Because", "Then,", "One day", "Yesterday", "")
EVENTS = (
    "N and M went to the P",
    "N and M arrived at the P",
    "N and M left the P",
    "N and M were at the P",
    "N and M were working at the P",
    "N and M walked to the P",
    "N and M met near the P",
    "N and M had a long day at the P",
    "N and M went to the P and then to the Q",
    "N and M left the P and then the Q",
    "friends N and M found a O at the P",
)
# S is the name mentioned again; the other one follows.
ACTS = (
    "gave", "handed", "passed", "offered", "sent", "showed", "happily gave", "wanted to give",
    "wanted to show", "decided to pass", "decided to offer", "said a few words about",
)  # fmt: skip
GIFTS = ("a O", "the O", "the old O", "a new O")


def is_held_out(*parts: str) -> bool:
    """Whether this combination is kept out of training: a fifth are, chosen by a checksum."""
    # A checksum, and not a generator: the choice must not depend on the order of calls.
    return zlib.crc32(" ".join(parts).encode()) % 5 == 0


def _templates(firsts: tuple[str, ...], seconds: tuple[str, ...], *, held_out: bool) -> list[str]:
    pairs = [(first, second) for first in firsts for second in seconds]
    return [f"{a} {b}".strip() for a, b in pairs if is_held_out(a, b) == held_out]


OPENINGS = {out: _templates(STARTS, EVENTS, held_out=out) for out in (False, True)}
CLOSINGS = {out: _templates(ACTS, GIFTS, held_out=out) for out in (False, True)}


@dataclass(frozen=True)
class Prompt:
    """A text, the token that follows it (with its space), and the one that must not."""

    text: str
    answer: str
    other: str


def indirect_object(rng: np.random.Generator, *, order: str, held_out: bool) -> Prompt:
    """One indirect-object prompt.

    Args:
        rng: where randomness comes from.
        order: "ABBA" (the second name is repeated) or "BABA" (the first is).
        held_out: whether the pair of names, the opening and the closing are kept out of training.
    """
    while True:
        first, second = rng.choice(NAMES, 2, replace=False)
        if is_held_out(*sorted((first, second))) == held_out:
            break
    subject, answer = (second, first) if order == "ABBA" else (first, second)
    opening, closing = rng.choice(OPENINGS[held_out]), rng.choice(CLOSINGS[held_out])
    opening = opening[0].upper() + opening[1:]
    end = "," if opening.split()[0] in STARTS[:6] else "."
    place, another = rng.choice(PLACES, 2, replace=False)
    first_object, second_object = rng.choice(OBJECTS, 2, replace=False)
    filled = {"N": first, "M": second, "S": subject, "P": place, "Q": another}
    before = _fill(opening + end, filled | {"O": first_object})
    after = _fill(f"S {closing} to", filled | {"O": second_object})
    return Prompt(f"{before} {after}", f" {answer}", f" {subject}")


def subject_verb(rng: np.random.Generator) -> Prompt:
    """One prompt of subject-verb agreement, with another noun between the two."""
    subject, between = rng.choice(OBJECTS[:20], 2, replace=False)
    plural, distractor = rng.integers(2, size=2)
    where = rng.choice(["near", "behind", "under", "with"])
    text = f"The {_number(subject, plural)} {where} the {_number(between, distractor)}"
    verbs = [" is", " are"]
    return Prompt(text, verbs[plural], verbs[1 - plural])


def sentences(rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """Endless training sentences, each as a prompt and its rest."""
    while True:
        if rng.random() < 0.75:
            order = "ABBA" if rng.random() < 0.5 else "BABA"
            prompt = indirect_object(rng, order=order, held_out=False)
            yield prompt.text, f"{prompt.answer}."
        else:
            prompt = subject_verb(rng)
            yield prompt.text, f"{prompt.answer} {rng.choice(ADJECTIVES)}."


def repeated(rng: np.random.Generator, ids: np.ndarray, length: int) -> np.ndarray:
    """A random sequence of `length` different ids, twice."""
    once = rng.choice(ids, length, replace=False)
    return np.concatenate([once, once])


def words() -> list[str]:
    """Every word of the text, for the tokenizer."""
    clauses = (*STARTS, *EVENTS, *ACTS, *GIFTS, "Friends to")
    parts = {w.strip(",.") for clause in clauses for w in clause.split()}
    # Single letters other than "a" stand for names, places and objects.
    plain = {w for w in parts if len(w) > 1 or w == "a"}
    nouns = {_number(noun, plural) for noun in OBJECTS[:20] for plural in (0, 1)}
    others = {"The", "the", "is", "are", "near", "behind", "under", "with"}
    return sorted(plain | nouns | others | {*NAMES, *PLACES, *OBJECTS, *ADJECTIVES})


def _fill(clause: str, values: dict[str, str]) -> str:
    return " ".join(
        values.get(word.strip(",."), word.strip(",.")) + word[len(word.rstrip(",.")) :]
        for word in clause.split()
    )


def _number(noun: str, plural: int) -> str:
    if not plural:
        return noun
    return noun + ("es" if noun.endswith(("x", "ch")) else "s")
