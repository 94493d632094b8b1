"""Files: whole ones are opened without being read, others are told apart and named."""

import json
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file as load_torch

from arrakis_jax.checkpoint import from_pretrained
from arrakis_jax.checkpoint.files import open_folder
from arrakis_jax.core.errors import CheckpointError
from tests.checkpoint.writers import GPT2, LLAMA, W_Q, same, shard, tensors_of, write


def test_sharded_files_equal_one_file(tmp_path):
    one = from_pretrained(write(tmp_path / "one"))
    assert same(one, from_pretrained(shard(write(tmp_path / "two"))))


def test_folders_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="must be a Hugging Face folder.*got .*without"):
        from_pretrained(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "empty" / "model.bin").write_bytes(b"x")
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
        asked.append((repo_id, options["revision"], "*.safetensors" in options["allow_patterns"]))
        assert ("pytorch_model*.bin" in options["allow_patterns"]) != asked[-1][-1]
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    write(tmp_path)
    assert same(from_pretrained("some/model", revision="v1"), from_pretrained(tmp_path))
    assert asked == [("some/model", "v1", True)]
    as_torch(tmp_path)
    from_pretrained("some/model")
    assert asked[1:] == [("some/model", None, True), ("some/model", None, False)]


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


def header(folder, change):
    """Rewrites the header of a folder's file."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    about = json.loads(data[8 : 8 + size])
    change(about)
    text = json.dumps(about).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [81, 24]},
        {"shape": [-80, -24]},
        {"dtype": "F64"},
        {"dtype": "F7"},
        {"data_offsets": [0, 10**15]},
        {"data_offsets": [-8, 7672]},
        {"data_offsets": [0, 80 * 24 * 4]},
    ],
)
def test_a_header_that_lies(tmp_path, change):
    folder = write(tmp_path)
    header(folder, lambda about: about[W_Q].update(change))
    with pytest.raises(CheckpointError, match="`model.safetensors` must be a whole safetensors"):
        from_pretrained(folder)


def test_a_header_without_end(tmp_path):
    folder = write(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes((2**63 - 1).to_bytes(8, "little") + file.read_bytes()[8:])
    with pytest.raises(CheckpointError, match="`model.safetensors` must be a whole safetensors"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(np.int64, "I64"), (ml_dtypes.float8_e4m3fn, "F8_E4M3"), (np.uint8, "U8"), (bool, "BOOL")],
)
def test_tensors_of_other_dtypes(tmp_path, dtype, name):
    folder = write(tmp_path)
    tensors = load_torch(folder / "model.safetensors")
    from safetensors.torch import save_file

    kinds = {"I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8}
    tensors[W_Q] = tensors[W_Q].to(kinds.get(name, torch.bool))
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"`{W_Q}` must be stored as one of .*, got {name};"):
        from_pretrained(folder)


def as_torch(folder, **options):
    """The folder's tensors in torch's format instead; a sharded folder's too."""
    for file in folder.glob("*.safetensors"):
        torch.save(load_torch(file), file.with_name(bin_name(file.name)), **options)
        file.unlink()
    for file in folder.glob("*.index.json"):
        index = json.loads(file.read_text())
        index["weight_map"] = {k: bin_name(v) for k, v in index["weight_map"].items()}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        file.unlink()
    return folder


def bin_name(name: str) -> str:
    return f"pytorch_{name}".replace("pytorch_part", "part").replace("safetensors", "bin")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch(tmp_path, dtype, zipped):
    tensors = tensors_of(LLAMA, np.dtype(dtype))
    want = from_pretrained(write(tmp_path / "safe", LLAMA, tensors))
    folder = write(tmp_path / "torch", LLAMA, tensors)
    as_torch(folder, _use_new_zipfile_serialization=zipped)
    assert zipfile.is_zipfile(folder / "pytorch_model.bin") == zipped
    assert same(want, from_pretrained(folder))


def test_files_of_torch_are_not_read_beside_safetensors(tmp_path):
    folder = write(tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"no checkpoint")
    from_pretrained(folder)


def test_sharded_files_of_torch(tmp_path):
    want = from_pretrained(write(tmp_path / "one"))
    folder = as_torch(shard(write(tmp_path / "two")))
    assert same(want, from_pretrained(folder))
    index = folder / "pytorch_model.bin.index.json"
    for file in ("../one/pytorch_model.bin", "/etc/passwd"):
        text = index.read_text().replace("part-0.bin", file, 1)
        index.write_text(text)
        with pytest.raises(CheckpointError, match="must be of files inside the folder, got"):
            from_pretrained(folder)


def test_tensors_of_torch_that_share_their_memory(tmp_path):
    """A tied unembedding, and a view that is not contiguous."""
    folder = write(tmp_path, GPT2)
    want = from_pretrained(folder)
    tensors = load_torch(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    name = "transformer.h.0.mlp.c_fc.weight"
    tensors[name] = torch.nn.Parameter(tensors[name].T.contiguous().T)
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert same(want, from_pretrained(folder))


class Evil:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch_run_no_code(tmp_path, capsys, zipped):
    folder = as_torch(write(tmp_path))
    torch.save({"x": Evil()}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="`pytorch_model.bin` must be a whole file of torch"):
        from_pretrained(folder)
    assert capsys.readouterr().out == ""


def test_files_of_torch_that_are_broken_or_something_else(tmp_path):
    folder = as_torch(write(tmp_path))
    file = folder / "pytorch_model.bin"
    whole = file.read_bytes()
    for keep in (0, 5, 1000, -1):
        file.write_bytes(whole[:keep])
        with pytest.raises(CheckpointError, match="`pytorch_model.bin` must be a whole file of"):
            from_pretrained(folder)
    state = {"epoch": 3, "x": torch.ones(2), "y": torch.ones(2).to_sparse()}
    torch.save(state, file)
    with pytest.raises(CheckpointError) as error:
        from_pretrained(folder)
    assert "`epoch` must be a tensor with numbers, under a name, got int" in str(error.value)
    assert "`y` must be a tensor" in str(error.value) and "`x`" not in str(error.value)
    torch.save({"x": torch.ones(2, dtype=torch.int64)}, file)
    assert open_folder(folder)["x"].stored == "int64"


def test_files_of_torch_without_torch(tmp_path, monkeypatch):
    folder = as_torch(write(tmp_path))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        CheckpointError, match="where torch is not installed, got .*; install torch"
    ):
        from_pretrained(folder)


def test_an_index_of_something_else_than_names(tmp_path):
    index = {"weight_map": {"model.norm.weight": ["a.safetensors"]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"weight_map\['model.norm.weight'\].* a file's name"):
        open_folder(tmp_path)
