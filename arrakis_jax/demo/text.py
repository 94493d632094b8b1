"""The text that the shipped model is trained on: seeded, made from short lists.

Indirect-object sentences, subject-verb agreement, and repeated random sequences. A fifth of the
pairs of names, and whole opening and closing clauses, are held out of training.
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
OPENINGS = (
    "When N and M went to the P,",
    "When N and M arrived at the P,",
    "After N and M went to the P,",
    "After N and M left the P,",
    "While N and M were at the P,",
    "While N and M were working at the P,",
    "As N and M walked to the P,",
    "Once N and M were at the P,",
    "Because N and M met at the P,",
    "Then, N and M went to the P.",
    "Then, N and M had a long day at the P.",
    "One day N and M walked to the P.",
    "Yesterday N and M met near the P.",
    "N and M were working at the P.",
    "N and M went to the P and then to the Q.",
    "Friends N and M found a O at the P.",
    "It was late when N and M left the P.",
    "The P was old, but N and M went to the P.",
)
HELD_OUT_OPENINGS = (
    "After N and M arrived at the P,",
    "Then, N and M met near the P.",
    "While N and M walked to the P,",
    "One day N and M were working at the P.",
    "Yesterday N and M left the P and then the Q.",
)
# S is the name mentioned again; the other one follows.
CLOSINGS = (
    "S gave a O to",
    "S gave the O to",
    "S handed a O to",
    "S passed the O to",
    "S wanted to give a O to",
    "S wanted to show the O to",
    "S decided to pass a O to",
    "S decided to offer the O to",
    "S sent a O to",
    "S showed the O to",
    "S said a few words to",
    "S brought a new O to",
    "S happily gave the old O to",
)
HELD_OUT_CLOSINGS = (
    "S wanted to pass the O to",
    "S decided to give a O to",
    "S handed the O to",
    "S happily sent a new O to",
)


@dataclass(frozen=True)
class Prompt:
    """A text, the token that follows (with its space), and the name that does not."""

    text: str
    answer: str
    other: str


def is_held_out(first: str, second: str) -> bool:
    """Whether this unordered pair of names is kept out of training: a fifth are."""
    return zlib.crc32(" ".join(sorted((first, second))).encode()) % 5 == 0


def indirect_object(rng: np.random.Generator, *, order: str, held_out: bool) -> Prompt:
    """One indirect-object prompt.

    Args:
        rng: where randomness comes from.
        order: "ABBA" (the second name is repeated) or "BABA" (the first is).
        held_out: with a pair of names, an opening and a closing never seen in training.
    """
    while True:
        first, second = rng.choice(NAMES, 2, replace=False)
        if is_held_out(first, second) == held_out:
            break
    subject, answer = (second, first) if order == "ABBA" else (first, second)
    opening = rng.choice(HELD_OUT_OPENINGS if held_out else OPENINGS)
    closing = rng.choice(HELD_OUT_CLOSINGS if held_out else CLOSINGS)
    place, another = rng.choice(PLACES, 2, replace=False)
    found, given = rng.choice(OBJECTS, 2, replace=False)
    filled = {"N": first, "M": second, "S": subject, "P": place, "Q": another}
    text = f"{_fill(opening, filled | {'O': found})} {_fill(closing, filled | {'O': given})}"
    return Prompt(text, f" {answer}", f" {subject}")


def agreement(rng: np.random.Generator) -> Prompt:
    """One subject-verb agreement prompt, with a noun of either number in between."""
    subject, between = rng.choice(OBJECTS[:20], 2, replace=False)
    plural, distractor = rng.integers(2, size=2)
    where = rng.choice(["near", "behind", "under", "with"])
    text = f"The {_number(subject, plural)} {where} the {_number(between, distractor)}"
    verbs = [" is", " are"]
    return Prompt(text, verbs[plural], verbs[1 - plural])


def sentences(rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """Training sentences without end, as a prompt and its rest."""
    while True:
        if rng.random() < 0.75:
            order = "ABBA" if rng.random() < 0.5 else "BABA"
            prompt = indirect_object(rng, order=order, held_out=False)
            yield prompt.text, f"{prompt.answer}."
        else:
            prompt = agreement(rng)
            yield prompt.text, f"{prompt.answer} {rng.choice(ADJECTIVES)}."


def repeated(rng: np.random.Generator, ids: np.ndarray, length: int) -> np.ndarray:
    """A random sequence of `length` different ids, twice."""
    once = rng.choice(ids, length, replace=False)
    return np.concatenate([once, once])


def words() -> list[str]:
    """Every word of the text, for the tokenizer."""
    clauses = (*OPENINGS, *HELD_OUT_OPENINGS, *CLOSINGS, *HELD_OUT_CLOSINGS)
    found = {w.strip(",.") for clause in clauses for w in clause.split()}
    plain = {w for w in found if len(w) > 1 or w == "a"}
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
