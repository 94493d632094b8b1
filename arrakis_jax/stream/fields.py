"""The names of the fields of a residual stream, and which of them a model lacks."""

from arrakis_jax.core.config import ModelConfig

# Fields without an L axis; the others have it first.
UNSTACKED = ("embed", "final", "norm_final_scale")
INPUT_FIELDS = ("tokens", "mask")
STREAM = ("embed", "resid_pre", "attn_out", "resid_mid", "mlp_out", "final")
SCALES = (
    "norm_attn_scale", "norm_attn_out_scale", "norm_mlp_scale", "norm_mlp_out_scale",
    "norm_q_scale", "norm_k_scale", "norm_final_scale",
)  # fmt: skip
MLP_FIELDS = ("mlp_out", "mlp_act", "norm_mlp_scale", "norm_mlp_out_scale")
MOE_FIELDS = ("shared_act", "router", "routing")
INTERNAL = ("q", "k", "v", "pattern", "z", "mlp_act", "shared_act", "router")
FIELDS = (*STREAM, *SCALES, *INTERNAL, "routing")
# Fields whose shape may differ between segments of layers, or that a segment may lack. In a model
# of several segments they are tuples, with one entry for each.
SEGMENTED = ("mlp_act", *MOE_FIELDS)
# Sites of edits, at which every query, key and value head, and the MLP, has its own copy of the
# stream that it reads, before its norm.
READERS = ("q_in", "k_in", "v_in", "mlp_in")
# The parts of the field "routing", and the site of each.
ROUTING_SITES = {"index": "routing_index", "weight": "routing_weight", "shared": "shared_gate"}


def lacking(config: ModelConfig) -> tuple[str, ...]:
    """The fields of a residual stream that a model of this config does not have."""
    # Names, and whether the model has them. A field is there only if all its rows say so.
    rules = (
        (MLP_FIELDS, config.any_mlp),
        (MOE_FIELDS, config.n_experts > 0),
        (("shared_act",), config.d_shared_expert > 0),
        (("resid_mid",), not config.parallel),
        (SCALES, config.norm is not None),
        (("norm_attn_scale", "norm_mlp_scale"), config.norms_inputs or config.norms_stream),
        (("norm_mlp_scale",), not config.shared_norm),
        (("norm_attn_out_scale", "norm_mlp_out_scale"), config.norms_outputs),
        (("norm_q_scale", "norm_k_scale"), config.qk_norm is not None),
        (("norm_final_scale",), config.final_norm),
    )
    absent = {name for names, present in rules if not present for name in names}
    return tuple(name for name in FIELDS if name in absent)
