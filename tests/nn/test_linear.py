"""Products in bfloat16: their values and gradients, against the same products in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrakis_jax import residual_gradients
from arrakis_jax.nn.linear import product
from tests.cost import dots, flops, temporary
from tests.models import batch, close, config, model

ROUNDED = dict(dtype="bfloat16", matmul_precision="default")
SIZES = dict(B=2, T=3, S=4, D=6, H=4, K=5, G=2, R=2, F=7, V=9)
TOKENS, MASK, _ = batch()


@pytest.mark.parametrize(
    "spec",
    ["BTD,DF->BTF", "BTD,D->BT", "BTD,VD->BTV", "BTHD,DHK->BTHK", "BGRTK,BSGK->BGRTS",
     "BGRTS,BSGK->BGRTK"],
)  # fmt: skip
def test_a_rounded_product_and_its_gradients(spec):
    in_a, in_b, out = spec.replace("->", ",").split(",")
    keys = jax.random.split(jax.random.key(0), 3)
    a, b, dy = (
        jax.random.normal(key, [SIZES[axis] for axis in axes]).astype(jnp.bfloat16)
        for key, axes in zip(keys, (in_a, in_b, out), strict=True)
    )
    y, back = jax.vjp(lambda a, b: product(spec, a, b, config=config("gpt2", **ROUNDED)), a, b)
    da, db = back(dy.astype(jnp.float32))
    assert (y.dtype, da.dtype, db.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    exact_a, exact_b, exact_dy = (np.asarray(x, np.float64) for x in (a, b, dy))
    close(y, np.einsum(spec, exact_a, exact_b), 1e-6)
    close(da, np.einsum(f"{out},{in_b}->{in_a}", exact_dy, exact_b), 2**-8)
    close(db, np.einsum(f"{out},{in_a}->{in_b}", exact_dy, exact_a), 2**-8)


@pytest.mark.parametrize(
    "variant, changes", [("gpt2", {}), ("llama", dict(d_embed=10)), ("mixed", {})]
)
def test_gradients_multiply_bfloat16_alone_and_sum_in_float32(variant, changes):
    m = model(variant, **ROUNDED, **changes)

    def loss(m):
        return m(TOKENS, mask=MASK, capture=("logits",)).logits.sum()

    forward = [eqn for eqn, _ in dots(jax.make_jaxpr(loss)(m).jaxpr)]
    found = [eqn for eqn, _ in dots(jax.make_jaxpr(jax.grad(loss))(m).jaxpr)]
    assert len(found) >= 3 * len(forward) > 0
    for eqn in found:
        assert [x.aval.dtype for x in eqn.invars] == [jnp.bfloat16, jnp.bfloat16], eqn
        assert eqn.outvars[0].aval.dtype == jnp.float32, eqn


@pytest.mark.parametrize("variant", ["gpt2", "llama", "mixed"])
def test_rounding_multiplies_no_more(variant):
    """No product is run again for a gradient, and none is for one that is not asked for."""

    def count(**changes):
        return flops(
            lambda m: residual_gradients(m, TOKENS, 3, mask=MASK), model(variant, **changes)
        )

    assert count(**ROUNDED) == count()


@pytest.mark.parametrize("tied", [True, False])
def test_the_logits_of_one_row_do_not_widen_the_unembedding(tied):
    m = model("llama", tied=tied, vocab_size=4000, **ROUNDED)
    y_BTD = jax.random.normal(jax.random.key(0), (2, 1, m.config.d_model))
    one, two = (
        temporary(lambda m, y: m.unembed(y), m, y_BTD[:1]),
        temporary(lambda m, y: m.unembed(y), m, y_BTD),
    )
    assert one < two + 4000 * m.config.d_model
    close(m.unembed(y_BTD[:1]), m.unembed(y_BTD)[:1], 1e-6)
