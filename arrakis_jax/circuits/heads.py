"""A head by its layer and index, and the checks that tools of single heads share."""

from typing import Any

from arrakis_jax.core.axes import Array, Int
from arrakis_jax.core.checks import checked_layer
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.core.errors import expected
from arrakis_jax.nn.transformer import Transformer

Head = tuple[int | Int[Array, ""], int | Int[Array, ""]]
HeadIndex = tuple[Int[Array, ""], Int[Array, ""]]  # what a Head is inside of a compiled function

# What weights alone do not tell about heads: where they look, and the scales of their norms.
HEAD_FIELDS = ("pattern", "norm_attn_scale", "norm_attn_out_scale")


def checked_head(model: Transformer, head: Any, name: str = "head") -> tuple[Any, Any]:
    """A head as (layer, index), each counted from 0 or traced.

    Raises:
        ValueError: for what is not a pair.
        IndexError: if there is no such layer or head.
    """
    if not isinstance(head, tuple | list) or len(head) != 2:
        do = "name a head by its layer and its index"
        raise ValueError(expected(name, "(layer, head)", repr(head), do))
    config = model.config
    return (
        checked_layer(head[0], config.n_layers, name=f"{name}[0]"),
        checked_layer(head[1], config.n_heads, name=f"{name}[1]"),
    )


def check_linear(config: ModelConfig) -> None:
    """Raises unless the stream is a plain sum, and values are linear in it but for norms."""
    for name, value, fits in (
        ("norm_placement", config.norm_placement, not config.norms_stream),
        ("clip_qkv", config.clip_qkv, config.clip_qkv is None),
    ):
        if not fits:
            got = f"one with {name}={value!r}"
            do = "paths are not defined there; decompose by head"
            raise ValueError(expected("model", "one whose stream is a plain sum", got, do))


def check_bilinear(config: ModelConfig) -> None:
    """Raises unless scores are bilinear in the streams of query and key, but for norms."""
    if config.qk_norm is not None:
        got = f"one with qk_norm={config.qk_norm!r}"
        do = "use qk_matrices with the scales of a captured stream"
        must = "one whose scores are bilinear in the embeddings"
        raise ValueError(expected("model", must, got, do))
