"""Model families: one small file for each; a new file in this folder is found by itself."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

from arrakis_jax.core.config import ModelConfig
from arrakis_jax.core.errors import expected
from arrakis_jax.families.base import Family


@cache
def families() -> Mapping[str, Family]:
    """Every supported family by its `model_type`s."""
    modules = [import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    # Each module names its family as it likes. A module that builds on another family imports that
    # module, not the family, so no family is listed twice.
    defined = [v for module in modules for v in vars(module).values() if isinstance(v, Family)]
    return {
        name: family
        for family in sorted(defined, key=lambda family: family.name)
        for name in (family.name, *family.aliases)
    }


def family_for(model_type: Any, *, name: str = "model_type") -> Family:
    """The family of this `model_type`.

    Raises:
        ValueError: listing the supported ones.
    """
    supported = families()
    if not isinstance(model_type, str) or model_type not in supported:
        do = "other architectures are not supported"
        raise ValueError(expected(name, f"one of {tuple(supported)}", repr(model_type), do))
    return supported[model_type]


def config_for(family: str, **overrides: Any) -> ModelConfig:
    """The config of a family, from the defaults of its Hugging Face config class.

    Args:
        family: a `model_type`, such as "gpt2" or "llama".
        **overrides: values of config fields, by their Hugging Face names; `dtype` too.

    Raises:
        ValueError: for a family or a field that is not known, or a value that is not supported.

    Example:
        >>> config_for("llama").d_mlp
        11008
        >>> config_for("gpt2", n_layer=2, n_embd=48, n_head=3).d_head
        16
    """
    chosen = family_for(family, name="family")
    unknown = sorted(overrides.keys() - chosen.known)
    if unknown:
        do = "use Hugging Face's names"
        raise ValueError(expected("overrides", f"among {sorted(chosen.read)}", unknown, do))
    return chosen.config(overrides)
