"""Every field of Hugging Face's configs is read, ignored on purpose, or refused."""

import dataclasses
from copy import deepcopy

import pytest
from transformers import CONFIG_MAPPING
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from arrakis_jax.core.config import RopeScaling
from arrakis_jax.families import config_for, families, family_for

FAMILIES = {family.name: family for family in families().values()}
ORIGINAL = "original_max_position_embeddings"
LLAMA3_BY_LENGTH = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
LLAMA3 = LLAMA3_BY_LENGTH | {ORIGINAL: 8192}
LONGROPE = {
    "type": "longrope", "short_factor": [1 + i / 9 for i in range(16)],
    "long_factor": [2 + i for i in range(16)],
}  # fmt: skip

# What the classes do with fields that they do not have, besides those of RoPE.
BESIDES = {"gemma3": {"rope_local_base_freq": 10000.0, "sliding_window_pattern": 6}}

# A field that is read changes the config when it is doubled (an int), halved (a float), negated, or
# set to another choice, or else to one of these.
CHANGES = {
    "head_dim": 6, "n_inner": 9, "intermediate_size": 9, "ffn_hidden_size": 9, "clip_qkv": 3.0,
    "word_embed_proj_dim": 9, "num_key_value_heads": 1, "num_kv_heads": 1, "n_head_kv": 71,
    "num_ln_in_parallel_attn": 1, "sliding_window": 9, "max_window_layers": 5,
    "mlp_only_layers": [1], "final_logit_softcapping": 7.0, "rope_scaling": LLAMA3,
    "rope_parameters": LLAMA3, ORIGINAL: 77, "no_rope_layers": [0] * 36,
    "attention_types": [[["local"], 24]], "attention_layers": ["global"] * 24,
}  # fmt: skip
CHANGES_IN = {
    ("phi", "head_dim"): 24,
    ("stablelm", "head_dim"): 24,
    ("gemma3", "rope_parameters"): {"full_attention": LLAMA3},
}
# Where that is not enough: what must be the case for a field to matter.
WINDOWS = {"use_sliding_window": True, "sliding_window": 8}
GIVEN = {
    "qwen2": WINDOWS, "qwen3": WINDOWS, "smollm3": WINDOWS,
    "qwen2_moe": WINDOWS | {"decoder_sparse_step": 2},
    "qwen3_moe": WINDOWS | {"decoder_sparse_step": 2},
    ("falcon", "num_kv_heads"): {"new_decoder_architecture": True},
    ("falcon", "num_ln_in_parallel_attn"): {"new_decoder_architecture": True},
}  # fmt: skip
# What must change with it.
ALONG = {("gpt_neo", "num_layers"): {"attention_types": [[["global", "local"], 24]]}}
# What is read to be refused.
CHECKED = {("gpt_oss", "quantization_config")}


def config_class(name):
    found = CONFIG_MAPPING[name]
    return found.sub_configs.get(FAMILIES[name].nested, found)


@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_are_those_of_the_class(name):
    theirs = {field.name: field.default for field in dataclasses.fields(config_class(name))}
    ours = FAMILIES[name].defaults
    named = ours.keys() & theirs
    assert {n: ours[n] for n in named} == {n: theirs[n] for n in named}
    rotary = getattr(config_class(name)(), "rope_parameters", None) or {}
    rotary = rotary.get("full_attention", rotary)
    effective = {n: rotary[n] for n in ("rope_theta", "partial_rotary_factor") if n in rotary}
    others = {n: v for n, v in ours.items() if n not in theirs and v is not None}
    assert others == effective | BESIDES.get(name, {})


@pytest.mark.parametrize("name", FAMILIES)
def test_every_field_of_the_class_is_accounted_for(name):
    config, family = config_class(name)(), FAMILIES[name]
    fields = {f.name for f in dataclasses.fields(config)}
    assert fields | set(config.to_dict()) | set(config.attribute_map) <= family.known
    assert family.config(config.to_diff_dict()) == config_for(name)
    assert family.config(config.to_dict()) == config_for(name)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_field_is_both_read_and_ignored(name):
    family = FAMILIES[name]
    ignored = [field for names in family.ignored.values() for field in names]
    assert len(set(ignored)) == len(ignored)
    assert not set(family.read) & {*ignored, *family.only}
    assert not set(ignored) & set(family.only)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_field_that_is_read_changes_the_config(name):
    family = FAMILIES[name]
    for field in family.read:
        if field in ("dtype", "torch_dtype"):
            assert config_for(name, **{field: "bfloat16"}).dtype == "bfloat16"
            continue
        inner = family.renamed.get(field, field)
        given = GIVEN.get((name, inner), GIVEN.get(name, {}))
        if inner == ORIGINAL:
            given = given | {"rope_scaling": LLAMA3}
        value = changed(family, inner, given.get(inner, family.defaults[inner]))
        changes = {inner: value} | ALONG.get((name, inner), {})
        changes[field] = changes.pop(inner)
        same = config_for(name, **given | changes) == config_for(name, **given)
        assert same == ((name, inner) in CHECKED), field


def changed(family, field, value):
    """Another value of a field."""
    if field in family.choices:
        table = family.choices[field]
        return next(choice for choice in table if table[choice] != table[value])
    if (family.name, field) in CHANGES_IN:
        return CHANGES_IN[family.name, field]
    if field == "layer_types":
        n_layers = family.defaults["num_hidden_layers"]
        return ["full_attention", "sliding_attention"] * (n_layers // 2)
    if (family.name, field) in CHECKED:
        return {"quant_method": "mxfp4"}
    if isinstance(value, bool):
        return not value
    if value is None or CHANGES.get(field, value) != value:
        return CHANGES[field]
    return value / 2 if isinstance(value, float) else 2 * value


def test_config_for_defaults():
    llama = config_for("llama")
    assert (llama.n_layers, llama.d_model, llama.d_mlp, llama.d_head) == (32, 4096, 11008, 128)
    assert (llama.n_kv_heads, llama.vocab_size, llama.tied) == (32, 32000, False)
    gpt2 = config_for("gpt2")
    assert (gpt2.n_layers, gpt2.d_model, gpt2.d_mlp, gpt2.max_positions) == (12, 768, 3072, 1024)
    assert gpt2.tied and gpt2.activation == "gelu_tanh"
    assert family_for("gemma3_text") is family_for("gemma3")


# Configs as older versions wrote them, or with fields that depend on each other. Hugging Face's
# class reads them and writes them in its own way, which must mean the same to us.
SMALL = dict(hidden_size=64, num_attention_heads=2, max_position_embeddings=4096)
YARN = {"rope_type": "yarn", "factor": 4.0}
SPELLINGS = {
    "llama-linear": ("llama", dict(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})),
    "llama-dynamic": ("llama", dict(rope_scaling={"type": "dynamic", "factor": 2.0})),
    "llama-dynamic-original": (
        "llama", dict(rope_scaling={"rope_type": "dynamic", "factor": 2.0, ORIGINAL: 99}),
    ),
    "llama3": ("llama", dict(rope_theta=5e5, rope_scaling=LLAMA3)),
    "llama3-both": ("llama", dict(rope_theta=5e5, rope_parameters=LLAMA3 | {"rope_theta": 7e5})),
    "llama3-scaling-first": (
        "llama", dict(rope_scaling=LLAMA3, rope_parameters={"rope_type": "default"}),
    ),
    "llama3-length": ("llama", dict(rope_scaling=LLAMA3_BY_LENGTH)),
    "llama3-original": ("llama", {"rope_scaling": LLAMA3, ORIGINAL: 77}),
    "yarn": ("qwen2", dict(rope_scaling=YARN | {ORIGINAL: 1024})),
    "yarn-two-types": ("qwen3", dict(rope_scaling=YARN | {"type": "linear"})),
    "yarn-length": ("mistral", dict(rope_scaling=YARN)),
    "yarn-ratio": ("llama", dict(rope_scaling=YARN | {"factor": None, ORIGINAL: 64})),
    "yarn-mscale": ("llama", dict(rope_scaling=YARN | {"mscale": 0.7, "mscale_all_dim": 0.9})),
    "yarn-one-mscale": ("llama", dict(rope_scaling=YARN | {"mscale": 0.7})),
    "yarn-attention": (
        "llama",
        dict(rope_scaling=YARN | {
            "attention_factor": 1.3, "mscale": 0.7, "mscale_all_dim": 0.9, "beta_fast": 20,
            "beta_slow": 2.0, "truncate": False,
        }),
    ),
    "yarn-shorter": ("llama", dict(rope_scaling=YARN | {"factor": 0.5})),
    "longrope": ("phi3", SMALL | {"rope_scaling": LONGROPE, ORIGINAL: 64}),
    "longrope-original": ("phi3", SMALL | {"rope_scaling": LONGROPE | {ORIGINAL: 64}}),
    "longrope-factor": (
        "llama", SMALL | {"rope_scaling": LONGROPE | {"factor": 9.0, ORIGINAL: 64}},
    ),
    "longrope-attention": (
        "llama", SMALL | {"rope_scaling": LONGROPE | {"attention_factor": 1.2}},
    ),
    "longrope-within": ("llama", SMALL | {"rope_scaling": LONGROPE}),
    "partial-phi3": (
        "phi3",
        SMALL | {"hidden_size": 128, "partial_rotary_factor": 0.5, "rope_scaling": LONGROPE},
    ),
    "partial": ("phi3", SMALL | {"partial_rotary_factor": 0.75}),
    "partial-both": (
        "phi", {"partial_rotary_factor": 0.25, "rope_parameters": {"partial_rotary_factor": 0.75}},
    ),
    "partial-neox": ("gpt_neox", dict(rotary_pct=0.5, rotary_emb_base=777)),
    "gemma3": (
        "gemma3",
        dict(
            rope_theta=3e6, rope_local_base_freq=3e4, sliding_window_pattern=4, layer_types=None,
            rope_scaling={"rope_type": "linear", "factor": 8.0},
        ),
    ),
    "gemma3-one-rope": (
        "gemma3", dict(rope_parameters={"sliding_attention": {"type": "linear", "factor": 3.0}}),
    ),
    "gemma3-no-window": ("gemma3", dict(sliding_window_pattern=1)),
    "gemma3-all-windows": (
        "gemma3", dict(num_hidden_layers=2, layer_types=["sliding_attention"] * 2),
    ),
    "gpt_oss": ("gpt_oss", dict(rope_scaling={"type": "linear", "factor": 2.0}, num_experts=16)),
    "gpt_oss-theta": ("gpt_oss", dict(rope_theta=1e4)),
    "qwen2-windows": ("qwen2", dict(use_sliding_window=True, max_window_layers=20)),
    "qwen2-windows-off": ("qwen2", dict(max_window_layers=20, sliding_window=99)),
    "qwen2-null": ("qwen2", dict(use_sliding_window=True, sliding_window=None)),
    "qwen3-listed": (
        "qwen3",
        dict(
            use_sliding_window=True, num_hidden_layers=3,
            layer_types=["full_attention", "sliding_attention", "attention"],
        ),
    ),
    "qwen2_moe-windows": (
        "qwen2_moe", dict(use_sliding_window=True, max_window_layers=9, decoder_sparse_step=3),
    ),
    "qwen3_moe": ("qwen3_moe", dict(use_sliding_window=True, mlp_only_layers=[0, 5], head_dim=128)),
    "qwen3_moe-dense": ("qwen3_moe", dict(decoder_sparse_step=99, num_local_experts=4)),
    "mistral-null": ("mistral", dict(sliding_window=None)),
    "smollm3": (
        "smollm3",
        dict(use_sliding_window=True, sliding_window=9, no_rope_layer_interval=3),
    ),
    "smollm3-listed": (
        "smollm3",
        dict(num_hidden_layers=2, no_rope_layers=[1, 0, 0], use_sliding_window=True,
             sliding_window=9),
    ),
    "gemma-gelu": ("gemma", dict(hidden_act="gelu")),
}  # fmt: skip


@pytest.mark.parametrize("case", SPELLINGS)
def test_older_spellings_mean_what_the_class_makes_of_them(case):
    name, fields = SPELLINGS[case]
    ours = config_for(name, **fields)
    theirs = config_class(name)(**deepcopy(fields))
    assert ours == FAMILIES[name].config(theirs.to_dict())
    assert ours != config_for(name) or case in ("gemma-gelu", "qwen2-windows-off", "qwen2-null")
    if ours.rope_scaling is None or name == "gemma3":
        return
    kind = theirs.rope_parameters["rope_type"]
    _, attention_factor = ROPE_INIT_FUNCTIONS[kind](theirs)
    assert ours.rope_scaling.kind == kind
    assert ours.rope_scaling.attention_factor == attention_factor


@pytest.mark.parametrize("case", SPELLINGS)
def test_layers_are_those_of_the_class(case):
    name, fields = SPELLINGS[case]
    ours, theirs = config_for(name, **fields), config_class(name)(**deepcopy(fields))
    n = ours.n_layers
    if "layer_types" in FAMILIES[name].defaults:
        slides = [kind == "sliding_attention" for kind in theirs.layer_types]
        windows = ours.window_layers or (ours.window is not None,) * n
        assert list(windows) == slides
    if name == "smollm3":
        assert ours.rope_layers == tuple(map(bool, theirs.no_rope_layers[:n]))


# What published files hold besides the fields of their class.
PUBLISHED = {
    "starcoder2": dict(
        activation_function="gelu", attention_softmax_in_fp32=True, layer_norm_epsilon=1e-05,
        mlp_type="default", norm_type="layer_norm", scale_attn_weights=True,
        scale_attention_softmax_in_fp32=True,
    ),
    "gemma": dict(hidden_activation=None, rope_scaling=None),
    "gemma2": dict(
        cache_implementation="hybrid", hidden_act="gelu_pytorch_tanh", sliding_window_size=4096,
    ),
    "gemma3": dict(attn_logit_softcapping=None, cache_implementation="hybrid"),
    "phi3": dict(
        attention_bias=False, full_attn_mod=1, interpolate_factor=1, lm_head_bias=False,
        mlp_bias=False, auto_map={},
    ),
    "qwen2": dict(use_mrope=False),
    "qwen3_moe": dict(max_window_layers=48),
    "smollm3": dict(max_window_layers=28, pretraining_tp=2),
    "cohere": dict(model_max_length=131072, pretraining_tp=1),
    "gpt_oss": dict(
        experts_per_token=4, initial_context_length=4096,
        quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_fields_of_published_configs(name):
    assert config_for(name, **PUBLISHED[name]) == config_for(name)


def test_scalings_are_resolved():
    given = dict(rope_theta=5e5, rope_scaling=LLAMA3)
    scaling = RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
    )
    assert config_for("llama", **given).rope_scaling == scaling
    plain = config_for("llama", rope_parameters={"rope_type": "default", "rope_theta": 7.0})
    assert (plain.rope_theta, plain.rope_scaling) == (7.0, None)
    # An old name, which transformers 5 no longer reads.
    su = SMALL | {"rope_scaling": LONGROPE | {"type": "su"}}
    assert config_for("phi3", **su) == config_for("phi3", **SMALL | {"rope_scaling": LONGROPE})


def test_layers_with_experts():
    dense = config_for("qwen3_moe", mlp_only_layers=[0], num_hidden_layers=4)
    assert dense.moe_layers == (False, True, True, True) and dense.d_mlp == 6144
    assert config_for("qwen3_moe").moe_layers is None and config_for("qwen3_moe").d_mlp == 0
    assert config_for("qwen2_moe", num_experts=0).n_experts == 0


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt2", dict(activation_function="relu6"), "`activation_function` must be one of"),
        ("gpt2", dict(add_cross_attention=True), "`add_cross_attention` must be False"),
        ("gpt2", dict(n_layer="12"), "`n_layer` must be of type int, got '12'"),
        ("gpt2", dict(n_layer=True), "`n_layer` must be of type int, got True"),
        ("gpt2", dict(n_head=5), "`n_embd` must be a multiple of 5 heads, got 768"),
        ("gpt2", dict(n_inner=1.5), "`n_inner` must be of type int or null, got 1.5"),
        ("gpt2", dict(dtype="int8"), "`dtype` must be one of .*, got 'int8'"),
        ("llama", dict(rope_scaling={"type": "mrope", "factor": 2.0}),
         r"`rope_scaling.rope_type` must be one of \('default', .*, got 'mrope'"),
        ("llama", dict(rope_parameters={"rope_type": "llama3", "factor": 2.0}),
         "`rope_parameters.low_freq_factor` must be a number > 0, got None; llama3 needs it"),
        ("llama", dict(rope_parameters=LLAMA3 | {"beta_fast": 2}),
         "`rope_parameters.beta_fast` must be absent .*, got 2"),
        ("llama", dict(rope_parameters=LLAMA3 | {"factor": "8"}), "must be a number > 0, got '8'"),
        ("llama", dict(rope_parameters={"rope_theta": -1.0}), "`rope_parameters.rope_theta` must"),
        ("llama", dict(rope_scaling=YARN | {"truncate": 1}), "truncate` must be a bool, got 1"),
        ("phi3", dict(rope_scaling=LONGROPE),
         r"short_factor` must be a list of 48 numbers > 0, got \[1.0"),
        ("llama", dict(partial_rotary_factor=0.5), "`partial_rotary_factor` must be 1 .*got 0.5"),
        ("llama", dict(rope_parameters={"partial_rotary_factor": 0.5}), "must be 1, got 0.5"),
        ("phi3", dict(partial_rotary_factor=1.5), "must be a number > 0 and <= 1, got 1.5"),
        ("llama", dict(num_key_value_heads=5), "must be a multiple of n_kv_heads=5"),
        ("llama", dict(quantization_config={"bits": 4}), "`quantization_config` must be None"),
        ("gpt_oss", dict(quantization_config={"quant_method": "awq"}),
         "`quantization_config` must be absent, or of quant_method 'mxfp4', got .*'awq'"),
        ("gpt_oss", dict(quantization_config={"bits": 4}), "of quant_method 'mxfp4', got .*4"),
        ("gpt_oss", dict(swiglu_alpha=1.0), "`swiglu_alpha` must be 1.702 or None, got 1.0"),
        ("llama", dict(per_layer_config={0: {}}), "`per_layer_config` must be None"),
        ("gemma", dict(use_bidirectional_attention=True), "attention` must be False or None"),
        ("gemma3", dict(attn_logit_softcapping=50.0), "`attn_logit_softcapping` must be None"),
        ("gemma3", dict(rope_parameters={"rope_type": "default"}),
         "`rope_parameters` must be dicts under 'full_attention' and 'sliding_attention', got"),
        ("gemma3", dict(rope_scaling={"type": "linear", "factor": 8.0}), "factor` must be absent"),
        ("gemma3", dict(sliding_window_pattern=0), "`sliding_window_pattern` must be > 0, got 0"),
        ("gemma2", dict(layer_types=["full_attention"]), "`layer_types` must be 26 of"),
        ("gemma2", dict(num_hidden_layers=1, layer_types=["chunked_attention"]),
         r"`layer_types` must be 1 of .*, got \['chunked_attention'\]"),
        ("gemma2", dict(sliding_window=None), "`sliding_window` must be an int.*, got None"),
        ("smollm3", dict(no_rope_layers=[1]), "`no_rope_layers` must be .*36 layers, got"),
        ("qwen2_moe", dict(mlp_only_layers=["0"]), "`mlp_only_layers` must be of layers"),
        ("qwen2_moe", dict(mlp_only_layers=[24]), "`mlp_only_layers` must be of layers"),
        ("qwen3_moe", dict(num_experts=-2), "`num_experts` must be >= 0, got -2"),
        ("smollm3", dict(no_rope_layers=["0"] * 36), "`no_rope_layers` must be 0 or 1 for each"),
        ("granite", dict(embedding_multiplier=float("nan")), "must be finite, got nan"),
        ("llama", dict(rms_norm_eps=float("inf")), "`rms_norm_eps` must be finite, got inf"),
        ("llama", dict(rope_theta=10**400), "`rope_theta` must be finite"),
        ("llama", dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1.0, "factor": 2.0}),
         "`rope_theta` must be more than 1 with yarn"),
        ("llama", dict(num_hidden_layers=10**12), "`num_hidden_layers` must be at most 10000"),
        ("gemma2", dict(num_hidden_layers=10**12), "`num_hidden_layers` must be at most 10000"),
        ("gpt_neo", dict(attention_types=[[["global"], 10**11]]), "for each of 24 layers, got"),
        ("falcon", dict(num_attention_heads=0), "must be of numbers that fit together, got"),
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
    with pytest.raises(ValueError, match=r"`family` must be one of \(.*'llama',.*\), got 'bert'"):
        config_for("bert")
