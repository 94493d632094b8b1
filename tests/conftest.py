"""A stricter world than users': rank promotion and warnings are errors, on 8 virtual devices."""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

STORIES = Path(__file__).resolve().parents[2] / "shared" / "data" / "stories260K"


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
