"""Tensors and parameters fit one to one, in every spelling; whatever does not is named."""

import re
from dataclasses import replace

import numpy as np
import pytest

from arrakis_jax.checkpoint import export_weights, from_pretrained
from arrakis_jax.checkpoint.files import Tensor
from arrakis_jax.checkpoint.parameters import named
from arrakis_jax.checkpoint.weights import sources
from arrakis_jax.core.errors import CheckpointError
from arrakis_jax.families import family_for
from tests.checkpoint.writers import (
    GPT2,
    LLAMA,
    MIXTRAL,
    SEGMENTS,
    W_Q,
    same,
    tensors_of,
    write,
)  # fmt: skip
from tests.families.cases import TINY


@pytest.mark.parametrize(
    "hf",
    [GPT2, SEGMENTS, LLAMA | {"attention_bias": True, "mlp_bias": True}]
    + [{"model_type": family} | TINY[family] for family in ("bloom", "gpt_oss", "mixtral", "opt")],
)
def test_export_is_the_inverse_of_loading(tmp_path, hf):
    tensors = tensors_of(hf)
    exported = export_weights(hf["model_type"], from_pretrained(write(tmp_path, hf)))
    assert exported.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(exported[name], tensor)


@pytest.mark.parametrize("hf", [GPT2, LLAMA])
def test_prefix_may_be_absent_and_buffers_present(tmp_path, hf):
    tensors = tensors_of(hf)
    prefix = family_for(hf["model_type"]).prefix
    bare = {name.removeprefix(prefix): t for name, t in tensors.items()}
    if hf is GPT2:
        bare["h.0.attn.bias"] = np.ones((1, 1, 13, 13), np.uint8)
        bare["h.2.attn.masked_bias"] = np.full(1, -1e4, np.float32)
    else:
        bare["layers.1.self_attn.rotary_emb.inv_freq"] = np.ones(5, np.float32)
        bare["rotary_emb.inv_freq"] = np.ones(5, np.float32)
    full = from_pretrained(write(tmp_path / "full", hf, tensors))
    assert same(full, from_pretrained(write(tmp_path / "bare", hf, bare)))


def test_stored_unembedding_of_a_tied_model(tmp_path):
    tensors = tensors_of(GPT2)
    plain = from_pretrained(write(tmp_path / "plain", GPT2, tensors))
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()
    assert same(plain, from_pretrained(write(tmp_path / "same", GPT2, tensors)))
    tensors["lm_head.weight"][30, 23] += 1
    with pytest.raises(CheckpointError, match="`lm_head.weight` must be a weight of this gpt2"):
        from_pretrained(write(tmp_path / "other", GPT2, tensors))


def test_all_problems_of_tensors_in_one_error(tmp_path):
    tensors = tensors_of(LLAMA)
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors[W_Q] = tensors[W_Q][:, :-1].copy()
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(80, np.float32)
    tensors["model.layers.2.mlp.up_proj.weight"] = np.ones((40, 24), np.float32)
    tensors["lm_head.weight"] = np.ones((32, 24), np.int8)
    with pytest.raises(CheckpointError) as error:
        from_pretrained(write(tmp_path, LLAMA, tensors))
    assert str(error.value).splitlines() == [
        "`lm_head.weight` must be stored as one of ('F64', 'F32', 'F16', 'BF16'), got I8; "
        "convert the weights",
        "`model.layers.0.self_attn.q_proj.bias` must be a weight of this llama config, "
        "got a tensor of shape (80,); the model has no place for it",
        "`model.layers.0.self_attn.q_proj.weight` must be of shape (80, 24), "
        "got shape (80, 23); compare it with config.json",
        "`model.layers.1.mlp.up_proj.weight` must be in the checkpoint, with shape (40, 24), "
        "got no such tensor; compare it with config.json",
        "`model.layers.2.mlp.up_proj.weight` must be a weight of this llama config, "
        "got a tensor of shape (40, 24); the model has no place for it",
        "`model.norm.weight` must be in the checkpoint, with shape (24,), "
        "got no such tensor; compare it with config.json",
    ]


def plan(hf, tensors):
    family = family_for(hf["model_type"])
    return sources(family, family.config(hf), tensors)


@pytest.mark.parametrize("family", TINY)
def test_every_tensor_of_every_family_is_needed_and_no_other(family):
    hf = {"model_type": family} | TINY[family]
    tensors = {
        name: Tensor(name, "F32", tensor.shape, lambda: None)
        for name, tensor in tensors_of(hf).items()
    }
    plan(hf, tensors)
    for name, tensor in tensors.items():
        if re.search(r"\.[02]\.", name):
            continue  # as in layer 1
        missing = {n: t for n, t in tensors.items() if n != name}
        more = tensors | {f"{name}_": replace(tensor, name=f"{name}_")}
        turned = tensors | {name: replace(tensor, shape=tensor.shape[::-1])}
        for wrong in (missing, more, turned):
            if wrong is turned and tensor.shape == tensor.shape[::-1]:
                continue
            with pytest.raises(CheckpointError, match=f"`{re.escape(name)}_?` must be"):
                plan(hf, wrong)


def test_one_tensor_for_each_expert(tmp_path):
    tensors = tensors_of(MIXTRAL)
    moe = from_pretrained(write(tmp_path, MIXTRAL, tensors)).blocks.moe
    for layer in range(2):
        place = f"model.layers.{layer}.block_sparse_moe."
        router = tensors[f"{place}gate.weight"]
        np.testing.assert_array_equal(moe.w_router[layer], router.T)
        for expert in range(4):
            for ours, theirs in (("w_gate", "w1"), ("w_in", "w3"), ("w_out", "w2")):
                want = tensors[f"{place}experts.{expert}.{theirs}.weight"].T
                np.testing.assert_array_equal(getattr(moe, ours)[layer, expert], want)


def test_another_spelling_of_the_same(tmp_path):
    """All experts in one tensor."""
    apart = tensors_of(MIXTRAL)
    together = {n: t for n, t in apart.items() if "block_sparse_moe" not in n}
    for layer in range(2):
        old, new = (f"model.layers.{layer}.{name}." for name in ("block_sparse_moe", "mlp"))
        w1, w2, w3 = (
            np.stack([apart[f"{old}experts.{e}.w{i}.weight"] for e in range(4)]) for i in (1, 2, 3)
        )
        together[f"{new}gate.weight"] = apart[f"{old}gate.weight"]
        together[f"{new}experts.gate_up_proj"] = np.concatenate([w1, w3], 1)
        together[f"{new}experts.down_proj"] = w2
    assert {n: t.shape for n, t in together.items()} == {
        n: t.shape for n, t in tensors_of(MIXTRAL, spelling=-1).items()
    }
    want = from_pretrained(write(tmp_path / "apart", MIXTRAL, apart))
    assert same(want, from_pretrained(write(tmp_path / "together", MIXTRAL, together)))

    missing = dict(together)
    del missing["model.layers.1.mlp.experts.down_proj"]
    with pytest.raises(CheckpointError, match="^`model.layers.1.mlp.experts.down_proj` must be in"):
        from_pretrained(write(tmp_path / "missing", MIXTRAL, missing))
    with pytest.raises(CheckpointError, match="mlp.experts.down_proj` must be a weight of this"):
        from_pretrained(write(tmp_path / "both", MIXTRAL, together | apart))
    neither = {n: t for n, t in together.items() if "down_proj" not in n}
    with pytest.raises(CheckpointError, match="block_sparse_moe.experts.0.w2.weight` must be in"):
        from_pretrained(write(tmp_path / "neither", MIXTRAL, neither))


def test_layers_that_differ(tmp_path):
    tensors = tensors_of(SEGMENTS)
    model = from_pretrained(write(tmp_path, SEGMENTS, tensors))
    assert model.blocks is None and [n for _, n in model.config.segments] == [1, 1, 3]
    for i, layers in enumerate(([0], [1], [2, 3, 4])):
        segment = model.segments[i]
        for j, layer in enumerate(layers):
            place = f"model.layers.{layer}."
            norm = tensors[f"{place}input_layernorm.weight"]
            np.testing.assert_array_equal(segment.norm_attn.w[j], norm)
            if i == 1:
                up = tensors[f"{place}mlp.experts.2.up_proj.weight"]
                np.testing.assert_array_equal(segment.moe.w_in[j, 2], up.T)
            else:
                up = tensors[f"{place}mlp.up_proj.weight"]
                np.testing.assert_array_equal(segment.mlp.w_in[j], up.T)
    assert not any(name.startswith("blocks") for name in named(model))


def test_two_names_of_one_tensor(tmp_path):
    tensors = tensors_of(LLAMA)
    tensors[W_Q.removeprefix("model.")] = tensors[W_Q]
    with pytest.raises(CheckpointError, match="^`layers.0.self_attn.q_proj.weight` must be a wei"):
        from_pretrained(write(tmp_path, LLAMA, tensors))


def test_names_are_respelled(tmp_path, monkeypatch):
    llama = family_for("llama")
    spelled = replace(llama, spelled={r"\.gain$": ".weight", "^decoder": "model"})
    monkeypatch.setattr("arrakis_jax.families.families", lambda: {"llama": spelled})
    tensors = tensors_of(LLAMA)
    other = {
        re.sub(r"norm\.weight", "norm.gain", name).replace("model", "decoder"): tensor
        for name, tensor in tensors.items()
    }
    assert not set(other) & set(tensors) - {"lm_head.weight"}
    want = from_pretrained(write(tmp_path / "usual", LLAMA, tensors))
    assert same(want, from_pretrained(write(tmp_path / "other", LLAMA, other)))
    both = other | {"model.norm.weight": tensors["model.norm.weight"]}
    with pytest.raises(CheckpointError, match="^`decoder.norm.gain` must be a weight of"):
        from_pretrained(write(tmp_path / "both", LLAMA, both))
    # A tensor is named as it is on disk.
    other["decoder.norm.gain"] = other["decoder.norm.gain"][:-1].copy()
    with pytest.raises(CheckpointError, match="^`decoder.norm.gain` must be of shape"):
        from_pretrained(write(tmp_path / "short", LLAMA, other))


def test_one_tensor_for_each_head(tmp_path):
    stablelm = LLAMA | dict(model_type="stablelm", qk_layernorm=True)
    del stablelm["head_dim"]
    stablelm["hidden_size"] = 64
    tensors = tensors_of(stablelm)
    model = from_pretrained(write(tmp_path, stablelm, tensors))
    for layer in range(2):
        for head in range(4):
            norm = tensors[f"model.layers.{layer}.self_attn.k_layernorm.norms.{head}.weight"]
            np.testing.assert_array_equal(model.blocks.attn.norm_k.w[layer, head], norm)
