"""The rotary fields of Hugging Face configs, in every spelling."""

from typing import Any

from arrakis_jax.config import RopeScaling
from arrakis_jax.errors import expected

# The fields, as part of a family's defaults; Hugging Face's own default of theta is 10000.
DEFAULTS = {
    "rope_theta": 10000.0,
    "rope_parameters": None,
    "rope_scaling": None,
    "original_max_position_embeddings": None,
}
TYPES = {
    "rope_parameters": dict,
    "rope_scaling": dict,
    "original_max_position_embeddings": int,
}
SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_positions",
}


def rope(hf: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a ModelConfig.

    Transformers 5 writes `rope_parameters`; earlier versions `rope_theta` and `rope_scaling`, whose
    type is under "rope_type" or "type". They are ranked as in modeling_rope_utils.py.

    Raises:
        ValueError: for a scaling that is not supported, or not complete.
    """
    spelled = "rope_scaling" if hf["rope_scaling"] else "rope_parameters"
    given = {k: v for k, v in (hf[spelled] or {}).items() if v is not None}
    old_kind = given.pop("type", "default")
    kind = given.pop("rope_type", old_kind)
    theta = given.pop("rope_theta", hf["rope_theta"])
    problems = []

    def demand(condition: bool, name: str, must: str, got: Any, do: str):
        if not condition:
            problems.append(expected(f"{spelled}.{name}", must, repr(got), do))

    demand(_positive(theta), "rope_theta", "a number > 0", theta, "correct it")
    partial = given.pop("partial_rotary_factor", 1.0)
    demand(partial == 1, "partial_rotary_factor", "1", partial, "it is not supported")
    demand(kind in ("default", "llama3"), "rope_type", "'default' or 'llama3'", kind,
           "other scalings of the rotary frequencies are not supported")  # fmt: skip
    scaling = None
    if kind == "llama3":
        trained = hf["original_max_position_embeddings"]
        if trained is None:
            trained = given.get("original_max_position_embeddings", hf["max_position_embeddings"])
        given["original_max_position_embeddings"] = trained
        wrong = [name for name in SCALING if not _positive(given.get(name))]
        for name in wrong:
            demand(False, name, "a number > 0", given.get(name), "llama3 needs it")
        if not wrong:
            scaling = RopeScaling(**{ours: given[name] for name, ours in SCALING.items()})
    if kind in ("default", "llama3"):
        used = SCALING if kind == "llama3" else ("original_max_position_embeddings",)
        for name in given.keys() - set(used):
            demand(False, name, f"absent with rope_type {kind!r}", given[name], "remove it")
    if problems:
        raise ValueError("\n".join(problems))
    return {"rope_theta": float(theta), "rope_scaling": scaling}


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
