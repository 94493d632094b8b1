"""Decoder families of Hugging Face, one small file each: a module with a `family` is found."""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from arrakis_jax.config import ModelConfig
from arrakis_jax.errors import CheckpointError, expected
from arrakis_jax.families.base import Family


@cache
def families() -> dict[str, Family]:
    """Every family, by its `model_type`."""
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    found = [module.family for module in modules if hasattr(module, "family")]
    return {family.name: family for family in found}


def family_for(model_type: Any) -> Family:
    """The family of this `model_type`.

    Raises:
        CheckpointError: listing the supported ones.
    """
    if model_type not in families():
        do = "other architectures cannot be loaded"
        must = f"one of {tuple(sorted(families()))}"
        raise CheckpointError(expected("model_type", must, repr(model_type), do))
    return families()[model_type]


def config_for(family: str, *, dtype: str = "float32", **overrides: Any) -> ModelConfig:
    """The ModelConfig of a family's Hugging Face class defaults.

    Args:
        family: its `model_type`, such as "gpt2" (the 124M shape) or "llama" (6.7B).
        dtype: of the weights.
        **overrides: fields of the Hugging Face config, by their names there.

    Raises:
        CheckpointError: for an unknown family, or a field that is unknown or unsupported.

    Example:
        >>> config_for("llama", num_hidden_layers=2).n_layers
        2
    """
    return family_for(family).config(overrides, dtype)
