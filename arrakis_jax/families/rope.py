"""The rotary fields of Hugging Face configs, in every spelling.

A family takes `DEFAULTS` and `TYPES` into its own, and gives `rope(hf)` to ModelConfig. One that
may rotate only a part of each head also has a default for `partial_rotary_factor`; for the others
any value but 1 is refused. Fields under other names are `renamed` to these.
"""

import math
from collections.abc import Mapping
from typing import Any

from arrakis_jax.core.config import ROPE_SCALINGS, RopeScaling
from arrakis_jax.core.errors import expected
from arrakis_jax.families.base import HUGE

# The fields, as part of a family's defaults; Hugging Face's own default of theta is 10000.
ORIGINAL = "original_max_position_embeddings"
DEFAULTS = {"rope_theta": 10000.0, "rope_parameters": None, "rope_scaling": None, ORIGINAL: None}
TYPES = {"rope_parameters": dict, "rope_scaling": dict, ORIGINAL: int}

# What each type of RoPE needs, and what it may have besides.
NEEDED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
}
OPTIONAL = {
    "yarn": (
        "factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
        "truncate",
    ),
    "longrope": ("factor", "attention_factor"),
}  # fmt: skip
RENAMED = {"su": "longrope"}


def rope(hf: dict[str, Any], renamed: Mapping[str, str] = RENAMED) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and `rotary_dim` of a ModelConfig.

    Transformers 5 writes `rope_parameters`; earlier versions `rope_theta` and `rope_scaling`, whose
    type is under "rope_type" or "type". They are ranked as in modeling_rope_utils.py.

    Args:
        hf: the values of a family's fields. The width of a head is `head_dim`, or where that is
            absent `hidden_size / num_attention_heads`.
        renamed: old names of types.

    Raises:
        ValueError: for a type that is not supported, or a scaling that is not complete.
    """
    spelled = "rope_scaling" if hf["rope_scaling"] else "rope_parameters"
    given = {k: v for k, v in (hf[spelled] or {}).items() if v is not None}
    old_kind = given.pop("type", "default")
    kind = str(given.pop("rope_type", old_kind))
    kind = renamed.get(kind, kind)
    theta = given.pop("rope_theta", hf["rope_theta"])
    partial = given.pop("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))
    trained = given.get(ORIGINAL, hf["max_position_embeddings"])
    given[ORIGINAL] = trained if hf[ORIGINAL] is None else hf[ORIGINAL]
    d_head = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    d_rotary = d_head
    problems = []

    def demand(condition: bool, name: str, must: str, got: Any, do: str = "correct it"):
        if not condition:
            problems.append(expected(f"{spelled}.{name}", must, repr(got), do))

    demand(_positive(theta), "rope_theta", "a number > 0", theta)
    if "partial_rotary_factor" not in hf:
        demand(partial == 1, "partial_rotary_factor", "1", partial, "it is not supported")
    elif _positive(partial) and partial <= 1:
        d_rotary = int(d_head * partial)
    else:
        demand(False, "partial_rotary_factor", "a number > 0 and <= 1", partial)
    if kind in NEEDED:
        known = (*NEEDED[kind], *OPTIONAL.get(kind, ()), ORIGINAL)
        for name in dict.fromkeys((*NEEDED[kind], *given)):
            value, do = given.get(name), "correct it" if name in given else f"{kind} needs it"
            if name not in known:
                demand(False, name, f"absent with rope_type {kind!r}", value, "remove it")
            elif must := _must(name, value, d_rotary // 2):
                demand(False, name, must, value, do)
    else:
        demand(False, "rope_type", f"one of {tuple(NEEDED)}", kind, "others are not supported")
    if problems:
        raise ValueError("\n".join(problems))
    return {
        "rope_theta": float(theta),
        "rope_scaling": None
        if kind == "default"
        else _scaling(kind, given, hf["max_position_embeddings"]),
        "rotary_dim": None if d_rotary == d_head else d_rotary,
    }


def _must(name: str, value: Any, n_pairs: int) -> str | None:
    """What a value of a rotary dict must be, if it is not."""
    if name == "truncate":
        return None if isinstance(value, bool) else "a bool"
    if name in ("short_factor", "long_factor"):
        right = isinstance(value, list) and len(value) == n_pairs and all(map(_positive, value))
        return None if right else f"a list of {n_pairs} numbers > 0"
    return None if _positive(value) else "a number > 0"


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < HUGE


def _scaling(kind: str, given: dict[str, Any], longest: int) -> RopeScaling:
    """A complete scaling, with Hugging Face's defaults where the config leaves something out."""
    trained = given[ORIGINAL]
    values = {"beta_fast": 32.0, "beta_slow": 1.0, "factor": longest / trained, **given}
    values["original_max_positions"] = longest if kind == "dynamic" else trained
    arguments: dict[str, Any] = {name: values[name] for name in ROPE_SCALINGS[kind]}
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    arguments["kind"] = kind
    arguments["truncate"] = given.get("truncate", True)
    arguments["attention_factor"] = _attention_factor(kind, given, values["factor"], trained)
    return RopeScaling(**arguments)


def _attention_factor(kind: str, given: dict[str, Any], stretch: float, trained: int) -> float:
    """What cosines and sines are multiplied by (Peng et al. 2023; Ding et al. 2024)."""
    if kind not in ("yarn", "longrope"):
        return 1.0
    if "attention_factor" in given:
        return float(given["attention_factor"])
    growth = math.log(max(stretch, 1))
    if kind == "longrope":
        return math.sqrt(1 + growth / math.log(trained))
    top, bottom = given.get("mscale"), given.get("mscale_all_dim")
    if top is None or bottom is None:
        top, bottom = 1.0, 0.0
    return (0.1 * top * growth + 1) / (0.1 * bottom * growth + 1)
