"""RoPE's base and scaling from a Hugging Face config, in the v5 and in the older spellings."""

from typing import Any

from arrakis_jax.config import RopeScaling
from arrakis_jax.errors import CheckpointError, expected

TYPES = ("default", "llama3")
_LLAMA3 = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_positions",
}


def rope(hf: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a ModelConfig.

    v5 configs hold `rope_parameters {rope_type, rope_theta, ...}`; older ones `rope_theta` and
    `rope_scaling {"rope_type" or "type", ...}`.
    """
    found = {**(hf["rope_scaling"] or {}), **(hf["rope_parameters"] or {})}
    kind = found.pop("rope_type", found.pop("type", "default"))
    found.pop("type", None)
    theta = found.pop("rope_theta", hf["rope_theta"])
    wanted = _LLAMA3 if kind == "llama3" else {}
    if kind not in TYPES:
        do = "other scalings are not implemented"
        raise CheckpointError(expected("rope_type", f"one of {TYPES}", repr(kind), do))
    found = {name: value for name, value in found.items() if value is not None}
    if kind == "llama3" and "original_max_position_embeddings" not in found:
        found["original_max_position_embeddings"] = hf["max_position_embeddings"]
    if set(found) != set(wanted):
        do = "see the fields of this rope_type in Hugging Face's modeling_rope_utils"
        got = f"{tuple(sorted(found))}"
        raise CheckpointError(expected("rope_parameters", f"{tuple(sorted(wanted))}", got, do))
    scaling = (
        RopeScaling(**{ours: found[name] for name, ours in wanted.items()}) if wanted else None
    )
    return {"rope_theta": float(theta), "rope_scaling": scaling}
