"""Checkpoints: what is on disk arrives unchanged, uncopied and complete, or not at all."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from arrakis_jax import checkpoint, run
from arrakis_jax.checkpoint.parameters import parameters
from arrakis_jax.checkpoint import from_pretrained, save
from arrakis_jax.config import RopeScaling
from arrakis_jax.errors import CheckpointError
from arrakis_jax.families import family_for

GPT2 = dict(model_type="gpt2", vocab_size=31, n_positions=13, n_embd=24, n_layer=3, n_head=4)
LLAMA = dict(
    model_type="llama", vocab_size=32, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=8, num_key_value_heads=4, head_dim=10,
)  # fmt: skip
TOKENS = np.arange(12).reshape(2, 6)
W_Q = "model.layers.0.self_attn.q_proj.weight"


def tensors_of(hf: dict, dtype=np.float32) -> dict[str, np.ndarray]:
    """Random weights for a config, as they are on disk."""
    rng = np.random.default_rng(0)
    family = family_for(hf["model_type"])
    config = family.config(hf)
    params = (parameters(config)[0])
    tensors = {}
    for rule in family.rules:
        if rule.params[0] in params:
            for layer in range(config.n_layers if "{l}" in rule.tensor else 1):
                value = rng.normal(size=rule.shape(config)).astype(dtype)
                tensors[rule.tensor.replace("{l}", str(layer))] = value
    return tensors


def write(folder, hf=LLAMA, tensors=None, **changes):
    """A checkpoint folder; `changes` go to the config."""
    folder.mkdir(exist_ok=True)
    hf = hf | changes
    (folder / "config.json").write_text(json.dumps(hf))
    save_file(tensors_of(hf) if tensors is None else tensors, folder / "model.safetensors")
    return folder


def shard(folder, **files):
    """Splits a folder's tensors over two files; `files` are changes of the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"part-{i}.safetensors")
        weight_map |= dict.fromkeys(part, f"part-{i}.safetensors")
    index = {"metadata": {}, "weight_map": weight_map | files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def logits(model):
    return np.asarray(model(jnp.asarray(TOKENS), capture=("logits",)).logits)


def same(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return a.config == b.config and all(np.array_equal(x, y) for x, y in leaves)


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


@pytest.mark.parametrize("hf", [GPT2, LLAMA, LLAMA | {"attention_bias": True, "mlp_bias": True}])
def test_export_is_the_inverse_of_loading(tmp_path, hf):
    tensors = tensors_of(hf)
    exported = checkpoint.export_weights(hf["model_type"], from_pretrained(write(tmp_path, hf)))
    assert exported.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(exported[name], tensor)


def test_parameters_can_be_set(tmp_path):
    model = from_pretrained(write(tmp_path))
    before = logits(model)
    model.w_e[...] = 2 * model.w_e[...]
    assert not np.allclose(before, logits(model))


def test_sharded_files_equal_one_file(tmp_path):
    one = from_pretrained(write(tmp_path / "one"))
    assert same(one, from_pretrained(shard(write(tmp_path / "two"))))


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
    aligned = checkpoint._aligned
    monkeypatch.setattr(checkpoint, "_aligned", lambda *a: made.append(aligned(*a)) or made[-1])
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


def test_save_and_restore(tmp_path):
    rope = dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16,
    )  # fmt: skip
    model = from_pretrained(write(tmp_path / "hf", rope_scaling=rope))
    assert isinstance(model.config.rope_scaling, RopeScaling)
    save(model, tmp_path / "native")
    restored = from_pretrained(tmp_path / "native")
    assert same(model, restored)
    np.testing.assert_array_equal(logits(model), logits(restored))
    half = from_pretrained(tmp_path / "native", dtype="bfloat16")
    assert half.config.dtype == "bfloat16"
    np.testing.assert_array_equal(half.w_e[...], model.w_e[...].astype(jnp.bfloat16))
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = from_pretrained(tmp_path / "native", mesh=mesh)
    assert same(model, sharded)
    assert sharded.w_e[...].addressable_shards[0].data.shape == (8, 24)
    save(sharded, tmp_path / "again")
    assert same(model, from_pretrained(tmp_path / "again"))


def test_save_does_not_overwrite(tmp_path):
    model = from_pretrained(write(tmp_path / "hf"))
    with pytest.raises(FileExistsError, match="`path` must be a new or empty folder, got"):
        save(model, tmp_path / "hf")


def test_broken_native_checkpoints(tmp_path):
    save(from_pretrained(write(tmp_path / "hf")), tmp_path / "native")
    about = tmp_path / "native" / "arrakis_jax.json"
    text = about.read_text()
    about.write_text(text.replace("n_layers", "layers"))
    with pytest.raises(CheckpointError, match="`arrakis_jax.json` must be .*, got"):
        from_pretrained(tmp_path / "native")
    about.write_text(text.replace('"format": 1', '"format": 99'))
    with pytest.raises(CheckpointError, match="`format` must be 1, got 99"):
        from_pretrained(tmp_path / "native")
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    for old, new in (('"d_mlp": 40', '"d_mlp": 41'), ('"tied": false', '"tied": true')):
        assert old in text
        about.write_text(text.replace(old, new))
        for where in (None, mesh):
            with pytest.raises(CheckpointError, match="`weights` must be .*, got"):
                from_pretrained(tmp_path / "native", mesh=where)
    about.write_text(text)
    for file in (tmp_path / "native" / "weights").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:100])
    # In a process of its own, to which Orbax leaves the threads of the restore that fails.
    code = f"import arrakis_jax; arrakis_jax.from_pretrained({str(tmp_path / 'native')!r})"
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "CheckpointError: `weights` must be the folder that `save` wrote, got" in failed.stderr


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


def test_config_problems_come_in_one_error(tmp_path):
    folder = write(tmp_path)
    hf = LLAMA | {"attn_logit_softcapping": 30.0, "hidden_act": "mish"}
    (folder / "config.json").write_text(json.dumps(hf))
    with pytest.raises(CheckpointError) as error:
        from_pretrained(folder)
    for name in ("attn_logit_softcapping", "hidden_act"):
        assert f"`{name}` must be" in str(error.value)
    (folder / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(CheckpointError, match=r"must be one of \('gpt2', 'llama'\), got 'mamba'"):
        from_pretrained(folder)


def test_folders_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="must be a Hugging Face folder.*got .*without"):
        from_pretrained(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="must be a folder with model.safetensors .*got.*bin"):
        from_pretrained(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="`config.json` must be JSON, got"):
        from_pretrained(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="`config.json` must be a JSON object, got list"):
        from_pretrained(tmp_path / "empty")


@pytest.mark.parametrize("name", ["/no/such/folder", "no/such/folder", "nobody/nothing", "~", ""])
def test_what_is_neither_folder_nor_hub_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "..")
    message = "`path_or_repo_id` must be a folder, or a hub id that can be reached, got"
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(name or tmp_path / "absent")


def test_hub_id(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot_download(repo_id, **options):
        asked.append((repo_id, options["revision"]))
        assert "*.safetensors" in options["allow_patterns"]
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    write(tmp_path)
    assert same(from_pretrained("some/model", revision="v1"), from_pretrained(tmp_path))
    assert asked == [("some/model", "v1")]


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_file(tmp_path, keep):
    folder = write(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:keep])
    message = "`model.safetensors` must be a whole safetensors file, got"
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(folder)


@pytest.mark.parametrize(
    "file", ["../other/model.safetensors", "/etc/passwd", "a/../../b", "C:\\x", "..\\x", "\\x"]
)
def test_index_may_not_leave_the_folder(tmp_path, file):
    write(tmp_path / "other")
    folder = shard(write(tmp_path / "model"), **{W_Q: file})
    with pytest.raises(CheckpointError, match="must be of files inside the folder, got"):
        from_pretrained(folder)


def test_broken_index(tmp_path):
    folder = shard(write(tmp_path), **{W_Q: "absent.safetensors", "nothing": "part-0.safetensors"})
    with pytest.raises(CheckpointError) as error:
        from_pretrained(folder)
    assert "must be of files that exist, got 'absent.safetensors'" in str(error.value)
    assert "`nothing` must be where the index says" in str(error.value)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(CheckpointError, match="`weight_map` must be a table, got 3"):
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
    from arrakis_jax.tokens import encode, tokenizer_for

    want = encode(tokenizer_for(stories), published)[0][0]
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
