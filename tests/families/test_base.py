"""Rules: shapes on disk, and the share of each parameter of a fused tensor."""

import numpy as np

from arrakis_jax.checkpoint.parameters import layers_of, parameters
from arrakis_jax.families import config_for, families
from arrakis_jax.families.base import rule
from tests.families.cases import TINY

CONFIG = config_for(
    "llama", hidden_size=10, num_attention_heads=6, num_key_value_heads=2, head_dim=4
)
D, H, G, K, R = 10, 6, 2, 4, 3


def test_rows_of_unequal_size():
    qkv = rule("qkv", "(part K) D -> D part K", "q", "k", "v", sizes=("H", "G", "G"))
    assert qkv.shape(CONFIG) == ((H + 2 * G) * K, D)
    array = np.random.default_rng(0).normal(size=qkv.shape(CONFIG))
    rows = np.split(array, [H * K, (H + G) * K])
    for name, block, heads in zip("qkv", rows, (H, G, G), strict=True):
        want = block.reshape(heads, K, D).transpose(2, 0, 1)
        np.testing.assert_array_equal(qkv.part(array, name, CONFIG), want)
    parts = [qkv.part(array, name, CONFIG) for name in "qkv"]
    np.testing.assert_array_equal(qkv.joined(parts, CONFIG), array)


def test_rows_grouped_by_key_value_head():
    qkv = rule("qkv", "(G part K) D -> D G part K", "q", "k", "v", sizes=("R", "1", "1"))
    array = np.random.default_rng(0).normal(size=qkv.shape(CONFIG))
    groups = array.reshape(G, R + 2, K, D)
    q = qkv.part(array, "q", CONFIG).reshape(D, H, K)
    np.testing.assert_array_equal(q[:, 4], groups[1, 1].T)
    np.testing.assert_array_equal(qkv.part(array, "v", CONFIG)[:, 1, 0], groups[1, -1].T)
    parts = [q, qkv.part(array, "k", CONFIG)[:, :, 0], qkv.part(array, "v", CONFIG)[:, :, 0]]
    np.testing.assert_array_equal(qkv.joined(parts, CONFIG), array)


def test_equal_parts_are_views():
    qkv = rule("qkv", "D (part H K) -> part D H K", "q", "k", "v")
    array = np.random.default_rng(0).normal(size=(D, 3 * H * K))
    k = qkv.part(array, "k", CONFIG)
    np.testing.assert_array_equal(k[0], array[:, H * K : 2 * H * K].reshape(D, H, K))
    assert np.shares_memory(k, array)


def test_rules_are_distinct_and_of_layers_where_they_say_so():
    for family in families().values():
        tensors = [row.tensor for row in family.rules]
        assert len(set(tensors)) == len(tensors)
        for row in family.rules:
            assert all(p.startswith("blocks.") == ("{l}" in row.tensor) for p in row.params)
            assert len(set(row.params)) == len(row.params)


def test_every_parameter_has_a_rule_that_inverts():
    rng = np.random.default_rng(0)
    for name, family in families().items():
        config = family.config(TINY[family.name])
        params, _ = parameters(config)
        generic = {layers_of(param, config)[0] for param in params}
        assert generic <= {param for row in family.rules for param in row.params}, name
        for row in family.rules:
            if not generic.issuperset(row.params):
                continue
            array = rng.normal(size=row.shape(config))
            parts = [row.part(array, param, config) for param in row.params]
            np.testing.assert_array_equal(row.joined(parts, config), array)
