"""A logit as the sum over every path through heads."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from arrakis_jax.circuits.heads import HEAD_FIELDS, Head, check_linear
from arrakis_jax.circuits.matrices import ov_matrices
from arrakis_jax.core.axes import Array, Float, Int, over
from arrakis_jax.core.checks import Ids, Mask, Tokens, checked_ids, checked_position
from arrakis_jax.core.errors import expected
from arrakis_jax.core.numerics import contract, ratio
from arrakis_jax.forward.run import compiled
from arrakis_jax.forward.source import Source, source_of
from arrakis_jax.frozen.reads import logit_direction, logit_reader
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.nn.walk import Place, walk
from arrakis_jax.results.ranking import Top, top
from arrakis_jax.results.record import ABSENT, Record
from arrakis_jax.stream.padding import Padding
from arrakis_jax.stream.residuals import ModelOutput, ResidualStream

_FIELDS = (*HEAD_FIELDS, "embed", "mlp_out", "final", "norm_final_scale")


class Path(NamedTuple):
    """One path from the start of the stream to a logit.

    Attributes:
        source: where it starts: "embed", "pos", "bias" or "mlp".
        heads: the heads it runs through, `(layer, head)` each, first to last.
    """

    source: str
    heads: tuple[Head, ...] = ()

    def __str__(self) -> str:
        return " > ".join((self.source, *(f"L{layer} head {head}" for layer, head in self.heads)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class PathTerms(Record):
    """The share of every path in a logit or logit difference, in logits.

    C counts where paths start: `sources`. "embed" is the tokens' embeddings, "pos" those of learned
    positions, "bias" is what is constant (biases of values, outputs and norms), "mlp" the MLPs'
    outputs. A path starts at the last of these that it meets, and runs through heads' patterns and
    OV matrices.

    Attributes:
        direct: `[C,B]`, what reaches the logit through no head.
        heads: `[L,C,H,B]`, through one head.
        virtual: `[C,H,H,B]`, through a head of layer 0, then one of layer 1; None without both.
        constant: `[B]`, of the final norm's bias and the unembedding's.
        logit: `[B]`, the model's logit or logit difference, before a soft-cap.
        gap: `[B]`, `|sum(terms) + constant - logit|` over the sum of absolute terms.
        sources: the names of C.
    """

    direct: Float[Array, "C B"]
    heads: Float[Array, "L C H B"]
    virtual: Float[Array, "C H H B"] = ABSENT
    constant: Float[Array, " B"]
    logit: Float[Array, " B"]
    gap: Float[Array, " B"]
    sources: tuple[str, ...] = field(metadata={"static": True})

    @property
    def terms(self) -> Float[Array, "N B"]:
        """All N paths in the order of `labels`."""
        parts = [self.direct, self.heads] + ([] if self.virtual is None else [self.virtual])
        return jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in parts])

    @property
    def labels(self) -> tuple[Path, ...]:
        """What each of `terms` is."""
        n_layers, _, n_heads, _ = self.heads.shape
        single = [
            Path(source, ((layer, head),))
            for layer in range(n_layers)
            for source in self.sources
            for head in range(n_heads)
        ]
        double = [
            Path(source, ((0, first), (1, second)))
            for source in self.sources
            for first in range(n_heads)
            for second in range(n_heads)
        ]
        return (*map(Path, self.sources), *single, *(() if self.virtual is None else double))

    def top(self, k: int) -> Top:
        """The k paths of largest absolute value: their values and indices, `[k,B]` each."""
        return top(self.terms, k)


def path_expansion(
    model: Transformer,
    tokens: Tokens | ResidualStream | ModelOutput,
    targets: Ids,
    *,
    against: Ids | None = None,
    position: int | Array = -1,
    mask: Mask | None = None,
    check: bool = False,
) -> PathTerms:
    """A logit of a model of up to two layers as the sum over all paths through its heads.

    `logit = x r + sum_h A_h x W_OV^h r + sum_{h1,h2} A_h2 A_h1 x W_OV^h1 W_OV^h2 r + constant`,
    over sources x and heads of both layers, with r the direction that the logit reads. Patterns
    and the scales of norms are those of this forward. The terms plus the constant equal the
    model's logit.

    An MLP's output is a source, and is not taken apart. Factors on the logits are included; a
    soft-cap is not.

    Args:
        model: a transformer of at most two layers.
        tokens: `[B,T]` token ids, or a captured stream (pattern, embed, mlp_out, final and the
            scales of norms).
        targets: token ids, an int or `[B]`.
        against: token ids whose logit is subtracted, or None.
        position: counted in real tokens (-1 is each row's last): an int or `[B]`.
        mask: `[B,T]`, with token ids.
        check: also check the values of arrays that are on an accelerator.

    Returns:
        PathTerms: `.direct [C,B]`, `.heads [L,C,H,B]`, `.virtual [C,H,H,B]`.

    Raises:
        ValueError: for a model of more layers, with norms on the stream itself, or `clip_qkv`.

    Example:
        >>> config = config_for("gpt2", n_layer=2, n_embd=16, n_head=2, vocab_size=11)
        >>> model = Transformer(config, rngs=nnx.Rngs(0))
        >>> paths = path_expansion(model, jnp.arange(6)[None], 3, against=5)
        >>> paths.virtual.shape, str(paths.labels[-1]), bool(paths.gap.max() < 1e-5)
        ((4, 2, 2, 1), 'mlp > L0 head 1 > L1 head 1', True)

    Reference:
        Elhage et al. 2021, "The Path Expansion Trick", "Two-Layer Attention-Only Transformers".
    """
    config = model.config
    if config.n_layers > 2:
        do = "decompose by head and by source, which work at any depth"
        raise ValueError(expected("model", "of at most 2 layers", config.n_layers, do))
    check_linear(config)
    source = source_of(model, tokens, mask, check=check, batch=True)
    n_rows, length = source.shape
    position = checked_position(position, n_rows, source.mask, length)
    targets = checked_ids(config, targets, (n_rows,), check=check)
    if against is not None:
        against = checked_ids(config, against, (n_rows,), name="against", check=check)
    return _expansion(model, source, position, targets, against)


@compiled()
def _expansion(
    model: Transformer,
    source: Source,
    position: Int[Array, " B"],
    targets: Int[Array, " B"],
    against: Int[Array, " B"] | None,
) -> PathTerms:
    stream = source.stream(model, _FIELDS)
    stream.need(*_FIELDS, all_layers=True, all_positions=True)
    index, exists = source.padding.columns(position[:, None])
    at = (jnp.arange(len(index)), index[:, 0])
    u_BD, bias_B = logit_reader(model, targets, against)
    logit_B = contract("BD,BD->B", model.final_norm(stream.final[at]), u_BD) + bias_B
    r_BD, offset_B = logit_direction(model, u_BD)
    if model.norm_final is not None:
        r_BD = r_BD / stream.norm_final_scale[at][:, None]

    names, written_CBTD, read_LCBTD = _sources(model, stream)
    fields = _through_heads(model, stream, _with_ones(model, stream, names, read_LCBTD), at, r_BD)
    fields["direct"] = contract("CBD,BD->CB", written_CBTD[:, *at], r_BD)
    fields |= {"constant": offset_B + bias_B, "logit": logit_B}
    # NaN, so that a position that a row does not have cannot pass for a result.
    fields = {n: jnp.where(over(exists[:, 0], x), x, jnp.nan) for n, x in fields.items()}
    paths = PathTerms(**fields, gap=ABSENT, sources=names)
    gap = jnp.abs(paths.terms.sum(0) + paths.constant - logit_B)
    return replace(paths, gap=ratio(gap, jnp.abs(paths.terms).sum(0)))


def _through_heads(
    model: Transformer,
    stream: ResidualStream,
    read_LCBTN: Float[Array, "L C B T N"],
    at: tuple[Array, Array],
    r_BD: Float[Array, "B D"],
) -> dict[str, Array]:
    """The terms of paths through one head and through two, from what each layer's heads read.

    `at` are the rows and columns of the positions asked for. Only these rows of the last pattern
    count, and the direction r meets the weights before any vector: nothing is as large as
    `[B,T,T,H,D]`.
    """
    rows, columns = at
    ov = ov_matrices(model, biases=True)
    share_LBT = _scale(model, stream, "norm_attn_out_scale")  # one without such a norm
    row_LBHS = stream.pattern[:, rows, :, columns]  # with the indexed axes in front
    row_LBHS = jnp.moveaxis(row_LBHS, 0, 1) / share_LBT[:, *at][..., None, None]
    into_LBHN = contract("LHNK,LHKD,BD->LBHN", ov.left, ov.right, r_BD)
    heads = contract("LBHS,LCBSN,LBHN->LCHB", row_LBHS, read_LCBTN, into_LBHN)
    if model.config.n_layers < 2:
        return {"heads": heads}
    # Through both layers: the second's row times the first's pattern, over the scales between.
    scale_BT = _scale(model, stream, "norm_attn_scale")[1] * share_LBT[0]
    weight_BNT = row_LBHS[1] / scale_BT[:, None]
    chain_BHNS = contract("BNT,BHTS->BHNS", weight_BNT, stream.pattern[0])
    value_CBSHK = contract("CBSD,HDK->CBSHK", read_LCBTN[0], ov.left[0])
    # The second head's biases are its own path: only what the first wrote is read here.
    into_BHNK = contract("HKD,BND->BHNK", ov.right[0], into_LBHN[1, ..., :-1])
    virtual = contract("BHNS,CBSHK,BHNK->CHNB", chain_BHNS, value_CBSHK, into_BHNK)
    return {"heads": heads, "virtual": virtual}


def _with_ones(
    model: Transformer, stream: ResidualStream, names: tuple[str, ...], read_LCBTD: Array
) -> Float[Array, "L C B T N"]:
    """What heads read of the sources, over the norm's scale, and a one for "bias" (N = D + 1)."""
    # A head's biases stand in the last row of `ov.left`. They count once, as part of "bias".
    read_LCBTD = read_LCBTD / _scale(model, stream, "norm_attn_scale")[:, None, ..., None]
    one = jnp.array([name == "bias" for name in names], read_LCBTD.dtype)
    one = jnp.broadcast_to(one[None, :, None, None, None], (*read_LCBTD.shape[:-1], 1))
    return jnp.concatenate([read_LCBTD, one], -1)


def _sources(model: Transformer, stream: ResidualStream) -> tuple[tuple[str, ...], Array, Array]:
    """The sources' names, and their writes: in all `[C,B,T,D]`, before each layer `[L,C,...]`."""
    acc, n_layers = model.config.acc, model.config.n_layers
    at_start = {"embed": stream.embed.astype(acc)}
    if model.w_pos is not None:  # the embedding holds the learned positions: they are told apart
        padding = Padding.of(stream.mask.shape, stream.mask)
        pos_BTD = jnp.where(stream.mask[..., None], model.embed_positions(padding.rank), 0)
        at_start = {"embed": at_start["embed"] - pos_BTD, "pos": pos_BTD}
    whole = dict(at_start)
    before = {n: jnp.broadcast_to(x[None], (n_layers, *x.shape)) for n, x in at_start.items()}
    written = {"bias": _biases(model, stream)}
    if "mlp_out" not in stream.lacks:
        written["mlp"] = stream.mlp_out.astype(acc)
    # A layer reads what was written before it: the cumulative sum without its own write.
    for name, x_LBTD in written.items():
        whole[name] = x_LBTD.sum(0)
        before[name] = jnp.cumsum(x_LBTD, 0) - x_LBTD
    return tuple(whole), jnp.stack(list(whole.values())), jnp.stack(list(before.values()), 1)


def _biases(model: Transformer, stream: ResidualStream) -> Float[Array, "L B T D"]:
    """What attention of each layer writes that no head does."""
    config = model.config

    def step(state: None, place: Place, scale_BT: Array) -> tuple[None, Array]:
        b_o, norm = place.block.attn.b_o, place.block.norm_attn_out
        # The output's bias passes the norm of the output, and that norm's own bias comes after.
        zero_D = jnp.zeros(config.d_model, config.acc)
        bias_D = zero_D if b_o is None else b_o[...].astype(config.acc)
        bias_D = bias_D if norm is None else norm.linear(bias_D)
        after_D = zero_D if norm is None or norm.b is None else norm.b[...].astype(config.acc)
        written_BTD = bias_D[None, None] / scale_BT[..., None] + after_D[None, None]
        return state, config.residual_scale * written_BTD

    scale_LBT = _scale(model, stream, "norm_attn_out_scale")
    biases_LBTD = walk(model, step, None, scale_LBT).found
    return jnp.where(stream.mask[None, ..., None], biases_LBTD, 0)


def _scale(model: Transformer, stream: ResidualStream, name: str) -> Float[Array, "L B T"]:
    """The divisor of a norm of every layer; one where there is no such norm."""
    value = getattr(stream, name)
    if name in stream.lacks or value is None:
        return jnp.ones((model.config.n_layers, *stream.mask.shape), model.config.acc)
    return value
