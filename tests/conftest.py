"""A stricter world than users': rank promotion and warnings are errors, on 8 virtual devices."""

import os

from jaxlib.version import __version_info__ as jaxlib_version

# XLA compiles quickly and optimises little: the suite is a thousand small programs, each run once.
# ARRAKIS_OPTIMISED=1 compiles as users do, three to five times as long; CI runs a part so.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str("ARRAKIS_OPTIMISED" not in os.environ)
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8" + (
    " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    if "ARRAKIS_OPTIMISED" not in os.environ and jaxlib_version < (0, 11)  # unknown ones are fatal
    else ""
)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import gc
import shutil
from itertools import count
from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
PROGRAMS_BYTES = 2**31

STORIES = Path(__file__).resolve().parents[2] / "shared" / "data" / "stories260K"
tests_run = count(1)


def pytest_configure(config):
    """Compiled programs are kept in pytest's cache: for all workers, and for the next run."""
    if not hasattr(config, "cache"):
        return  # -p no:cacheprovider
    folder = config.cache.mkdir("programs")
    if not hasattr(config, "workerinput"):  # the workers start after this
        if sum(file.stat().st_size for file in folder.iterdir()) > PROGRAMS_BYTES:
            shutil.rmtree(folder)
            folder.mkdir()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_collection_finish():
    """What was imported stays: the garbage collector need not look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def few_programs_in_memory():
    """A compiled program takes dozens of memory maps, of which Linux allows a process 65530."""
    yield
    maps = Path("/proc/self/maps")
    many = maps.read_bytes().count(b"\n") > 20_000 if maps.exists() else next(tests_run) % 20 == 0
    if many:
        jax.clear_caches()


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def stories() -> Path:
    if not STORIES.exists():
        pytest.skip("the trained checkpoint stories260K is not beside the project")
    return STORIES


@pytest.fixture(scope="session")
def demo():
    from arrakis_jax import demo_model

    return demo_model()
