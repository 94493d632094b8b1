"""Batches on a mesh: any kind of axes, the numbers of one device, one clear error otherwise."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from arrakis_jax import Prompts, logit_attribution, run
from tests.models import batch, close, model


def prompts() -> Prompts:
    tokens, mask, _ = batch(lengths=(3, 5, 2, 4))
    return Prompts(np.where(mask, tokens, -1).astype(np.int32), mask)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_tokens_on_a_mesh(kind):
    m, batch_of_four = model(), prompts()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    tokens, mask = (jax.device_put(x, rows) for x in batch_of_four)
    want = run(m, batch_of_four).logits
    for placed in (Prompts(tokens, mask), batch_of_four.place(mesh)):
        found = run(m, placed).logits
        close(found, want, 1e-6)
        assert len(found.sharding.device_set) == 4
    heads = logit_attribution(m, tokens, jax.device_put(np.arange(4), rows), mask=mask)
    close(heads.terms, logit_attribution(m, batch_of_four, np.arange(4)).terms, 1e-5)


def test_batches_that_no_mesh_takes():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    with pytest.raises(ValueError, match="`prompts` must be a multiple of the 4 .* got 3 of them"):
        prompts()[:3].place(mesh)
    with pytest.raises(ValueError, match="`axis` must be an axis of the mesh, .*, got 'rows'"):
        prompts().place(mesh, "rows")
    with pytest.raises(TypeError, match="`mesh` must be a jax.sharding.Mesh"):
        prompts().place("data")
    placed = prompts().place(mesh)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="`jax.set_mesh` must be without"):
        run(model(), placed)
