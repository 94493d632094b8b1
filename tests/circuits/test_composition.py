"""Composition scores against explicit D x D products, known circuits, and random heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from arrakis_jax.circuits.composition import _variance, composition_baseline, composition_scores
from arrakis_jax.circuits.matrices import ov_matrices, qk_matrices
from arrakis_jax.core.axes import over
from tests.induction import PREV, V, induction_model
from tests.models import close, compilations, model

KINDS = ("q", "k", "v")


def by_hand(ov, qk):
    """`[L,H,L,H]` of each kind, from D x D matrices."""
    norm = lambda x: np.linalg.norm(x, axis=(-2, -1))  # noqa: E731
    n_layers, n_heads = ov.shape[:2]
    found = {kind: np.zeros((n_layers, n_heads) * 2) for kind in KINDS}
    for i, j in zip(*np.triu_indices(n_layers, 1), strict=True):
        for a, b in np.ndindex(n_heads, n_heads):
            first = ov[i, a]
            for kind, second in zip(KINDS, (qk[j, b], qk[j, b].T, ov[j, b]), strict=True):
                found[kind][i, a, j, b] = norm(first @ second) / norm(first) / norm(second)
    return found


@pytest.mark.parametrize(
    "variant", ["llama", "gpt2", "post", "both", "shared_norm", "moe", "mixed", "no_norm"]
)
def test_against_products_of_full_matrices(variant, x64):
    m = model(variant, dtype="float64")
    for distance, fold in ((0, True), (3, True), ([1, 2], False)):
        found = composition_scores(m, distance=distance, fold=fold)
        ov, qk = ov_matrices(m, fold=fold), qk_matrices(m, distance=distance, fold=fold)
        expected = by_hand(np.asarray(ov.expand()), np.asarray(qk.expand()))
        for kind in KINDS:
            np.testing.assert_allclose(getattr(found, kind), expected[kind], atol=1e-13)
    assert found.baseline == 20**-0.5


def test_a_hand_built_induction_circuit(x64):
    """G4: the later head's keys read what the earlier one wrote, and nothing else does."""
    m = induction_model()
    # Its keys also read token 0 as the previous one, which layer 0 never writes.
    found = composition_scores(m)
    np.testing.assert_allclose(found.k[0, 0, 1, 0], 1 / np.sqrt(V + 1 / 4), rtol=1e-13)
    w_k = m.blocks.attn.w_k
    w_k[...] = w_k[...].at[1, PREV, 0, 0].set(0)
    found = composition_scores(m)
    np.testing.assert_allclose(found.k[0, 0, 1, 0], 1 / np.sqrt(V - 1 + 1 / 4), rtol=1e-13)
    rest = np.asarray(found.k).copy()
    rest[0, 0, 1, 0] = 0
    for values in (found.q, found.v, rest):
        np.testing.assert_array_equal(values, 0)


def test_bounds_of_the_scores(x64):
    """One head that writes what the other reads, direction by direction, scores one: K = 1."""
    m = model("no_norm", d_head=2, n_layers=2, n_heads=1, n_kv_heads=1, dtype="float64")
    attn, rng = m.blocks.attn, np.random.default_rng(0)
    w, other = np.linalg.qr(rng.normal(size=(20, 2)))[0].T
    ones = np.ones(2)
    for name in ("w_q", "w_k", "w_v"):
        getattr(attn, name)[...] = jnp.asarray(np.outer(w, ones))[None, :, None] * jnp.ones(
            (2, 1, 1, 1)
        )
    attn.w_o[...] = jnp.asarray(np.outer(ones, w))[None, None] * jnp.ones((2, 1, 1, 1))
    for kind in KINDS:
        np.testing.assert_allclose(getattr(composition_scores(m), kind)[0, 0, 1, 0], 1, rtol=1e-13)
    attn.w_o[...] = jnp.asarray(np.outer(ones, other))[None, None] * jnp.ones((2, 1, 1, 1))
    for kind in KINDS:
        np.testing.assert_allclose(getattr(composition_scores(m), kind), 0, atol=1e-13)


def test_random_heads_score_the_baseline():
    """G16: the root mean square is D^-1/2; measured 0.0042 standard deviation at D=128, K=16."""
    m = model(d_model=128, d_head=16)
    random = composition_baseline(m, key=jax.random.key(0), draws=300)
    assert random.scores.shape == (300,)
    assert abs(random.rms * 128**0.5 - 1) < 0.03
    np.testing.assert_allclose(random.mean, 0.0885, rtol=0.02)
    np.testing.assert_allclose(random.std, 0.0042, rtol=0.15)
    scores = np.asarray(random.scores)
    np.testing.assert_allclose(random.rms, np.sqrt(np.mean(scores**2)), rtol=1e-6)
    other = composition_baseline(m, key=jax.random.key(1), draws=300)
    assert not np.isin(random.scores, other.scores).any()


def test_singular_values_do_not_move_the_baseline(x64):
    """Its mean square is 1 / D also for heads of one dominant direction, in random orientation."""
    m = model("no_norm", d_head=4, n_layers=2, n_heads=40, n_kv_heads=40, dtype="float64")
    scale = jnp.asarray([10.0, 1.0, 0.5, 0.1])
    for name in ("w_q", "w_v"):
        w = getattr(m.blocks.attn, name)
        w[...] = w[...] * over(scale, w[...])
    found = composition_scores(m)
    for kind in KINDS:
        scores = np.asarray(getattr(found, kind))[0, :, 1]
        np.testing.assert_allclose(np.mean(scores**2), 1 / 20, rtol=0.1)


def test_excess_and_z_scores(x64):
    m = model(dtype="float64")
    found = composition_scores(m)
    random = composition_baseline(m, key=jax.random.key(0), draws=50)
    z = found.z_scores(random)
    earlier = np.arange(3)[:, None] < np.arange(3)
    for kind in KINDS:
        raw = np.moveaxis(np.asarray(getattr(found, kind)), 2, 1)
        for moved, values in (
            (found.excess, raw - 20**-0.5),
            (z, (raw - np.mean(random.scores)) / np.std(random.scores)),
        ):
            values = np.moveaxis(values * earlier[:, :, None, None], 1, 2)
            np.testing.assert_allclose(getattr(moved, kind), values, atol=1e-12)
            assert moved.baseline == 0
        assert (raw[earlier] > 0).all() and not raw[~earlier].any()
    # Random weights are unrelated heads.
    assert np.abs(z.k[0, :, 1]).mean() < 2


def test_oriented_z_scores_of_matrices_turned_at_random(x64):
    """Mean 0 and variance 1 over random rotations, whatever the singular values."""
    d, n = 6, 20000
    rng = np.random.default_rng(0)
    q, r = np.linalg.qr(rng.normal(size=(n, d, d)))
    q = q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None]
    for first, second in (([3.0, 1.0], [1.0, 1.0]), ([1.0, 0.0], [5.0, 2.0]), ([1, 0.9], [1, 0.1])):
        p, s = (np.square(x) / np.sum(np.square(x)) for x in (first, second))
        squares = np.einsum("i,nij,j->n", p, np.square(q[:, :2, :2]), s)
        np.testing.assert_allclose(squares.mean(), 1 / d, rtol=0.03)
        variance = _variance(jnp.sum(p**2), jnp.sum(s**2), d)
        np.testing.assert_allclose(squares.var(), variance, rtol=0.05)


def test_oriented_z_scores_of_models(x64):
    m = model("no_norm", n_layers=2, n_heads=40, n_kv_heads=40, dtype="float64")
    scale = jnp.asarray([10.0, 1.0, 0.5, 0.1])
    for name in ("w_q", "w_v"):
        w = getattr(m.blocks.attn, name)
        w[...] = w[...] * over(scale, w[...])
    found = composition_scores(m)
    for matrix, name in ((ov_matrices(m), "ov"), (qk_matrices(m), "qk")):
        s = np.asarray(matrix.singular_values())
        concentration = (s**4).sum(-1) / (s**2).sum(-1) ** 2
        close(getattr(found, f"concentration_{name}"), concentration, 1e-12)
    z = found.oriented_z_scores
    for kind in KINDS:
        values = np.asarray(getattr(z, kind))
        assert not values[1].any() and not values[0, :, 0].any()
        assert abs(values[0, :, 1].mean()) < 0.2 and 0.8 < values[0, :, 1].std() < 1.2
    # Of Gaussian heads these are too wide: their scores scatter more than those of random weights.
    random = composition_baseline(m, key=jax.random.key(0))
    assert np.asarray(found.z_scores(random).k)[0, :, 1].std() > 1.3


def shapes(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (v.aval.shape for v in eqn.outvars if hasattr(v.aval, "shape"))
        for value in eqn.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from shapes(inner)


def test_no_matrix_of_width_by_width_is_formed():
    m = model("llama", d_model=22, n_layers=5)
    traced = list(shapes(jax.make_jaxpr(composition_scores)(m).jaxpr))
    assert (6, 22, 4) in traced and (6, 4, 6, 4) in traced
    assert not [s for s in traced if s.count(22) > 1]
    # One pair of layers at a time: nothing has two layer axes but the scores.
    assert {s for s in traced if s.count(5) > 1} == {(5, 5, 6, 6), (5, 6, 5, 6)}


@pytest.mark.parametrize("n_layers", [0, 1])
def test_few_layers_have_no_pairs(n_layers):
    found = composition_scores(model(n_layers=n_layers))
    assert found.v.shape == (n_layers, 6, n_layers, 6) and not np.asarray(found.v).any()


def test_a_head_of_zeros_scores_zero():
    m = model()
    m.blocks.attn.w_o[...] = m.blocks.attn.w_o[...].at[0, 2].set(0)
    found = composition_scores(m)
    for kind in KINDS:
        values = np.asarray(getattr(found, kind))
        assert np.isfinite(values).all() and not values[0, 2].any() and values[0, 1, 1:].all()


def test_jit_equals_no_jit_and_compiles_once(x64):
    m = model("gpt2", dtype="float64")
    found = composition_scores(m, distance=1)
    inside = jax.jit(lambda m, d: composition_scores(m, distance=d))(m, 1)
    for kind in KINDS:
        close(getattr(inside, kind), getattr(found, kind), 1e-13)
    key = jax.random.key(0)
    random = composition_baseline(m, key=key, draws=7)
    close(
        jax.jit(lambda m, k: composition_baseline(m, key=k, draws=7))(m, key).mean,
        random.mean,
        1e-13,
    )
    with compilations() as names:
        composition_scores(m, distance=4)
        composition_baseline(m, key=jax.random.key(1), draws=7)
    assert names == []


def test_bfloat16_and_float32(x64):
    double = model("llama", dtype="float64")
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 2e-2)):
        m = model("llama", dtype=dtype)
        found = composition_scores(m)
        assert found.q.dtype == jnp.float32
        close(found.q, composition_scores(double).q, tolerance)


def test_exports_for_accelerators():
    m = model("llama")
    leaves, structure = jax.tree.flatten(m)

    def flat(leaves, distance, key):
        m = jax.tree.unflatten(structure, leaves)
        random = composition_baseline(m, key=jax.random.wrap_key_data(key), draws=5)
        return jax.tree.leaves(composition_scores(m, distance=distance).z_scores(random))

    key = jax.random.key_data(jax.random.key(0))
    exported = export.export(jax.jit(flat), platforms=("cpu", "cuda", "tpu"))(leaves, 1, key)
    again = export.deserialize(bytearray(exported.serialize())).call(leaves, 1, key)
    for a, b in zip(again, flat(leaves, 1, key), strict=True):
        close(a, b, 1e-4)


def test_bad_input():
    m = model()
    with pytest.raises(ValueError, match="`distance` must be at least 0, got -3"):
        composition_scores(m, distance=-3)
    for draws in (0, 1.5, True):
        with pytest.raises(ValueError, match=r"`draws` must be an int in \[1, 1000000\], got"):
            composition_baseline(m, key=jax.random.key(0), draws=draws)
