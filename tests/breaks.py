"""Breaks the code in many places, one at a time, and shows which test notices each.

    python -m tests.breaks [--only NAME ...] [--list] [--jobs 2]

A break replaces a text that occurs once in a file of the package: a sign, a factor, an axis, a
term, a place. The script copies the checkout to a temporary folder, applies one break, and runs
the tests named with it: those of the default suite, and if none fails the exhaustive ones. It
prints a line for each break, and lastly runs the tests that failed on the code as it is, where
they must pass. The exit status is 1 if a break survives or cannot be applied.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("arrakis_jax", "tests", "benchmarks", "pyproject.toml", "README.md")
# Programs that jax compiled are kept here, for all breaks and for the next time.
CACHE = ROOT / ".pytest_cache" / "breaks"
SUITES = {"default": (), "exhaustive": ("-m", "exhaustive")}
PASSED, FAILED, NO_TESTS = 0, 1, 5  # exit statuses of pytest


class Break(NamedTuple):
    """`old` becomes `new` in a file of arrakis_jax; `tests` are nodes or files below tests."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


# fmt: off
BREAKS = (
    # core
    Break("norm: mean of squares", "core/numerics.py",
          "jnp.sum(jnp.square(x), -1)", "jnp.mean(jnp.square(x), -1)",
          ("movement/test_stream_geometry.py::test_against_numpy[gpt2-True]",)),
    Break("ratio: one over zero", "core/numerics.py",
          "jnp.where(b == 0, 0, a", "jnp.where(b == 0, 1, a",
          ("circuits/test_composition.py::test_a_head_of_zeros_scores_zero",)),
    Break("root: slope at zero", "core/numerics.py",
          "jnp.where(zero, 1, square)", "square",
          ("movement/test_residual_movement.py::test_gradients_are_finite_where_nothing_moves",)),
    Break("contract: precision", "core/numerics.py",
          'precision="highest"', 'precision="default"',
          ("test_engineering.py::"
           "test_every_float32_product_is_at_the_configs_precision[decompose]",)),
    Break("mask check: twos", "core/checks.py",
          "(real != 0) & (real != 1)", "(real < 0)",
          ("core/test_checks.py::test_bad_tokens_and_masks[run-mask of twos]",)),
    Break("token check: off by one", "core/checks.py",
          "| (ids >= config.vocab_size)", "| (ids > config.vocab_size)",
          ("core/test_checks.py::test_bad_tokens_and_masks[run-too large]",)),
    Break("position check: off by one", "core/checks.py",
          "(values < -count) | (values >= count)", "(values < -count) | (values > count)",
          ("decomposition/test_logit_attribution.py::test_bad_input",)),
    Break("config rules: RoPE of an odd size", "core/config_rules.py",
          "c.d_rotary % 2 == 0 and ", "",
          ("families/test_config.py::test_all_problems_come_in_one_error",)),
    Break("config rules: heads per group", "core/config_rules.py",
          "lambda c, v: v % c.n_kv_heads == 0", "lambda c, v: v >= c.n_kv_heads",
          ("families/test_config.py::"
           "test_unsupported_values_are_refused"
           "[llama-changes17-must be a multiple of n_kv_heads=5]",)),
    # results
    Break("labels: skipped terms counted", "results/labels.py",
          "rest = i - len(self.first) + self.skipped", "rest = i - len(self.first)",
          ("decomposition/test_attribute_to.py::"
           "test_only_what_is_between_the_points_moves_it[gpt2]",)),
    Break("labels: index and source swapped", "results/labels.py",
          "divmod(i, self.sources)", "divmod(i, self.sources)[::-1]",
          ("terms/test_sources.py::test_against_the_literal_products[gpt2]",)),
    Break("ranking: signed", "results/ranking.py",
          "size = jnp.abs(values)", "size = values",
          ("results/test_ranking.py::test_the_largest_of_every_column",)),
    Break("table: the label before", "results/table.py",
          "label_of[term] = labels[term]", "label_of[term] = labels[term - 1]",
          ("decomposition/test_top_attribution.py::test_tables",)),
    Break("terms by layer: start of a segment", "results/terms.py",
          "start += size", "start += segment.per_layer",
          ("results/test_terms.py",)),
    # stream
    Break("padding: rank from one", "stream/padding.py",
          "jnp.cumsum(mask, -1) - 1, 0)", "jnp.cumsum(mask, -1), 0)",
          ("nn/test_transformer.py::test_padding_changes_nothing[gpt2-left]",)),
    Break("padding: keys at padding", "stream/padding.py",
          "over(allowed[0], keys) & keys", "over(allowed[0], keys) | keys & False",
          ("nn/test_transformer.py::test_padding_changes_nothing[llama3-left]",)),
    Break("window: one more column", "stream/padding.py",
          "1 - window)", "-window)",
          ("nn/test_attention.py::test_windows_count_real_tokens",)),
    Break("window: one more real token", "stream/padding.py",
          "self.rank[..., None, :] < window)", "self.rank[..., None, :] <= window)",
          ("nn/test_attention.py::test_windows_count_real_tokens",)),
    Break("columns: padding has a rank", "stream/padding.py",
          " & self.real[..., None, :]", "",
          ("decomposition/test_logit_attribution.py::test_padded_equals_one_by_one[0-left]",)),
    Break("positions that a row lacks", "stream/padding.py",
          "jnp.where(valid.reshape(shape), picked, absent)", "picked",
          ("stream/test_padding.py::test_positions_that_a_row_lacks_are_absent",)),
    Break("Set: sign", "stream/edits.py",
          "return self.operand(value, removed)\n\n\n", "return -self.operand(value, removed)\n\n\n",
          ("nn/test_transformer.py::TestEdits::test_set_at_a_position_counted_in_real_tokens",)),
    Break("Add: sign", "stream/edits.py",
          "value + self.operand(", "value - self.operand(",
          ("nn/test_transformer.py::TestEdits::test_scale_and_add",)),
    Break("Scale: added", "stream/edits.py",
          "value * self.operand(", "value + self.operand(",
          ("nn/test_transformer.py::TestEdits::test_scale_and_add",)),
    Break("Project: twice", "stream/edits.py",
          "(value.astype(acc) - span)", "(value.astype(acc) - 2 * span)",
          ("nn/test_transformer.py::TestEdits::test_project_leaves_the_complement",)),
    Break("Replace: layer 0", "stream/edits.py",
          "dynamic_index_in_dim(other, layer, keepdims", "dynamic_index_in_dim(other, 0, keepdims",
          ("nn/test_transformer.py::"
           "TestEdits::test_replace_by_itself_changes_nothing_and_by_another_run_patches",)),
    Break("edits: negative positions", "stream/edits.py",
          "position + count_B, position)", "position + count_B - 1, position)",
          ("nn/test_transformer.py::TestEdits::test_set_at_a_position_counted_in_real_tokens",)),
    Break("edits: head ignored", "stream/edits.py",
          "value.ndim) == self.head", "value.ndim) >= self.head",
          ("nn/test_transformer.py::TestEdits::test_set_a_head",)),
    Break("resid_post: of the layer before", "stream/residuals.py",
          "self.resid_pre[1:], self.final", "self.resid_pre[:-1], self.final",
          ("nn/test_transformer.py::test_every_write_is_added_to_the_stream[llama]",)),
    Break("residuals.at: another column", "stream/residuals.py",
          "self.positions.index(p) for p", "self.positions.index(p) - 1 for p",
          ("decomposition/test_logit_lens.py::test_positions_and_captured_streams",)),
    Break("centred: mean over padding", "stream/points.py",
          "keepdims=True) / real.sum()", "keepdims=True) / len(y)",
          ("movement/test_linear_cka.py::test_against_numpy[gpt2-True]",)),
    Break("points: the first token kept", "stream/points.py",
          "real & (position > 0)", "real & (position >= 0)",
          ("movement/test_linear_cka.py::test_against_numpy[llama-False]",)),
    # nn
    Break("norm: eps", "nn/norm.py",
          "+ (self.config.norm_eps or 0.0)", "+ 2 * (self.config.norm_eps or 0.0)",
          ("nn/test_attention.py::test_attention_written_out",)),
    Break("norm: centring", "nn/norm.py",
          "x - jnp.mean(x, self._axes, keepdims=True)",
          "x - 0 * jnp.mean(x, self._axes, keepdims=True)",
          ("decomposition/test_logit_lens.py::test_against_numpy[gpt2-7]",)),
    Break("norm: linear without centring", "nn/norm.py",
          "self.gained(self.centre(x))", "self.gained(x)",
          ("decomposition/test_decompose.py::"
           "test_terms_sum_to_every_stream_point[stream_after-source]",)),
    Break("norm: transposed in the other order", "nn/norm.py",
          "self.centre(self.gained(u))", "self.gained(self.centre(u))",
          ("decomposition/test_logit_attribution.py::"
           "test_terms_sum_to_the_models_own_logit[gpt2-head]",)),
    Break("attention: scale", "core/config.py",
          "self.d_head**-0.5", "self.d_head**-0.4",
          ("nn/test_attention.py::test_attention_written_out",)),
    Break("attention: softcap before the scale", "nn/attention.py",
          "softcap(scores_BGRTS * scale, cfg.attention_softcap)",
          "softcap(scores_BGRTS, cfg.attention_softcap) * scale",
          ("families/test_parity.py::test_float64[gemma2]",)),
    Break("attention: sinks left out", "nn/attention.py",
          "[scores_BGRTS, sinks], -1)", "[scores_BGRTS, sinks - 100], -1)",
          ("families/test_parity.py::test_float64[gpt_oss-limit]",)),
    Break("attention: bias of Falcon unscaled", "nn/attention.py",
          "bias * scale if cfg.falcon_alibi", "bias if cfg.falcon_alibi",
          ("families/test_parity.py::test_float64[falcon-rw-long]",)),
    Break("attention: heads of a group", "nn/attention.py",
          'q_BTHK, "B T (G R) K -> B G R T K"', 'q_BTHK, "B T (R G) K -> B G R T K"',
          ("nn/test_attention.py::test_attention_written_out",)),
    Break("attention: norm of all heads", "nn/attention.py",
          "over_last = 2 if", "over_last = 1 if",
          ("families/test_parity.py::test_float64[olmo2]",)),
    Break("rotary: turned back", "nn/rotary.py",
          "a * cos - b * sin, b * cos + a * sin", "a * cos + b * sin, b * cos - a * sin",
          ("nn/test_attention.py::test_scores_depend_on_the_distance_only[llama]",)),
    Break("rotary: interleaved pairs", "nn/rotary.py",
          "turned[..., 0::2], turned[..., 1::2]", "turned[..., 1::2], turned[..., 0::2]",
          ("nn/test_attention.py::test_interleaved_pairs_are_the_same_up_to_a_permutation",)),
    Break("rotary: Llama 3's scaling", "nn/rotary.py",
          "(kept + (1 - kept) / factor)", "(kept / factor + (1 - kept))",
          ("nn/test_attention.py::test_llama3_scaling_written_out",)),
    Break("ALiBi: slopes", "nn/context.py",
          "np.arange(1, 2 * (n_heads - power) + 1, 2)",
          "np.arange(2, 2 * (n_heads - power) + 2, 2)",
          ("nn/test_attention.py::test_slopes_written_out[6]",)),
    Break("context: columns after a prefix", "nn/context.py",
          "lambda x: x[:, n:]", "lambda x: x[:, : x.shape[1] - n]",
          ("patching/test_patch_sweep.py::"
           "test_earlier_positions_keep_their_keys_and_values[llama3]",)),
    Break("MLP: gate and input swapped", "nn/mlp.py",
          "act(gate) * (hidden + config.up_offset if config.up_offset else hidden)",
          "act(hidden) * (gate + config.up_offset if config.up_offset else gate)",
          ("families/test_parity.py::test_float64[llama]",)),
    Break("MoE: weights of the chosen alone", "nn/moe.py",
          "jax.nn.logsumexp(router_BTE", "jax.nn.logsumexp(top_BTk",
          ("families/test_parity.py::test_float64[qwen2_moe]",)),
    Break("MoE: the expert of a block", "nn/moe.py",
          'side="right")', 'side="left")',
          ("families/test_parity.py::test_float64[mixtral]",)),
    Break("block: parallel MLP reads attention", "nn/block.py",
          'shared_norm else self._norm("mlp", x_BTD, site)',
          'shared_norm else self._norm("mlp", x_BTD + attn_BTD, site)',
          ("families/test_parity.py::test_float64[gpt_neox]",)),
    Break("block: norm before attention", "nn/block.py",
          'if place == "stream_before" else x_BTD\n            x_BTD = x_BTD + self',
          'if place == "pre" else x_BTD\n            x_BTD = x_BTD + self',
          ("families/test_parity.py::test_float64[bloom-normed-residual]",)),
    Break("block: residual scale", "nn/block.py",
          "out_BTD if scale == 1 else out_BTD * scale", "out_BTD",
          ("nn/test_transformer.py::test_every_write_is_added_to_the_stream[scaled]",)),
    Break("linear: sign of a bias", "nn/linear.py",
          "y if b is None else y + over", "y if b is None else y - over",
          ("nn/test_transformer.py::test_every_write_is_added_to_the_stream[gpt2]",)),
    Break("linear: rounded gradient", "nn/linear.py",
          'f"{out},{in_b}->{in_a}", dy, b)', 'f"{out},{in_b}->{in_a}", -dy, b)',
          ("nn/test_linear.py::test_a_rounded_product_and_its_gradients[BTD,DF->BTF]",)),
    Break("walk: not reversed", "nn/walk.py",
          "scanned, reverse=reverse)", "scanned)",
          ("decomposition/test_logit_attribution.py::"
           "test_terms_sum_to_the_models_own_logit[stream_after-source]",)),
    Break("walk: segments not reversed", "nn/walk.py",
          "reversed(stretches) if reverse else stretches", "stretches",
          ("nn/test_walk.py",)),
    Break("walk: rows of a subset of layers", "nn/walk.py",
          "slice(begin, begin + len(rows))", "slice(0, len(rows))",
          ("decomposition/test_decompose.py::"
           "test_from_tokens_from_a_stream_and_from_a_part_of_it",)),
    Break("walk: layer numbers of a subset", "nn/walk.py",
          "np.array(wanted, np.int32)", "np.arange(len(wanted), dtype=np.int32)",
          ("decomposition/test_top_attribution.py::"
           "test_of_a_captured_stream_of_some_layers_and_in_jit",)),
    Break("walk_from: start ignored", "nn/walk.py",
          "jnp.maximum(start, layers.start)", "jnp.maximum(0, layers.start)",
          ("nn/test_transformer.py::test_resume_equals_the_full_forward[mixed-2]",)),
    Break("at_layer: the layer before", "nn/walk.py",
          "w[layer - layers.start]", "w[layer - layers.start - 1]",
          ("decomposition/test_attribute_to.py::"
           "test_what_a_neuron_and_a_head_read_is_explained[gpt2]",)),
    Break("layer run: kept layers in reverse", "nn/layer_run.py",
          "slots[kept] = np.arange(len(kept))", "slots[kept] = np.arange(len(kept))[::-1]",
          ("nn/test_transformer.py::test_capture_selects_fields_layers_and_positions",)),
    Break("layer run: a layer too late", "nn/layer_run.py",
          "range(start, self.model.config.n_layers)",
          "range(start + 1, self.model.config.n_layers)",
          ("nn/test_transformer.py::test_resume_equals_the_full_forward[llama-0]",)),
    Break("taps: sign", "nn/site.py",
          "value + tap.astype(value.dtype)", "value - tap.astype(value.dtype)",
          ("nn/test_transformer.py::test_taps_are_added_at_their_site",)),
    Break("logits: padding not masked", "nn/transformer.py",
          "return logits if real is None else jnp.where(real[..., None], logits, 0)",
          "return logits",
          ("nn/test_transformer.py::test_padding_changes_nothing[gpt2-left]",)),
    Break("embedding: position offset", "nn/ends.py",
          "position + offset", "position",
          ("families/test_parity.py::test_float64[opt]",)),
    Break("mean embedding: one token less", "nn/ends.py",
          "/ self.config.vocab_size", "/ (self.config.vocab_size - 1)",
          ("nn/test_transformer.py::"
           "test_the_mean_embedding_is_that_of_all_tokens[stream_before]",)),
    Break("logits: scale", "nn/ends.py",
          "logits if scale == 1 else logits * scale", "logits if scale == 1 else logits / scale",
          ("families/test_parity.py::test_float64[cohere-qk-norm]",)),
    # frozen
    Break("writes: share of the output's norm", "frozen/writes.py",
          "share = share / getattr", "share = share * getattr",
          ("decomposition/test_decompose.py::test_terms_sum_to_every_stream_point[post-source]",)),
    Break("reads: offset of the final norm", "frozen/reads.py",
          'contract("...D,D->...", u, model', 'contract("...D,D->...", r, model',
          ("decomposition/test_logit_attribution.py::"
           "test_terms_sum_to_the_models_own_logit[gpt2-head]",)),
    Break("reads: order of a layer's norms", "frozen/reads.py",
          "_before(place.block.norm_mlp, post)[0]\n            return"
          " _before(place.block.norm_attn, mid)[0], post",
          "_before(place.block.norm_attn, post)[0]\n            return"
          " _before(place.block.norm_mlp, mid)[0], post",
          ("decomposition/test_logit_attribution.py::"
           "test_terms_sum_to_the_models_own_logit[stream_after-source]",)),
    Break("reads: scale of a norm", "frozen/reads.py",
          "attn / stream.norm_attn_scale", "attn * stream.norm_attn_scale",
          ("decomposition/test_logit_attribution.py::"
           "test_terms_sum_to_the_models_own_logit[stream_after-source]",)),
    Break("attention brought: bias", "frozen/attention.py",
          "brought = stream.attn_out - bias", "brought = stream.attn_out + bias",
          ("movement/test_information_flow.py::test_against_all_vectors[gpt2]",)),
    Break("attention brought: own part", "frozen/attention.py",
          "= norm.linear(own_stream) / stream.norm_attn_scale[..., None]",
          "= norm.linear(own_stream)",
          ("movement/test_information_flow.py::test_against_all_vectors[stream_after]",)),
    # forward
    Break("source: ranks of positions from the end", "forward/source.py",
          "self.padding.counted(jnp.asarray(at, int))", "jnp.abs(jnp.asarray(at, int))",
          ("decomposition/test_logit_attribution.py::"
           "test_one_position_has_the_terms_that_it_has_among_all",)),
    Break("Logit: against is added", "forward/targets.py",
          "logit(self.ids) - logit(self.against)", "logit(self.ids) + logit(self.against)",
          ("forward/test_targets.py::test_each_target_by_definition[both]",)),
    Break("LogProb: a logit", "forward/targets.py",
          "_of_ids(_log_probs(model, y_BD), jnp", "_of_ids(_logits(model, y_BD), jnp",
          ("forward/test_targets.py::test_each_target_by_definition[both]",)),
    Break("KL: the other way round", "forward/targets.py",
          "log_p - log_q, 0)", "log_q - log_p, 0)",
          ("forward/test_targets.py::test_each_target_by_definition[both]",)),
    Break("Entropy: sign", "forward/targets.py",
          "-jnp.sum(jnp.exp(log_p)", "jnp.sum(jnp.exp(log_p)",
          ("forward/test_targets.py::test_each_target_by_definition[both]",)),
    Break("Continuation: a position late", "forward/targets.py",
          "jnp.arange(-n - 1, -1)", "jnp.arange(-n, 0)",
          ("forward/test_targets.py::test_a_continuation_is_the_sum_one_token_at_a_time[1-left]",)),
    Break("run: edits checked and dropped", "forward/run.py",
          "mask=mask, capture=capture, edits=edits)", "mask=mask, capture=capture)",
          ("nn/test_transformer.py::TestEdits::test_set_a_head",)),
    # terms
    Break("factors along: mean over a head", "terms/factors.py",
          "jnp.sum(_wide(self.coefficient) * read, -1)",
          "jnp.mean(_wide(self.coefficient) * read, -1)",
          ("decomposition/test_logit_attribution.py::"
           "test_terms_sum_to_the_models_own_logit[gpt2-head]",)),
    Break("factors project: size", "terms/factors.py",
          '->m...N", self.coefficient, read)', '->m...N", jnp.abs(self.coefficient), read)',
          ("decomposition/test_decompose.py::"
           "test_projections_and_norms_never_expand_and_equal_the_expanded[both]",)),
    Break("factors norms: signed", "terms/factors.py",
          "jnp.abs(self.coefficient[..., 0])", "self.coefficient[..., 0]",
          ("decomposition/test_decompose.py::"
           "test_projections_and_norms_never_expand_and_equal_the_expanded[both]",)),
    Break("sources norms: triangle transposed", "terms/factors.py",
          '"...SGK,GRJK->...GRSJ"', '"...SGK,GRKJ->...GRSJ"',
          ("terms/test_sources.py::test_against_the_literal_products[gpt2]",)),
    Break("sources: share of the source", "terms/factors.py",
          "share[..., None, :, None]", "share[..., None, None, :]",
          ("decomposition/test_decompose.py::test_terms_sum_to_every_stream_point[post-source]",)),
    Break("stream norms: scales upside down", "terms/stream_norms.py",
          "self.typical.reshape(-1, *(1,) * (scale.ndim - 1)) / scale",
          "scale / self.typical.reshape(-1, *(1,) * (scale.ndim - 1))",
          ("decomposition/test_decompose.py::"
           "test_terms_sum_to_every_stream_point[stream_after-source]",)),
    Break("stream norms: half a layer early", "terms/stream_norms.py",
          "2 * np.array(layers) + half", "2 * np.array(layers)",
          ("decomposition/test_decompose.py::"
           "test_terms_sum_to_every_stream_point[stream_after-source]",)),
    Break("spans: last MLP not dropped", "terms/stream.py",
          "dropped += (len(members) - written)", "dropped += 0 * (len(members) - written)",
          ("decomposition/test_decompose.py::test_a_point_lists_what_is_written_before_it",)),
    Break("spans: first attention not skipped", "terms/stream.py",
          "skipped = sum(f.kind.count for f in before)", "skipped = 0",
          ("decomposition/test_attribute_to.py::"
           "test_only_what_is_between_the_points_moves_it[gpt2]",)),
    Break("rounding: without attention", "terms/layer.py",
          "rounding - self.stream.resid_pre - self.stream.attn_out",
          "rounding - self.stream.resid_pre",
          ("decomposition/test_decompose.py::"
           "test_the_rounding_of_a_bfloat16_stream_is_a_term[gpt2-head]",)),
    Break("experts: routing weight", "terms/layer.py",
          "hot * routing.weight[..., None]", "hot",
          ("decomposition/test_decompose.py::test_terms_sum_to_every_stream_point[mixed-expert]",)),
    Break("shared expert: gate", "terms/layer.py",
          "self.stream.shared_act.astype(self.config.acc) * gate[..., None]",
          "self.stream.shared_act.astype(self.config.acc)",
          ("decomposition/test_decompose.py::test_terms_sum_to_every_stream_point[mixed-neuron]",)),
    Break("embeddings: position counted twice", "terms/stream.py",
          "[stream.embed - pos, pos]", "[stream.embed, pos]",
          ("decomposition/test_decompose.py::test_terms_sum_to_every_stream_point[gpt2-head]",)),
    Break("along a reader: the MLP's norm", "terms/scan.py",
          "(reader.pre, reader.attn * reader.mlp)", "(reader.pre, reader.attn)",
          ("decomposition/test_logit_attribution.py::"
           "test_terms_sum_to_the_models_own_logit[stream_after-source]",)),
    Break("logit attribution: bias of the unembedding", "terms/scan.py",
          "(logit, self.offset + self.bias)", "(logit, self.offset)",
          ("decomposition/test_logit_attribution.py::"
           "test_every_position_in_float64[unembed_bias]",)),
    # decomposition
    Break("logit attribution: scale of the final norm", "decomposition/logit_attribution.py",
          "values / read.scale[None]", "values",
          ("decomposition/test_logit_attribution.py::"
           "test_terms_sum_to_the_models_own_logit[llama-component]",)),
    Break("logit attribution: own norms counted as later", "decomposition/logit_attribution.py",
          "from_layer[kept + 1]", "from_layer[kept]",
          ("decomposition/test_logit_attribution.py::"
           "test_terms_sum_to_the_models_own_logit[stream_after-source]",)),
    Break("top attribution: where layers begin", "decomposition/top_attribution.py",
          "begin = len(labels.first)", "begin = 0",
          ("decomposition/test_top_attribution.py::"
           "test_they_are_those_of_the_whole[both-neuron]",)),
    Break("top attribution: sizes", "decomposition/top_attribution.py",
          "self.absolute + jnp.abs(terms).sum(-1)", "self.absolute + terms.sum(-1)",
          ("decomposition/test_top_attribution.py::test_an_edit_that_breaks_the_sum_is_reported",)),
    Break("top attribution: rest", "decomposition/top_attribution.py",
          "rest=read.logit - read.constant - terms", "rest=read.logit - terms",
          ("decomposition/test_top_attribution.py::test_an_edit_that_breaks_the_sum_is_reported",)),
    Break("top attribution: sizes past a norm", "decomposition/top_attribution.py",
          "self.size, self.size * factor)", "self.size, self.size)",
          ("decomposition/test_top_attribution.py::"
           "test_they_are_those_of_the_whole[stream_after-neuron]",)),
    Break("attribute_to: constant", "decomposition/attribute_to.py",
          'contract("...D,D->...", direction, norm', 'contract("...D,D->...", r, norm',
          ("decomposition/test_attribute_to.py::"
           "test_what_a_neuron_and_a_head_read_is_explained[gpt2]",)),
    Break("attribute_movement: growth", "decomposition/attribute_movement.py",
          "growth=parts.along(a + b)", "growth=parts.along(b - a)",
          ("decomposition/test_attribute_to.py::"
           "test_a_movement_is_split_exactly[llama-component]",)),
    Break("attribute_movement: share", "decomposition/attribute_movement.py",
          "jnp.square(distance)[None]", "distance[None]",
          ("decomposition/test_attribute_to.py::"
           "test_a_movement_is_split_exactly[llama-component]",)),
    Break("residual decomposition: biases of norms", "decomposition/residual_decomposition.py",
          "biases = norm.linear(biases) / scale", "biases = norm.linear(biases)",
          ("decomposition/test_decompose.py::"
           "test_residual_decomposition_sums_exactly[stream_after]",)),
    Break("residual decomposition: attention", "decomposition/residual_decomposition.py",
          "from_attn=at(attn_out)", "from_attn=at(attn_out - resid_pre)",
          ("decomposition/test_decompose.py::test_residual_decomposition_sums_exactly[llama]",)),
    Break("decompose: layer's start", "decomposition/decompose.py",
          'at = ("resid_post", layer)', 'at = ("resid_pre", layer)',
          ("decomposition/test_decompose.py::"
           "test_from_tokens_from_a_stream_and_from_a_part_of_it",
           "decomposition/test_decompose.py::test_terms_are_what_their_labels_say")),
    Break("logit lens: KL of normalisers", "decomposition/logit_lens.py",
          "(normaliser - normaliser[-1:])", "(normaliser[-1:] - normaliser)",
          ("decomposition/test_logit_lens.py::test_against_numpy[llama-7]",)),
    Break("logit lens: rank counts itself", "decomposition/logit_lens.py",
          "(fresh > logit[..., None])", "(fresh >= logit[..., None])",
          ("decomposition/test_logit_lens.py::test_against_numpy[llama-7]",)),
    Break("logit lens: entropy", "decomposition/logit_lens.py",
          "log_total + sums.below / sums.total", "log_total - sums.below / sums.total",
          ("decomposition/test_logit_lens.py::test_against_numpy[llama-7]",)),
    # movement
    Break("movement: cosine", "movement/residual_movement.py",
          "(together**2 - apart**2) / 4", "(together**2 - apart**2) / 2",
          ("movement/test_residual_movement.py::test_right_and_opposite_angles",)),
    Break("movement: half the angle", "movement/residual_movement.py",
          "2 * jnp.arctan2(apart", "jnp.arctan2(apart",
          ("movement/test_residual_movement.py::test_right_and_opposite_angles",)),
    Break("residual movement: start of a layer", "movement/residual_movement.py",
          "jnp.minimum(layer + 1, last)", "jnp.minimum(layer, last)",
          ("test_induction.py::test_movement_is_known",)),
    Break("movement matrix: sum, not difference", "movement/movement_matrix.py",
          "jnp.square(y[None] - x[:, None])", "jnp.square(y[None] + x[:, None])",
          ("movement/test_movement_matrix.py::test_matrix[llama]",)),
    Break("movement matrix: median", "movement/movement_matrix.py",
          "ordered[..., (n_kept - 1) // 2]", "ordered[..., (n_kept + 1) // 2]",
          ("movement/test_movement_matrix.py::test_reducers_against_numpy[parallel-median-True]",)),
    Break("geometry: participation ratio", "movement/stream_geometry.py",
          "ratio(jnp.square(variance.sum()), jnp", "ratio(variance.sum(), jnp",
          ("movement/test_stream_geometry.py::test_known_shapes",)),
    Break("geometry: effective rank", "movement/stream_geometry.py",
          "entropy = -(share * ", "entropy = -(share**2 * ",
          ("movement/test_stream_geometry.py::test_known_shapes",)),
    Break("geometry: growth", "movement/stream_geometry.py",
          "ratio(self.norm[1:], self.norm[:-1])", "ratio(self.norm[:-1], self.norm[1:])",
          ("movement/test_stream_geometry.py",)),
    Break("CKA: correction", "movement/linear_cka.py",
          "hsic - 2 * contract", "hsic - contract",
          ("movement/test_linear_cka.py::test_against_numpy[gpt2-True]",)),
    Break("flow: rollout without the stream", "movement/information_flow.py",
          "mean + kept, {}", "mean + 2 * kept, {}",
          ("movement/test_information_flow.py::test_rollout_of_known_patterns",)),
    Break("flow: mean of heads", "movement/information_flow.py",
          "astype(model.config.acc).mean(1)", "astype(model.config.acc).max(1)",
          ("movement/test_information_flow.py::test_against_all_vectors[llama]",)),
    Break("flow: order of layers", "movement/information_flow.py",
          '(contract("BTN,BNS->BTS", rows, flow)', '(contract("BTN,BNS->BTS", flow, rows)',
          ("movement/test_information_flow.py::test_against_all_vectors[llama]",)),
    Break("flow: share of the output's norm", "movement/contributions.py",
          "brought.pattern * brought.share[:, None, :, None]", "brought.pattern",
          ("movement/test_information_flow.py::test_against_all_vectors[post]",)),
    Break("flow: mixing ratio", "movement/contributions.py",
          "ratio(others_BT, others_BT + kept_BT)", "ratio(others_BT, kept_BT)",
          ("movement/test_information_flow.py::test_against_all_vectors[llama]",)),
    Break("flow: nearness", "movement/contributions.py",
          "jnp.minimum(q, 2 * jnp.abs(whole) - q)", "jnp.minimum(q, jnp.abs(whole) - q)",
          ("movement/test_information_flow.py::test_against_all_vectors[llama]",)),
    Break("flow routes: MLP does not lead back", "movement/flow_routes.py",
          "mid = kept_mlp | kept_residual", "mid = kept_residual",
          ("movement/test_flow_routes.py::test_against_a_search_through_all_importances[llama]",)),
    Break("flow routes: total of a parallel block", "movement/flow_routes.py",
          "total_BT = total_BT + mlp_BT", "total_BT = total_BT + 0 * mlp_BT",
          ("movement/test_flow_routes.py::"
           "test_against_a_search_through_all_importances[parallel]",)),
    Break("ALTI-Logit: a later norm", "movement/alti_logit.py",
          "logits * at.attn[..., None] +", "logits +",
          ("movement/test_information_flow.py::test_logits_against_all_vectors[stream_after]",)),
    Break("ALTI-Logit: what no token is given", "movement/alti_logit.py",
          "+ bias_BT + m_BT * _lost(mixture)", "+ bias_BT",
          ("movement/test_information_flow.py::"
           "test_what_nothing_contributes_to_is_told_and_stays_in_the_sum",)),
    # circuits
    Break("OV: residual scale", "circuits/matrices.py",
          "w_o = w_o * config.residual_scale", "w_o = w_o",
          ("circuits/test_matrices.py::test_multipliers_and_unfolded_weights",)),
    Break("QK: keys turned as queries", "circuits/matrices.py",
          "k = rotate(k, *of_key", "k = rotate(k, *of_query",
          ("circuits/test_matrices.py::test_rope_turns_by_the_distance_and_several_are_averaged",)),
    Break("QK: bias of the norm", "circuits/matrices.py",
          'row_NK + contract("NKD,D->NK"', 'row_NK - contract("NKD,D->NK"',
          ("circuits/test_matrices.py::test_scores_of_the_forward[gpt2]",)),
    Break("factored: product between bases", "circuits/factored.py",
          '"...MK,...NK->...MN", left, right', '"...KM,...NK->...MN", left, right',
          ("circuits/test_factored.py::test_norms_and_values_against_numpy[11-4]",)),
    Break("composition: later and earlier", "circuits/composition.py",
          "_between(writes_LHDK[earlier], read[later])",
          "_between(writes_LHDK[later], read[earlier])",
          ("circuits/test_composition.py::test_against_products_of_full_matrices[llama]",)),
    Break("composition: fourth moment", "circuits/composition.py",
          "fourth = 3 * a * b", "fourth = a * b",
          ("circuits/test_composition.py::test_oriented_z_scores_of_matrices_turned_at_random",)),
    Break("copying: table transposed", "circuits/copying.py",
          "matrix.right, between_DD)", "matrix.right, between_DD.T)",
          ("circuits/test_copying.py::test_copying_against_the_full_circuit[llama]",)),
    Break("copying ranks: the token itself", "circuits/copying.py",
          "(equal - 1) / 2", "equal / 2",
          ("circuits/test_copying.py::test_ranks_of_known_heads",)),
    Break("head scores: induction", "circuits/head_scores.py",
          "copy_BT, -1) + 1", "copy_BT, -1) + 2",
          ("circuits/test_head_scores.py::"
           "test_on_repeated_tokens_these_are_the_diagonals_of_the_second_copy[llama]",)),
    Break("head scores: previous token", "circuits/head_scores.py",
          '"previous": (padding.rank - 1, later)', '"previous": (padding.rank, later)',
          ("circuits/test_head_scores.py::"
           "test_on_repeated_tokens_these_are_the_diagonals_of_the_second_copy[llama]",)),
    Break("head tables: scale of attention", "circuits/head_tables.py",
          "key_MK) * model.config.score_scale(head[0])", "key_MK)",
          ("circuits/test_head_tables.py::test_one_layer_is_a_look_up[llama]",)),
    Break("head tables: biases", "circuits/head_tables.py",
          "w[:-1]) + over(w[-1], x_ND)", "w[:-1]) - over(w[-1], x_ND)",
          ("circuits/test_head_tables.py::test_one_layer_is_a_look_up[gpt2]",)),
    Break("bigrams: bias", "circuits/bigrams.py",
          "model.unembedding(ids)) + bias[None]", "model.unembedding(ids)) - bias[None]",
          ("circuits/test_bigrams.py::test_bigrams_are_the_model_without_layers[unembed_bias]",)),
    Break("top tokens: beyond the vocabulary", "circuits/vocabulary.py",
          "inside = ids < vocab_size", "inside = ids < vocab_size + 1",
          ("circuits/test_bigrams.py::test_the_vocabulary_by_pieces",)),
    Break("path expansion: a layer reads its own write", "circuits/path_expansion.py",
          "jnp.cumsum(x_LBTD, 0) - x_LBTD", "jnp.cumsum(x_LBTD, 0)",
          ("circuits/test_path_expansion.py::test_all_paths_sum_to_the_logit[with_mlp]",)),
    Break("path expansion: scale between layers", "circuits/path_expansion.py",
          "row_LBHS[1] / scale_BT[:, None]", "row_LBHS[1]",
          ("circuits/test_path_expansion.py::test_all_paths_sum_to_the_logit[llama]",)),
    Break("virtual head: weight", "circuits/virtual_head.py",
          "later[1], earlier[1]", "later[0], earlier[1]",
          ("circuits/test_path_expansion.py::"
           "test_a_virtual_head_is_the_difference_that_a_replacement_makes[llama]",)),
    # attribution
    Break("gradient x input: the gradient alone", "attribution/saliency.py",
          "else gradient * x).sum(-1)", "else gradient).sum(-1)",
          ("attribution/test_feature_attribution.py::"
           "test_saliency_and_grad_x_input_by_definition[gpt2]",)),
    Break("saliency: mean of sizes", "attribution/saliency.py",
          "(jnp.abs(gradient) if", "(gradient if",
          ("attribution/test_feature_attribution.py::"
           "test_saliency_and_grad_x_input_by_definition[gpt2]",)),
    Break("SmoothGrad: noise", "attribution/saliency.py",
          "noise * table_std(model)", "noise",
          ("attribution/test_feature_attribution.py::test_smooth_grad_against_a_loop",)),
    Break("integrated gradients: Gauss's weights", "attribution/integrated_gradients.py",
          "(1 + node) / 2, weight / 2", "(1 + node) / 2, weight",
          ("attribution/test_feature_attribution.py::"
           "test_integrated_gradients_against_the_sum_written_out[gauss_legendre]",)),
    Break("integrated gradients: trapezoid's ends", "attribution/integrated_gradients.py",
          "weight[[0, -1]] /= 2", "weight[[0, -1]] /= 4",
          ("attribution/test_feature_attribution.py::"
           "test_integrated_gradients_against_the_sum_written_out[trapezoid]",)),
    Break("integrated gradients: midpoint", "attribution/integrated_gradients.py",
          '"midpoint": 0.5', '"midpoint": 0.4',
          ("attribution/test_feature_attribution.py::"
           "test_integrated_gradients_against_the_sum_written_out[midpoint]",)),
    Break("integrated gradients: rows that are done", "attribution/integrated_gradients.py",
          "(previous.gap <= tolerance) & (level > 0)", "(previous.gap <= tolerance) & (level > 9)",
          ("attribution/test_feature_attribution.py::"
           "test_steps_are_doubled_row_by_row_until_the_gap_is_small",)),
    Break("occlusion: the token before", "attribution/perturb.py",
          "values_NB[1:].T", "values_NB[:-1].T",
          ("attribution/test_feature_attribution.py::test_occlusion_against_a_loop_of_edits",)),
    Break("value zeroing: keys", "attribution/perturb.py",
          'if site == "v" else', 'if site == "k" else',
          ("attribution/test_feature_attribution.py::test_value_zeroing_against_a_loop_of_edits",)),
    Break("residual gradients: at attention's write", "attribution/residual_gradients.py",
          'following[1:] if config.parallel else gradients["resid_mid"]', "following[1:]",
          ("attribution/test_residual_gradients.py::test_joint_equals_one_at_a_time[gpt2]",)),
    Break("largest tokens: padding takes part", "attribution/result.py",
          "k, among=self.mask.T)", "k, among=None)",
          ("attribution/test_feature_attribution.py::test_the_largest_tokens_and_the_table",)),
    # patching
    Break("patch sweep: sign", "patching/patch_sweep.py",
          "change = patched - base_B.reshape(", "change = -patched + base_B.reshape(",
          ("patching/test_patch_sweep.py::"
           "test_every_cell_is_a_run_with_one_edit[llama-options1-sites1-over1]",)),
    Break("patch sweep: resid_post of the layer before", "patching/patch_sweep.py",
          '"resid_post": 1', '"resid_post": 0',
          ("patching/test_patch_sweep.py::test_every_cell_is_a_run_with_one_edit",)),
    Break("patching: gate reversed", "patching/gates.py",
          "self.source.astype(acc) - base.astype(acc)",
          "base.astype(acc) - self.source.astype(acc)",
          ("patching/test_attribution_patching.py::test_a_gate_is_a_patch_by_degrees",)),
    Break("attribution patching: middles", "patching/attribution_patching.py",
          "dtype=base.dtype) + 0.5) / steps", "dtype=base.dtype) + 0.0) / steps",
          ("patching/test_attribution_patching.py::test_averaged_gradients_are_complete",)),
    Break("QK fix: queries of a key", "patching/qk_fix.py",
          ".sum((2, 3))", ".mean((2, 3))",
          ("patching/test_qk_fix.py::test_one_layer_of_attention_is_patched_exactly",)),
    Break("QK fix: mean of the others", "patching/qk_fix.py",
          "(mean - share * g) / (1 - share)", "mean / (1 - share)",
          ("patching/test_qk_fix.py::test_one_layer_of_attention_is_patched_exactly",)),
    Break("GradDrop: number of runs", "patching/grad_drop.py",
          "x / (n_layers - 1)", "x / n_layers",
          ("patching/test_grad_drop.py::test_of_two_layers",)),
    Break("GradDrop: runs below", "patching/grad_drop.py",
          "lambda e: index * jnp.abs(e)", "lambda e: 0 * jnp.abs(e)",
          ("patching/test_grad_drop.py::test_all_layers_at_once_are_one_at_a_time[shared_norm]",)),
    Break("bootstrap: one tail", "patching/effects.py",
          "50 * (1 - interval), 50 * (1 + interval)", "100 * (1 - interval), 100 * interval",
          ("patching/test_effects.py::test_bootstrap_intervals_cover",)),
    Break("effects: labels of the second site", "patching/effects.py",
          "i -= prod(shape)", "i -= prod(shape) - 1",
          ("patching/test_effects.py::test_labels_name_the_cells_in_the_order_of_the_effects",)),
    Break("patching: mean over padding", "patching/pairs.py",
          "/ stream.mask.sum()", "/ stream.mask.size",
          ("patching/test_effects.py::test_means_are_over_real_tokens",)),
    # edges
    Break("graph: MLP reads its layer's heads", "edges/graph.py",
          "last_heads = not self.parallel", "last_heads = self.parallel",
          ("patching/test_effects.py::"
           "test_the_graph_has_an_edge_from_every_writer_to_every_later_reader[llama]",)),
    Break("graph: change through a norm", "edges/graph.py",
          "written(out_BTD + change_BTD) - written(out_BTD)", "written(change_BTD)",
          ("patching/test_effects.py::test_what_writers_change",)),
    Break("EAP: inputs reversed", "edges/steps.py",
          "(1 - at) * base_BTD[None] + at * source_BTD[None]",
          "at * base_BTD[None] + (1 - at) * source_BTD[None]",
          ("edges/test_edge_attribution.py::test_gradients_at_every_reader_and_along_the_inputs",)),
    Break("EAP: a reader's gradient is kept", "edges/steps.py",
          "    return x, gate, changes_WBTD", "    return 2 * x, gate, changes_WBTD",
          ("edges/test_edge_attribution.py::test_the_sum_over_readers_is_attribution_patching",)),
    Break("EAP-IG: groups of activations", "edges/steps.py",
          "self.graph.has_mlp) + mlp", "self.graph.has_mlp)",
          ("edges/test_edge_attribution.py::test_along_activations",)),
    Break("EAP-IG: effects of other groups", "edges/edge_attribution.py",
          "jnp.asarray(group_W) == group", "jnp.asarray(group_W) >= group",
          ("edges/test_edge_attribution.py::test_along_activations",)),
    Break("path patching: base", "edges/path_patching.py",
          "jax.lax.map(patched, ends) - base_B[None]",
          "jax.lax.map(patched, ends) - source_B[None]",
          ("edges/test_path_patching.py::test_every_edge_is_a_run_with_one_edit",)),
    Break("path patching: a reader's head", "edges/path_patching.py",
          "== self.at.reader_head", ">= self.at.reader_head",
          ("edges/test_path_patching.py::test_every_edge_is_a_run_with_one_edit",)),
    Break("circuit: change of the MLP", "edges/circuit.py",
          "site) - other.mlp_out", "site)",
          ("edges/test_circuit.py::test_all_edges_are_the_clean_run_and_none_the_corrupt[both]",)),
    Break("circuit: CMD signed", "edges/circuit.py",
          "self._area(jnp.abs(1 - self.of_means))", "self._area(1 - self.of_means)",
          ("edges/test_circuit.py::test_faithfulness",)),
    Break("select: the least first", "edges/select.py",
          "(candidates, (-scores_RW", "(candidates, (scores_RW",
          ("edges/test_circuit.py::test_selection",)),
    Break("pruned: edges that lead nowhere", "edges/select.py",
          "mask & reached & leading[:, None]", "mask & reached",
          ("edges/test_circuit.py::test_pruning_keeps_paths_from_the_embedding_to_the_output",)),
    Break("edges: labels", "edges/effects.py",
          "divmod(i, self.graph.n_writers)", "divmod(i, self.graph.n_writers + 1)",
          ("edges/test_edge_attribution.py::test_results",)),
    # evaluation
    Break("agreement: ties", "evaluation/agreement.py",
          "(below + up_to + 1) / 2", "(below + 1)",
          ("evaluation/test_agreement.py::test_rank_correlation_is_scipys_with_ties",)),
    Break("agreement: one more of the largest", "evaluation/agreement.py",
          "largest = place < k", "largest = place <= k",
          ("evaluation/test_agreement.py::test_signs_overlap_and_what_was_missed",)),
    Break("faithfulness: one more token", "evaluation/token_faithfulness.py",
          "(rank_BT < k)", "(rank_BT <= k)",
          ("evaluation/test_token_faithfulness.py::"
           "test_every_curve_by_taking_tokens_away_one_at_a_time",)),
    Break("faithfulness: insertion of the order itself", "evaluation/token_faithfulness.py",
          ".shape[1:])[:, ::-1]", ".shape[1:])",
          ("evaluation/test_token_faithfulness.py::"
           "test_every_curve_by_taking_tokens_away_one_at_a_time",)),
    Break("faithfulness: area", "evaluation/token_faithfulness.py",
          "(curve_KB[1:] + curve_KB[:-1]) / 2", "curve_KB[1:]",
          ("evaluation/test_token_faithfulness.py::"
           "test_every_curve_by_taking_tokens_away_one_at_a_time",)),
    Break("randomisation: from the first layer", "evaluation/randomisation.py",
          "tuple(range(first, n_layers))", "tuple(range(first + 1))",
          ("evaluation/test_randomisation.py::test_the_cascade",)),
    Break("randomisation: layers that are not chosen", "evaluation/randomisation.py",
          "jnp.where(chosen, _permuted(key, leaf), leaf)", "_permuted(key, leaf)",
          ("evaluation/test_randomisation.py",)),
    # families
    Break("Llama: output matrix", "families/decoder.py",
          'o_proj.weight", "D (H K) -> H K D"', 'o_proj.weight", "D (K H) -> H K D"',
          ("families/test_parity.py::test_float64[llama]",)),
    Break("GPT-2: queries and keys", "families/gpt2.py",
          '"blocks.attn.w_q", "blocks.attn.w_k", "blocks',
          '"blocks.attn.w_k", "blocks.attn.w_q", "blocks',
          ("families/test_parity.py::test_float64[gpt2]",)),
    Break("GPT-NeoX: fused rows", "families/gpt_neox.py",
          '"(H part K) D -> part D H K"', '"(part H K) D -> part D H K"',
          ("families/test_parity.py::test_float64[gpt_neox]",)),
    Break("GPT-Neo: scale", "families/gpt_neo.py",
          '"attention_scale": 1.0', '"attention_scale": None',
          ("families/test_parity.py::test_float64[gpt_neo]",)),
    Break("rules: rows of unequal size", "families/base.py",
          "np.cumsum(self._sizes(config))", "np.cumsum(self._sizes(config)[::-1])",
          ("families/test_base.py::test_rows_of_unequal_size",)),
    # checkpoint
    Break("MXFP4: halves of a byte", "checkpoint/mxfp4.py",
          "np.tile(values, 16), np.repeat(values, 16)",
          "np.repeat(values, 16), np.tile(values, 16)",
          ("checkpoint/test_mxfp4.py::test_every_code_under_every_scale",)),
    Break("MXFP4: bias", "checkpoint/mxfp4.py",
          "_BIAS, _NAN = 127, 255", "_BIAS, _NAN = 128, 255",
          ("checkpoint/test_mxfp4.py::test_every_code_under_every_scale",)),
    Break("weights: infinity is finite", "checkpoint/weights.py",
          "max(initial=0) < infinity[0]", "max(initial=0) <= infinity[0]",
          ("checkpoint/test_load.py::test_finite[float32]",)),
    Break("files: an index leaves the folder", "checkpoint/files.py",
          ' or ".." in p.parts', "",
          ("checkpoint/test_files.py::test_index_may_not_leave_the_folder",)),
    # text
    Break("encode: side of padding", "text.py",
          'if side == "left" else 0', 'if side == "right" else 0',
          ("test_text.py::test_padding[left]",)),
    Break("encode: BOS twice", "text.py",
          "return row[1:] if has_own and", "return row if has_own and",
          ("test_text.py::test_bos_of_a_tokenizer_that_adds_it",)),
    Break("encode: BOS asked for beside one's own", "text.py",
          "return own if has_own else [first, *own]", "return [first, *own]",
          ("test_text.py::test_bos_of_a_tokenizer_that_adds_it",)),
    # cli
    Break("cli: the least likely", "cli.py",
          "np.argsort(-np.asarray(out.logits[0, -1])", "np.argsort(np.asarray(out.logits[0, -1])",
          ("test_cli.py::test_what_analyze_prints",)),
    Break("cli: movement backwards", "cli.py",
          "stream.resid_pre[:, 0, -1], stream.resid_post[:, 0, -1]",
          "stream.resid_post[:, 0, -1], stream.resid_pre[:, 0, -1]",
          ("test_cli.py::test_the_numbers_are_those_of_the_functions",)),
    Break("cli: attribution of another token", "cli.py",
          "model, tokens, goal, against=rival, mask=mask, method",
          "model, tokens, rival, against=goal, mask=mask, method",
          ("test_cli.py::test_the_numbers_are_those_of_the_functions",)),
    # residual_tools
    Break("tools: layers swapped", "residual_tools.py",
          "tokens, layer_idx1, layer_idx2, **options", "tokens, layer_idx2, layer_idx1, **options",
          ("test_residual_tools.py::test_text_ids_and_stream_agree",)),
    # demo
    Break("demo: who gives", "demo/text.py",
          '(second, first) if order == "ABBA"', '(first, second) if order == "ABBA"',
          ("demo/test_demo.py::test_indirect_object_prompts[ABBA]",)),
    Break("demo: induction scores", "demo/evaluate.py",
          "queries - LENGTH + 1]", "queries - LENGTH]",
          ("demo/test_demo.py::test_the_written_figures_are_those_of_the_weights",)),
    # examples
    Break("examples: the largest heads", "examples/sources_of_a_logit.py",
          "np.argsort(-np.abs(to_last))", "np.argsort(np.abs(to_last))",
          ("test_readme.py::test_examples_print_what_they_say[sources_of_a_logit]",)),
)
# fmt: on


class Outcome(NamedTuple):
    """What became of a break: the suite and the node that killed it, or why there is none."""

    kind: str
    said: str
    node: str | None = None


def not_once(breaks: Iterable[Break]) -> list[str]:
    """Says of each break whose `old` does not occur exactly once how often it does."""
    counts = [(b, (ROOT / "arrakis_jax" / b.file).read_text().count(b.old)) for b in breaks]
    return [
        f"{b.name}: `old` must occur once in {b.file}, and occurs {n} times: {b.old!r}"
        for b, n in counts
        if n != 1
    ]


def copied(folder: Path) -> Path:
    """A copy of the checkout in a new folder, with the shared data beside it."""
    copy = folder / "checkout"
    copy.mkdir()
    for name in COPIED:
        place = ROOT / name
        (shutil.copytree if place.is_dir() else shutil.copy2)(place, copy / name)
    if (ROOT.parent / "shared").exists():
        (folder / "shared").symlink_to((ROOT.parent / "shared").resolve())
    return copy


def pytest(copy: Path, tests: Iterable[str], *options: str) -> tuple[int, list[str], str]:
    """Runs tests in a copy: the exit status, the nodes that failed, and what was printed."""
    command = (sys.executable, "-m", "pytest", "-n", "0", "-q", "-rfE", "-o", f"cache_dir={CACHE}")
    done = subprocess.run(
        [*command, *options, *tests],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
    )
    printed = done.stdout + done.stderr
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return done.returncode, failed, printed


def outcome(broken: Break) -> Outcome:
    """Applies a break to a copy, and runs its tests until one fails."""
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(Path(folder))
        file = copy / "arrakis_jax" / broken.file
        file.write_text(file.read_text().replace(broken.old, broken.new))
        tests = [f"tests/{test}" for test in broken.tests]
        for suite, options in SUITES.items():
            status, failed, printed = pytest(copy, tests, "-x", *options)
            if status == FAILED and failed:
                return Outcome(suite, f"killed by {suite}: {failed[0]}", failed[0])
            if status not in (PASSED, NO_TESTS):
                last = (printed.strip().splitlines() or ["nothing was printed"])[-1]
                return Outcome("not run", f"NOT RUN, pytest ended with {status}: {last}")
    return Outcome("survived", "SURVIVED")


def failing_unbroken(nodes: Iterable[str]) -> list[str]:
    """Those of the nodes that fail on the code as it is, and so prove nothing."""
    with tempfile.TemporaryDirectory() as folder:
        status, failed, printed = pytest(copied(Path(folder)), sorted(set(nodes)), "-m", "")
    return failed if status in (PASSED, FAILED) else [printed.strip()[-500:]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="the breaks of these names")
    parser.add_argument("--list", action="store_true", help="print the breaks, and run none")
    parser.add_argument("--jobs", type=int, default=2, help="how many breaks at a time")
    options = parser.parse_args()
    chosen = [b for b in BREAKS if options.only is None or b.name in options.only]
    if unknown := set(options.only or ()) - {b.name for b in chosen}:
        parser.error(f"there are no breaks of the names {sorted(unknown)}")
    problems = not_once(chosen)
    print(*problems, sep="\n", end="\n" * bool(problems))
    if problems or options.list:
        for b in [] if problems else chosen:
            print(f"{b.name}\n    {b.file}: {b.old!r} -> {b.new!r}\n    {', '.join(b.tests)}")
        return bool(problems)
    found = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for b, one in zip(chosen, pool.map(outcome, chosen), strict=True):
            print(f"{b.name}: {one.said}", flush=True)
            found.append(one)
    print()
    for kind, count in Counter(one.kind for one in found).most_common():
        print(f"{count:4} {kind}")
    print(f"{len(found):4} in all")
    nodes = [one.node for one in found if one.node is not None]
    unproven = failing_unbroken(nodes) if nodes else []
    for node in unproven:
        print(f"fails on the code as it is, too: {node}")
    return int(bool(unproven) or len(nodes) < len(found))


if __name__ == "__main__":
    sys.exit(main())
