"""What a ModelConfig must fulfil: the types of its fields, and demands on their values."""

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, NamedTuple, get_args

from arrakis_jax.core.errors import expected
from arrakis_jax.core.rope_scaling import RopeScaling, is_number

_TYPES = {
    int: "an int",
    float: "a finite number",
    bool: "True or False",
    tuple[bool, ...]: "a tuple of bools",
    RopeScaling: "a RopeScaling",
}
_MAY_BE_ZERO = (
    "n_layers", "d_mlp", "position_offset", "n_experts", "experts_per_token", "d_expert",
    "d_shared_expert",
)  # fmt: skip


def problems_of(config: Any) -> list[str]:
    """A message for everything that is wrong with a config."""
    # The demands compare numbers, so they can only be tested on fields of the right types.
    return list(_wrong_types(config)) or [
        expected(name, demand.must.format(c=config), repr(getattr(config, name)), demand.do)
        for demand in _DEMANDS
        for name in demand.names.split()
        if not demand.holds(config, getattr(config, name))
    ]


def _wrong_types(config: Any) -> Iterator[str]:
    for field in fields(config):
        value, types = getattr(config, field.name), get_args(field.type) or (field.type,)
        kind, optional = next((t for t in types if t in _TYPES), None), type(None) in types
        if kind is None or (optional and value is None):
            continue
        least = (0 if field.name in _MAY_BE_ZERO else 1) if kind is int else None
        if not _fits(value, kind) or (least is not None and value < least):
            must = _TYPES[kind] + ("" if least is None else f" >= {least}")
            must += " or None" if optional else ""
            yield expected(field.name, must, repr(value), "check it")


def _fits(value: Any, kind: Any) -> bool:
    if kind is float:
        return is_number(value)
    if kind == tuple[bool, ...]:
        return isinstance(value, tuple) and all(isinstance(v, bool) for v in value)
    # A bool is an int to Python, and never one here.
    return isinstance(value, kind) and (kind is not int or not isinstance(value, bool))


class _Demand(NamedTuple):
    """What the values of some fields must fulfil.

    Attributes:
        names: the fields.
        must: what they must be, for the message; `{c.field}` stands for another field's value.
        holds: whether a config and the value of one of the fields fulfil it.
        do: the remedy.
    """

    names: str
    must: str
    holds: Callable[[Any, Any], bool]
    do: str


def _choice(name: str, *values: str | None) -> _Demand:
    return _Demand(name, f"one of {values}", lambda c, v: v in values, "choose one")


def _scaling(prefix: str) -> tuple[_Demand, ...]:
    """The demands of the RoPE scaling in all layers, or in those with a window."""

    def of_kind(kind: str, test: Callable[[Any, RopeScaling], bool]) -> Callable[[Any, Any], bool]:
        def holds(config: Any, _: Any) -> bool:
            scaling = getattr(config, f"{prefix}rope_scaling")
            return scaling is None or scaling.kind != kind or test(config, scaling)

        return holds

    def one_factor_each(config: Any, scaling: RopeScaling) -> bool:
        lengths = {len(factors or ()) for factors in (scaling.short_factor, scaling.long_factor)}
        return lengths == {config.rotary_pairs}

    theta = f"{prefix}rope_theta"
    return (
        _Demand("rotary_dim", "more than 2 with dynamic scaling",
                of_kind("dynamic", lambda c, _: c.rotary_pairs > 1), "choose another scaling"),
        _Demand(theta, "more than 1 with yarn scaling",
                of_kind("yarn", lambda c, _: (getattr(c, theta) or 0) > 1), "correct it"),
        _Demand(f"{prefix}rope_scaling", "with {c.rotary_pairs} factors in each list",
                of_kind("longrope", one_factor_each), "give one for each pair"),
    )  # fmt: skip


def _even_rotary(c: Any, _: Any) -> bool:
    return c.positions != "rope" or (c.d_rotary % 2 == 0 and c.d_rotary <= c.d_head)


def _all_or_none(c: Any, n_experts: int) -> bool:
    sizes = (c.experts_per_token, c.d_expert)
    return all(sizes) if n_experts else not any((*sizes, c.d_shared_expert))


def _has_norm(c: Any, norm: str | None) -> bool:
    normed = c.norm_placement != "pre" or c.embed_norm or c.qk_norm is not None
    return norm is not None or not normed


_DEMANDS = (
    _Demand("rope_layers window_layers moe_layers", "None or {c.n_layers} bools",
            lambda c, v: v is None or len(v) == c.n_layers, "give one for each layer"),
    _Demand("n_heads", "a multiple of n_kv_heads={c.n_kv_heads}",
            lambda c, v: v % c.n_kv_heads == 0, "change one of them"),
    _choice("norm", "layernorm", "rmsnorm", None),
    _choice("norm_placement", "pre", "post", "both", "stream_before", "stream_after"),
    _choice("positions", "learned", "rope", "alibi", None),
    _choice("qk_norm", "head", "each_head", "all_heads", None),
    _choice("activation", "gelu", "gelu_tanh", "gelu_bloom", "quick_gelu", "silu", "relu",
            "identity"),
    _choice("dtype", "float32", "bfloat16", "float64"),
    _choice("stream_dtype", "bfloat16", None),
    _choice("matmul_precision", "highest", "high", "default"),
    _Demand("norm_eps", "a number >= 0 with a norm and None without",
            lambda c, v: (v is not None and v >= 0) == (c.norm is not None), "set both or neither"),
    _Demand("rope_theta", "set exactly with positions='rope'",
            lambda c, v: (c.positions == "rope") == (v is not None), "set both or neither"),
    _Demand("rope_scaling rotary_dim rope_layers window_rope_theta",
            "None without positions='rope'",
            lambda c, v: v is None or c.positions == "rope", "drop it"),
    _Demand("window_rope_scaling", "None without window_rope_theta",
            lambda c, v: v is None or c.window_rope_theta is not None, "drop it"),
    _Demand("window_layers window_rope_theta", "None without a window",
            lambda c, v: v is None or c.window is not None, "set both or neither"),
    _Demand("rope_theta window_rope_theta attention_softcap logit_softcap clip_qkv mlp_limit",
            "a number > 0 or None", lambda c, v: v is None or v > 0, "correct it"),
    # Without `rotary_dim` all of a head is rotated, so the message names `d_head`.
    _Demand("d_head", "even with RoPE, and at most d_head={c.d_head}",
            lambda c, v: c.rotary_dim is not None or _even_rotary(c, v), "change one of them"),
    _Demand("rotary_dim", "even with RoPE, and at most d_head={c.d_head}",
            lambda c, v: v is None or _even_rotary(c, v), "change one of them"),
    _Demand("position_offset", "0 without positions='learned'",
            lambda c, v: not v or c.positions == "learned", "drop it"),
    *_scaling(""),
    *_scaling("window_"),
    _Demand("falcon_alibi", "False without positions='alibi'",
            lambda c, v: not v or c.positions == "alibi", "drop it"),
    _Demand("shared_norm", "False without parallel",
            lambda c, v: not v or c.parallel, "set both or neither"),
    _Demand("norm_placement", "'pre' with parallel",
            lambda c, v: not c.parallel or v == "pre", "no other is supported"),
    _Demand("norm", "set where norms are asked for", _has_norm,
            "choose one, or drop norm_placement, embed_norm and qk_norm"),
    _Demand("n_experts",
            "set with experts_per_token and d_expert, or 0 with both 0 (and d_shared_expert)",
            _all_or_none, "set all or none"),
    _Demand("experts_per_token", "at most n_experts={c.n_experts}",
            lambda c, v: v <= c.n_experts, "change one of them"),
    _Demand("d_mlp", "positive if some layer has no experts, else 0",
            lambda c, v: not c.n_experts or (v > 0) != all(c.moe_layers or (True,)), "check it"),
    _Demand("moe_layers router_bias renormalise", "unset without n_experts",
            lambda c, v: not v or c.n_experts > 0, "drop it"),
    _Demand("norm_placement", "another one in a model without MLPs",
            lambda c, v: not c.norms_stream or c.any_mlp, "no other is supported"),
    _Demand("stream_dtype", "None with norm_placement={c.norm_placement!r}",
            lambda c, v: not v or not c.norms_stream,
            "its rounding would be no term of a decomposition"),
)  # fmt: skip
