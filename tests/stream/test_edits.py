"""Edits whose value could be read in two ways are refused."""

import numpy as np
import pytest

from arrakis_jax import Replace, run
from tests.models import close, model


def test_a_value_of_every_layer_or_of_one():
    m = model()
    n, d = m.config.n_layers, m.config.d_model
    square, wide = np.arange(n * n).reshape(n, n), np.arange(n * (n + 1)).reshape(n, n + 1)
    part = np.random.default_rng(0).normal(size=(n, n, d))
    for edit in (
        Replace("resid_pre", part, position=-1),
        Replace("norm_mlp_scale", part[..., 0], position=0),
    ):
        with pytest.raises(ValueError, match=r"got shape \(3, 3.*\), which could be either; give"):
            run(m, square, edits=edit)
    with pytest.raises(ValueError, match="`value` must be broadcastable to site 'resid_pre'"):
        run(m, wide, edits=Replace("resid_pre", part, position=-1))
    # Named by `layer`, by every axis, or by an index for each layer, it is read as it is meant.
    one = run(m, square, edits=Replace("resid_pre", part, layer=1, position=-1))
    close(one.residuals.resid_pre[1, :, -1], part[:, -1].astype(np.float32), 1e-6)
    stacked = np.broadcast_to(part[:, :, None], (n, n, n, d))
    every = run(m, square, edits=Replace("resid_pre", stacked, position=-1))
    edits = [Replace("resid_pre", part[i], layer=i, position=-1) for i in range(n)]
    each = run(m, square, edits=edits)
    close(every.residuals.resid_pre[:, :, -1], part.astype(np.float32), 1e-6)
    close(each.logits, every.logits, 1e-6)
