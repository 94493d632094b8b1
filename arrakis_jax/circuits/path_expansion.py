"""A logit as the sum over every path through heads."""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from arrakis_jax.circuits.matrices import Head, ov_matrices
from arrakis_jax.core.axes import Array, Float, over
from arrakis_jax.core.checks import (
    Ids,
    Mask,
    Tokens,
    checked_count,
    checked_ids,
    checked_position,
    checked_tokens,
)
from arrakis_jax.core.errors import expected
from arrakis_jax.core.numerics import contract, ratio
from arrakis_jax.forward.run import compiled
from arrakis_jax.forward.source import batch_of, stream_of
from arrakis_jax.frozen.reads import logit_direction, logit_reader
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.results.record import ABSENT, Record
from arrakis_jax.stream.capture import Capture
from arrakis_jax.stream.padding import Padding
from arrakis_jax.stream.residuals import ModelOutput, ResidualStream

_FIELDS = ("pattern", "norm_attn_scale", "norm_attn_out_scale")
_ENDS = ("embed", "mlp_out", "final", "norm_final_scale")


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

    C counts where paths start: `sources`. "embed" is the tokens' embeddings, "pos" the learned
    positions', "bias" what is constant (biases of values, outputs and norms), "mlp" what MLPs
    write. A path starts at the last of these, and runs through heads' patterns and OV matrices.

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

    def top(self, k: int) -> tuple[Float[Array, "k B"], Array]:
        """The k paths of largest absolute value: their values and indices, `[k,B]` each."""
        terms = self.terms.T
        checked_count("k", k, terms.shape[-1])
        index = jax.lax.top_k(jnp.abs(terms), k)[1]
        return jnp.take_along_axis(terms, index, -1).T, index.T


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

    What an MLP writes is a source, not taken apart. Factors on the logits are included; a
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
        >>> found = path_expansion(model, jnp.arange(6)[None], 3, against=5)
        >>> found.virtual.shape, str(found.labels[-1]), bool(found.gap.max() < 1e-5)
        ((4, 2, 2, 1), 'mlp > L0 head 1 > L1 head 1', True)

    Reference:
        Elhage et al. 2021, "The Path Expansion Trick", "Two-Layer Attention-Only Transformers".
    """
    config = model.config
    if config.n_layers > 2:
        do = "decompose by head and by source, which work at any depth"
        raise ValueError(expected("model", "of at most 2 layers", config.n_layers, do))
    _check_linear(model)
    stream = stream_of(tokens, mask)
    if stream is None:
        tokens, mask = checked_tokens(config, tokens, mask, check=check)
        n_rows, length = tokens.shape
    else:
        stream = batch_of(stream)
        stream.need(*_FIELDS, *_ENDS, all_layers=True, all_positions=True)
        (n_rows, length), mask = stream.mask.shape, stream.mask
    position = checked_position(position, n_rows, mask, length)
    targets = checked_ids(config, targets, (n_rows,), check=check)
    if against is not None:
        against = checked_ids(config, against, (n_rows,), name="against", check=check)
    if stream is None:
        return _run_and_expand(model, tokens, mask, position, targets, against)
    return _expand(model, stream, position, targets, against)


@compiled()
def _run_and_expand(model, tokens, mask, position, targets, against):
    capture = Capture((*_FIELDS, *_ENDS))
    return _expansion(
        model, model(tokens, mask=mask, capture=capture).residuals, position, targets, against
    )


@compiled()
def _expand(model, stream, position, targets, against):
    return _expansion(model, stream, position, targets, against)


def _expansion(
    model: Transformer,
    stream: ResidualStream,
    position: Array,
    targets: Array,
    against: Array | None,
) -> PathTerms:
    index, valid = Padding.of(stream.mask.shape, stream.mask).columns(position[:, None])
    rows, valid = jnp.arange(index.shape[0]), valid[:, 0]
    at = (rows, index[:, 0])
    u_BD, bias_B = logit_reader(model, targets, against)
    logit_B = contract("BD,BD->B", model.final_norm(stream.final[at]), u_BD) + bias_B
    r_BD, offset_B = logit_direction(model, u_BD)
    constant_B = offset_B + bias_B
    if model.norm_final is not None:
        r_BD = r_BD / stream.norm_final_scale[at][:, None]

    sources, direct_CBTD, read_LCBTD = _sources(model, stream)
    share_LBT, scale_LBT = (_scale(model, stream, name) for name in _FIELDS[:0:-1])
    ov = ov_matrices(model, biases=True)
    read_LCBTD = read_LCBTD / scale_LBT[:, None, ..., None]
    one = jnp.array([name == "bias" for name in sources], read_LCBTD.dtype)
    one = jnp.broadcast_to(one[None, :, None, None, None], (*read_LCBTD.shape[:-1], 1))
    read_LCBTD = jnp.concatenate([read_LCBTD, one], -1)

    row_LBHS = stream.pattern[:, rows, :, index[:, 0]]  # with the indexed axes in front
    row_LBHS = jnp.moveaxis(row_LBHS, 0, 1) / share_LBT[:, *at][..., None, None]
    into_LBHD = contract("LHDK,LHKN,BN->LBHD", ov.left, ov.right, r_BD)
    heads = contract("LBHS,LCBSD,LBHD->LCHB", row_LBHS, read_LCBTD, into_LBHD)
    virtual = None
    if model.config.n_layers == 2:
        weight_BNT = row_LBHS[1] / (scale_LBT[1] * share_LBT[0])[:, None]
        chain_BHNS = contract("BNT,BHTS->BHNS", weight_BNT, stream.pattern[0])
        value_CBSHK = contract("CBSD,HDK->CBSHK", read_LCBTD[0], ov.left[0])
        into_BHNK = contract("HKD,BND->BHNK", ov.right[0], into_LBHD[1, ..., :-1])
        virtual = contract("BHNS,CBSHK,BHNK->CHNB", chain_BHNS, value_CBSHK, into_BHNK)
    direct = contract("CBD,BD->CB", direct_CBTD[:, *at], r_BD)

    found = {"direct": direct, "heads": heads, "constant": constant_B, "logit": logit_B}
    found |= {} if virtual is None else {"virtual": virtual}
    found = {name: jnp.where(over(valid, x), x, jnp.nan) for name, x in found.items()}
    paths = PathTerms(**found, gap=ABSENT, sources=sources)
    gap = jnp.abs(paths.terms.sum(0) + constant_B - logit_B)
    return replace(paths, gap=ratio(gap, jnp.abs(paths.terms).sum(0)))


def _sources(model: Transformer, stream: ResidualStream) -> tuple[tuple[str, ...], Array, Array]:
    """The sources' names, what they write in all, and what each layer finds of them written.

    `[C,B,T,D]` and `[L,C,B,T,D]`.
    """
    acc, n_layers = model.config.acc, model.config.n_layers
    embed_BTD = stream.embed.astype(acc)
    found, every = {}, (n_layers, *embed_BTD.shape)
    if model.w_pos is not None:
        padding = Padding.of(stream.mask.shape, stream.mask)
        pos_BTD = model.embed_positions(padding.rank)
        found["pos"] = jnp.where(stream.mask[..., None], pos_BTD, 0)
        embed_BTD = embed_BTD - found["pos"]
    found = {"embed": embed_BTD, **found}
    direct = dict(found)
    read = {name: jnp.broadcast_to(x[None], every) for name, x in found.items()}
    written = {"bias": _bias(model, stream)}
    if "mlp_out" not in stream.lacks:
        written["mlp"] = stream.mlp_out.astype(acc)
    for name, x_LBTD in written.items():
        direct[name] = x_LBTD.sum(0)
        read[name] = jnp.cumsum(x_LBTD, 0) - x_LBTD
    return tuple(direct), jnp.stack(list(direct.values())), jnp.stack(list(read.values()), 1)


def _bias(model: Transformer, stream: ResidualStream) -> Float[Array, "L B T D"]:
    """What attention of each layer writes that no head does."""
    config, acc = model.config, model.config.acc
    found = []
    for blocks, layers in model.stacks():
        b_o, norm = blocks.attn.b_o, blocks.norm_attn_out
        own = jnp.zeros((len(layers), config.d_model), acc) if b_o is None else b_o[...].astype(acc)
        after = jnp.zeros_like(own)
        if norm is not None:
            own = norm.centre(own) * (1 if norm.gain is None else norm.gain)
            after = after if norm.b is None else norm.b[...].astype(acc)
        found.append((own, after))
    own_LD, after_LD = (jnp.concatenate(x)[:, None, None] for x in zip(*found, strict=True))
    share_LBT = _scale(model, stream, "norm_attn_out_scale")
    written = config.residual_scale * (own_LD / share_LBT[..., None] + after_LD)
    return jnp.where(stream.mask[None, ..., None], written, 0)


def _scale(model: Transformer, stream: ResidualStream, name: str) -> Float[Array, "L B T"]:
    """The divisor of a norm of every layer; one where there is no such norm."""
    value = getattr(stream, name)
    if name in stream.lacks or value is None:
        return jnp.ones((model.config.n_layers, *stream.mask.shape), model.config.acc)
    return value


def _check_linear(model: Transformer) -> None:
    """Raises unless heads read the stream linearly, but for norms in front and behind."""
    config = model.config
    for name, value, must in (
        ("norm_placement", config.norm_placement, not config.norms_stream),
        ("clip_qkv", config.clip_qkv, config.clip_qkv is None),
    ):
        if not must:
            got = f"one with {name}={value!r}"
            do = "paths are not defined there; decompose by head"
            raise ValueError(expected("model", "one whose stream is a plain sum", got, do))
