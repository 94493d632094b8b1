"""Every field of Hugging Face's configs is read, ignored on purpose, or refused."""

import dataclasses

import pytest
from transformers import GPT2Config, LlamaConfig

from arrakis_jax.config import RopeScaling
from arrakis_jax.families import config_for, families, family_for

CLASSES = {"gpt2": GPT2Config, "llama": LlamaConfig}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def test_every_family_is_compared():
    assert set(CLASSES) == set(families())


@pytest.mark.parametrize("name", CLASSES)
def test_defaults_are_those_of_the_class(name):
    theirs = {
        f.name: f.default
        for f in dataclasses.fields(CLASSES[name])
        if f.default is not dataclasses.MISSING
    }
    ours = dict(family_for(name).defaults)
    if name == "llama":
        assert ours.pop("rope_theta") == LlamaConfig.default_theta
        for old in ("rope_scaling", "original_max_position_embeddings"):
            assert ours.pop(old) is None
    assert ours == {field: theirs[field] for field in ours}


@pytest.mark.parametrize("name", CLASSES)
def test_every_field_of_the_class_is_accounted_for(name):
    config = CLASSES[name]()
    known = family_for(name).known
    fields = {f.name for f in dataclasses.fields(config)}
    assert fields | set(config.to_dict()) | set(config.attribute_map) <= known
    assert family_for(name).config(config.to_diff_dict()) == config_for(name)
    assert family_for(name).config(config.to_dict()) == config_for(name)


@pytest.mark.parametrize("name", CLASSES)
def test_no_field_is_both_read_and_ignored(name):
    family = family_for(name)
    ignored = [field for names in family.ignored.values() for field in names]
    assert len(set(ignored)) == len(ignored)
    assert not set(family.read) & {*ignored, *family.only}


def test_config_for_defaults():
    llama = config_for("llama")
    assert (llama.n_layers, llama.d_model, llama.d_mlp, llama.d_head) == (32, 4096, 11008, 128)
    assert (llama.n_kv_heads, llama.vocab_size, llama.tied) == (32, 32000, False)
    gpt2 = config_for("gpt2")
    assert (gpt2.n_layers, gpt2.d_model, gpt2.d_mlp, gpt2.max_positions) == (12, 768, 3072, 1024)
    assert gpt2.tied and gpt2.activation == "gelu_tanh"


def test_every_field_that_is_read_changes_the_config():
    changes = {
        "gpt2": dict(
            vocab_size=7, n_positions=5, n_embd=24, n_layer=2, n_head=4, n_inner=9,
            activation_function="silu", layer_norm_epsilon=1e-3, scale_attn_weights=False,
            scale_attn_by_inverse_layer_idx=True, tie_word_embeddings=False, hidden_size=24,
            max_position_embeddings=5, num_attention_heads=4, num_hidden_layers=2,
            dtype="bfloat16", torch_dtype="bfloat16",
        ),
        "llama": dict(
            vocab_size=7, hidden_size=64, intermediate_size=9, num_hidden_layers=2,
            num_attention_heads=64, num_key_value_heads=4, head_dim=6, hidden_act="gelu",
            max_position_embeddings=5, rms_norm_eps=1e-3, tie_word_embeddings=True,
            attention_bias=True, mlp_bias=True, rope_theta=5.0, rope_parameters=LLAMA3,
            rope_scaling=LLAMA3, dtype="bfloat16", torch_dtype="bfloat16",
        ),
    }  # fmt: skip
    for name, fields in changes.items():
        read = set(family_for(name).read) - {"original_max_position_embeddings"}
        assert set(fields) == read
        for field, value in fields.items():
            assert config_for(name, **{field: value}) != config_for(name), field


def test_spellings_of_rope():
    old = {("type" if k == "rope_type" else k): v for k, v in LLAMA3.items()}
    spellings = (
        dict(rope_theta=5e5, rope_scaling=LLAMA3),
        dict(rope_theta=5e5, rope_scaling=old),
        dict(rope_parameters=LLAMA3 | {"rope_theta": 5e5}),
        dict(rope_parameters=LLAMA3, rope_theta=5e5, rope_scaling=None),
    )
    scaling = RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
    )
    for spelling in spellings:
        config = config_for("llama", **spelling)
        assert (config.rope_theta, config.rope_scaling) == (5e5, scaling)
    short = {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}
    by_length = config_for("llama", rope_scaling=short, max_position_embeddings=99)
    assert by_length.rope_scaling.original_max_positions == 99
    named = config_for("llama", rope_scaling=LLAMA3, original_max_position_embeddings=77)
    assert named.rope_scaling.original_max_positions == 77
    plain = config_for("llama", rope_parameters={"rope_type": "default", "rope_theta": 7.0})
    assert (plain.rope_theta, plain.rope_scaling) == (7.0, None)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt2", dict(activation_function="quick_gelu"), "`activation_function` must be one of"),
        ("gpt2", dict(add_cross_attention=True), "`add_cross_attention` must be False"),
        ("gpt2", dict(n_layer="12"), "`n_layer` must be of type int, got '12'"),
        ("gpt2", dict(n_layer=True), "`n_layer` must be of type int, got True"),
        ("gpt2", dict(n_head=5), "`n_embd` must be a multiple of 5 heads, got 768"),
        ("gpt2", dict(n_inner=1.5), "`n_inner` must be of type int or null, got 1.5"),
        ("gpt2", dict(dtype="int8"), "`dtype` must be one of .*, got 'int8'"),
        ("llama", dict(rope_scaling={"type": "yarn", "factor": 2.0}),
         "`rope_scaling.rope_type` must be 'default' or 'llama3', got 'yarn'"),
        ("llama", dict(rope_parameters={"rope_type": "llama3", "factor": 2.0}),
         "`rope_parameters.low_freq_factor` must be a number > 0, got None"),
        ("llama", dict(rope_parameters=LLAMA3 | {"beta_fast": 2}),
         "`rope_parameters.beta_fast` must be absent .*, got 2"),
        ("llama", dict(rope_parameters=LLAMA3 | {"factor": "8"}), "must be a number > 0, got '8'"),
        ("llama", dict(partial_rotary_factor=0.5), "`partial_rotary_factor` must be 1 .*got 0.5"),
        ("llama", dict(num_key_value_heads=5), "must be a multiple of n_kv_heads=5"),
        ("llama", dict(quantization_config={"bits": 4}), "`quantization_config` must be None"),
        ("llama", dict(per_layer_config={0: {}}), "`per_layer_config` must be None"),
    ],
)  # fmt: skip
def test_unsupported_values_are_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        config_for(name, **changes)


def test_all_problems_come_in_one_error():
    hf = dict(
        attn_logit_softcapping=50.0, hidden_act="relu6", num_hidden_layers=None, head_dim=7,
        use_cache=True, unknown_but_unset=None,
    )  # fmt: skip
    with pytest.raises(ValueError) as error:
        family_for("llama").config(hf)
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert all("must be" in line and "got" in line for line in lines)
    for name in ("attn_logit_softcapping", "hidden_act", "num_hidden_layers", "d_head"):
        assert sum(f"`{name}`" in line for line in lines) == 1


def test_unknown_names():
    with pytest.raises(ValueError, match=r"`overrides` must be among .*n_layer.*got \['n_layers'"):
        config_for("gpt2", n_layers=2)
    with pytest.raises(
        ValueError, match=r"`family` must be one of \('gpt2', 'llama'\), got 'bert'"
    ):
        config_for("bert")
