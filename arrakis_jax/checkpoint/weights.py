"""From the tensors of a Hugging Face checkpoint to parameters, and back."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from arrakis_jax.checkpoint.files import WEIGHTS, Tensor
from arrakis_jax.checkpoint.parameters import layers_of, named, parameters
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.core.errors import CheckpointError, expected
from arrakis_jax.families import family_for
from arrakis_jax.families.base import Family, Rule, letters
from arrakis_jax.nn.transformer import Transformer

_ALIGNMENT = 64  # bytes; JAX copies a host array that is not aligned to it
_LISTED = 100  # problems listed in one error
_CHUNK = 1 << 24  # numbers compared at once


@dataclass(frozen=True)
class ParameterSource:
    """The tensors of one parameter.

    Attributes:
        rule: how they become the parameter.
        param: the parameter, as `rule` names it.
        tensors: an array of tensors, one for each index of the parameter's first axes. Its shape is
            (), (L,) or (L, E).
    """

    rule: Rule
    param: str
    tensors: np.ndarray

    def read(
        self,
        shape: tuple[int, ...],
        index: tuple[slice, ...],
        config: ModelConfig,
        done: Callable[[Tensor, np.ndarray], None],
    ) -> np.ndarray:
        """The part of the parameter at `index`; calls `done` with every tensor and its piece.

        Reads no tensor outside of that part.
        """
        rule, tensors = self.rule, self.tensors
        if tensors.size and tensors.flat[0].parts:
            # Such a tensor is computed when read. One expert after the other needs less memory, so
            # the axis E moves from the pattern to `tensors`.
            tensors = np.array([t.parts for t in tensors.flat]).reshape(*tensors.shape, -1)
            rule = replace(rule, pattern=re.sub(r"\bE ", "", rule.pattern))
        n = tensors.ndim
        chosen: Any = tensors[(*index[:n], ...)]
        out = aligned(
            tuple(len(range(size)[i]) for size, i in zip(shape, index, strict=True)), config.dtype
        )
        for at in np.ndindex(chosen.shape):
            part = rule.part(chosen[at].read(), self.param, config)
            with np.errstate(over="ignore", invalid="ignore"):
                out[at] = part.reshape(shape[n:])[index[n:]]
            done(chosen[at], out[at])
        return out


def sources(
    family: Family, config: ModelConfig, tensors: Mapping[str, Tensor]
) -> dict[str, ParameterSource]:
    """The tensors of every parameter.

    Raises:
        CheckpointError: unless they fit one to one, listing every one that does not.
    """
    tensors = _renamed(tensors, family)
    params, _ = parameters(config)
    rule_of, wanted = {}, {}
    for param in params:
        generic, layers = layers_of(param, config)
        rules = [(r, _names(r, config, layers)) for r in family.rules if generic in r.params]
        assert rules, f"no rule of {family.name} fills {param}"
        # The first rule whose tensors are all there; else the one with the fewest missing.
        rule, names = max(rules, key=lambda row: _share(row[1], tensors))
        wanted |= dict.fromkeys(names.flat, rule.shape(config))
        rule_of[param] = rule, generic, names
    problems = []
    for name, shape in wanted.items():
        got = tensors.get(name)
        if got is None:
            must, do = f"in the checkpoint, with shape {shape}", "compare it with config.json"
            problems.append(expected(name, must, "no such tensor", do))
        elif got.shape != shape:
            do = "compare it with config.json"
            problems.append(expected(got.name, f"of shape {shape}", f"shape {got.shape}", do))
        elif got.stored not in WEIGHTS:
            must, do = f"stored as one of {WEIGHTS}", "convert the weights"
            problems.append(expected(got.name, must, got.stored, do))
    for name in tensors.keys() - wanted.keys() - _redundant(family, params, tensors):
        must, got = f"a weight of this {family.name} config", f"shape {tensors[name].shape}"
        do = "the model has no place for it"
        problems.append(expected(tensors[name].name, must, f"a tensor of {got}", do))
    if problems:
        listed = sorted(problems, key=_natural)
        more = len(listed) - _LISTED
        listed = [*listed[:_LISTED], *([f"and {more} more like these"] if more > 0 else [])]
        raise CheckpointError("\n".join(listed))
    return {
        param: ParameterSource(rule, generic, _table(tensors, names))
        for param, (rule, generic, names) in rule_of.items()
    }


def export_weights(family: str, model: Transformer) -> dict[str, np.ndarray]:
    """The model's parameters as the tensors of a Hugging Face checkpoint of this family."""
    config, params = model.config, named(model)
    where = {name: layers_of(name, config) for name in params}
    tensors, exported = {}, set()
    for rule in family_for(family).rules:
        for name in params:
            generic, layers = where[name]
            if generic != rule.params[0] or name in exported:
                continue
            head = name.removesuffix(generic.removeprefix("blocks."))
            names = [head + param.removeprefix("blocks.") for param in rule.params]
            exported.update(names)
            values = [np.asarray(params[name]) for name in names]
            table = _names(rule, config, layers)
            for at in np.ndindex(table.shape):
                tensors[table[at]] = rule.joined([value[at] for value in values], config)
    return tensors


def aligned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An empty array that JAX can use on a CPU without a copy."""
    size = prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def finite(array: np.ndarray) -> bool:
    """Whether every number is finite; needs no memory beside the array."""
    # As integers, the bits of floats of one sign have the order of the floats, and NaN comes after
    # infinity. Signed integers find what is too large among positive floats, unsigned integers
    # among negative ones, whose first bit is set.
    size = array.dtype.itemsize
    infinity = np.array([np.inf, -np.inf], array.dtype).view(f"u{size}")
    return bool(
        array.view(f"i{size}").max(initial=0) < infinity[0]
        and array.view(f"u{size}").max(initial=0) < infinity[1]
    )


def _names(rule: Rule, config: ModelConfig, layers: range) -> np.ndarray:
    """The names of a rule's tensors, as an array over the parameter's first axes."""
    stacked = "{l}" in rule.tensor
    shape = (len(layers),) if stacked else ()
    shape += () if rule.each is None else (letters(config)[rule.each],)
    rows = [rule.names(config, layer) for layer in (layers if stacked else [None])]
    return np.array(rows, object).reshape(shape)


def _share(names: np.ndarray, tensors: Mapping[str, Tensor]) -> float:
    """The share of the names that the checkpoint has."""
    return sum(name in tensors for name in names.flat) / max(names.size, 1)


def _table(tensors: Mapping[str, Tensor], names: np.ndarray) -> np.ndarray:
    """The tensors of these names, in an array of the same shape."""
    table = np.empty(names.shape, object)
    for at in np.ndindex(names.shape):
        table[at] = tensors[str(names[at])]
    return table


def _renamed(tensors: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """The tensors under the names of the family's table, without those that are no weights."""
    known = {re.sub(r"\\\{\w\\\}", r"\\d+", re.escape(rule.tensor)) for rule in family.rules}
    pattern = re.compile("|".join(known))

    def listed(name: str) -> str:
        for spelling, usual in family.spelled.items():
            name = re.sub(spelling, usual, name)
        full = family.prefix + name
        return full if pattern.fullmatch(full) and not pattern.fullmatch(name) else name

    renamed = {}
    # Unchanged names come first. A tensor whose new name is taken keeps its own, and is reported as
    # left over.
    for name in sorted(tensors, key=lambda name: listed(name) != name):
        target = listed(name)
        if not any(re.fullmatch(buffer, n) for buffer in family.buffers for n in (name, target)):
            renamed[name if target in renamed else target] = tensors[name]
    return renamed


def _redundant(family: Family, params: Mapping, tensors: Mapping[str, Tensor]) -> set[str]:
    """The stored unembedding of a tied model, if it equals the embedding."""
    if "w_u" in params:
        return set()
    heads, tables = (
        [rule.tensor for rule in family.rules if rule.params == (param,) and rule.tensor in tensors]
        for param in ("w_u", "w_e")
    )
    return {h for h in heads if all(_equal(tensors[h], tensors[t]) for t in tables)}


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits."""
    if (a.stored, a.shape) != (b.stored, b.shape) or a.stored not in WEIGHTS:
        return False
    # Bits are compared, since NaN equals nothing; in chunks, since the tensors are memory-mapped.
    x, y = (t.read().view(f"u{t.dtype.itemsize}") for t in (a, b))
    step = max(1, _CHUNK // max(1, prod(a.shape[1:])))
    return all(np.array_equal(x[i : i + step], y[i : i + step]) for i in range(0, len(x), step))


def _natural(text: str) -> list:
    """A sorting key that counts layers as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]
