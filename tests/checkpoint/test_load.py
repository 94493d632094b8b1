"""What is on disk arrives unchanged, uncopied, and where it belongs."""

import json
import re
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

from arrakis_jax import run
from arrakis_jax.checkpoint import from_pretrained, load, partition, save, weights
from arrakis_jax.checkpoint.parameters import parameters
from arrakis_jax.core.errors import CheckpointError
from arrakis_jax.families import family_for
from tests.checkpoint.writers import (
    GPT2,
    GPT_OSS,
    LLAMA,
    MIXTRAL,
    SEGMENTS,
    TOKENS,
    W_Q,
    logits,
    same,
    tensors_of,
    write,
)  # fmt: skip


def test_values(tmp_path):
    tensors = tensors_of(LLAMA)
    model = from_pretrained(write(tmp_path))
    d, h, g, k = 24, 8, 4, 10
    for layer in range(2):
        block = {n.split(f"layers.{layer}.")[-1]: t for n, t in tensors.items()}
        attn, mlp = model.blocks.attn, model.blocks.mlp
        q, v = block["self_attn.q_proj.weight"], block["self_attn.v_proj.weight"]
        np.testing.assert_array_equal(attn.w_q[layer], q.T.reshape(d, h, k))
        np.testing.assert_array_equal(attn.w_v[layer], v.T.reshape(d, g, k))
        o = block["self_attn.o_proj.weight"]
        np.testing.assert_array_equal(attn.w_o[layer], o.T.reshape(h, k, d))
        np.testing.assert_array_equal(mlp.w_gate[layer], block["mlp.gate_proj.weight"].T)
        np.testing.assert_array_equal(mlp.w_in[layer], block["mlp.up_proj.weight"].T)
    np.testing.assert_array_equal(model.w_u[...], tensors["lm_head.weight"].T)


def test_parameters_can_be_set(tmp_path):
    model = from_pretrained(write(tmp_path))
    before = logits(model)
    model.w_e[...] = 2 * model.w_e[...]
    assert not np.allclose(before, logits(model))


@pytest.mark.parametrize(
    ("stored", "asked", "got"),
    [
        ("float32", None, "float32"),
        ("bfloat16", None, "bfloat16"),
        ("float16", None, "float32"),
        ("float32", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "float32"),
        ("float64", "float32", "float32"),
    ],
)
def test_dtypes(tmp_path, stored, asked, got):
    tensors = tensors_of(LLAMA, np.dtype(stored))
    # The tensors decide, not what config.json says about them.
    model = from_pretrained(write(tmp_path, LLAMA, tensors, torch_dtype="float32"), dtype=asked)
    assert model.config.dtype == got
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {np.dtype(got)}
    np.testing.assert_array_equal(
        np.asarray(model.w_e[...]), tensors["model.embed_tokens.weight"].astype(got)
    )


def test_mixed_dtypes_give_the_widest(tmp_path):
    tensors = tensors_of(LLAMA, ml_dtypes.bfloat16)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    assert from_pretrained(write(tmp_path, LLAMA, tensors)).config.dtype == "float32"


def test_float64_needs_x64(tmp_path):
    folder = write(tmp_path, LLAMA, tensors_of(LLAMA, np.float64))
    for asked in (None, "float64"):
        with pytest.raises(ValueError, match="`dtype` must be .* without x64, got 'float64'"):
            from_pretrained(folder, dtype=asked)
    with jax.enable_x64(True):
        assert from_pretrained(folder).w_e.dtype == np.float64
    with pytest.raises(ValueError, match="`dtype` must be .*, got 'float16'"):
        from_pretrained(folder, dtype="float16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_arrays_are_used_without_a_copy(tmp_path, monkeypatch, dtype):
    made = []
    aligned = weights.aligned
    monkeypatch.setattr(weights, "aligned", lambda *a: made.append(aligned(*a)) or made[-1])
    model = from_pretrained(write(tmp_path), dtype=dtype)
    addresses = {array.ctypes.data for array in made}
    assert {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(model)} == addresses


def test_model_outlives_its_files_and_host_arrays(tmp_path):
    folder = write(tmp_path)
    model = from_pretrained(folder)
    before = logits(model)
    (folder / "model.safetensors").unlink()
    junk = [np.full(array.shape, 7.0, np.float32) for array in jax.tree.leaves(model)]
    np.testing.assert_array_equal(before, logits(model))
    assert len(junk) == len(jax.tree.leaves(model))


def test_on_a_mesh(tmp_path):
    folder = write(tmp_path)
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=axis_types)
    model, whole = from_pretrained(folder, mesh=mesh), from_pretrained(folder)
    attn, mlp = model.blocks.attn, model.blocks.mlp
    assert attn.w_q[...].addressable_shards[0].data.shape == (2, 24, 2, 10)
    assert attn.w_k[...].addressable_shards[0].data.shape == (2, 24, 1, 10)
    assert mlp.w_out[...].addressable_shards[0].data.shape == (2, 10, 24)
    assert model.w_e[...].addressable_shards[0].data.shape == (8, 24)
    assert model.norm_final.w[...].sharding.is_fully_replicated
    assert same(model, whole)
    assert np.allclose(logits(model), logits(whole), atol=1e-4)
    odd = from_pretrained(write(tmp_path / "odd", vocab_size=31), mesh=mesh)
    assert odd.w_u[...].sharding.is_fully_replicated
    rows = jax.make_mesh((8,), ("data",), axis_types=axis_types[:1])
    assert from_pretrained(folder, mesh=rows).w_e[...].sharding.is_fully_replicated


def test_config_problems_come_in_one_error(tmp_path):
    folder = write(tmp_path)
    hf = LLAMA | {"attn_logit_softcapping": 30.0, "hidden_act": "mish"}
    (folder / "config.json").write_text(json.dumps(hf))
    with pytest.raises(CheckpointError) as error:
        from_pretrained(folder)
    for name in ("attn_logit_softcapping", "hidden_act"):
        assert f"`{name}` must be" in str(error.value)
    (folder / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(CheckpointError, match=r"must be one of \(.*'llama', .*\), got 'mamba'"):
        from_pretrained(folder)


def test_nothing_heavy_is_imported(tmp_path):
    code = (
        "import sys; from arrakis_jax.checkpoint import from_pretrained\n"
        f"from_pretrained({str(write(tmp_path))!r})\n"
        "print(sorted({'torch', 'transformers', 'orbax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_stories_continue_as_published(stories):
    published = (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the "
        "park. One day, she saw a big, red ball. She wanted to play with it, but it was too high."
    )
    from arrakis_jax.text import (
        encode,
        tokenizer_for,
    )

    want = encode(tokenizer_for(stories), published).tokens[0]
    assert len(want) > 60
    model = from_pretrained(stories)
    step = jax.jit(lambda tokens, mask: model(tokens, mask=mask, capture=("logits",)).logits)
    tokens = np.zeros((1, len(want)), np.int32)
    tokens[0, 0] = 1
    for t in range(1, len(want)):
        mask = np.arange(len(want))[None] < t
        tokens[0, t] = step(tokens, mask)[0, t - 1].argmax()
    np.testing.assert_array_equal(tokens[0], want)


def test_how_a_checkpoint_computes_is_a_choice(tmp_path):
    choice = dict(stream_dtype="bfloat16", matmul_precision="default")
    chosen = from_pretrained(write(tmp_path / "hf"), **choice)
    assert chosen.config.stream_dtype == "bfloat16" and chosen.blocks.attn.config == chosen.config
    save(chosen, tmp_path / "native")
    assert from_pretrained(tmp_path / "native").config == chosen.config
    plain = from_pretrained(tmp_path / "native", matmul_precision="highest").config
    assert plain.matmul_precision == "highest"
    with pytest.raises(ValueError, match="`matmul_precision` must be .* got 'low'"):
        from_pretrained(tmp_path / "hf", matmul_precision="low")


def test_arguments_that_are_none(tmp_path):
    folder = write(tmp_path / "hf")
    for call, error, message in [
        (lambda: from_pretrained(None), TypeError, "`path_or_repo_id` must be a path or a name"),
        (lambda: from_pretrained(""), TypeError, "`path_or_repo_id` must be a path or a name"),
        (lambda: from_pretrained(folder, mesh="x"), TypeError, "`mesh` must be a .*, got str"),
        (lambda: save(3, tmp_path / "new"), TypeError, "`model` must be a Transformer, got int"),
        (lambda: from_pretrained(folder / "model.safetensors"), CheckpointError,
         "that is a file; give its folder"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            call()
    assert not (tmp_path / "new").exists()


def test_an_explicit_mesh_serves_as_an_auto_one(tmp_path):
    """JAX's default for make_mesh."""
    folder, mesh = write(tmp_path / "hf"), jax.make_mesh((2, 4), ("data", "model"))
    sharded, plain = from_pretrained(folder, mesh=mesh), from_pretrained(folder)
    np.testing.assert_allclose(run(sharded, TOKENS).logits, run(plain, TOKENS).logits, atol=1e-4)


AXES = (jax.sharding.AxisType.Auto,) * 2


@pytest.mark.parametrize("hf", [MIXTRAL, SEGMENTS, GPT_OSS])
def test_experts_on_a_mesh_are_read_once(tmp_path, monkeypatch, hf):
    """Each device's own, although two rows of devices hold the same."""
    read = []
    finite = load.finite
    monkeypatch.setattr(load, "finite", lambda piece: read.append(piece.nbytes) or finite(piece))
    folder, mesh = write(tmp_path, hf), jax.make_mesh((2, 4), ("data", "model"), axis_types=AXES)
    sharded = from_pretrained(folder, mesh=mesh)
    assert sum(read) == sum(leaf.nbytes for leaf in jax.tree.leaves(sharded))
    assert same(sharded, from_pretrained(folder))
    moe = sharded.blocks.moe if sharded.blocks else sharded.segments[1].moe
    for name in ("w_in", "w_gate", "w_out"):
        assert getattr(moe, name)[...].addressable_shards[0].data.shape[1] == 1, name
    np.testing.assert_allclose(
        run(sharded, TOKENS).logits, run(from_pretrained(folder), TOKENS).logits, atol=1e-3
    )


def test_every_parameter_has_its_place():
    """Split over devices unless it is small, whatever its name has in common with others."""
    mesh = jax.make_mesh((2,), ("model",), axis_types=AXES[:1])
    whole = {
        "w_pos", "norm_final.w", "norm_final.b", "norm_attn.w", "norm_attn.b", "norm_mlp.w",
        "norm_mlp.b", "attn.b_o", "mlp.b_out", "moe.w_router", "moe.b_router", "moe.w_shared_gate",
    }  # fmt: skip
    cohere = LLAMA | dict(model_type="cohere", use_qk_norm=True)
    for hf in (GPT2 | {"vocab_size": 32}, SEGMENTS, GPT_OSS, MIXTRAL, cohere):
        config = family_for(hf["model_type"]).config(hf)
        for name, leaf in parameters(config)[0].items():
            axes = tuple(partition(name, leaf.shape, mesh))
            key = re.sub(r"^(blocks|segments\.\d)\.", "", name)
            assert ("model" in axes) != (key in whole), name
            assert key == name or axes[:1] != ("model",), name


def test_a_part_of_heads_that_are_stored_together(tmp_path):
    """Falcon's queries are grouped by key/value head, and a device's share need not be a group."""
    hf = dict(
        model_type="falcon", vocab_size=31, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=8, num_kv_heads=2, new_decoder_architecture=True,
    )  # fmt: skip
    mesh = jax.make_mesh((4,), ("model",), axis_types=AXES[:1])
    folder = write(tmp_path, hf)
    model = from_pretrained(folder, mesh=mesh)
    assert model.blocks.attn.w_q[...].addressable_shards[0].data.shape == (2, 32, 2, 4)
    assert same(model, from_pretrained(folder))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_finite(dtype):
    info = ml_dtypes.finfo(dtype)
    fine = np.array([0, -0.0, 1, -1, info.max, info.min, info.smallest_subnormal], dtype)
    assert weights.finite(fine) and weights.finite(fine[::2]) and weights.finite(fine[:0])
    for value in (np.inf, -np.inf, np.nan, -np.nan):
        assert not weights.finite(np.append(fine, np.array(value, dtype)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_no_numbers_are_named(tmp_path, dtype):
    tensors = tensors_of(LLAMA, np.dtype(dtype))
    tensors[W_Q][3, 4], tensors["lm_head.weight"][1, 2] = np.nan, -np.inf
    with pytest.warns(UserWarning, match="NaN or infinity in") as warned:
        from_pretrained(write(tmp_path, LLAMA, tensors))
    message = str(warned[0].message)
    assert f"`weights` must be finite in {dtype}, got" in message and len(warned) == 1
    assert W_Q in message and "lm_head.weight" in message and "k_proj" not in message


def test_numbers_too_large_for_the_dtype_are_named(tmp_path):
    tensors = tensors_of(LLAMA)
    tensors[W_Q][0, 0] = np.finfo(np.float32).max
    assert from_pretrained(write(tmp_path, LLAMA, tensors)).config.dtype == "float32"
    with pytest.warns(UserWarning, match=f"finite in bfloat16, got NaN or infinity in {W_Q};"):
        from_pretrained(tmp_path, dtype="bfloat16")


@pytest.mark.parametrize("terminal", ["0", "1"])
def test_a_bar_for_large_models_in_a_terminal(tmp_path, monkeypatch, capsys, terminal):
    folder = write(tmp_path)
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TTY_COMPATIBLE", terminal)
    from_pretrained(folder)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(load, "LARGE", 0)
    from_pretrained(folder)
    out, err = capsys.readouterr()
    assert out == "" and ("loading" in err) == (terminal == "1") == bool(err)


GEMMA3 = {k: v for k, v in LLAMA.items() if k != "model_type"} | dict(query_pre_attn_scalar=10)


def test_a_decoder_among_other_parts(tmp_path):
    text = GEMMA3 | {"model_type": "gemma3_text"}
    tensors = tensors_of(text)
    plain = from_pretrained(write(tmp_path / "text", text, tensors), dtype="float32")
    outer = dict(
        model_type="gemma3", text_config=text, vision_config={"hidden_size": 7}, mm_tokens=3,
        torch_dtype="bfloat16", tie_word_embeddings=True,
    )  # fmt: skip
    inside = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    inside["vision_tower.vision_model.embeddings.weight"] = np.ones(3, np.float32)
    inside["multi_modal_projector.mm_norm.weight"] = np.ones(3, np.float32)
    assert same(plain, from_pretrained(write(tmp_path / "both", outer, inside)))
    with pytest.raises(CheckpointError, match="`lm_head.weight` must be in the checkpoint"):
        from_pretrained(write(tmp_path / "untied", outer, inside, tie_word_embeddings=False))
    for wrong, message in [
        ({"text_config": 3}, "`text_config` must be a table, got int"),
        ({"text_config": text | {"novelty": 3}}, "`novelty` must be absent"),
        ({"quantization_config": {"bits": 4}}, "`quantization_config` must be"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            from_pretrained(write(tmp_path / "wrong", outer, inside, **wrong))


@pytest.mark.parametrize("hf", [GPT2, LLAMA, MIXTRAL])
def test_sizes_that_are_none(tmp_path, hf):
    folder = write(tmp_path, hf)
    for field in (name for name, value in hf.items() if isinstance(value, int)):
        for value in (-1, -hf[field], 2.5):
            (folder / "config.json").write_text(json.dumps(hf | {field: value}))
            with pytest.raises(CheckpointError, match="config.json cannot be used:\n`.*must be"):
                from_pretrained(folder)
