"""The three tools bound to a model, with the signatures of Arrakis' Residual Tools."""

from __future__ import annotations

from typing import Any

from arrakis_jax.attribution.feature_attribution import Attribution, feature_attribution
from arrakis_jax.core.checks import Ids, checked_layer
from arrakis_jax.core.errors import expected
from arrakis_jax.decomposition.residual_decomposition import (
    ResidualDecomposition,
    normed_decomposition,
    residual_decomposition,
)
from arrakis_jax.forward.run import run
from arrakis_jax.forward.source import stream_of
from arrakis_jax.movement.residual_movement import Movement, residual_movement
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.stream.capture import Capture
from arrakis_jax.stream.residuals import ModelOutput, ResidualStream
from arrakis_jax.text import encode, token_id

# All that a decomposition of one layer reads.
_LAYER = Capture(("resid_pre", "attn_out", "mlp_out", "norm_attn_scale", "norm_mlp_scale"))


class ResidualTools:
    """`residual_decomposition`, `residual_movement` and `feature_attribution` of one model.

    The signatures are those of Arrakis' Residual Tools. An instance holds nothing but the model and
    a tokenizer; a second one compiles nothing again.

    Example:
        >>> tools = ResidualTools(*demo_model())
        >>> tools.residual_movement("When Mary and John went to the store,", 0, -1).angle.shape
        (1, 10)
    """

    def __init__(self, model: Transformer, tokenizer: Any = None):
        """Binds a model, and a tokenizer, with which texts are accepted too."""
        if not isinstance(model, Transformer):
            do = "pass the model first, then its tokenizer"
            raise TypeError(expected("model", "a Transformer", type(model).__name__, do))
        self.model = model
        self.tokenizer = tokenizer

    def residual_decomposition(
        self, activations: Any, layer_idx: int, **options: Any
    ) -> ResidualDecomposition:
        """The stream that entered a layer, and the outputs that the layer added to it.

        Args:
            activations: a ResidualStream or ModelOutput, `[B,T]` token ids, or text.
            layer_idx: an int in [-L, L), or a traced scalar.
            **options: with token ids, those of `run`: `mask`, `edits`, `check`.
        """
        stream = stream_of(activations, options.get("mask"))
        if stream is None:
            layer_idx = checked_layer(layer_idx, self.model.config.n_layers)
            tokens, options = self._tokens("activations", activations, options)
            activations = run(self.model, tokens, capture=_LAYER, **options)
        elif options.keys() - {"mask"}:
            do = "they belong to the forward, which has been run"
            got = sorted(options.keys() - {"mask"})
            raise TypeError(expected("options", "none with a stream", got, do))
        # With norms on the stream itself the shares need the norms' weights, which a stream lacks.
        if self.model.config.norms_stream:
            return normed_decomposition(self.model, activations, layer_idx)
        return residual_decomposition(activations, layer_idx)

    def residual_movement(
        self,
        input_ids: Any | ResidualStream | ModelOutput,
        layer_idx1: int,
        layer_idx2: int,
        **options: Any,
    ) -> Movement:
        """How far the stream moves from the end of one layer to the end of another.

        Args:
            input_ids: `[B,T]` token ids, text, or a captured stream.
            layer_idx1: the first layer.
            layer_idx2: the second layer.
            **options: those of the function `residual_movement`: `mask`, `check`.
        """
        tokens, options = self._tokens("input_ids", input_ids, options)
        return residual_movement(self.model, tokens, layer_idx1, layer_idx2, **options)

    def feature_attribution(
        self, input_ids: Any, target_ids: Ids | str, **options: Any
    ) -> Attribution:
        """The share of each input token in the logit of a target.

        Args:
            input_ids: `[B,T]` token ids, or text.
            target_ids: token ids, or a token as text.
            **options: those of the function `feature_attribution`: `method`, `against`, `mask`...
        """
        tokens, options = self._tokens("input_ids", input_ids, options)
        for name in {"against"} & options.keys():
            options[name] = self._id(options[name])
        return feature_attribution(self.model, tokens, self._id(target_ids), **options)

    def _tokens(self, name: str, value: Any, options: dict) -> tuple[Any, dict]:
        """Token ids and options, from text or from what may be token ids already."""
        if not (isinstance(value, str) or _are_texts(value)):
            return value, dict(options)
        if self.tokenizer is None:
            do = "or build ResidualTools(model, tokenizer)"
            raise TypeError(expected(name, "token ids without a tokenizer", "text", do))
        if "mask" in options:
            do = "text makes its own mask"
            raise TypeError(expected("mask", "left out with text", options["mask"], do))
        return encode(self.tokenizer, value), dict(options)

    def _id(self, value: Any) -> Any:
        """Token ids, from texts or from what may be token ids already."""
        if isinstance(value, str):
            if self.tokenizer is None:
                do = "or build ResidualTools(model, tokenizer)"
                raise TypeError(expected("target_ids", "ids without a tokenizer", "text", do))
            return token_id(self.tokenizer, value)
        return [self._id(text) for text in value] if _are_texts(value) else value


def _are_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], str)
