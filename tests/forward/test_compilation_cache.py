"""Programs are kept on disk, also if some were compiled before the cache was asked for."""

import os
import subprocess
import sys

import pytest

from arrakis_jax import compilation_cache

CODE = """
import sys, jax, jax.numpy as jnp
jax.jit(lambda x: x + 1)(jnp.ones(3))
from arrakis_jax import compilation_cache
folder = compilation_cache(*sys.argv[1:])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x * 2)(jnp.ones(3))
print(folder, sum(1 for file in folder.iterdir()) > 0, compilation_cache() == folder)
"""


@pytest.mark.parametrize("named", [True, False])
def test_programs_are_kept(tmp_path, named):
    folder = tmp_path / ("programs" if named else "arrakis_jax")
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, "-c", CODE, *([str(folder)] if named else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == [str(folder), "True", "True"]


def test_a_file_is_no_folder(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="`folder` must be a folder, got"):
        compilation_cache(file)
