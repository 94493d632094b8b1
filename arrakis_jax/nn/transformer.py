"""The decoder: embedding, a walk over the layers, readout."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from arrakis_jax.core.axes import Array, Bool, Float, Int
from arrakis_jax.core.checks import tokens_and_mask
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.core.errors import expected
from arrakis_jax.nn.block import Block
from arrakis_jax.nn.ends import Ends
from arrakis_jax.nn.layer_run import LayerRun, counted_layers, routed
from arrakis_jax.nn.linear import constant, weight
from arrakis_jax.nn.norm import Norm
from arrakis_jax.nn.site import Sites
from arrakis_jax.nn.walk import Place, Walked, walk
from arrakis_jax.results.record import ABSENT
from arrakis_jax.stream.capture import Capture, as_capture
from arrakis_jax.stream.edits import Edit
from arrakis_jax.stream.fields import ROUTING_SITES, UNSTACKED, lacking
from arrakis_jax.stream.padding import Padding, select_positions
from arrakis_jax.stream.residuals import ModelOutput, ResidualStream

Edits = tuple[Edit | Callable, ...]


class Layer(NamedTuple):
    """One layer of a forward. `Transformer.fold` and `over_layers` hand it to a function.

    Attributes:
        block: the layer's parameters, without a layer axis.
        index: the number of the layer.
        stream: the fields asked for, without a layer axis, and the mask.
        resid_post: `[B,T,D]`, the stream leaving the layer; None if a captured stream cannot tell.
    """

    block: Block
    index: Int[Array, ""]
    stream: ResidualStream
    resid_post: Any


class Transformer(Ends):
    """A decoder-only transformer whose forward returns its residual stream.

    Every parameter of `blocks` has a leading layer axis: `blocks.attn.w_q [L,D,H,K]`, `w_k, w_v
    [L,D,G,K]`, `w_o [L,H,K,D]`, `blocks.mlp.w_in, w_gate [L,D,F]`, `w_out [L,F,D]`, biases `b_*`,
    norms `blocks.norm_attn.w`, `blocks.norm_mlp.w`, `norm_final.w` (and `.b`); `w_e [V,D]`,
    `w_pos [P,D]`, `w_u [D,V]`, `b_u [V]`. With experts: `blocks.moe.w_router [L,D,E]`, `w_in,
    w_gate [L,E,D,F]`, `w_out [L,E,F,D]`. A parameter that the config does not have is None.
    `model.w_e[...]` reads one, and `model.w_e[...] = value` sets it.

    If only some layers have experts, `blocks` is None. `segments` then holds the stacks: each has
    consecutive layers of one kind.

    `jax.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))` gives the model without its
    numbers: the names, shapes and dtypes of all parameters.

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
        # Tied embeddings also read out the logits, so they must be small. Untied ones have
        # variance 1: at first they outweigh what the blocks add.
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
            tokens: token ids, or Prompts; ids at padding are not read. An id outside of the
                vocabulary makes its own row NaN (`run` raises instead).
            mask: True (or 1) at real tokens; None when all are.
            capture: what to return: "residuals", "all", a tuple of field names, or a Capture.
            edits: changes to the forward, in order.
            taps: arrays to add at sites, `[L,...]`, or without L for `embed` and `final`. The
                gradient with respect to a tap of zeros is the gradient at its site. Or functions
                of a site's value, as pytrees with such leaves.
        """
        tokens, mask = tokens_and_mask(tokens, mask)
        return self.after_embedding(
            self.embed(tokens, mask=mask),
            tokens=tokens,
            mask=mask,
            capture=capture,
            edits=edits,
            taps=taps,
        )

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
        """The forward from the embedding on. The result keeps `tokens`; nothing else reads them.

        `at` holds the positions to record, in place of the capture's. They may be traced. The
        result's mask then says which of them exist. Fields in `whole` keep every position.
        """
        capture = as_capture(capture)
        padding = Padding.of(x_BTD.shape[:2], mask)
        taps = {} if taps is None else taps
        site = replace(self._sites(padding, capture, edits, at), whole=frozenset(whole))
        # Records made inside the scan must leave it as its outputs, so the two do not share a dict.
        outside = replace(site, taps={k: v for k, v in taps.items() if k in UNSTACKED}, records={})
        inside = {k: v for k, v in taps.items() if k not in UNSTACKED}
        layers = counted_layers(capture.layers, self.config.n_layers)

        x_BTD = outside("embed", x_BTD.astype(self.config.stream))
        x_BTD, fields = LayerRun.of(self, site, padding).recorded(x_BTD, inside, layers)
        x_BTD = outside("final", x_BTD)
        logits = self._logits(x_BTD, outside, capture)
        stream = self._stream(
            outside.records | fields,
            tokens=tokens,
            mask=padding.real if at is None else site.valid,
            layers=layers,
            positions=capture.positions if at is None else None,
            edited=tuple(sorted(site.edited)),
        )
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
    ) -> tuple[ResidualStream, Walked]:
        """The forward from the embedding on, with a function called at each layer.

        `step(state, layer) -> (state, found)` gets the layer's fields. They exist for one layer at
        a time, except for what the step returns.

        Returns:
            The stream outside of the layers (embed, final, norm_final_scale), and the walk: the
            last state and all that was found.
        """
        padding = Padding.of(x_BTD.shape[:2], mask)
        site = self._sites(padding, Capture((*fields, *UNSTACKED)), edits)
        outside = replace(site, records={})
        layer_run = LayerRun.of(self, site, padding)

        def folding(carry: tuple, place: Place, _: Any) -> tuple[tuple, Any]:
            x_BTD, records = layer_run.step(carry[0], place, {})
            stream = self._stream(routed(records), mask=padding.real)
            state, output = step(carry[1], Layer(place.block, place.index, stream, x_BTD))
            return (x_BTD, state), output

        x_BTD = outside("embed", x_BTD.astype(self.config.stream))
        walked = walk(self, folding, (x_BTD, state))
        x_BTD, state = walked.state
        # For the record of the final norm's scale; no logits are computed.
        self._logits(outside("final", x_BTD), outside, Capture(("norm_final_scale",)))
        return self._stream(outside.records, mask=padding.real), walked._replace(state=state)

    def readout(
        self,
        x_BTD: Float[Array, "B T D"],
        *,
        mask: Array | None = None,
        edits: Edits = (),
        capture: str | tuple[str, ...] | Capture = ("logits", "final", "norm_final_scale"),
    ) -> ModelOutput:
        """The final norm and the unembedding, applied to a stream."""
        capture = as_capture(capture)
        padding = Padding.of(x_BTD.shape[:2], mask)
        site = self._sites(padding, capture, edits)
        logits = self._logits(site("final", x_BTD.astype(self.config.stream)), site, capture)
        stream = self._stream(
            site.records, mask=padding.real, positions=capture.positions,
            edited=tuple(sorted(site.edited)),
        )  # fmt: skip
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

        With an int the blocks are a static slice, and the result can be differentiated. With a
        traced scalar only the blocks needed are run, and reverse-mode differentiation fails.
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
        """The stream after the last block, from `x_BTD` entering block `start`, as in `resume`.

        With `before`, `x_BTD` holds the last columns only. `before` has the keys and values
        `[L,B,N,G,K]` of the N columns before them, and `mask` is `[B,N+T]`.
        """
        n_layers = self.config.n_layers
        n_before = 0 if before is None else before[0].shape[2]
        padding = Padding.of((x_BTD.shape[0], n_before + x_BTD.shape[1]), mask)
        site = self._sites(padding.after(n_before), Capture(()), edits)
        if isinstance(start, int):
            start = start + n_layers if start < 0 else start
        else:
            start = jnp.where(start < 0, start + n_layers, start)
        layer_run = LayerRun.of(self, site, padding, before)
        return layer_run.through(x_BTD.astype(self.config.stream), start)

    def stacks(self) -> list[tuple[Block, range]]:
        """Each segment's stacked blocks and its layers. `walk` goes over them."""
        blocks: list[Any] = [self.blocks] if self.segments is None else list(self.segments)
        ends = np.cumsum([n for _, n in self.config.segments]).tolist()
        starts = [0, *ends[:-1]]
        return [(b, range(*bounds)) for b, *bounds in zip(blocks, starts, ends, strict=True)]

    def _stream(self, fields: dict[str, Any], **facts: Any) -> ResidualStream:
        """These fields as a residual stream of this model."""
        lacks, normed = lacking(self.config), self.config.norms_stream
        return ResidualStream(**fields, **facts, lacks=lacks, normed=normed)

    def _sites(
        self, padding: Padding, capture: Capture, edits: Edits, at: Array | None = None
    ) -> Sites:
        # Outside of the scan, once: each edit's position becomes a selection of columns.
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

    def _logits(self, x_BTD: Array, site: Sites, capture: Capture) -> Array:
        # The unembedding is a large product: it is left out unless logits are wanted.
        wanted = {"logits", "norm_final_scale"} & set(capture.fields)
        if not wanted:
            return ABSENT
        y_BTD = x_BTD
        if self.norm_final is not None:
            y_BTD = self.norm_final(x_BTD, site, "norm_final_scale")
        if "logits" not in wanted:
            return ABSENT
        # Positions are chosen before the unembedding, so that no other logits are computed.
        y_BND = select_positions(y_BTD, site.index, site.valid, axis=1)
        logits = self.unembed(y_BND)
        real = site.mask if site.index is None else site.valid
        return logits if real is None else jnp.where(real[..., None], logits, 0)
