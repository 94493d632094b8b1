"""Methods as values that hold their own options, and the checks that they share."""

from abc import ABC, abstractmethod
from dataclasses import fields
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.attribution.result import Attribution
from arrakis_jax.core.axes import Array
from arrakis_jax.core.checks import host
from arrakis_jax.core.errors import expected
from arrakis_jax.forward.targets import Target
from arrakis_jax.nn.transformer import Transformer


class FeatureMethod(ABC):
    """A method of `feature_attribution`. Each is a frozen dataclass whose fields are its options.

    A new one has a default for each option, checks them in `__post_init__`, and builds its result
    with `Inputs` (inputs.py). It is listed in FEATURE_METHODS (feature_attribution.py) and its
    values are described in MEANINGS (result.py).

    Attributes:
        name: the string that also names it.
    """

    name: ClassVar[str]

    @abstractmethod
    def attribute(
        self, model: Transformer, tokens: Array, mask: Array | None, target: Target, *, check: bool
    ) -> Attribution:
        """The attribution of checked tokens and a checked target."""


def option_names(method: Any) -> tuple[str, ...]:
    """The options that a method, or its class, has."""
    # `name` is a class variable, so it is no field.
    return tuple(option.name for option in fields(method))


def refuse_beside(method: Any, keywords: dict[str, Any]) -> None:
    """Raises ValueError for options given as keywords beside a method that is a value."""
    for name, value in keywords.items():
        do = "it has no such option"
        if name in option_names(method):
            do = f"write method={type(method).__name__}({name}=...)"
        must = f"left out with method={type(method).__name__}(...)"
        raise ValueError(expected(name, must, repr(value), do))


def check_whole(name: str, value: Any) -> None:
    """Raises ValueError unless an option is a positive int."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)  # True is an int
    if not whole or value < 1:
        must = "a positive int" + (" or None" if name == "steps" else "")
        raise ValueError(expected(name, must, value, "try 64"))


def check_size(name: str, value: Any) -> None:
    """Raises ValueError unless an option is a number from 0 on, as far as is known."""
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    known = host(array)  # None while it is traced
    fits = array.shape == () and jnp.issubdtype(array.dtype, jnp.number)
    if not fits or (known is not None and not 0 <= known < np.inf):
        raise ValueError(expected(name, "a number, 0 or more", repr(value), "give one such"))
