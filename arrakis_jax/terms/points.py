"""Points of the stream where sums of terms begin or end."""

from typing import Any, NamedTuple

from arrakis_jax.core.axes import Array, Float
from arrakis_jax.core.checks import checked_layer
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.core.errors import expected
from arrakis_jax.stream.residuals import ResidualStream

POINTS = ("resid_pre", "resid_mid", "resid_post")


class StreamPoint(NamedTuple):
    """A point of the stream, named by how much is written before it.

    Attributes:
        attn: how many attentions come before it.
        mlp: how many MLPs come before it.
    """

    attn: int
    mlp: int

    def field(self, config: ModelConfig) -> str:
        """The field of a stream that holds the point: resid_pre, resid_mid or final."""
        # resid_post of a layer is resid_pre of the next, so one field serves both names.
        if self.attn != self.mlp:
            return "resid_mid"
        return "final" if self.mlp == config.n_layers else "resid_pre"

    def of(self, stream: ResidualStream, config: ModelConfig) -> Float[Array, "B T D"]:
        """The stream at the point, in at least float32."""
        name = self.field(config)
        x = stream.final if name == "final" else stream.of_layer(name, self.mlp)
        return x.astype(config.acc)


class Span(NamedTuple):
    """A half-open range of writes: those after the point `begin` and before the point `end`."""

    begin: StreamPoint
    end: StreamPoint


def checked_point(at: Any, config: ModelConfig, name: str = "at") -> StreamPoint:
    """The point `at`; TypeError, ValueError or IndexError if the model has no such point."""
    n_layers = config.n_layers
    if at == "final":
        return StreamPoint(n_layers, n_layers)
    if not (isinstance(at, tuple) and len(at) == 2 and at[0] in POINTS):
        must, do = f"'final' or ({POINTS}, layer)", "such as ('resid_post', 3)"
        raise ValueError(expected(name, must, repr(at), do))
    if config.parallel and at[0] == "resid_mid":
        do = "attention and MLP of a parallel block write at once; use resid_post"
        raise ValueError(expected(name, "a point that the model has", repr(at), do))
    layer = checked_layer(at[1], n_layers, name="layer")
    if not isinstance(layer, int):
        do = "the number of terms depends on it; use residual_decomposition for a traced layer"
        raise TypeError(expected("layer", "an int", "a traced value", do))
    return StreamPoint(layer + (at[0] != "resid_pre"), layer + (at[0] == "resid_post"))
