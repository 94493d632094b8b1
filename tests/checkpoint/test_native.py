"""Native checkpoints: what was saved comes back, on any mesh, also from older versions."""

import json
import subprocess
import sys
from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrakis_jax import ModelConfig
from arrakis_jax.checkpoint import from_pretrained, save
from arrakis_jax.core.config import RopeScaling
from arrakis_jax.core.errors import CheckpointError
from tests.checkpoint.writers import GPT_OSS, SEGMENTS, logits, same, write
from tests.families.cases import TINY


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
    # In a process of its own, to which Orbax leaves the threads of the restore that fails: they
    # write to stderr, in the middle of what others write there.
    code = f"""
import arrakis_jax
try:
    arrakis_jax.from_pretrained({str(tmp_path / "native")!r})
except arrakis_jax.CheckpointError as error:
    print(error)
"""
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "`weights` must be the folder that `save` wrote, got" in failed.stdout


@pytest.mark.parametrize(
    "hf",
    [SEGMENTS, GPT_OSS, {"model_type": "gemma3"} | TINY["gemma3"]],
    ids=lambda hf: hf["model_type"],
)
def test_every_kind_of_field_and_parameter(tmp_path, hf):
    """Tuples, scalings of RoPE, segments, experts."""
    model = from_pretrained(write(tmp_path / "hf", hf))
    save(model, tmp_path / "native")
    assert same(model, from_pretrained(tmp_path / "native"))
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    assert same(model, from_pretrained(tmp_path / "native", mesh=mesh))


def test_a_checkpoint_of_an_older_version(tmp_path):
    """Its config lacks the fields that were added since, and its weights are in one piece."""
    import orbax.checkpoint as ocp

    from arrakis_jax.checkpoint.parameters import named

    model = from_pretrained(write(tmp_path / "hf"))
    save(model, tmp_path / "new")
    about = json.loads((tmp_path / "new" / "arrakis_jax.json").read_text())
    old = (
        "n_layers d_model n_heads n_kv_heads d_head d_mlp vocab_size norm norm_eps positions "
        "max_positions rope_theta rope_scaling attention_scale scale_by_inverse_layer qkv_bias "
        "out_bias activation gated mlp_bias tied unembed_bias dtype stream_dtype matmul_precision"
    ).split()
    assert {f.name for f in fields(ModelConfig)} > set(old)
    about["config"] = {name: about["config"][name] for name in old}
    (tmp_path / "old").mkdir()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "old" / "weights", named(model))
    (tmp_path / "old" / "arrakis_jax.json").write_text(json.dumps(about))
    assert same(model, from_pretrained(tmp_path / "old"))
