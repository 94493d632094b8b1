"""The decoder: embedding, a scan over the stacked blocks of each segment, readout."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from arrakis_jax.core.axes import Array, Bool, Float, Int, over
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.core.errors import expected
from arrakis_jax.core.numerics import contract
from arrakis_jax.nn.block import Block
from arrakis_jax.nn.context import AttentionContexts
from arrakis_jax.nn.linear import constant, product, softcap, weight
from arrakis_jax.nn.norm import Norm
from arrakis_jax.nn.site import Sites
from arrakis_jax.results.record import ABSENT
from arrakis_jax.stream.capture import Capture, as_capture
from arrakis_jax.stream.edits import Edit
from arrakis_jax.stream.fields import ROUTING_SITES, SEGMENTED, UNSTACKED, lacking
from arrakis_jax.stream.padding import Padding, select_positions
from arrakis_jax.stream.residuals import ModelOutput, ResidualStream, Routing

Edits = tuple[Edit | Callable, ...]


class Layer(NamedTuple):
    """One layer of a forward, as `Transformer.fold` and `over_layers` hand it to a function.

    Attributes:
        block: its parameters, without a layer axis.
        index: which layer it is.
        stream: the fields asked for, without a layer axis, and the mask.
        resid_post: `[B,T,D]`, the stream leaving it; None if a captured stream cannot tell.
    """

    block: Block
    index: Int[Array, ""]
    stream: ResidualStream
    resid_post: Float[Array, "B T D"]


class Transformer(nnx.Module):
    """A decoder-only transformer whose forward returns its residual stream.

    Every parameter of `blocks` has a leading layer axis: `blocks.attn.w_q [L,D,H,K]`, `w_k, w_v
    [L,D,G,K]`, `w_o [L,H,K,D]`, `blocks.mlp.w_in, w_gate [L,D,F]`, `w_out [L,F,D]`, biases `b_*`,
    norms `blocks.norm_attn.w`, `blocks.norm_mlp.w`, `norm_final.w` (and `.b`); `w_e [V,D]`,
    `w_pos [P,D]`, `w_u [D,V]`, `b_u [V]`. With experts: `blocks.moe.w_router [L,D,E]`, `w_in,
    w_gate [L,E,D,F]`, `w_out [L,E,F,D]`. One that the config does not have is None. They are
    read as `model.w_e[...]` and set as `model.w_e[...] = value`.

    A model in which some layers have experts and some have not holds consecutive layers of a kind
    in `segments`, in place of `blocks`, which is then None.

    `jax.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))` gives the model without its
    numbers: names, shapes and dtypes of all parameters.

    Example:
        >>> config = config_for("gpt2", n_layer=2, n_embd=16, n_head=2, vocab_size=11)
        >>> model = Transformer(config, rngs=nnx.Rngs(0))
        >>> model(jnp.arange(6)[None]).residuals.resid_pre.shape
        (2, 1, 6, 16)
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        if not isinstance(config, ModelConfig):
            do = "make one, or call config_for(family)"
            raise TypeError(expected("config", "a ModelConfig", repr(config), do))
        if not isinstance(rngs, nnx.Rngs):
            raise TypeError(expected("rngs", "nnx.Rngs", repr(rngs), "such as nnx.Rngs(0)"))
        d, v = config.d_model, config.vocab_size
        self.config = config
        # What also reads out must be small; otherwise embeddings outweigh what blocks add at first.
        fan_in = d if config.tied else 1
        width = config.d_embed or d
        self.w_e = weight(rngs, (v, width), fan_in, config)
        projected = config.d_embed is not None
        self.w_project_in = weight(rngs, (width, d), width, config) if projected else None
        self.norm_embed = Norm(config) if config.embed_norm else None
        learned = config.positions == "learned"
        rows = config.max_positions + config.position_offset
        self.w_pos = weight(rngs, (rows, d), fan_in, config) if learned else None
        blocks = [Block(config, rngs, (n,), moe=moe) for moe, n in config.segments]
        self.blocks = blocks[0] if len(blocks) == 1 else None
        self.segments = nnx.List(blocks) if len(blocks) > 1 else None
        self.norm_final = Norm(config) if config.norm and config.final_norm else None
        self.w_project_out = weight(rngs, (d, width), d, config) if projected else None
        self.w_u = None if config.tied else weight(rngs, (width, v), width, config)
        self.b_u = constant((v,), 0.0, config) if config.unembed_bias else None

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        mask: Bool[Array, "B T"] | None = None,
        capture: str | tuple[str, ...] | Capture = "residuals",
        edits: Edits = (),
        taps: dict[str, Any] | None = None,
    ) -> ModelOutput:
        """The logits and the residual stream.

        Args:
            tokens: token ids; those at padding are not read. An id outside of the vocabulary
                makes its own row NaN (`run` raises instead).
            mask: True (or 1) at real tokens; None when all are.
            capture: what to return: "residuals", "all", a tuple of field names, or a Capture.
            edits: changes made on the way, in order.
            taps: arrays added at sites, `[L,...]` or for `embed` and `final` without L: the
                gradient with respect to a tap of zeros is the gradient at its site. Or functions
                of a site's value, pytrees with such leaves.
        """
        return self.after_embedding(
            self.embed(tokens, mask=mask),
            tokens=tokens,
            mask=mask,
            capture=capture,
            edits=edits,
            taps=taps,
        )

    def embed_tokens(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The token embeddings as the stream holds them: scaled, projected and normed.

        Without positions. NaN for an id outside of the vocabulary.
        """
        return self._embedded(_rows(self.w_e[...], tokens))

    def _embedded(self, e: Float[Array, "... M"]) -> Float[Array, "... D"]:
        """What the stream holds of these rows of the embedding."""
        scale = jnp.asarray(self.config.embed_scale, self.config.dtype).astype(self.config.acc)
        x = e.astype(self.config.acc) * scale
        if self.w_project_in is not None:
            rows = x.reshape(-1, x.shape[-1])
            rows = product("NM,MD->ND", rows, self.w_project_in[...], config=self.config)
            x = rows.reshape(*x.shape[:-1], -1)
        return x if self.norm_embed is None else self.norm_embed(x, Sites(), "norm_embed_scale")

    def mean_embedding(self) -> Float[Array, " D"]:
        """The mean of all token embeddings, as the stream holds them."""
        if self.norm_embed is None:
            return self._embedded(jnp.mean(self.w_e[...].astype(self.config.acc), 0))
        zero = jnp.zeros(self.config.d_model, self.config.acc)

        def add(total: Array, e: Array) -> tuple[Array, None]:
            return total + self._embedded(e), None

        return jax.lax.scan(add, zero, self.w_e[...])[0] / self.config.vocab_size

    def embed_positions(self, position: Int[Array, "..."]) -> Float[Array, "... D"]:
        """The learned position embeddings; NaN beyond the table. Needs a model that has them."""
        assert self.w_pos is not None
        offset = self.config.position_offset
        return _rows(self.w_pos[...], position + offset).astype(self.config.acc)

    def embed(
        self, tokens: Int[Array, "B T"], *, mask: Array | None = None
    ) -> Float[Array, "B T D"]:
        """Token plus learned position embedding, the stream entering block 0; zero at padding."""
        padding = Padding.of(tokens.shape, mask)
        if padding.mask is not None:
            tokens = jnp.where(padding.mask, tokens, 0)
        x_BTD = self.embed_tokens(tokens)
        if self.w_pos is not None:
            x_BTD = x_BTD + self.embed_positions(padding.rank)
        return x_BTD if padding.mask is None else jnp.where(padding.mask[..., None], x_BTD, 0)

    def after_embedding(
        self,
        x_BTD: Float[Array, "B T D"],
        *,
        tokens: Int[Array, "B T"] | None = None,
        mask: Array | None = None,
        capture: str | tuple[str, ...] | Capture = "residuals",
        edits: Edits = (),
        taps: dict[str, Any] | None = None,
        at: Int[Array, "B N"] | None = None,
        whole: tuple[str, ...] = (),
    ) -> ModelOutput:
        """The forward from the embedding on; `tokens` are only handed to the result.

        `at` are positions to record in place of the capture's; they may be traced. The result's
        mask then says which of them exist. Fields named in `whole` are recorded at every position.
        """
        capture = as_capture(capture)
        padding = Padding.of(x_BTD.shape[:2], mask)
        taps = {} if taps is None else taps
        site = replace(self._sites(padding, capture, edits, at), whole=frozenset(whole))
        outside = replace(site, taps={k: v for k, v in taps.items() if k in UNSTACKED}, records={})
        inside = {k: v for k, v in taps.items() if k not in UNSTACKED}

        x_BTD = outside("embed", x_BTD.astype(self.config.stream))
        x_BTD, records, layers = self._scan(x_BTD, site, padding, capture, inside)
        x_BTD = outside("final", x_BTD)
        logits = self._logits(x_BTD, outside, capture)

        about: dict[str, Any] = {
            "tokens": tokens,
            "mask": padding.real if at is None else site.valid,
            "layers": layers,
            "positions": capture.positions if at is None else None,
            "lacks": lacking(self.config),
            "normed": self.config.norms_stream,
        }
        stream = ResidualStream(**outside.records, **records, **about)
        return ModelOutput(logits, stream)

    def fold(
        self,
        x_BTD: Float[Array, "B T D"],
        state: Any,
        step: Callable[[Any, Layer], tuple[Any, Any]],
        *,
        mask: Array | None = None,
        fields: tuple[str, ...] = (),
        edits: Edits = (),
    ) -> tuple[ResidualStream, Any, list[Any]]:
        """The forward from the embedding on, each layer's fields given to a function as it runs.

        What `step(state, layer) -> (state, found)` does not keep of them exists for one layer at
        a time.

        Returns:
            The stream outside of the layers (embed, final, norm_final_scale), the last state, and
            for each segment what was found, stacked over its layers.
        """
        padding = Padding.of(x_BTD.shape[:2], mask)
        site = self._sites(padding, Capture((*fields, *UNSTACKED)), edits)
        outside = replace(site, records={})
        x_BTD = outside("embed", x_BTD.astype(self.config.stream))
        about: dict[str, Any] = {
            "mask": padding.real,
            "lacks": lacking(self.config),
            "normed": self.config.norms_stream,
        }
        found = []
        for i, (blocks, layers) in enumerate(self.stacks()):
            body = self._body(self._in_segment(site, i, layers), padding)

            def folding(carry: tuple, xs: tuple, body: Callable = body) -> tuple[tuple, Any]:
                x_BTD, state = carry
                x_BTD, records = body(x_BTD, (xs[0], {}, xs[1]))
                stream = ResidualStream(**_routed(records), **about)
                state, found = step(state, Layer(xs[0], xs[1], stream, x_BTD))
                return (x_BTD, state), found

            xs = (blocks, jnp.arange(layers.start, layers.stop))
            (x_BTD, state), own = jax.lax.scan(folding, (x_BTD, state), xs)
            found.append(own)
        x_BTD = outside("final", x_BTD)
        self._logits(x_BTD, outside, Capture(("norm_final_scale",)))
        return ResidualStream(**outside.records, **about), state, found

    def unembedding(self, ids: Int[Array, "..."] | None = None) -> Float[Array, "... D"]:
        """What reads these tokens' logits from the normed stream, `[...,D]`, or all as `[V,D]`.

        `logit = final_norm(x) . unembedding + unembedding_bias`, before a soft-cap: factors on the
        logits are included. NaN for an id outside of the vocabulary.
        """
        if ids is None:
            rows = self.w_e[...] if self.w_u is None else self.w_u[...].T
        elif self.w_u is None:
            rows = _rows(self.w_e[...], ids)
        else:
            rows = jnp.moveaxis(_rows(self.w_u[...], ids, axis=1), 0, -1)
        rows = rows.astype(self.config.acc) * self.config.logit_scale
        if self.w_project_out is not None:
            rows = contract("...M,DM->...D", rows, self.w_project_out[...])
        return rows

    def unembedding_bias(self, ids: Int[Array, "..."]) -> Float[Array, "..."]:
        """The bias on the logits of these token ids; zero in a model without."""
        if self.b_u is None:
            return jnp.zeros(ids.shape, self.config.acc)
        return _rows(self.b_u[...], ids).astype(self.config.acc) * self.config.logit_scale

    def final_norm(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """What the unembedding reads, from the stream."""
        return x if self.norm_final is None else self.norm_final(x, Sites(), "norm_final_scale")

    def readout(
        self,
        x_BTD: Float[Array, "B T D"],
        *,
        mask: Array | None = None,
        edits: Edits = (),
        capture: str | tuple[str, ...] | Capture = ("logits", "final", "norm_final_scale"),
    ) -> ModelOutput:
        """The final norm and the unembedding of a stream."""
        capture = as_capture(capture)
        padding = Padding.of(x_BTD.shape[:2], mask)
        site = self._sites(padding, capture, edits)
        logits = self._logits(site("final", x_BTD.astype(self.config.stream)), site, capture)
        about: dict[str, Any] = {
            "mask": padding.real,
            "positions": capture.positions,
            "lacks": lacking(self.config),
            "normed": self.config.norms_stream,
        }
        stream = ResidualStream(**site.records, **about)
        return ModelOutput(logits, stream)

    def resume(
        self,
        x_BTD: Float[Array, "B T D"],
        start: int | Int[Array, ""],
        *,
        mask: Array | None = None,
        edits: Edits = (),
    ) -> ModelOutput:
        """Blocks start..L-1 from the stream entering block `start`, then the readout.

        With an int the blocks are a static slice, and the result can be differentiated; with a
        traced scalar only the blocks needed are run, forward or forward-mode only.
        """
        x_BTD = self.blocks_from(x_BTD, start, mask=mask, edits=edits)
        return self.readout(x_BTD, mask=mask, edits=edits)

    def blocks_from(
        self,
        x_BTD: Float[Array, "B T D"],
        start: int | Int[Array, ""],
        *,
        mask: Array | None = None,
        edits: Edits = (),
        before: tuple[Array, Array] | None = None,
    ) -> Float[Array, "B T D"]:
        """The stream after the last block, from that entering block `start`; as in `resume`.

        With `before`, `x_BTD` are the last columns only: the keys and values `[L,B,N,G,K]` of the N
        columns before them are given, and `mask` is `[B,N+T]`.
        """
        n_layers = self.config.n_layers
        n_before = 0 if before is None else before[0].shape[2]
        padding = Padding.of((x_BTD.shape[0], n_before + x_BTD.shape[1]), mask)
        site = self._sites(padding.after(n_before), Capture(()), edits)
        x_BTD = x_BTD.astype(self.config.stream)
        if isinstance(start, int):
            begin = start + n_layers if start < 0 else start
        else:
            begin = jnp.where(start < 0, start + n_layers, start)
        for i, (blocks, layers) in enumerate(self.stacks()):
            body = self._body(self._in_segment(site, i, layers), padding, before)
            first, last = layers.start, layers.stop
            if isinstance(begin, int):
                rest = slice(max(begin - first, 0), None)
                xs = (blocks, {}, jnp.arange(first, last))
                xs = jax.tree.map(lambda a, rest=rest: a[rest], xs)
                x_BTD = jax.lax.scan(body, x_BTD, xs)[0]
                continue

            def step(
                layer: Array,
                x_BTD: Array,
                blocks: Block = blocks,
                first: int = first,
                body: Callable = body,
            ) -> Array:
                block = jax.tree.map(
                    lambda w: jax.lax.dynamic_index_in_dim(w, layer - first, keepdims=False), blocks
                )
                return body(x_BTD, (block, {}, layer))[0]

            x_BTD = jax.lax.fori_loop(jnp.maximum(begin, first), last, step, x_BTD)
        return x_BTD

    def stacks(self) -> list[tuple[Block, range]]:
        """The stacked blocks of each segment, and which layers they are."""
        blocks: list[Any] = [self.blocks] if self.segments is None else list(self.segments)
        ends = np.cumsum([n for _, n in self.config.segments]).tolist()
        starts = [0, *ends[:-1]]
        return [(b, range(*ends)) for b, *ends in zip(blocks, starts, ends, strict=True)]

    def _sites(
        self, padding: Padding, capture: Capture, edits: Edits, at: Array | None = None
    ) -> Sites:
        bound = tuple(
            edit.bind(self.config, padding.rank, padding.count) if isinstance(edit, Edit) else edit
            for edit in edits
        )
        index = valid = None
        if at is None and capture.positions is not None:
            at = jnp.array(capture.positions, int)
        if at is not None:
            index, valid = padding.columns(at)
        routing = ROUTING_SITES.values() if "routing" in capture.fields else ()
        return Sites(
            capture=frozenset((*capture.fields, *routing)),
            edits=bound,
            mask=padding.mask,
            index=index,
            valid=valid,
        )

    def _in_segment(self, site: Sites, i: int, layers: range) -> Sites:
        """The sites of one segment: edits that have a value for each take theirs."""
        if self.segments is None:
            return site
        own = [
            edit.of_segment(i, layers, self.config.n_layers) if isinstance(edit, Edit) else edit
            for edit in site.edits
        ]
        return replace(site, edits=tuple(edit for edit in own if edit is not None))

    def _body(
        self, site: Sites, padding: Padding, before: tuple[Array, Array] | None = None
    ) -> Callable:
        """One layer as a scan's body: `(x, (block, taps, layer)) -> (x, records)`."""
        contexts = AttentionContexts.of(self.config, padding)
        contexts = contexts if before is None else contexts.after(before)

        def body(x_BTD: Array, xs: tuple) -> tuple[Array, dict[str, Array]]:
            block, taps, layer = xs
            here = replace(site, taps=taps, layer=layer, records={})
            return block(x_BTD, contexts.at(layer), layer, here), here.records

        # Saves the products with weights and recomputes the rest, the T x T arrays above all.
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return jax.checkpoint(body, policy=policy, prevent_cse=False)

    def _scan(
        self,
        x_BTD: Array,
        site: Sites,
        padding: Padding,
        capture: Capture,
        taps: dict[str, Any],
    ) -> tuple[Array, dict[str, Any], tuple[int, ...] | None]:
        """The stream after all blocks, what was recorded, and of which layers if not of all."""
        wanted = capture.layers
        wanted = None if wanted is None else _counted(wanted, self.config.n_layers)
        records = []
        for i, (blocks, layers) in enumerate(self.stacks()):
            own = {
                name: tap[i]
                if isinstance(tap, tuple)
                else jax.tree.map(lambda x, own=layers: x[own.start : own.stop], tap)
                for name, tap in taps.items()
                if not (isinstance(tap, tuple) and tap[i] is None)
            }
            body = self._body(self._in_segment(site, i, layers), padding)
            xs = (blocks, own, jnp.arange(layers.start, layers.stop))
            if wanted is None:
                x_BTD, record = jax.lax.scan(body, x_BTD, xs)
            else:
                rows = [layer - layers.start for layer in wanted if layer in layers]
                x_BTD, record = self._scan_some(body, x_BTD, xs, rows, len(layers))
            records.append(_routed(record))
        return x_BTD, _joined(records), wanted

    def _scan_some(
        self, body: Callable, x_BTD: Array, xs: tuple, rows: list[int], n_layers: int
    ) -> tuple[Array, dict[str, Array]]:
        """A scan that records only some of its layers."""
        first = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), xs)
        _, shapes = jax.eval_shape(body, x_BTD, first)
        held = jax.tree.map(lambda s: jnp.zeros((len(rows), *s.shape), s.dtype), shapes)
        if not rows:
            return jax.lax.scan(lambda x, xs: (body(x, xs)[0], None), x_BTD, xs)[0], held
        slots = jnp.full(n_layers, len(rows)).at[jnp.array(rows, int)].set(
            jnp.arange(len(rows)), mode="drop"
        )  # fmt: skip

        def selecting(carry: tuple, xs: tuple) -> tuple[tuple, None]:
            x_BTD, held = carry
            x_BTD, records = body(x_BTD, xs[0])
            held = jax.tree.map(lambda a, r: a.at[xs[1]].set(r, mode="drop"), held, records)
            return (x_BTD, held), None

        (x_BTD, held), _ = jax.lax.scan(selecting, (x_BTD, held), (xs, slots))
        return x_BTD, held

    def _logits(self, x_BTD: Array, site: Sites, capture: Capture) -> Array:
        wanted = {"logits", "norm_final_scale"} & set(capture.fields)
        if not wanted:
            return ABSENT
        y_BTD = x_BTD
        if self.norm_final is not None:
            y_BTD = self.norm_final(x_BTD, site, "norm_final_scale")
        if "logits" not in wanted:
            return ABSENT
        y_BND = select_positions(y_BTD, site.index, site.valid, axis=1)
        logits = self.unembed(y_BND)
        real = site.mask if site.index is None else site.valid
        return logits if real is None else jnp.where(real[..., None], logits, 0)

    def unembed(
        self,
        y_BTD: Float[Array, "B T D"],
        start: int | Int[Array, ""] = 0,
        size: int | None = None,
    ) -> Float[Array, "B T V"]:
        """The logits of the normed stream; of `size` tokens from `start` (maybe traced) if given.

        As in a dynamic slice, a start from which fewer are left is moved back.
        """
        config = self.config

        def chosen(w: Array, axis: int) -> Array:
            return w if size is None else jax.lax.dynamic_slice_in_dim(w, start, size, axis)

        y_BTM = y_BTD
        if self.w_project_out is not None:
            y_BTM = product("BTD,DM->BTM", y_BTD, self.w_project_out[...], config=config)
        one = y_BTM.shape[:2] == (1, 1)
        if one and config.operands == jnp.bfloat16:
            # For a product with one row XLA widens, on a CPU, the whole unembedding.
            y_BTM = jnp.concatenate([y_BTM, jnp.zeros_like(y_BTM)], 1)
        if self.w_u is None:
            logits = product("BTM,VM->BTV", y_BTM, chosen(self.w_e[...], 0), config=config)
        else:
            logits = product("BTM,MV->BTV", y_BTM, chosen(self.w_u[...], 1), config=config)
        logits = logits[:, :1] if one else logits
        if self.b_u is not None:
            b_u = chosen(self.b_u[...], 0).astype(logits.dtype)
            logits = logits + over(b_u, logits)
        scale = config.logit_scale
        return softcap(logits if scale == 1 else logits * scale, config.logit_softcap)


def _rows(table: Array, index: Array, axis: int = 0) -> Array:
    """The entries at these indices of an axis; NaN where there are none, negative ones included."""
    return jnp.take(table, jnp.where(index < 0, table.shape[axis], index), axis, mode="fill")


def _routed(record: dict[str, Any]) -> dict[str, Any]:
    """What was recorded, with the sites of routing as one field."""
    about = {name: record.get(site, ABSENT) for name, site in ROUTING_SITES.items()}
    rest = {name: x for name, x in record.items() if name not in ROUTING_SITES.values()}
    return rest if about["index"] is None else {**rest, "routing": Routing(**about)}


def _joined(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What the segments recorded: stacked over all layers, or a tuple of what differs in kind."""
    if len(records) == 1:
        return records[0]
    names = {name: None for record in records for name in record}
    return {
        name: tuple(record.get(name) for record in records)
        if name in SEGMENTED
        else jnp.concatenate([record[name] for record in records])
        for name in names
    }


def _counted(layers: tuple[int, ...], n_layers: int) -> tuple[int, ...]:
    """Layers counted from 0, ascending, each once."""
    for layer in layers:
        if not -n_layers <= layer < n_layers:
            do = f"the model has {n_layers} layers"
            raise IndexError(expected("layers", f"in [{-n_layers}, {n_layers})", layer, do))
    return tuple(sorted({layer % n_layers for layer in layers}))
