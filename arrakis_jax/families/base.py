"""What a family is: how its Hugging Face config reads, and where its tensors go. All data."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import rearrange

from arrakis_jax.config import ModelConfig
from arrakis_jax.errors import CheckpointError, expected

# Fields of every Hugging Face config that do not change a decoder's forward.
BOOKKEEPING = frozenset(
    "architectures model_type _name_or_path transformers_version torch_dtype dtype use_cache "
    "id2label label2id problem_type num_labels return_dict output_hidden_states output_attentions "
    "chunk_size_feed_forward task_specific_params initializer_range bos_token_id eos_token_id "
    "pad_token_id unk_token_id sep_token_id decoder_start_token_id tokenizer_class prefix "
    "finetuning_task keys_to_ignore_at_inference auto_map max_length min_length do_sample "
    "num_beams temperature top_k top_p torchscript gradient_checkpointing _attn_implementation "
    "_attn_implementation_autoset attn_implementation return_dict_in_generate "
    "_commit_hash".split()
)
# Fields that are fine at these values and change the forward at any other.
INERT: Mapping[str, tuple] = {
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "quantization_config": (None,),
    "pruned_heads": (None, {}),
    "use_bfloat16": (False,),
}
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "linear": "identity",
}
_AXES = {
    "D": "d_model", "H": "n_heads", "G": "n_kv_heads", "K": "d_head", "F": "d_mlp",
    "V": "vocab_size", "P": "max_positions",
}  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """Where one tensor of a checkpoint goes.

    Attributes:
        tensor: its name, with `{l}` for the layer.
        parameters: the parameter it fills, or several if it holds them side by side.
        pattern: einops, from the tensor's axes to the parameter's; several parameters are split
            along a first axis named `parts`.
    """

    tensor: str
    parameters: tuple[str, ...]
    pattern: str

    def sizes(self, config: ModelConfig) -> dict[str, int]:
        """The sizes of the axes that the pattern names."""
        names = set(re.findall(r"\w+", self.pattern))
        sizes = {a: getattr(config, field) for a, field in _AXES.items() if a in names}
        return sizes | ({"parts": len(self.parameters)} if "parts" in names else {})

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """The tensor's shape."""
        sizes = self.sizes(config)
        groups = re.findall(r"\(([^)]*)\)|(\w+)", self.pattern.split("->")[0])
        return tuple(
            int(np.prod([sizes[axis] for axis in (group or single).split()]))
            for group, single in groups
        )

    def read(self, tensor: np.ndarray, config: ModelConfig) -> list[np.ndarray]:
        """The parameters (of one layer) in a tensor."""
        value = rearrange(tensor, self.pattern, **self.sizes(config))
        return list(value) if len(self.parameters) > 1 else [value]

    def write(self, parameters: list[np.ndarray], config: ModelConfig) -> np.ndarray:
        """The tensor that holds these parameters: the inverse of `read`."""
        value = np.stack(parameters) if len(parameters) > 1 else parameters[0]
        source, target = self.pattern.split("->")
        return np.ascontiguousarray(rearrange(value, f"{target}->{source}", **self.sizes(config)))


def rule(tensor: str, parameters: str, pattern: str) -> Rule:
    """A Rule, with the parameters separated by spaces."""
    return Rule(tensor, tuple(parameters.split()), pattern)


@dataclass(frozen=True)
class Family:
    """A decoder family of Hugging Face.

    Attributes:
        name: its `model_type`.
        defaults: the config's class defaults, of every field that is read.
        read: the fields as a ModelConfig; every field it reads is in `defaults`.
        rules: where the tensors go; those whose parameters the config does not have are absent.
        ignored: further fields that do not change the forward.
        inert: further fields that are fine at these values only.
        aliases: other names of fields.
        prefix: what some checkpoints leave out at the start of every tensor's name.
        buffers: regular expressions of tensors that are not parameters.
        tied_copy: the unembedding's tensor, which tied checkpoints may hold as a copy.
    """

    name: str
    defaults: Mapping[str, Any]
    read: Callable[[dict[str, Any]], dict[str, Any]]
    rules: tuple[Rule, ...]
    ignored: frozenset[str] = frozenset()
    inert: Mapping[str, tuple] | None = None
    aliases: Mapping[str, str] | None = None
    prefix: str = ""
    buffers: tuple[str, ...] = ()
    tied_copy: str = "lm_head.weight"

    def config(self, fields: Mapping[str, Any], dtype: str = "float32") -> ModelConfig:
        """The ModelConfig of a Hugging Face config, every field of it accounted for.

        Raises:
            CheckpointError: naming every field that is unknown or has an unsupported value.
        """
        aliases = self.aliases or {}
        given = {aliases.get(name, name): value for name, value in fields.items()}
        inert = {**INERT, **(self.inert or {})}
        problems = []
        for name, value in given.items():
            if name in inert:
                if value not in inert[name]:
                    do = "this feature is not implemented"
                    problems.append(expected(name, f"one of {inert[name]}", repr(value), do))
            elif name not in self.defaults and name not in BOOKKEEPING | self.ignored:
                do = f"{self.name} configs have no such field that this library knows; it may "
                do += "change the forward"
                problems.append(expected(name, "absent", repr(value), do))
        hf = {**self.defaults, **{k: v for k, v in given.items() if k in self.defaults}}
        try:
            read = {} if problems else self.read(hf)
            config = None if problems else ModelConfig(**read, dtype=dtype)
        except ValueError as error:
            config, problems = None, [str(error)]
        if config is None:
            raise CheckpointError("\n".join(problems))
        return config


def activation(fields: dict[str, Any], name: str) -> str:
    """The activation that a field names."""
    if fields[name] not in ACTIVATIONS:
        do = "other activations are not implemented"
        raise CheckpointError(expected(name, f"one of {tuple(ACTIVATIONS)}", fields[name], do))
    return ACTIVATIONS[fields[name]]
