"""Every tensor of a family's checkpoint is used once: none may lack, be left over or turned."""

from dataclasses import replace

import pytest

from arrakis_jax import CheckpointError
from arrakis_jax.checkpoint.files import open_folder
from arrakis_jax.checkpoint.load import _hf_config
from arrakis_jax.checkpoint.weights import sources
from tests.families import reference
from tests.families.cases import CASES, CHOSEN

# Also what is on disk in other spellings or numbers of tensors.
MORE = ("falcon-11b", "opt-plain", "qwen2_moe-sparse", "stablelm-qk-norm", "llama-biases")


@pytest.mark.parametrize("case", [case for case in (*CHOSEN, *MORE) if case in CASES])
def test_every_tensor_counts(case, tmp_path):
    reference.save(reference.torch_model(case), tmp_path)
    family, config = _hf_config(tmp_path)
    tensors = open_folder(tmp_path)
    found = sources(family, config, tensors)
    used = {t.name for source in found.values() for t in source.tensors.flat}
    assert used == set(tensors)

    def refused(changed, name):
        with pytest.raises(CheckpointError) as error:
            sources(family, config, changed)
        assert name in str(error.value), name

    for name, tensor in tensors.items():
        refused({n: t for n, t in tensors.items() if n != name}, name)
        refused({**tensors, name + "s": replace(tensor, name=name + "s")}, name + "s")
        if tensor.shape != tensor.shape[::-1]:
            turned = replace(tensor, shape=tensor.shape[::-1])
            refused({**tensors, name: turned}, name)
