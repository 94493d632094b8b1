"""MXFP4: every code under every scale, against the standard's table and transformers' routine."""

import numpy as np
import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from arrakis_jax.checkpoint import from_pretrained
from arrakis_jax.checkpoint.files import Tensor
from arrakis_jax.checkpoint.mxfp4 import dequantised, unpacked
from arrakis_jax.core.errors import CheckpointError
from tests.checkpoint.writers import GPT_OSS, same, tensors_of, write

# OCP Microscaling Formats (MX) Specification 1.0, 5.3.3: E2M1, sign, exponent and mantissa.
E2M1 = {
    0b0000: 0.0, 0b0001: 0.5, 0b0010: 1.0, 0b0011: 1.5,
    0b0100: 2.0, 0b0101: 3.0, 0b0110: 4.0, 0b0111: 6.0,
    0b1000: -0.0, 0b1001: -0.5, 0b1010: -1.0, 0b1011: -1.5,
    0b1100: -2.0, 0b1101: -3.0, 0b1110: -4.0, 0b1111: -6.0,
}  # fmt: skip
LARGEST = 3.3895313892515355e38  # of bfloat16


def test_every_code_under_every_scale():
    codes, scales = np.arange(16, dtype=np.uint8), np.arange(256)
    blocks = np.broadcast_to(codes | np.roll(codes, 1) << 4, (256, 1, 16))
    found = dequantised(blocks, scales[:, None].astype(np.uint8))
    assert found.dtype.name == "bfloat16" and found.shape == (256, 32)
    values = np.array([E2M1[int(code)] for code in codes])
    pairs = np.stack([values, np.roll(values, 1)], -1).reshape(-1)
    want = pairs * 2.0 ** (scales[:, None] - 127)
    want = np.where(np.abs(want) > LARGEST, np.copysign(np.inf, want), want)
    want[255] = np.nan  # E8M0 has no other, and no infinity
    np.testing.assert_array_equal(found.astype(np.float64), want)
    assert (np.signbit(found.astype(np.float64)) == np.signbit(want))[:255].all()


def packed(rng, n_experts, rows, cols, low=100, high=140):
    blocks = rng.integers(256, size=(n_experts, rows, cols // 32, 16), dtype=np.uint8)
    scales = rng.integers(low, high, size=(n_experts, rows, cols // 32), dtype=np.uint8)
    return blocks, scales


@pytest.mark.parametrize(("low", "high"), [(100, 140), (0, 255)])
def test_as_transformers_does(low, high):
    blocks, scales = packed(np.random.default_rng(0), 3, 10, 96, low, high)
    theirs = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales))
    tensors = {
        name: Tensor(name, "U8", array.shape, lambda array=array: array)
        for name, array in (("a.x_blocks", blocks), ("a.x_scales", scales))
    }
    (ours,) = unpacked(tensors).values()
    assert (ours.name, ours.stored, ours.shape) == ("a.x", "BF16", (3, 96, 10))
    assert ours.shape == tuple(theirs.shape) and theirs.dtype == torch.bfloat16
    for array in (ours.read(), np.stack([part.read() for part in ours.parts])):
        np.testing.assert_array_equal(array.astype(np.float32), theirs.float().numpy())


def checkpoint(folder, **changes):
    """A checkpoint in MXFP4, and the same in bfloat16; `changes` are of the packed tensors."""
    tensors = tensors_of(GPT_OSS, np.dtype("bfloat16"))
    small, rng = dict(tensors), np.random.default_rng(1)
    for name in [name for name in tensors if name.endswith("_proj")]:
        n_experts, cols, rows = tensors[name].shape
        blocks, scales = packed(rng, n_experts, rows, cols)
        del small[name]
        small |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors[name] = np.ascontiguousarray(np.swapaxes(dequantised(blocks, scales), 1, 2))
    for name, change in changes.items():
        place = f"model.layers.1.mlp.experts.{name}"
        small[place] = change(small[place])
        if small[place] is None:
            del small[place]
    quantised = {"quantization_config": {"quant_method": "mxfp4"}}
    return (
        write(folder / "packed", GPT_OSS, small, **quantised),
        write(folder / "plain", GPT_OSS, tensors),
    )


def test_a_model_in_mxfp4(tmp_path):
    import jax

    small, plain = checkpoint(tmp_path)
    model = from_pretrained(small)
    assert model.config.dtype == "bfloat16"
    assert same(model, from_pretrained(plain))
    assert same(from_pretrained(small, dtype="float32"), from_pretrained(plain, dtype="float32"))
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    assert same(model, from_pretrained(small, mesh=mesh))


def test_experts_are_unpacked_one_by_one(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        "arrakis_jax.checkpoint.mxfp4.dequantised",
        lambda *a: sizes.append(a[0].ndim) or dequantised(*a),
    )
    from_pretrained(checkpoint(tmp_path)[0])
    layers, experts, parameters = 2, 4, 3
    assert sizes == [3] * layers * experts * parameters


def test_a_scale_that_is_no_number_is_told(tmp_path):
    def broken(scales):
        scales[2, 3, 0] = 255
        return scales

    small, _ = checkpoint(tmp_path, down_proj_scales=broken)
    with pytest.warns(UserWarning, match="NaN or infinity in model.layers.1.mlp.experts.down_proj"):
        from_pretrained(small)


@pytest.mark.parametrize("name", ["down_proj_scales", "down_proj_blocks", "gate_up_proj_scales"])
@pytest.mark.parametrize(
    "change", [lambda a: None, lambda a: a.swapaxes(0, 1).copy(), lambda a: a.astype(np.int32)]
)
def test_packed_tensors_that_do_not_fit_are_named(tmp_path, name, change):
    small, _ = checkpoint(tmp_path, **{name: change})
    x, part = name.rsplit("_", 1)
    other = {"scales": "blocks", "blocks": "scales"}[part]
    with pytest.raises(CheckpointError) as error:
        from_pretrained(small)
    message = str(error.value)
    assert f"`model.layers.1.mlp.experts.{x}` must be in the checkpoint" in message
    assert f"`model.layers.1.mlp.experts.{x}_{other}` must be a weight of this" in message


def test_a_tensor_in_both_forms_is_refused():
    blocks, scales = packed(np.random.default_rng(0), 3, 10, 96)
    given = {"a.x_blocks": blocks, "a.x_scales": scales, "a.x": np.zeros((3, 96, 10), np.float32)}
    tensors = {
        name: Tensor(name, "F32" if name == "a.x" else "U8", array.shape, lambda array=array: array)
        for name, array in given.items()
    }
    assert unpacked(tensors) == tensors  # the packed ones are then left over, and named
