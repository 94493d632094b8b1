"""The shape alphabet: one letter per axis, used in names, annotations and einsums alike.

B batch, L layer, T position (query), S source position (key), D residual width, H query head,
G key/value head, R query heads per key/value head (H = G * R), K head width, F mlp hidden width,
V vocabulary, E expert, C component of a decomposition, P stream point, N anything else counted.
"""

from jaxtyping import Array, Bool, Float, Int

__all__ = ["Array", "Bool", "Float", "Int", "over"]


def over(value: Array, like: Array) -> Array:
    """`value` with axes of size one in front, so that it broadcasts over the axes of `like`."""
    return value[(None,) * (like.ndim - value.ndim)]
