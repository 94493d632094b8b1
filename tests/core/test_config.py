"""What a ModelConfig refuses, and the message for each."""

from dataclasses import replace
from typing import Any

import pytest

from arrakis_jax import ModelConfig, RopeScaling, config_for

CONFIG = config_for("llama", num_hidden_layers=3, num_key_value_heads=8)
YARN = RopeScaling(kind="yarn", factor=2.0, beta_fast=32.0, beta_slow=1.0, original_max_positions=9)
LONG = RopeScaling(
    kind="longrope", short_factor=(1.0,), long_factor=(1.0,), original_max_positions=9
)
REFUSED: list[tuple[dict[str, Any], str]] = [
    (dict(n_layers=-1), "`n_layers` must be an int >= 0, got -1; check it"),
    (dict(n_heads=True), "`n_heads` must be an int >= 1, got True; check it"),
    (dict(window=0), "`window` must be an int >= 1 or None, got 0; check it"),
    (dict(norm_eps=float("nan")), "`norm_eps` must be a finite number or None, got nan; check it"),
    (dict(rope_layers=(True, False)),
     "`rope_layers` must be None or 3 bools, got (True, False); give one for each layer"),
    (dict(n_kv_heads=5),
     "`n_heads` must be a multiple of n_kv_heads=5, got 32; change one of them"),
    (dict(norm_placement=None),
     "`norm_placement` must be one of ('pre', 'post', 'both', 'stream_before', 'stream_after'), "
     "got None; choose one"),
    (dict(norm=None), "`norm_eps` must be a number >= 0 with a norm and None without, "
     "got 1e-06; set both or neither"),
    (dict(positions="alibi"),
     "`rope_theta` must be set exactly with positions='rope', got 10000.0; set both or neither"),
    (dict(rotary_dim=5),
     "`rotary_dim` must be even with RoPE, and at most d_head=128, got 5; change one of them"),
    (dict(d_head=5),
     "`d_head` must be even with RoPE, and at most d_head=5, got 5; change one of them"),
    (dict(rope_scaling=YARN, rope_theta=1.0),
     "`rope_theta` must be more than 1 with yarn scaling, got 1.0; correct it"),
    (dict(rope_scaling=LONG), f"`rope_scaling` must be with 64 factors in each list, got {LONG!r}; "
     "give one for each pair"),
    (dict(parallel=True, norm_placement="post"),
     "`norm_placement` must be 'pre' with parallel, got 'post'; no other is supported"),
    (dict(n_experts=2, d_expert=3, experts_per_token=4),
     "`experts_per_token` must be at most n_experts=2, got 4; change one of them\n"
     "`d_mlp` must be positive if some layer has no experts, else 0, got 11008; check it"),
    (dict(norm_placement="stream_after", stream_dtype="bfloat16"),
     "`stream_dtype` must be None with norm_placement='stream_after', got 'bfloat16'; its rounding "
     "would be no term of a decomposition"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_a_config_is_refused(changes, message):
    with pytest.raises(ValueError) as error:
        replace(CONFIG, **changes)
    assert str(error.value) == message


def test_lists_and_tables_of_a_json_file():
    fields: Any = dict(kind="linear", factor=2.0)
    config = replace(CONFIG, rope_scaling=fields, rope_layers=[True, False, True])
    assert config == replace(
        CONFIG, rope_scaling=RopeScaling(**fields), rope_layers=(True, False, True)
    )
    assert isinstance(hash(config), int) and isinstance(config, ModelConfig)


def test_what_follows_from_the_fields():
    assert (CONFIG.heads_per_group, CONFIG.any_mlp, CONFIG.rotary_pairs) == (4, True, 64)
    assert not replace(CONFIG, d_mlp=0).any_mlp
    assert CONFIG.score_scale(2) == 128**-0.5
    assert replace(CONFIG, attention_scale=3.0, scale_by_inverse_layer=True).score_scale(2) == 1.0
