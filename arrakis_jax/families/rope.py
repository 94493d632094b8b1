"""The rotary fields of Hugging Face configs, in every spelling.

A family takes `ROTARY_DEFAULTS` and `ROTARY_TYPES` into its own tables, and gives
`rope_arguments(hf)` to ModelConfig. A family that may rotate only a part of each head also has a
default for `partial_rotary_factor`; the others refuse any value but 1. Fields under other names are
`renamed` to these.
"""

import math
from collections.abc import Iterator
from typing import Any

from arrakis_jax.core.errors import expected
from arrakis_jax.core.rope_scaling import ROPE_SCALINGS, RopeScaling
from arrakis_jax.families.base import HUGE

# Hugging Face's own default of theta is 10000.
ORIGINAL = "original_max_position_embeddings"
ROTARY_DEFAULTS = {
    "rope_theta": 10000.0,
    "rope_parameters": None,
    "rope_scaling": None,
    ORIGINAL: None,
}
ROTARY_TYPES = {"rope_parameters": dict, "rope_scaling": dict, ORIGINAL: int}

# The entries that each type of RoPE must have, and those that it may have.
_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
}
_OPTIONAL = {
    "yarn": (
        "factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
        "truncate",
    ),
    "longrope": ("factor", "attention_factor"),
}  # fmt: skip
_OLD_NAMES = {"su": "longrope"}


def rope_arguments(hf: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and `rotary_dim` of a ModelConfig.

    Transformers 5 writes `rope_parameters`. Earlier versions write `rope_theta` and `rope_scaling`,
    which has its type under "rope_type" or "type". Where two spellings differ, this follows
    modeling_rope_utils.py.

    Args:
        hf: the values of a family's fields. The width of a head is `head_dim`, or where that is
            absent `hidden_size / num_attention_heads`.

    Raises:
        ValueError: for a type that is not supported, or a scaling that is not complete.
    """
    spelled = "rope_scaling" if hf["rope_scaling"] else "rope_parameters"
    entries = {k: v for k, v in (hf[spelled] or {}).items() if v is not None}
    old_kind = entries.pop("type", "default")
    kind = str(entries.pop("rope_type", old_kind))
    kind = _OLD_NAMES.get(kind, kind)
    theta = entries.pop("rope_theta", hf["rope_theta"])
    partial = entries.pop("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))
    trained = entries.get(ORIGINAL, hf["max_position_embeddings"])
    entries[ORIGINAL] = trained if hf[ORIGINAL] is None else hf[ORIGINAL]
    d_head = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    in_range = _positive(partial) and partial <= 1
    rotates_part = "partial_rotary_factor" in hf and in_range
    d_rotary = int(d_head * partial) if rotates_part else d_head

    wrong = []
    if not _positive(theta):
        wrong.append(("rope_theta", "a number > 0", theta, "correct it"))
    if "partial_rotary_factor" not in hf:
        if partial != 1:
            wrong.append(("partial_rotary_factor", "1", partial, "it is not supported"))
    elif not in_range:
        wrong.append(("partial_rotary_factor", "a number > 0 and <= 1", partial, "correct it"))
    wrong.extend(_wrong_entries(kind, entries, d_rotary // 2))
    if wrong:
        problems = (
            expected(f"{spelled}.{name}", must, repr(got), do) for name, must, got, do in wrong
        )
        raise ValueError("\n".join(problems))
    scaled = kind != "default"
    return {
        "rope_theta": float(theta),
        "rope_scaling": _scaling(kind, entries, hf["max_position_embeddings"]) if scaled else None,
        "rotary_dim": None if d_rotary == d_head else d_rotary,
    }


def _wrong_entries(
    kind: str, entries: dict[str, Any], n_pairs: int
) -> Iterator[tuple[str, str, Any, str]]:
    """The entries that do not fit this type of RoPE: name, what it must be, value, remedy."""
    if kind not in _NEEDED:
        yield "rope_type", f"one of {tuple(_NEEDED)}", kind, "others are not supported"
        return
    known = (*_NEEDED[kind], *_OPTIONAL.get(kind, ()), ORIGINAL)
    for name in dict.fromkeys((*_NEEDED[kind], *entries)):
        value, do = entries.get(name), "correct it" if name in entries else f"{kind} needs it"
        if name not in known:
            yield name, f"absent with rope_type {kind!r}", value, "remove it"
        elif must := _must(name, value, n_pairs):
            yield name, must, value, do


def _must(name: str, value: Any, n_pairs: int) -> str | None:
    """What an entry must be, or None if it is right."""
    if name == "truncate":
        return None if isinstance(value, bool) else "a bool"
    if name in ("short_factor", "long_factor"):
        right = isinstance(value, list) and len(value) == n_pairs and all(map(_positive, value))
        return None if right else f"a list of {n_pairs} numbers > 0"
    return None if _positive(value) else "a number > 0"


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < HUGE


def _scaling(kind: str, entries: dict[str, Any], longest: int) -> RopeScaling:
    """A complete scaling, with Hugging Face's defaults where the config leaves something out."""
    trained = entries[ORIGINAL]
    values = {"beta_fast": 32.0, "beta_slow": 1.0, "factor": longest / trained, **entries}
    # With dynamic scaling Hugging Face compares a text's length with the model's longest input,
    # not with the context of the first training.
    values["original_max_positions"] = longest if kind == "dynamic" else trained
    arguments: dict[str, Any] = {name: values[name] for name in ROPE_SCALINGS[kind]}
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    return RopeScaling(
        kind=kind,  # pyright: ignore[reportArgumentType]
        truncate=entries.get("truncate", True),
        attention_factor=_attention_factor(kind, entries, values["factor"], trained),
        **arguments,
    )


def _attention_factor(kind: str, entries: dict[str, Any], stretch: float, trained: int) -> float:
    """The factor on cosines and sines (Peng et al. 2023; Ding et al. 2024)."""
    if kind not in ("yarn", "longrope"):
        return 1.0
    if "attention_factor" in entries:
        return float(entries["attention_factor"])
    growth = math.log(max(stretch, 1))
    if kind == "longrope":
        return math.sqrt(1 + growth / math.log(trained))
    # Hugging Face uses the two factors only where a config has both.
    top, bottom = entries.get("mscale"), entries.get("mscale_all_dim")
    if top is None or bottom is None:
        top, bottom = 1.0, 0.0
    return (0.1 * top * growth + 1) / (0.1 * bottom * growth + 1)
