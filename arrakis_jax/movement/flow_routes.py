"""The routes along which information flows to a prediction: the important edges of a graph."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.core.axes import Array, Bool, Float, Int
from arrakis_jax.core.checks import Ids, Mask, Tokens, checked_position
from arrakis_jax.core.errors import expected
from arrakis_jax.core.numerics import ratio
from arrakis_jax.forward.run import compiled
from arrakis_jax.forward.source import Source, source_of
from arrakis_jax.frozen.attention import BROUGHT_FIELDS, attention_brought
from arrakis_jax.movement.contributions import brought_nearness, nearness
from arrakis_jax.nn.transformer import Layer, Transformer
from arrakis_jax.results.record import ABSENT, Record
from arrakis_jax.stream.residuals import ModelOutput, ResidualStream


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class FlowRoutes(Record):
    """The important edges into every position of every layer, and those that lead to one of them.

    Importances of the edges of one step into one position sum to 1 (attention's with its residual
    edge; the MLP's with its own; in a parallel block all in one step), or all are zero where no
    part points the way of the sum. Zero at padding.

    Attributes:
        weight: `[L,B,T,k]`, the k most important edges of attention into T, largest first.
        source: `[L,B,T,k]`, the column that each comes from.
        head: `[L,B,T,k]`, through which head.
        residual_attn: `[L,B,T]`, importance of the stream that attention adds to.
        mlp: `[L,B,T]`, that of the MLP's output; None in a model without MLPs.
        residual_mlp: `[L,B,T]`, that of the stream that the MLP adds to; None without MLPs and in
            parallel blocks.
        kept: `[L,B,T,k]`, which edges lead to the position asked for, over edges above the
            threshold alone.
        kept_residual_attn: `[L,B,T]`, likewise.
        kept_mlp: `[L,B,T]`, likewise.
        kept_residual_mlp: `[L,B,T]`, likewise.
        inputs: `[B,T]`, the tokens from which a route leads there.
        edge_count: `[B]`, how many edges are kept.
        column: `[B]`, the column of the position asked for.
    """

    weight: Float[Array, "L B T k"]
    source: Int[Array, "L B T k"]
    head: Int[Array, "L B T k"]
    residual_attn: Float[Array, "L B T"]
    mlp: Float[Array, "L B T"] = ABSENT
    residual_mlp: Float[Array, "L B T"] = ABSENT
    kept: Bool[Array, "L B T k"]
    kept_residual_attn: Bool[Array, "L B T"]
    kept_mlp: Bool[Array, "L B T"] = ABSENT
    kept_residual_mlp: Bool[Array, "L B T"] = ABSENT
    inputs: Bool[Array, "B T"]
    edge_count: Int[Array, " B"]
    column: Int[Array, " B"]

    def graph(self, b: int) -> Any:
        """The kept edges of example `b` as a `networkx.MultiDiGraph`, on the host.

        Nodes are `("embed", column)`, `("resid_mid", layer, column)`, `("mlp", layer, column)` and
        `("resid_post", layer, column)`; a block that is parallel or has no MLP has no resid_mid.
        Edges point to the prediction and have `weight`, `kind` ("attn", "residual", "mlp", or
        "read" from the stream to an MLP, of weight 1), `layer` and `head` (None unless "attn").
        """
        import networkx

        graph: Any = networkx.MultiDiGraph()
        n_layers, n = self.weight.shape[:2]
        if not -n <= b < n:
            raise IndexError(expected("b", f"in [{-n}, {n})", b, f"the batch has {n} examples"))
        halves = self.residual_mlp is not None
        mid = "resid_mid" if halves else "resid_post"

        def before(layer: int, t: int) -> tuple:
            return ("resid_post", layer - 1, t) if layer else ("embed", t)

        def add(a: tuple, to: tuple, weight: Any, kind: str, layer: int, head: Any = None) -> None:
            # Several heads may join the same nodes: the key tells their edges apart.
            facts = {"weight": float(weight), "kind": kind, "layer": layer, "head": head}
            graph.add_edge(a, to, key=(kind, head), **facts)

        def edges(name: str, kept: str) -> Any:
            if getattr(self, name) is None:
                return
            weight, wanted = (np.asarray(getattr(self, x)[:, b]) for x in (name, kept))
            # An index is (layer, column), and for attention the edge's rank.
            for index in np.argwhere(wanted).tolist():
                yield (*index[:2], tuple(index), weight[tuple(index)])

        graph.add_node(before(n_layers, int(self.column[b])))
        source, head = np.asarray(self.source[:, b]), np.asarray(self.head[:, b])
        for layer, t, at, weight in edges("weight", "kept"):
            start = before(layer, int(source[at]))
            add(start, (mid, layer, t), weight, "attn", layer, int(head[at]))
        for layer, t, _, weight in edges("residual_attn", "kept_residual_attn"):
            add(before(layer, t), (mid, layer, t), weight, "residual", layer)
        # An MLP is a node of its own; a parallel one reads the stream before the block.
        for layer, t, _, weight in edges("mlp", "kept_mlp"):
            start, node = (mid, layer, t) if halves else before(layer, t), ("mlp", layer, t)
            add(start, node, 1, "read", layer)
            add(node, ("resid_post", layer, t), weight, "mlp", layer)
        for layer, t, _, weight in edges("residual_mlp", "kept_residual_mlp"):
            add((mid, layer, t), ("resid_post", layer, t), weight, "residual", layer)
        return graph


def flow_routes(
    model: Transformer,
    tokens: Tokens | ResidualStream | ModelOutput,
    position: Ids = -1,
    threshold: float = 0.04,
    *,
    mask: Mask | None = None,
    check: bool = False,
) -> FlowRoutes:
    """Information flow routes: the subgraph of important edges that leads to a prediction.

    The stream after attention at i is a sum of parts: what each head brings from each position,
    `A^h_ij v^h_j W_O^h`, and the stream `x_i` itself. A part's importance is
    `max(0, |y|_1 - |y - part|_1)` over the sum of these. Here y is the stream after attention with
    its biases, which are in no part. The stream after the MLP has two parts: the MLP's output and
    the stream that it is added to. From the end of the last layer at `position`, edges above the
    threshold are followed back to the input.

    Our choices: parts are as written to the stream, through norms of the output with scales as
    they were. Norms on the stream itself map the parts, with scales as they were, and a norm's bias
    is in no part. In parallel blocks heads, MLP and stream are parts of one step, and the MLP reads
    the stream before the block. Heads are not summed.

    Args:
        model: the transformer.
        tokens: `[B,T]` token ids, or a stream captured with "all", then not run again.
        position: of the prediction, counted in real tokens (-1 is each row's last): an int or
            `[B]`.
        threshold: in [0, 1]; edges must be more important. At most `1 / threshold` edges into a
            position can be: k is that, rounded up to a power of two. With 0 all edges are held.
        mask: `[B,T]`, with token ids.
        check: also check the values of arrays that are on an accelerator.

    Returns:
        FlowRoutes, padded arrays for the whole batch; `.graph(b)` is one example's graph.

    Raises:
        ValueError: for a threshold outside of [0, 1].
        NotCapturedError: if a stream is given that lacks a field.

    Example:
        >>> model, tokenizer = demo_model()
        >>> tokens, mask = encode(tokenizer, ["Alice and Tom", "Lucy"])
        >>> routes = flow_routes(model, tokens, mask=mask)
        >>> routes.weight.shape, bool((routes.edge_count > 0).all())
        ((4, 2, 4, 16), True)
        >>> ("resid_post", 3, 3) in routes.graph(0)
        True

    Reference:
        Ferrando & Voita 2024, Information Flow Routes, section 2.
    """
    source = source_of(model, tokens, mask, check=check, batch=True)
    n_rows, length = source.shape
    position = checked_position(position, n_rows, source.mask, length)
    edges = _most_edges(threshold, length * model.config.n_heads)
    # The level is traced: only k, the number of edges, decides shapes and programs.
    level = np.asarray(threshold, model.config.acc)
    return _routes(model, source, position, level, edges=edges)


def _most_edges(threshold: Any, edges: int) -> int:
    """How many of one position's edges may be above the threshold: the static k of the result.

    Importances into a position sum to at most 1, so that fewer than `1 / threshold` exceed it.
    Rounded up to a power of two, so that similar thresholds share a program.
    """
    number = isinstance(threshold, int | float | np.number) and not isinstance(threshold, bool)
    if not number or not 0 <= threshold <= 1:
        do = "it decides the result's shape, so it must be known before tracing"
        raise ValueError(expected("threshold", "a number in [0, 1]", repr(threshold), do))
    if threshold * edges <= 1:
        return edges
    return min(edges, 2 ** (ceil(1 / float(threshold)) - 1).bit_length())


class LayerEdges(NamedTuple):
    """Importances of the edges into the positions of a layer, or which of these edges are kept."""

    attn: Array
    residual_attn: Array
    mlp: Any = None
    residual_mlp: Any = None
    source: Any = None
    head: Any = None


@compiled("edges")
def _routes(
    model: Transformer,
    source: Source,
    position: Int[Array, " B"],
    threshold: np.ndarray,
    *,
    edges: int,
) -> FlowRoutes:
    config = model.config
    fields = (*BROUGHT_FIELDS, "mlp_out", "final")
    fields = (*fields, "norm_mlp_scale") if config.norms_stream else fields
    _, walked = source.over_layers(
        model, fields, None, lambda _, layer: (None, _edges(model, layer, edges))
    )
    all_edges: LayerEdges = walked.found
    padding = source.padding
    index, exists = padding.columns(position[:, None])
    end = (jnp.arange(padding.real.shape[1])[None] == index) & exists

    def back(reached: Array, layer: LayerEdges) -> tuple[Array, LayerEdges]:
        return _followed(reached, layer, threshold, config.parallel)

    # The graph is a few masks, so it is followed through all positions at once, layer by layer.
    inputs, kept = jax.lax.scan(back, end, all_edges, reverse=True)
    # Edges of all kinds of an example: every axis but the batch is summed over.
    counts = [x.sum(tuple(i for i in range(x.ndim) if i != 1)) for x in jax.tree.leaves(kept)]
    return FlowRoutes(
        weight=all_edges.attn,
        source=all_edges.source,
        head=all_edges.head,
        residual_attn=all_edges.residual_attn,
        mlp=all_edges.mlp,
        residual_mlp=all_edges.residual_mlp,
        kept=kept.attn,
        kept_residual_attn=kept.residual_attn,
        kept_mlp=kept.mlp,
        kept_residual_mlp=kept.residual_mlp,
        inputs=inputs,
        edge_count=jnp.stack(counts).sum(0),
        column=index[:, 0],
    )


def _edges(model: Transformer, layer: Layer, k: int) -> LayerEdges:
    """A layer's edges, of attention the k most important into each position."""
    config, stream = model.config, layer.stream
    brought = attention_brought(model, layer)
    mlp_BTD = None if stream.mlp_out is None else stream.mlp_out.astype(config.acc)
    # In a parallel block heads, MLP and stream add up in one step, and share one total.
    together = config.parallel and mlp_BTD is not None
    whole_BTD = layer.resid_post.astype(config.acc) if together else brought.total
    attn_BTSH = brought_nearness(brought, whole_BTD, by_head=True)
    residual_BT = nearness(brought.own, whole_BTD)
    total_BT = attn_BTSH.sum((-2, -1)) + residual_BT
    mlp_BT = residual_mlp_BT = None
    if mlp_BTD is not None and config.parallel:
        mlp_BT = nearness(mlp_BTD, whole_BTD)
        total_BT = total_BT + mlp_BT
        mlp_BT = ratio(mlp_BT, total_BT)
    elif mlp_BTD is not None:
        mlp_BT, residual_mlp_BT = _mlp_step(model, layer, mlp_BTD)
    # The largest are taken before the division by the total, which is the same for all.
    weight, index = jax.lax.top_k(attn_BTSH.reshape(*total_BT.shape, -1), k)
    source, head = jnp.divmod(index, config.n_heads)
    weight, residual_BT = ratio(weight, total_BT[..., None]), ratio(residual_BT, total_BT)
    return LayerEdges(weight, residual_BT, mlp_BT, residual_mlp_BT, source, head)


def _mlp_step(model: Transformer, layer: Layer, mlp_BTD: Array) -> tuple[Array, Array]:
    """Importances of the MLP's output and of what it is added to."""
    config, stream, norm = model.config, layer.stream, layer.block.norm_mlp
    own_BTD = stream.resid_mid.astype(config.acc)
    if config.norms_stream:  # the MLP adds to the normed stream, or its sum is normed
        assert norm is not None
        own_BTD = norm.linear(own_BTD) / stream.norm_mlp_scale[..., None]
        if config.norm_placement == "stream_after":
            mlp_BTD = norm.linear(mlp_BTD) / stream.norm_mlp_scale[..., None]
    whole_BTD = layer.resid_post.astype(config.acc)
    mlp_BT, own_BT = nearness(mlp_BTD, whole_BTD), nearness(own_BTD, whole_BTD)
    return ratio(mlp_BT, mlp_BT + own_BT), ratio(own_BT, mlp_BT + own_BT)


def _followed(
    reached: Bool[Array, "B T"], layer: LayerEdges, threshold: np.ndarray, parallel: bool
) -> tuple[Bool[Array, "B T"], LayerEdges]:
    """From the positions reached after a layer, those before it, and the edges between."""
    kept_mlp = kept_residual = None
    mid = reached  # where the layer has one step, its middle is its end
    if layer.mlp is not None:
        kept_mlp = reached & (layer.mlp > threshold)
    if layer.residual_mlp is not None:
        kept_residual = reached & (layer.residual_mlp > threshold)
        mid = kept_mlp | kept_residual
    attn = mid[..., None] & (layer.attn > threshold)
    residual = mid & (layer.residual_attn > threshold)
    # A source is reached by any of its kept edges; as a scatter, no `[B,T,S]` mask is made.
    rows = jnp.arange(reached.shape[0])[:, None, None]
    hits = jnp.zeros(reached.shape, jnp.int32).at[rows, layer.source].max(attn.astype(jnp.int32))
    before = residual | (hits > 0)
    if parallel and kept_mlp is not None:
        before = before | kept_mlp
    return before, LayerEdges(attn, residual, kept_mlp, kept_residual)
