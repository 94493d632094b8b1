"""A family: a table of Hugging Face config fields, and a table of weight rules."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from einops import rearrange

from arrakis_jax.core.config import ModelConfig
from arrakis_jax.core.errors import expected

# Config fields that change no forward, by the reason why.
_IGNORED = {
    "names and versions": (
        "model_type", "architectures", "name_or_path", "_name_or_path", "_commit_hash",
        "transformers_version", "auto_map", "tokenizer_class", "unsloth_version",
    ),
    "how Hugging Face runs and what it returns": (
        "use_cache", "return_dict", "output_hidden_states", "output_attentions", "torchscript",
        "tie_last_hidden_states", "chunk_size_feed_forward", "use_bfloat16", "tf_legacy_loss",
        "gradient_checkpointing", "attn_implementation", "_attn_implementation",
        "_attn_implementation_autoset", "is_decoder", "cache_implementation",
    ),
    "training": ("initializer_range",),
    "special tokens, which are the tokenizer's": (
        "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id",
        "decoder_start_token_id", "prefix",
    ),
    "task heads": (
        "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
        "task_specific_params",
    ),
    "generation": (
        "max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams",
        "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p",
        "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "bad_words_ids",
        "encoder_no_repeat_ngram_size", "num_return_sequences", "output_scores",
        "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id",
        "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
        "begin_suppress_tokens",
    ),
}  # fmt: skip

# Config fields that are supported with these values only; null is always right.
_ONLY = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "quantization_config": (),
    "per_layer_config": (),
}

# Hugging Face's names of the activations that are computed exactly.
HF_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "linear": "identity",
}

_DTYPES = {
    "float32": "float32",
    "float64": "float64",
    "bfloat16": "bfloat16",
    "float16": "float32",
}

_LAYER_COUNTS = {"num_hidden_layers", "n_layer", "num_layers"}
_MAX_LAYERS = 10_000
HUGE = 1e30  # larger than any number that a config can mean


@dataclass(frozen=True)
class Rule:
    """How a tensor on disk becomes one parameter, or several.

    Attributes:
        tensor: the tensor's name. `{l}` stands for the layer; the parameters of all layers are
            stacked. An axis in braces, such as `{E}` or `{H}`, stands for an index of the
            parameter's first axis: the checkpoint has one tensor for each.
        pattern: an einops pattern from the axes on disk to the axes of the parameter, in the
            letters of `letters`. Axes in braces do not appear. A tensor that holds several
            parameters has an axis `part` on both sides.
        params: the parameters that it fills; `blocks` stands for the layers of any segment.
        sizes: how much of the axis `part` each parameter takes, as a letter or "1" (the default).
    """

    tensor: str
    pattern: str
    params: tuple[str, ...]
    sizes: tuple[str, ...] = ()

    @property
    def each(self) -> str | None:
        """The letter of the axis in braces: every index along it is a tensor of its own."""
        match = re.search(r"\{([A-Z])\}", self.tensor)
        return match and match[1]

    def names(self, config: ModelConfig, layer: int | None = None) -> list[str]:
        """The names of the tensors that fill the parameters (of one layer)."""
        name = self.tensor.replace("{l}", str(layer))
        if self.each is None:
            return [name]
        length = letters(config)[self.each]
        return [name.replace(f"{{{self.each}}}", str(i)) for i in range(length)]

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """The shape of one tensor on disk."""
        length = self._lengths(config)
        groups = re.findall(r"\([^)]*\)|\w+", self.pattern.split("->")[0])
        return tuple(prod(length[axis] for axis in re.findall(r"\w+", g)) for g in groups)

    def part(self, array: np.ndarray, param: str, config: ModelConfig) -> np.ndarray:
        """The share of one parameter, as a view where numpy can."""
        array = rearrange(array, self.pattern, **self._used_lengths(config))
        if len(self.params) == 1:
            return array
        axis = self.pattern.split("->")[1].split().index("part")
        ends = np.cumsum(self._sizes(config))
        return np.split(array, ends[:-1], axis)[self.params.index(param)]

    def joined(self, parts: list[np.ndarray], config: ModelConfig) -> np.ndarray:
        """The tensor that holds these parameters (of one layer): the inverse of `part`."""
        length = self._lengths(config)
        source, target = self.pattern.split("->")
        whole = parts[0]
        if len(parts) > 1:
            axes = target.split()
            # A part of size 1 has no axis in the model: give it back before joining.
            shapes = (
                [size if axis == "part" else length[axis] for axis in axes]
                for size in self._sizes(config)
            )
            shaped = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
            whole = np.concatenate(shaped, axes.index("part"))
        on_disk = rearrange(whole, f"{target} -> {source}", **self._used_lengths(config))
        return np.ascontiguousarray(on_disk)

    def _sizes(self, config: ModelConfig) -> tuple[int, ...]:
        length = letters(config)
        return tuple(length[size] for size in self.sizes) or (1,) * len(self.params)

    def _lengths(self, config: ModelConfig) -> dict[str, int]:
        return letters(config) | {"part": sum(self._sizes(config))}

    def _used_lengths(self, config: ModelConfig) -> dict[str, int]:
        # einops refuses the length of an axis that its pattern does not have.
        length = self._lengths(config)
        return {axis: length[axis] for axis in set(re.findall(r"\w+", self.pattern))}


def rule(tensor: str, pattern: str, *params: str, sizes: tuple[str, ...] = ()) -> Rule:
    """A row of a family's table of weights."""
    return Rule(tensor, pattern, params, sizes)


def norm_rules(tensor: str, norm: str) -> tuple[Rule, Rule]:
    """The rows of a LayerNorm: its gain and its bias."""
    gain, bias = f"{tensor}.weight", f"{tensor}.bias"
    return rule(gain, "D -> D", f"{norm}.w"), rule(bias, "D -> D", f"{norm}.b")


def letters(config: ModelConfig) -> dict[str, int]:
    """The length of each axis of the weights, by the letters of axes.py.

    Letters used here alone: M width of the embedding, N rows of the learned positions, J width of
    one expert, U width of the shared expert.
    """
    return {
        "D": config.d_model,
        "H": config.n_heads,
        "G": config.n_kv_heads,
        "R": config.n_heads // config.n_kv_heads,
        "K": config.d_head,
        "F": config.d_mlp,
        "V": config.vocab_size,
        "M": config.d_embed or config.d_model,
        "N": config.max_positions + config.position_offset,
        "E": config.n_experts,
        "J": config.d_expert,
        "U": config.d_shared_expert,
        "1": 1,
    }


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture of Hugging Face.

    Attributes:
        name: its `model_type`.
        defaults: the config fields that are read, with the defaults of Hugging Face's class.
        types: the types of the fields whose default is None.
        nullable: fields that may be null although their default is not.
        choices: for each field that holds a name: the supported names, and their meaning here.
        build: a function from the values of these fields to the arguments of ModelConfig (all but
            dtype). It raises ValueError for a combination that is not supported.
        rules: the table of weights. Where several rows fill one parameter, the first row whose
            tensors are in the checkpoint is used.
        prefix: the start of tensor names; checkpoints may leave it out.
        aliases: other `model_type`s of the same architecture.
        nested: the config field that holds the decoder's own config, in models of several parts.
        buffers: regular expressions of tensors that are not weights of the decoder.
        spelled: other names of tensors: regular expressions, and their replacements.
        renamed: other names of fields.
        ignored: further fields that do not change the forward, by the reason why.
        only: further fields that are supported with these values only.
    """

    name: str
    defaults: Mapping[str, Any]
    build: Callable[[dict[str, Any]], dict[str, Any]]
    rules: tuple[Rule, ...]
    prefix: str
    aliases: tuple[str, ...] = ()
    nested: str | None = None
    types: Mapping[str, type] = field(default_factory=dict)
    nullable: tuple[str, ...] = ()
    choices: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    buffers: tuple[str, ...] = ()
    spelled: Mapping[str, str] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    ignored: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    only: Mapping[str, tuple] = field(default_factory=dict)

    @property
    def read(self) -> tuple[str, ...]:
        """The names of the config fields that are read."""
        return (*self.defaults, *self.renamed, "dtype", "torch_dtype")

    @property
    def known(self) -> frozenset[str]:
        """The names of all config fields that are accounted for."""
        reasons = (*_IGNORED.values(), *self.ignored.values())
        ignored = [name for names in reasons for name in names]
        return frozenset((*self.read, *ignored, *_ONLY, *self.only))

    def config(self, hf: Mapping[str, Any]) -> ModelConfig:
        """The ModelConfig of a Hugging Face config, in which absent fields have their defaults.

        Raises:
            ValueError: listing every field that is unknown, or has a value that is not supported.
        """
        values, problems = self._read(hf)
        stored = hf.get("dtype") or hf.get("torch_dtype") or "float32"
        dtype = _DTYPES.get(str(stored).removeprefix("torch."))
        if dtype is None:
            must = f"one of {tuple(_DTYPES)}"
            problems.append(expected("dtype", must, repr(stored), "convert the weights"))
        values |= {name: table[values[name]] for name, table in self.choices.items()}
        for name in _LAYER_COUNTS & values.keys():
            # Raised at once, because `build` makes tuples with an entry for each layer.
            if values[name] > _MAX_LAYERS:
                must = f"at most {_MAX_LAYERS}"
                raise ValueError(expected(name, must, values[name], "correct it"))
        config = None
        try:
            config = ModelConfig(**self.build(values), dtype=dtype or "float32")
        except ValueError as error:
            problems.append(str(error))
        except (ArithmeticError, TypeError) as error:
            must, do = "of numbers that fit together", "look for one that is 0, or far too large"
            problems.append(expected(f"config of {self.name}", must, f"'{error}'", do))
        if config is None or problems:
            raise ValueError("\n".join(problems))
        return config

    def _read(self, hf: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The values of the fields that are read, and a message for each field that is wrong."""
        values, problems = dict(self.defaults), []
        only = {**_ONLY, **self.only}
        for name, value in hf.items():
            field_name = self.renamed.get(name, name)
            if field_name in self.defaults:
                must = self._must(field_name, value)
                if must is None:
                    values[field_name] = value
                else:
                    do = "it is not supported" if field_name in self.choices else "correct it"
                    problems.append(expected(name, must, repr(value), do))
            elif name in only:
                if value is not None and value not in only[name]:
                    must = " or ".join(map(repr, (*only[name], None)))
                    problems.append(expected(name, must, repr(value), "it is not supported"))
            elif name not in self.known and value is not None:
                must = f"absent, or a config field of {self.name} that is known here"
                do = "it may change the forward; remove it if it does not"
                problems.append(expected(name, must, repr(value), do))
        return values, problems

    def _must(self, name: str, value: Any) -> str | None:
        """What the value must be, or None if it is right."""
        if name in self.choices:
            known = tuple(self.choices[name])
            return None if value in known else f"one of {known}"
        default = self.defaults[name]
        kind = self.types[name] if default is None else type(default)
        if value is None and (default is None or name in self.nullable):
            return None
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return None if abs(value) < HUGE else "finite"
        # Not isinstance: a bool is an int to Python, and JSON knows the difference.
        if type(value) is kind:
            return None
        return f"of type {kind.__name__}" + (" or null" if default is None else "")


def per_head(width: int, n_heads: int, name: str) -> int:
    """`width / n_heads`; raises ValueError unless it is whole."""
    if n_heads < 1 or width % n_heads:
        raise ValueError(expected(name, f"a multiple of {n_heads} heads", width, "check both"))
    return width // n_heads
