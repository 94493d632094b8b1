"""The layers of one forward: what happens at their sites, and what is kept of it."""

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
        sites: for each segment, what happens at the sites of its layers.
        contexts: what attention takes from the positions.
    """

    model: Any
    sites: tuple[Sites, ...]
    contexts: AttentionContexts

    @classmethod
    def of(
        cls, model: Any, site: Sites, padding: Padding, before: tuple[Array, Array] | None = None
    ) -> "LayerRun":
        """The layers with these sites; `before` are keys and values of the columns before."""
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
        """The stream after one layer, and what its sites recorded."""
        sites = self.sites[place.segment]

        # Saves the products with weights and recomputes the rest, the T x T arrays above all.
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
        """The stream after the last layer, from that entering layer `start`; nothing is kept."""
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
        """The stream after the last layer, and the fields recorded, of all or of these layers.

        `taps` are `[L,...]` arrays, or tuples with an entry for each segment.
        """
        by_segment = {
            name: PerSegment(tap) if isinstance(tap, tuple) else tap for name, tap in taps.items()
        }

        def step(x_BTD: Array, place: Place, taps: Any) -> tuple[Array, dict[str, Array]]:
            return self.step(x_BTD, place, {n: tap for n, tap in taps.items() if tap is not None})

        if layers is not None:
            return self._of_layers(x_BTD, step, by_segment, layers)
        walked = walk(self.model, step, x_BTD, by_segment)
        return walked.state, _joined([routed(record) for record in walked.by_segment])

    def _of_layers(
        self, x_BTD: Array, step: Any, taps: dict[str, Any], layers: tuple[int, ...]
    ) -> tuple[Array, dict[str, Any]]:
        """As `recorded`, of some layers: the walk's state holds their records, and no others."""
        segments = [own for _, own in self.model.stacks()]
        rows = [[layer for layer in layers if layer in own] for own in segments]
        # Each layer's row among those kept in its segment; layers that are not kept get a row
        # beyond the last, where a write is dropped.
        slots = np.full(self.model.config.n_layers, len(layers))
        for kept in rows:
            slots[kept] = np.arange(len(kept))
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
    """The sites of one segment: edits that have a value for each segment take theirs."""
    if model.segments is None:
        return site
    edits = [
        edit.of_segment(i, layers, model.config.n_layers) if isinstance(edit, Edit) else edit
        for edit in site.edits
    ]
    return replace(site, edits=tuple(edit for edit in edits if edit is not None))


def _zeros(n: int, shapes: Any) -> Any:
    """Arrays of zeros of these shapes, with n in place of the first axis."""
    return jax.tree.map(lambda s: jnp.zeros((n, *s.shape[1:]), s.dtype), shapes)


def routed(record: dict[str, Any]) -> dict[str, Any]:
    """What was recorded, with the sites of routing as one field."""
    routing = {name: record.get(site, ABSENT) for name, site in ROUTING_SITES.items()}
    rest = {name: x for name, x in record.items() if name not in ROUTING_SITES.values()}
    return rest if routing["index"] is None else {**rest, "routing": Routing(**routing)}


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


def counted_layers(layers: tuple[int, ...] | None, n_layers: int) -> tuple[int, ...] | None:
    """Layers counted from 0, ascending, each once; None for None."""
    for layer in layers or ():
        if not -n_layers <= layer < n_layers:
            do = f"the model has {n_layers} layers"
            raise IndexError(expected("layers", f"in [{-n_layers}, {n_layers})", layer, do))
    return None if layers is None else tuple(sorted({layer % n_layers for layer in layers}))
