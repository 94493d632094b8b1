"""Targets, which attributions explain: a number for each row of a batch, as a value.

A target is a pytree: ids, positions and references are leaves, so that new ones do not recompile.
It reads the logits at one or a few positions, and only those are unembedded. Every method takes
every target.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.core.axes import Array, Bool, Float, Int
from arrakis_jax.core.checks import Ids, checked_ids, checked_position, host
from arrakis_jax.core.errors import expected
from arrakis_jax.core.numerics import contract
from arrakis_jax.forward.run import as_pytree
from arrakis_jax.nn.linear import softcap
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.stream.padding import Padding


@dataclass(frozen=True)
class Target:
    """A number for each row of a batch, read from the model's logits.

    The logits are the model's own: after its soft-cap, if it has one.

    Attributes:
        position: where the logits are read, counted in real tokens (-1 is each row's last): an
            int, or one for each row `[B]`.
    """

    position: Any = field(default=-1, kw_only=True)

    def checked(self, model: Transformer, tokens: Array, mask: Array | None) -> "Target":
        """The target for a checked batch of tokens, its fields as arrays.

        Raises:
            TypeError, ValueError, IndexError: for ids, positions or references that do not fit.
        """
        position = checked_position(self.position, tokens.shape[0], mask, tokens.shape[1])
        return replace(self, position=position)

    def positions(self, length: int) -> Int[Array, "B N"]:
        """The positions that it reads, in batches of rows of this length."""
        return self.position[:, None]

    def value(
        self, model: Transformer, y_BND: Float[Array, "B N D"], real_BN: Bool[Array, "B N"]
    ) -> Float[Array, " B"]:
        """The target, from the normed stream at its positions, and which of them exist."""
        value = self.of_logits(model, y_BND[:, 0])
        # A position that a row does not have is found only under tracing, where nothing can raise.
        return jnp.where(real_BN[:, 0], value, jnp.nan)

    def of_logits(self, model: Transformer, y_BD: Float[Array, "B D"]) -> Float[Array, " B"]:
        """The target, from the normed stream at its one position."""
        raise NotImplementedError


def _logits(model: Transformer, y_BD: Float[Array, "B D"]) -> Float[Array, "B V"]:
    return model.unembed(y_BD[:, None])[:, 0]


def _log_probs(model: Transformer, y_BD: Float[Array, "B D"]) -> Float[Array, "B V"]:
    return jax.nn.log_softmax(_logits(model, y_BD), -1)


def _of_ids(values_BV: Array, ids_B: Array) -> Float[Array, " B"]:
    """The entries of these ids; NaN for one outside of the vocabulary."""
    # A negative id would count from the end: one beyond the last entry is filled with NaN.
    safe = jnp.where(ids_B < 0, values_BV.shape[-1], ids_B)
    return jnp.take_along_axis(values_BV, safe[:, None], -1, mode="fill")[:, 0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Logit(Target):
    """The logit of a token, or the difference of two logits.

    Attributes:
        ids: token ids, an int or `[B]`.
        against: ids of the logit subtracted, or None. (The difference of two log-probabilities is
            the same number.)
        position: where it is read.

    Example:
        >>> model, tokenizer = demo_model()
        >>> tokens, mask = encode(tokenizer, "Alice and Tom met, Tom gave a book to")
        >>> alice, tom = (token_id(tokenizer, name) for name in (" Alice", " Tom"))
        >>> feature_attribution(model, tokens, Logit(alice, tom), mask=mask).target.shape
        (1,)
    """

    ids: Ids
    against: Ids | None = None

    def checked(self, model, tokens, mask):  # noqa: D102
        return _with_ids(super().checked(model, tokens, mask), model, tokens, "ids", "against")

    def of_logits(self, model, y_BD):  # noqa: D102
        def logit(ids: Any) -> Float[Array, " B"]:
            # Columns of the unembedding for these ids alone, not logits over the vocabulary.
            read = contract("BD,BD->B", y_BD, model.unembedding(ids))
            return softcap(read + model.unembedding_bias(ids), model.config.logit_softcap)

        return logit(self.ids) if self.against is None else logit(self.ids) - logit(self.against)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogProb(Target):
    """The log-probability of a token, in nats. It saturates: prefer a logit difference.

    Attributes:
        ids: token ids, an int or `[B]`.
        position: where it is read.
    """

    ids: Ids

    def checked(self, model, tokens, mask):  # noqa: D102
        return _with_ids(super().checked(model, tokens, mask), model, tokens, "ids")

    def of_logits(self, model, y_BD):  # noqa: D102
        return _of_ids(_log_probs(model, y_BD), jnp.asarray(self.ids))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prob(LogProb):
    """The probability of a token.

    Attributes:
        ids: token ids, an int or `[B]`.
        position: where it is read.
    """

    def of_logits(self, model, y_BD):  # noqa: D102
        return jnp.exp(super().of_logits(model, y_BD))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Entropy(Target):
    """The entropy of the predicted distribution, in nats.

    Attributes:
        position: where it is read.
    """

    def of_logits(self, model, y_BD):  # noqa: D102
        log_p = _log_probs(model, y_BD)
        return -jnp.sum(jnp.exp(log_p) * log_p, -1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KL(Target):
    """The KL divergence from a reference to the predicted distribution, `KL(reference || model)`.

    In nats; zero where the model predicts the reference, and its gradient there is zero too: a
    gradient method needs a base run whose distribution is not the reference.

    Attributes:
        reference: logits or log-probabilities `[V]` or `[B,V]`, held fixed.
        position: where the prediction is read.
    """

    reference: Any

    def checked(self, model, tokens, mask):  # noqa: D102
        target = super().checked(model, tokens, mask)
        vocab, n_rows = model.config.vocab_size, tokens.shape[0]
        shape = jnp.shape(self.reference)
        if shape not in ((vocab,), (n_rows, vocab)):
            must = f"of shape ({vocab},) or ({n_rows}, {vocab})"
            do = "pass the reference run's logits at the position"
            raise ValueError(expected("reference", must, f"shape {shape}", do))
        values = host(self.reference)
        if values is not None and not np.isfinite(values.max(-1)).all():  # -inf is probability 0
            got, do = "NaN, infinity, or a row without any", "pass logits"
            raise ValueError(expected("reference", "a distribution in each row", got, do))
        reference = jnp.asarray(self.reference, model.config.acc)
        return replace(target, reference=jnp.broadcast_to(reference, (n_rows, vocab)))

    def of_logits(self, model, y_BD):  # noqa: D102
        log_q = _log_probs(model, y_BD)
        log_p = jax.nn.log_softmax(jax.lax.stop_gradient(self.reference), -1)
        p = jnp.exp(log_p)
        # Where p is zero its term is zero, and not the NaN of 0 * -inf.
        return contract("BV,BV->B", p, jnp.where(p > 0, log_p - log_q, 0))


@dataclass(frozen=True)
class Continuation(Target):
    """The summed log-probability of the last tokens of each row, in one teacher-forced forward.

    Each token is predicted from the real tokens before it. For a pair of prompts, the tokens are
    the base run's last ones, in both runs.

    Attributes:
        length: how many of each row's last real tokens are the continuation, an int or `[B]`.
    """

    length: Any

    def checked(self, model, tokens, mask):  # noqa: D102
        if not (isinstance(self.position, int) and self.position == -1):
            do = "a continuation is the end of its row"
            raise ValueError(expected("position", "left out", self.position, do))
        length = np.asarray(
            host(self.length) if isinstance(self.length, jax.Array) else self.length
        )
        n_rows, width = tokens.shape
        if length.dtype.kind not in "iu" or length.shape not in ((), (n_rows,)):
            must = f"an int or of shape ({n_rows},), known before tracing"
            raise TypeError(expected("length", must, repr(self.length), "count its tokens"))
        length_B = np.broadcast_to(length, (n_rows,))
        real = None if mask is None else host(mask)
        count_B = np.full(n_rows, width) if real is None else real.sum(-1)
        wrong = (length_B < 1) | (length_B >= count_B)
        if wrong.any():
            must = f"in [1, {int(count_B[wrong].min())})"
            do = "a prompt must be left before the continuation"
            raise ValueError(expected("length", must, f"{length_B[wrong][:3].tolist()}", do))
        # The last N real tokens, for the longest continuation; others use fewer of them.
        wanted_N = jnp.arange(-int(length_B.max()), 0)
        index, there = Padding.of(tokens.shape, mask).columns(
            jnp.broadcast_to(wanted_N, (n_rows, wanted_N.size))
        )
        used_BN = there & (-wanted_N[None] <= jnp.asarray(length_B)[:, None])
        ids_BN = jnp.where(used_BN, jnp.take_along_axis(tokens, index, -1), 0)
        return _Sequence(ids_BN, used_BN)

    def of_logits(self, model, y_BD):  # noqa: D102
        raise NotImplementedError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Sequence(Target):
    """A continuation of checked tokens: each row's last N ids, and which of them belong to it."""

    ids: Int[Array, "B N"]
    used: Bool[Array, "B N"]

    def positions(self, length):  # noqa: D102
        n = self.ids.shape[1]
        # The logits that predict a token are at the position before it.
        return jnp.broadcast_to(jnp.arange(-n - 1, -1), self.ids.shape)

    def value(self, model, y_BND, real_BN):  # noqa: D102
        @jax.checkpoint
        def log_p(y_BD: Array, ids_B: Array) -> Float[Array, " B"]:
            return _of_ids(_log_probs(model, y_BD), ids_B)

        # One position's logits at a time, forwards and, by the checkpoint, backwards.
        xs = (jnp.moveaxis(y_BND, 1, 0), self.ids.T)
        log_p_NB = jax.lax.map(lambda x: log_p(*x), xs)
        return jnp.where(self.used, log_p_NB.T, 0).sum(-1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Custom(Target):
    """A number for each row, by a function of its logits.

    Attributes:
        function: from logits `[B,V]` at the position to `[B]`; with `position=None` from those at
            every position, `[B,T,V]` (zero at padding). A row's number must depend on that row
            alone, by the same rule for all. Another function object compiles again, so define it
            once; arrays that change belong into a `jax.tree_util.Partial`.
        position: where the logits are read, or None.
    """

    function: Callable

    def checked(self, model, tokens, mask):  # noqa: D102
        if not callable(self.function):
            do = "give a function of logits"
            raise TypeError(expected("function", "callable", repr(self.function), do))
        target = self if self.position is None else super().checked(model, tokens, mask)
        n_rows, vocab = tokens.shape[0], model.config.vocab_size
        shape = (n_rows, vocab) if self.position is not None else (*tokens.shape, vocab)
        logits = jax.ShapeDtypeStruct(shape, model.config.acc)
        result = jax.eval_shape(self.function, logits)
        if getattr(result, "shape", None) != (n_rows,):
            must, do = f"a function from {shape} to ({n_rows},)", "return a number for each row"
            raise ValueError(expected("function", must, f"a result {result}", do))
        return replace(target, function=as_pytree(self.function))

    def positions(self, length):  # noqa: D102
        return jnp.arange(length)[None] if self.position is None else super().positions(length)

    def value(self, model, y_BND, real_BN):  # noqa: D102
        if self.position is not None:
            return super().value(model, y_BND, real_BN)
        logits = jnp.where(real_BN[..., None], model.unembed(y_BND), 0)
        return self.function(logits)

    def of_logits(self, model, y_BD):  # noqa: D102
        return self.function(_logits(model, y_BD))


def _with_ids(target: Any, model: Transformer, tokens: Array, *names: str) -> Any:
    """The target with the ids in these fields checked, one for each row."""
    ids = {
        name: checked_ids(model.config, value, tokens.shape[:1], name=name)
        for name in names
        if (value := getattr(target, name)) is not None
    }
    return replace(target, **ids)


def checked_target(
    model: Transformer,
    tokens: Array,
    target: Any,
    mask: Array | None,
    *,
    against: Any = None,
    position: Any = -1,
    name: str = "target",
) -> Target:
    """The target for a checked batch: a Target, a function of logits, or plain token ids.

    Raises:
        TypeError, ValueError, IndexError: for a target that does not fit.
    """
    if target is None or isinstance(target, str):
        do = "such as Logit(3), or 3; `token_id(tokenizer, text)` gives a text's"
        must = "token ids, a target or a function of logits"
        raise TypeError(expected(name, must, repr(target), do))
    if not isinstance(target, Target) and not callable(target):
        shape = tokens.shape[:1]
        # Checked here, so that messages have the argument's name.
        logit = Logit(
            checked_ids(model.config, target, shape, name=name),
            None if against is None else checked_ids(model.config, against, shape, name="against"),
        )
        return Target.checked(replace(logit, position=position), model, tokens, mask)
    if type(target) is Target or isinstance(target, type):
        do = "choose what is read, such as Logit(3)"
        raise TypeError(expected(name, "a target, token ids or a function", repr(target), do))
    if against is not None or not (isinstance(position, int) and position == -1):
        wrong, value = ("against", against) if against is not None else ("position", position)
        do = "it belongs into the target, such as Logit(3, against=4, position=-2)"
        raise ValueError(expected(wrong, f"left out with a `{name}` of its own", value, do))
    target = target if isinstance(target, Target) else Custom(target)
    return target.checked(model, tokens, mask)


def read_target(
    model: Transformer, x_BTD: Float[Array, "B T D"], mask: Array | None, target: Target
) -> Float[Array, " B"]:
    """The target of each row, from the final stream; unembeds only what the target reads."""
    padding = Padding.of(x_BTD.shape[:2], mask)
    if isinstance(target, Custom) and target.position is None:
        return target.value(model, _normed(model, x_BTD, padding.real), padding.real)
    # Positions are selected first: the norm and the unembedding then cost N of them, not T.
    index_BN, real_BN = padding.columns(target.positions(x_BTD.shape[1]))
    x_BND = jnp.take_along_axis(x_BTD, index_BN[..., None], 1)
    x_BND = jnp.where(real_BN[..., None], x_BND, 0)
    return target.value(model, _normed(model, x_BND, real_BN), real_BN)


def _normed(model: Transformer, x_BND: Array, real_BN: Array) -> Array:
    """The final norm where there is a token, and zero elsewhere."""
    if model.norm_final is None:
        return x_BND
    # Two wheres: a row of zeros has a slope of infinity under the norm's root, and infinity times
    # the outer where's zero is NaN. So the norm never sees such a row.
    safe = jnp.where(real_BN[..., None], x_BND, 1)
    return jnp.where(real_BN[..., None], model.final_norm(safe), 0)
