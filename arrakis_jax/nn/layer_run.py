"""The layers of one forward: edits and taps at their sites, and the fields they record."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.core.axes import Array, Float, Int
from arrakis_jax.core.errors import expected
from arrakis_jax.nn.context import AttentionContexts
from arrakis_jax.nn.site import Sites
from arrakis_jax.nn.walk import PerSegment, Place, walk, walk_from
from arrakis_jax.results.record import ABSENT
from arrakis_jax.stream.edits import Edit
from arrakis_jax.stream.fields import ROUTING_SITES, SEGMENTED
from arrakis_jax.stream.padding import Padding
from arrakis_jax.stream.residuals import Routing


@dataclass(frozen=True)
class LayerRun:
    """One forward through the layers.

    Attributes:
        model: the transformer.
        sites: the taps, edits and captures of each segment's layers.
        contexts: what attention needs to know of positions.
    """

    model: Any
    sites: tuple[Sites, ...]
    contexts: AttentionContexts

    @classmethod
    def of(
        cls, model: Any, site: Sites, padding: Padding, before: tuple[Array, Array] | None = None
    ) -> "LayerRun":
        """The layers with these sites. `before` holds keys and values of earlier columns."""
        contexts = AttentionContexts.of(model.config, padding)
        segments = enumerate(model.stacks())
        return cls(
            model,
            tuple(_in_segment(site, i, layers, model) for i, (_, layers) in segments),
            contexts if before is None else contexts.after(before),
        )

    def step(
        self, x_BTD: Float[Array, "B T D"], place: Place, taps: dict[str, Any]
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """The stream after one layer, and the records of its sites."""
        sites = self.sites[place.segment]

        # For a backward pass, products with weights are saved: they cost the most time. The rest
        # is recomputed, above all the T x T arrays of attention: they cost the most memory.
        # `prevent_cse` is not needed inside a scan and would slow it down.
        @partial(
            jax.checkpoint,
            policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            prevent_cse=False,
        )
        def layer(
            x_BTD: Array, block: Any, taps: dict[str, Any], index: Array
        ) -> tuple[Array, dict[str, Array]]:
            at_layer = replace(sites, taps=taps, layer=index, records={})
            return block(x_BTD, self.contexts.at(index), index, at_layer), at_layer.records

        return layer(x_BTD, place.block, taps, place.index)

    def through(
        self, x_BTD: Float[Array, "B T D"], start: int | Int[Array, ""]
    ) -> Float[Array, "B T D"]:
        """The stream after the last layer, from `x_BTD` entering layer `start`; no records."""
        if isinstance(start, int):
            rest = range(start, self.model.config.n_layers)
            return walk(
                self.model, lambda x, place, _: (self.step(x, place, {})[0], None), x_BTD,
                layers=rest,
            ).state  # fmt: skip
        return walk_from(self.model, lambda x, place: self.step(x, place, {})[0], x_BTD, start)

    def recorded(
        self,
        x_BTD: Float[Array, "B T D"],
        taps: dict[str, Any],
        layers: tuple[int, ...] | None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        """The stream after the last layer, and the recorded fields of all or of these layers.

        `taps` are `[L,...]` arrays, or tuples with an entry for each segment.
        """
        by_segment = {
            name: PerSegment(tap) if isinstance(tap, tuple) else tap for name, tap in taps.items()
        }

        def step(x_BTD: Array, place: Place, taps: Any) -> tuple[Array, dict[str, Array]]:
            # A segment whose layers do not have a site has None in place of its tap.
            return self.step(x_BTD, place, {n: tap for n, tap in taps.items() if tap is not None})

        if layers is not None:
            return self._of_layers(x_BTD, step, by_segment, layers)
        walked = walk(self.model, step, x_BTD, by_segment)
        return walked.state, _joined([routed(record) for record in walked.by_segment])

    def _of_layers(
        self, x_BTD: Array, step: Any, taps: dict[str, Any], layers: tuple[int, ...]
    ) -> tuple[Array, dict[str, Any]]:
        """As `recorded`, for some layers: the walk's state holds only their records."""
        segments = [members for _, members in self.model.stacks()]
        rows = [[layer for layer in layers if layer in members] for members in segments]
        # A scan would stack the records of every layer. So the records go into the state, where
        # each layer has its row. A layer that is not kept has a row beyond the last, and its
        # write is dropped.
        slots = np.full(self.model.config.n_layers, len(layers))
        for kept in rows:
            slots[kept] = np.arange(len(kept))
        # The records' shapes must be known before the walk. `eval_shape` computes no values.
        shapes = jax.eval_shape(lambda x: walk(self.model, step, x, taps).by_segment, x_BTD)
        records = tuple(_zeros(len(kept), s) for kept, s in zip(rows, shapes, strict=True))

        def keeping(state: tuple, place: Place, xs: tuple) -> tuple[tuple, None]:
            (x_BTD, records), (taps, slot), i = state, xs, place.segment
            x_BTD, record = step(x_BTD, place, taps)
            if rows[i]:
                put = jax.tree.map(lambda a, r: a.at[slot].set(r, mode="drop"), records[i], record)
                records = (*records[:i], put, *records[i + 1 :])
            return (x_BTD, records), None

        state = (x_BTD, records)
        x_BTD, records = walk(self.model, keeping, state, (taps, jnp.asarray(slots))).state
        return x_BTD, _joined([routed(record) for record in records])


def _in_segment(site: Sites, i: int, layers: range, model: Any) -> Sites:
    """The sites of one segment. An edit with a value for each segment takes this one's."""
    if model.segments is None:
        return site
    edits = [
        edit.of_segment(i, layers, model.config.n_layers) if isinstance(edit, Edit) else edit
        for edit in site.edits
    ]
    return replace(site, edits=tuple(edit for edit in edits if edit is not None))


def _zeros(n: int, shapes: Any) -> Any:
    """Zeros of these shapes, but with n entries on the first axis."""
    return jax.tree.map(lambda s: jnp.zeros((n, *s.shape[1:]), s.dtype), shapes)


def routed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the sites of routing gathered in one field."""
    routing = {name: record.get(site, ABSENT) for name, site in ROUTING_SITES.items()}
    rest = {name: x for name, x in record.items() if name not in ROUTING_SITES.values()}
    return rest if routing["index"] is None else {**rest, "routing": Routing(**routing)}


def _joined(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The segments' records, stacked over all layers, or as a tuple where their shapes differ."""
    if len(records) == 1:
        return records[0]
    names = {name: None for record in records for name in record}
    return {
        name: tuple(record.get(name) for record in records)
        if name in SEGMENTED
        else jnp.concatenate([record[name] for record in records])
        for name in names
    }


def counted_layers(layers: tuple[int, ...] | None, n_layers: int) -> tuple[int, ...] | None:
    """These layers counted from 0, ascending, without repeats; None for None."""
    for layer in layers or ():
        if not -n_layers <= layer < n_layers:
            do = f"the model has {n_layers} layers"
            raise IndexError(expected("layers", f"in [{-n_layers}, {n_layers})", layer, do))
    return None if layers is None else tuple(sorted({layer % n_layers for layer in layers}))
