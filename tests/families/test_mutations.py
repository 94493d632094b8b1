"""Parity notices every mistake: each mutation of a family's model makes its parity fail.

A seeded sample by default; all of them with `-m exhaustive`.
"""

import dataclasses
import random
from functools import cache
from tempfile import TemporaryDirectory

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from transformers import AutoConfig

from arrakis_jax import ModelConfig, Transformer, from_pretrained
from arrakis_jax.core.rope_scaling import ROPE_SCALINGS, RopeScaling
from arrakis_jax.families import family_for
from arrakis_jax.nn.norm import Norm
from tests.families import reference
from tests.families.cases import CASES, CHOSEN, TINY
from tests.models import chosen

SAMPLE = 25
# They describe a checkpoint, or how numbers are held, and not what is computed.
NOT_MUTATED = {"max_positions", "dtype", "stream_dtype", "matmul_precision"}
# Whole numbers that are sizes: the checkpoint would not fit.
SIZES = {
    "n_layers", "d_model", "n_heads", "n_kv_heads", "d_head", "d_mlp", "vocab_size", "n_experts",
    "d_expert", "d_shared_expert", "d_embed", "position_offset",
}  # fmt: skip


def numbers(config: ModelConfig, name: str) -> list:
    """Other values of a field, close by where they could be mistaken."""
    value, scale = getattr(config, name), config.attention_scale
    if name == "attention_scale":
        return [1.1 * (config.d_head**-0.5 if scale is None else scale)]
    if name == "window":
        return [] if value is None else [value - 1, value + 1, None]
    if name == "rotary_dim":
        return [] if config.rope_theta is None else [config.d_rotary - 2]
    if name == "experts_per_token":
        return [value - 1] if value else []
    if name in ("norm_offset", "up_offset"):
        applies = config.norm_gain if name == "norm_offset" else config.gated
        return [1.0 - value] if applies else []
    unused = {
        "norm_bias": config.norm != "layernorm",
        "qk_norm_bias": not (config.qk_norm and config.norm_bias and config.norm == "layernorm"),
        "rope_interleaved": config.positions != "rope",
    }
    if unused.get(name):
        return []
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, float):
        return [10 * value if name == "norm_eps" else 1.2 * value]
    if isinstance(value, tuple):
        turned = (*value[1:], value[0])
        return [turned] if turned != value else []
    return []


def names(config: ModelConfig, name: str) -> list:
    """Other names in a field that is one."""
    others = {
        "norm_placement": {
            "pre": "stream_before", "stream_before": "stream_after", "stream_after": "pre",
        },
        "qk_norm": {"each_head": "all_heads", "all_heads": "each_head", "head": "each_head"},
        "activation": {"gelu": "gelu_tanh", "gelu_tanh": "gelu", "gelu_bloom": "gelu"},
        "positions": {"alibi": None},
    }  # fmt: skip
    default = None
    if name == "activation":
        default = "silu" if config.activation == "relu" else "relu"
    other = others.get(name, {}).get(getattr(config, name), default)
    return [] if other is None and name != "positions" else [other]


def scalings(config: ModelConfig, name: str) -> list:
    """The scaling of the rotary frequencies with each of its numbers changed, and none."""
    scaling = getattr(config, name)
    if not isinstance(scaling, RopeScaling):
        return []
    changed = []
    for field in (*ROPE_SCALINGS[scaling.kind], "attention_factor"):
        value = getattr(scaling, field)
        if field.endswith("_factor") and isinstance(value, tuple):
            value = tuple(reversed(value))
            if field == "short_factor":
                continue  # of batches that are shorter
        elif field == "original_max_positions" and scaling.kind == "longrope":
            value = 100
        else:
            value = type(value)((0.25 if field.startswith("beta") else 1.5) * value)
        changed.append(dataclasses.replace(scaling, **{field: value}))
    return [*changed, None]


def mutations(case: str) -> list[tuple[str, str, object]]:
    """`(case, what is changed, to what)`."""
    family, changes = CASES[case]
    fields = {"model_type": family} | TINY[family] | changes
    hf = AutoConfig.for_model(**fields).to_dict()
    config = family_for(hf["model_type"]).config(hf)
    found = []
    for field in dataclasses.fields(config):
        if field.name in NOT_MUTATED | SIZES:
            continue
        for values in (numbers, names, scalings):
            found += [(case, field.name, value) for value in values(config, field.name)]
    found += [(case, size, "another size") for size in sorted(SIZES)]
    weights = {
        "kv heads tiled": 1 < config.n_kv_heads < config.n_heads,
        "gate and up swapped": config.gated,
        "centring dropped": config.norm == "layernorm",
        "sinks dropped": config.sinks,
        "query and key swapped": config.n_kv_heads == config.n_heads,
        "rows of values and keys swapped": True,
    }
    return found + [(case, what, None) for what, applies in weights.items() if applies]


EVERY = [mutation for case in CHOSEN for mutation in mutations(case)]
CHECKED = random.Random(0).sample(EVERY, SAMPLE)


@cache
def original(case: str) -> tuple[Transformer, dict[str, np.ndarray]]:
    torch_model = reference.torch_model(case)
    with TemporaryDirectory() as folder:
        reference.save(torch_model, folder)
        model = from_pretrained(folder)
    return model, reference.forward(torch_model, *reference.batch(case))


def differs(model: Transformer, case: str) -> bool:
    """Whether the model fails parity: its logits or a block's output are not torch's."""
    tokens, mask = reference.batch(case)
    want = original(case)[1]
    out = jax.jit(lambda model: model(jnp.asarray(tokens), mask=mask))(model)
    found = {"logits": out.logits, "resid_post": out.residuals.resid_post}
    return any(
        not np.abs(np.asarray(ours) - want[name])[..., mask, :].max()
        <= 2e-5 * np.abs(want[name][..., mask, :]).max()
        for name, ours in found.items()
    )


def named(model: Transformer) -> dict[str, jax.Array]:
    paths = jax.tree_util.tree_flatten_with_path(model)[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in paths}


def configured(model: Transformer, config: ModelConfig) -> Transformer | None:
    """The model's weights under another config; None if they do not fit it."""
    abstract = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    wanted, weights = named(abstract), named(model)
    if {n: w.shape for n, w in wanted.items()} != {n: w.shape for n, w in weights.items()}:
        return None
    return jax.tree.unflatten(jax.tree.structure(abstract), [weights[name] for name in wanted])


def with_weights(model: Transformer, change) -> Transformer:
    """The model with `change(path, weight, weights)` in place of each weight."""
    weights = named(model)
    changed = [change(name, weight, weights) for name, weight in weights.items()]
    return jax.tree.unflatten(jax.tree.structure(model), changed)


def tiled(model: Transformer) -> Transformer:
    """Query head h reads key/value head h % G: the heads reordered so that ours do the same."""
    config = model.config
    order = np.argsort(np.arange(config.n_heads) % config.n_kv_heads, kind="stable")
    axes = {".w_q": 2, ".b_q": 1, ".w_o": 1, ".sinks": 1, ".norm_q.w": 1}

    def change(path, weight, weights):
        for name, axis in axes.items():
            if f"{name}.value" in path and weight.ndim > axis and weight.shape[axis] == len(order):
                return jnp.take(weight, order, axis)
        return weight

    return with_weights(model, change)


def swapped(model: Transformer, one: str, other: str) -> Transformer:
    def change(path, weight, weights):
        for a, b in ((one, other), (other, one)):
            if f".{a}.value" in path:
                return weights[path.replace(f".{a}.value", f".{b}.value")]
        return weight

    return with_weights(model, change)


@pytest.mark.parametrize(("case", "what", "value"), chosen(EVERY, CHECKED))
def test_parity_fails(case, what, value, monkeypatch):
    model, _ = original(case)
    if what == "kv heads tiled":
        model = tiled(model)
    elif what == "gate and up swapped":
        model = swapped(model, "w_gate", "w_in")
    elif what == "query and key swapped":
        model = swapped(model, "w_q", "w_k")
    elif what == "rows of values and keys swapped":
        model = swapped(model, "w_v", "w_k")
    elif what == "sinks dropped":
        model = with_weights(model, lambda path, w, _: w - 100 if "sinks" in path else w)
    elif what == "centring dropped":
        monkeypatch.setattr(Norm, "centre", lambda self, x: x)
    else:
        if value == "another size":
            old = getattr(model.config, what)
            value = 2 if old is None else old + 1
        try:
            model = configured(model, dataclasses.replace(model.config, **{what: value}))
        except ValueError:
            return  # there is no such model
    assert model is None or differs(model, case)


@pytest.mark.parametrize("case", chosen(CHOSEN, {case for case, _, _ in CHECKED}))
def test_parity_holds(case):
    assert not differs(original(case)[0], case)
