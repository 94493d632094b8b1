"""The peers' side of a comparison: the jobs by TransformerLens, captum and nnsight.

Every job is what a user writes who knows the library: its own function where it has one, only what
is needed cached, no gradients where none are needed. A variant is named in parentheses: "(by hand)"
does without the library's function what it does pair by pair, cell by cell or with more than is
needed; "(backward hooks)" is the way of its demos; "(logits_to_keep)" is an argument of Hugging
Face's forward beneath it, which TransformerLens does not tell of, for the logits of the last
position alone.
"""

import gc
import importlib.metadata
import os
from collections.abc import Callable, Iterable
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}

import nnsight  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from captum.attr import InputXGradient, IntegratedGradients  # noqa: E402
from torch import Tensor  # noqa: E402
from transformer_lens import patching  # noqa: E402
from transformer_lens.ActivationCache import ActivationCache  # noqa: E402
from transformer_lens.model_bridge import TransformerBridge  # noqa: E402
from transformer_lens.tools.analysis import (  # noqa: E402
    EdgeAttributionConfig,
    Node,
    attribution_patch,
    direct_logit_attribution,
    logit_lens,
)
from transformer_lens.tools.analysis.attribution_patching import (  # noqa: E402
    AttributionResult,
    cache_activation_and_gradient,
)

from benchmarks import workloads  # noqa: E402
from benchmarks.serve import Job, serve  # noqa: E402
from benchmarks.workloads import AGAINST, TARGET, WORKLOADS  # noqa: E402

PACKAGES = ("torch", "transformers", "transformer-lens", "captum", "nnsight")
STEPS = 32
LAST = {"logits_to_keep": 1}  # of Hugging Face's forward: no logits but the last position's
JOBS: dict[str, Job] = {}


class State:
    """The tokens `[B,T]`, and one model at a time, as some are large, made when a job needs it."""

    def __init__(self, request: dict[str, Any]):
        self.path, self.dtype = request["checkpoint"], getattr(torch, request["dtype"])
        self.device = {"gpu": "cuda"}.get(request["device"], request["device"])
        workload = WORKLOADS[request["workload"]]
        config = transformers.AutoConfig.from_pretrained(self.path)
        self.n_layers = int(config.num_hidden_layers)
        self.held: tuple[str, Any] = ("", None)

        def tokens(shape: tuple[int, int], seed: int = 0) -> Tensor:
            ids = workloads.tokens(shape, config.vocab_size, seed)
            return torch.from_numpy(ids).to(self.device)

        self.tokens, self.corrupt = tokens(workload.batch), tokens(workload.batch, 1)
        following = workloads.following(self.tokens.cpu().numpy())
        self.following = torch.from_numpy(following).to(self.device)
        self.integral = tokens(workload.integral)
        self.sweep = tokens(workload.sweep), tokens(workload.sweep, 1)
        self.edges = tokens(workload.edges), tokens(workload.edges, 1)

    def hugging_face(self, **options: Any) -> transformers.PreTrainedModel:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            self.path, dtype=self.dtype, **options
        )
        return model.to(self.device).eval()

    def bridge(self) -> TransformerBridge:
        return TransformerBridge.boot_transformers(
            self.path,
            hf_model=self.hugging_face(attn_implementation="eager"),
            device=self.device,
            dtype=self.dtype,
        )

    def only(self, name: str, make: Callable[[], Any]) -> Any:
        """The model of this name, made in place of another."""
        if self.held[0] != name:
            self.held = ("", None)
            gc.collect()
            self.held = (name, make())
        return self.held[1]

    @property
    def model(self) -> transformers.PreTrainedModel:
        """The model without TransformerLens, for captum and nnsight."""
        return self.only("model", lambda: self.hugging_face().requires_grad_(False))

    @property
    def raw(self) -> TransformerBridge:
        """TransformerLens with the weights as they are, which require no gradients."""
        return self.only("raw", self.bridge)

    @property
    def folded(self) -> TransformerBridge:
        """TransformerLens with norms folded and weights centred, as logit attribution needs them.

        A head's value bias stays the head's.
        """

        def make() -> TransformerBridge:
            bridge = self.bridge()
            bridge.enable_compatibility_mode(fold_value_biases=False)
            return bridge

        return self.only("folded", make)

    @property
    def slopes(self) -> TransformerBridge:
        """The raw one where weights require gradients, as its tools' hooks need it."""
        return self.raw.requires_grad_(True)


def load(request: dict[str, Any]) -> tuple[State, dict[str, Any]]:
    torch.set_num_threads(request["threads"])
    # On GPUs "high" is TF32, as XLA's default is.
    torch.set_float32_matmul_precision("highest" if request["precision"] == "highest" else "high")
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    state = State(request)
    device = torch.cuda.get_device_name() if state.device == "cuda" else "cpu"
    return state, {"jobs": list(JOBS), "versions": versions, "device": device}


def job(
    name: str, peer: str, told: Callable[[Any], dict[str, Tensor]] = lambda found: found
) -> Callable:
    """Registers a job, which returns when its result is there."""

    def register(function: Callable[[State], Any]) -> Callable[[State], Any]:
        def run(state: State) -> Any:
            found = function(state)
            if state.device == "cuda":
                torch.cuda.synchronize()
            return found

        def arrays(found: Any) -> dict[str, np.ndarray]:
            return {name: x.detach().float().cpu().numpy() for name, x in told(found).items()}

        JOBS[name] = Job(run, arrays, peer)
        return function

    return register


def goal(logits: Tensor) -> Tensor:
    """The logit difference at the last position, summed over rows."""
    last = logits[:, -1]
    return (last[:, TARGET] - last[:, AGAINST]).sum()


def points(bridge: TransformerBridge) -> list[str]:
    """The hooks of all points of the stream, first to last."""
    n = int(bridge.cfg.n_layers)
    found = [f"blocks.{i}.hook_resid_{at}" for i in range(n) for at in ("pre", "mid")]
    return [*found, f"blocks.{n - 1}.hook_resid_post"]


def cached(
    bridge: TransformerBridge, tokens: Tensor, names: list[str], **options: Any
) -> ActivationCache:
    with torch.no_grad():
        return bridge.run_with_cache(tokens, names_filter=names, **options)[1]


@job(
    "forward",
    "TransformerBridge()",
    lambda logits: {"logits": logits[:, -1]},
)
def forward(state: State) -> Tensor:
    with torch.no_grad():
        return state.raw(state.tokens)


def stream_told(found: tuple[list[Tensor], list[Tensor], Tensor]) -> dict[str, Tensor]:
    pre, mid, final = found
    return {
        "resid_pre": torch.stack([x[:, -1] for x in pre]),
        "resid_mid": torch.stack([x[:, -1] for x in mid]),
        "final": final[:, -1],
    }


@job("forward, residuals", "run_with_cache(names_filter)", stream_told)
def forward_residuals(state: State, **options: Any) -> tuple[list[Tensor], list[Tensor], Tensor]:
    cache = cached(state.raw, state.tokens, points(state.raw), **options)
    layers = range(state.n_layers)
    pre = [cache["resid_pre", i] for i in layers]
    mid = [cache["resid_mid", i] for i in layers]
    return pre, mid, cache["resid_post", layers[-1]]


@job("forward, residuals (logits_to_keep)", "run_with_cache(names_filter)", stream_told)
def forward_residuals_last(state: State) -> tuple[list[Tensor], list[Tensor], Tensor]:
    return forward_residuals(state, **LAST)


def blocks_of(traced: nnsight.NNsight) -> tuple[Any, str]:
    """The blocks of a model in nnsight, and their norm that reads the stream after attention."""
    if traced._module.config.model_type == "gpt2":
        return traced.transformer.h, "ln_2"
    return traced.model.layers, "post_attention_layernorm"


@job("forward, residuals (nnsight)", "trace(): .input of blocks and norms", stream_told)
def forward_residuals_nnsight(state: State) -> tuple[list[Tensor], list[Tensor], Tensor]:
    traced = nnsight.NNsight(state.model)
    blocks, norm = blocks_of(traced)
    with torch.no_grad(), traced.trace(state.tokens):
        pre, mid = nnsight.save([]), nnsight.save([])
        for block in blocks:
            pre.append(block.input)
            mid.append(getattr(block, norm).input)
        final = nnsight.save(blocks[-1].output)
    return pre, mid, final[0] if isinstance(final, tuple) else final


def written(bridge: TransformerBridge) -> list[str]:
    """The hooks of what is written to the stream, and of the final norm's scale."""
    layers = range(int(bridge.cfg.n_layers))
    first = [name for name in ("hook_embed", "hook_pos_embed") if name in bridge.hook_dict]
    outs = [f"blocks.{i}.hook_{part}_out" for i in layers for part in ("attn", "mlp")]
    return [*first, *outs, "ln_final.hook_scale"]


def terms_told(terms: Tensor) -> dict[str, Tensor]:
    return {"terms": terms}


@job("components, last position", "direct_logit_attribution(unit='component')", terms_told)
def components_last(state: State) -> Tensor:
    cache = cached(state.folded, state.tokens, written(state.folded))
    with torch.no_grad():
        return direct_logit_attribution(
            state.folded, answer_tokens=TARGET, incorrect_tokens=AGAINST, cache=cache
        ).attribution


@job("components, every position", "direct_logit_attribution(unit='component')", terms_told)
def components_every(state: State) -> Tensor:
    cache = cached(state.folded, state.tokens, written(state.folded))
    with torch.no_grad():
        return direct_logit_attribution(
            state.folded,
            answer_tokens=state.following,
            incorrect_tokens=torch.full_like(state.following, AGAINST),
            pos=None,
            cache=cache,
        ).attribution


def heads(bridge: TransformerBridge) -> list[str]:
    layers = range(int(bridge.cfg.n_layers))
    return [*(f"blocks.{i}.attn.hook_z" for i in layers), "ln_final.hook_scale"]


@job(
    "heads, last position",
    "stack_head_results, logit_attrs",
    lambda terms: {"terms": terms[..., 0]},
)
def heads_last(state: State) -> Tensor:
    names, last = heads(state.folded), slice(-1, None)
    cache = cached(state.folded, state.tokens, names, pos_slice=last)
    with torch.no_grad():
        return cache.logit_attrs(cache.stack_head_results(), TARGET, AGAINST)


@job("heads, every position", "stack_head_results, logit_attrs", terms_told)
def heads_every(state: State) -> Tensor:
    cache = cached(state.folded, state.tokens, heads(state.folded))
    against = torch.full_like(state.following, AGAINST)
    with torch.no_grad():
        return cache.logit_attrs(cache.stack_head_results(), state.following, against)


@job("logit lens", "logit_lens(return_type='log_probs')")
def lens(state: State) -> dict[str, Tensor]:
    cache = cached(state.raw, state.tokens, points(state.raw))
    found = logit_lens(state.raw, cache=cache, incl_mid=True, return_type="log_probs")
    return {
        "log_prob": found.values[..., TARGET],
        "top_log_probs": found.values.topk(5).values,
    }


@job("movement matrix", "accumulated_resid(incl_mid), torch.cdist")
def movement(state: State) -> dict[str, Tensor]:
    cache = cached(state.raw, state.tokens, points(state.raw))
    with torch.no_grad():
        x_BTPD = cache.accumulated_resid(incl_mid=True).permute(1, 2, 0, 3).float()
        norm_BTP = x_BTPD.norm(dim=-1)
        moved = torch.cdist(x_BTPD, x_BTPD, compute_mode="donot_use_mm_for_euclid_dist")
        unit_BTPD = x_BTPD / norm_BTP[..., None]
        found = {
            "relative_norm": moved / norm_BTP[..., None],
            "cosine": unit_BTPD @ unit_BTPD.mT,
        }
        return {name: x.permute(2, 3, 0, 1) for name, x in found.items()}


def layers_told(found: list[Tensor]) -> dict[str, Tensor]:
    return {"resid_pre": torch.stack(found)}


# At resid_mid these hooks tell what comes back through the MLP alone, not the gradient.
@job("gradient, every layer", "cache_activation_and_gradient", layers_told)
def layer_gradients(state: State) -> list[Tensor]:
    names = points(state.raw)[:-1:2]
    found = cache_activation_and_gradient(state.slopes, state.tokens, goal, names)
    return [found.gradients[name] for name in names]


@job("gradient, every layer (backward hooks)", "hooks(bwd_hooks), backward()", layers_told)
def layer_gradients_by_hooks(state: State) -> list[Tensor]:
    """The way of its demos: gradients of weights are taken, too."""
    bridge, found = state.slopes, []

    def keep(gradient: Tensor, hook: Any) -> None:
        found.insert(0, gradient.detach())

    with bridge.hooks(bwd_hooks=[(name, keep) for name in points(bridge)[:-1:2]]):
        goal(bridge(state.tokens)).backward()
    bridge.zero_grad(set_to_none=True)
    return found


def gradients_told(found: list[Tensor]) -> dict[str, Tensor]:
    return {"resid_pre": torch.stack(found[::2]), "resid_mid": torch.stack(found[1::2])}


@job("gradient, every site", "hooks(), torch.autograd.grad", gradients_told)
def gradients(state: State, **options: Any) -> list[Tensor]:
    bridge, values = state.raw.requires_grad_(False), []

    def keep(value: Tensor, hook: Any) -> None:
        values.append(value if values else value.requires_grad_())

    with bridge.hooks(fwd_hooks=[(name, keep) for name in points(bridge)[:-1]]):
        total = goal(bridge(state.tokens, **options))
    return list(torch.autograd.grad(total, values))


@job("gradient, every site (logits_to_keep)", "hooks(), torch.autograd.grad", gradients_told)
def gradients_last(state: State) -> list[Tensor]:
    return gradients(state, **LAST)


@job("gradient, every site (nnsight)", "trace(), with total.backward(): .grad", gradients_told)
def gradients_nnsight(state: State) -> list[Tensor]:
    traced = nnsight.NNsight(state.model)
    blocks, norm = blocks_of(traced)
    with traced.trace(state.tokens):
        found, sites = nnsight.save([]), []
        for block in blocks:
            x = block.input
            if not sites:  # of a frozen model: no gradients of weights are taken
                x.requires_grad_()
            sites += [x, getattr(block, norm).input]
        with goal(traced.output.logits).backward():
            for site in reversed(sites):
                found.insert(0, site.grad)
    return found


def difference(embeddings: Tensor, model: transformers.PreTrainedModel) -> Tensor:
    """The target of every row, from its token embeddings."""
    last = model(inputs_embeds=embeddings).logits[:, -1]
    return last[:, TARGET] - last[:, AGAINST]


@job("gradient x input", "captum: InputXGradient", lambda found: {"tokens": found.sum(-1)})
def gradient_x_input(state: State) -> Tensor:
    embeddings = state.model.get_input_embeddings()(state.tokens).requires_grad_()
    return InputXGradient(difference).attribute(embeddings, additional_forward_args=(state.model,))


@job(
    "integrated gradients",
    "captum: IntegratedGradients",
    lambda found: {"tokens": found.sum(-1)},
)
def integrated_gradients(state: State) -> Tensor:
    embed = state.model.get_input_embeddings()
    return IntegratedGradients(difference).attribute(
        embed(state.integral),
        baselines=embed(torch.zeros_like(state.integral)),
        additional_forward_args=(state.model,),
        n_steps=STEPS,
        method="gausslegendre",
    )


def places(nodes: Iterable[Node]) -> tuple[int, int, int]:
    """How many layers, positions and heads there are nodes of."""
    found = [(node.layer or 0, node.position, node.head or 0) for node in nodes]
    layers, positions, heads = (1 + max(numbers) for numbers in zip(*found, strict=True))
    return layers, positions, heads


def nodes_told(found: AttributionResult) -> dict[str, Tensor]:
    layers, positions, heads = places(found.node_scores)
    told = {
        "embed": torch.zeros(positions),
        "z": torch.zeros(layers, positions, heads),
        "mlp_out": torch.zeros(layers, positions),
    }
    for node, score in found.node_scores.items():
        if node.kind == "embed":
            told["embed"][node.position] = score
        elif node.kind == "mlp_out":
            told["mlp_out"][node.layer, node.position] = score
        else:
            told["z"][node.layer, node.position, node.head] = score
    return told


@job("attribution patching", "attribution_patch(granularity='node')", nodes_told)
def nodes(state: State) -> AttributionResult:
    return attribution_patch(state.slopes, state.tokens, state.corrupt, goal)


def batched_nodes_told(found: dict[str, Tensor]) -> dict[str, Tensor]:
    def layers(end: str) -> Tensor:
        return torch.stack([x for name, x in found.items() if name.endswith(end)])

    return {"embed": found["hook_embed"], "z": layers("z"), "mlp_out": layers("mlp_out")}


@job(
    "attribution patching (by hand)",
    "run_with_cache, cache_activation_and_gradient of the batch",
    batched_nodes_told,
)
def nodes_by_hand(state: State) -> dict[str, Tensor]:
    layers = range(state.n_layers)
    names = [f"blocks.{i}.{site}" for i in layers for site in ("attn.hook_z", "hook_mlp_out")]
    names = ["hook_embed", *names]
    clean = cached(state.raw, state.tokens, names, **LAST)
    corrupt = cache_activation_and_gradient(state.slopes, state.corrupt, goal, names)
    return {
        name: ((clean[name] - corrupt.activations[name]) * corrupt.gradients[name]).sum(-1).mean(0)
        for name in names
    }


def edges_told(found: AttributionResult) -> dict[str, Tensor]:
    """Scores `[R,W]`, summed over positions: of each layer q, k and v by head, then the MLP."""
    layers, _, heads = places(found.node_scores)
    own = {"q_input": 0, "k_input": heads, "v_input": 2 * heads, "mlp_in": 3 * heads}

    def writer(node: Node) -> int:
        if node.layer is None:
            return 0
        return 1 + node.layer * (heads + 1) + (heads if node.head is None else node.head)

    def reader(node: Node) -> int:
        if node.kind == "logits":
            return layers * (3 * heads + 1)
        return node.layer * (3 * heads + 1) + own[node.kind] + (node.head or 0)

    effects = np.zeros((layers * (3 * heads + 1) + 1, layers * (heads + 1) + 1))
    for (u, v), score in found.edge_scores.items():
        effects[reader(v), writer(u)] += score
    return {"effects": torch.from_numpy(effects)}


@job("edge attribution patching", "attribution_patch(granularity='edge')", edges_told)
def edges(state: State) -> AttributionResult:
    by_edge = EdgeAttributionConfig(granularity="edge")
    return attribution_patch(state.slopes, *state.edges, goal, by_edge)


@job(
    "edge attribution patching (by hand)",
    "run_with_cache, cache_activation_and_gradient, einsum",
    lambda effects: {"effects": effects},
)
def edges_by_hand(state: State) -> Tensor:
    bridge, layers = state.slopes, range(state.n_layers)
    if bridge.cfg.n_key_value_heads not in (None, bridge.cfg.n_heads):
        raise ValueError("with grouped queries keys and values have no input of each head's own")
    writes = [f"blocks.{i}.{site}" for i in layers for site in ("attn.hook_result", "hook_mlp_out")]
    writes = ["hook_embed", *writes]
    inputs = ("attn.hook_q_input", "attn.hook_k_input", "attn.hook_v_input", "hook_mlp_in")
    reads = [f"blocks.{i}.{site}" for i in layers for site in inputs]
    reads = [*reads, f"blocks.{layers[-1]}.hook_resid_post"]
    flags = (bridge.set_use_attn_result, bridge.set_use_split_qkv_input, bridge.set_use_hook_mlp_in)
    for flag in flags:
        flag(True)
    try:
        clean = cached(bridge, state.edges[0], writes, **LAST)
        corrupt = cache_activation_and_gradient(bridge, state.edges[1], goal, [*writes, *reads])
    finally:
        for flag in flags:
            flag(False)

    def joined(values: list[Tensor]) -> Tensor:
        return torch.cat([x if x.ndim == 4 else x[:, :, None] for x in values], 2)

    changes_BTWD = joined([clean[name] - corrupt.activations[name] for name in writes])
    slopes_BTRD = joined([corrupt.gradients[name] for name in reads])
    effects_RW = torch.einsum("btrd,btwd->rw", slopes_BTRD, changes_BTWD) / len(state.edges[0])
    heads = int(bridge.cfg.n_heads)
    # In the order of writing: what is written before a reader reads.
    written = [0, *(2 * i + 1 + mlp for i in layers for mlp in (*[0] * heads, 1))]
    read = [*(2 * i + mlp for i in layers for mlp in (*[0] * 3 * heads, 1)), 2 * len(layers)]
    earlier = torch.tensor(written)[None] <= torch.tensor(read)[:, None]
    return effects_RW * earlier.to(effects_RW.device)


@job(
    "exact patching",
    "get_act_patch_resid_pre",
    lambda found: {"effects": found.effect()},
)
def exact(state: State) -> patching.PatchingResult:
    clean, corrupt = state.sweep
    cache = cached(state.raw, clean, points(state.raw)[:-1:2])
    with torch.no_grad():
        return patching.get_act_patch_resid_pre(state.raw, corrupt, cache, goal, baseline=True)


@job(
    "exact patching (by hand)",
    "run_with_hooks, the positions of a layer as a batch",
    lambda effects: {"effects": effects},
)
def exact_by_hand(state: State) -> Tensor:
    clean, corrupt = state.sweep
    names = points(state.raw)[:-1:2]
    cache = cached(state.raw, clean, names, **LAST)
    rows = torch.arange(corrupt.shape[1], device=corrupt.device)

    def patch(value: Tensor, hook: Any) -> Tensor:
        value[rows, rows] = cache[hook.name][0]
        return value

    with torch.no_grad():
        base = goal(state.raw(corrupt, **LAST))
        cells = corrupt.expand(len(rows), -1)
        logits = [
            state.raw.run_with_hooks(cells, fwd_hooks=[(name, patch)], **LAST)[:, -1]
            for name in names
        ]
    return torch.stack([x[:, TARGET] - x[:, AGAINST] for x in logits]) - base


@job(
    "value-weighted flow",
    "run_with_cache, then by hand: norms from the Gram matrix of heads",
    lambda found: {"norms": torch.stack(found)},
)
def flow(state: State) -> list[Tensor]:
    bridge, layers = state.raw, range(state.n_layers)
    names = [f"blocks.{i}.attn.hook_{site}" for i in layers for site in ("pattern", "v")]
    cache = cached(bridge, state.tokens, names)

    def norms(layer: int) -> Tensor:
        a_BSHT = cache["pattern", layer].permute(0, 3, 1, 2)
        v_BSHK, w_o_HKD = cache["v", layer], bridge.blocks[layer].attn.W_O
        v_BSHK = v_BSHK.repeat_interleave(len(w_o_HKD) // v_BSHK.shape[2], 2)
        u_BSHD = torch.einsum("bshk,hkd->bshd", v_BSHK, w_o_HKD)
        gram_BSHN = u_BSHD @ u_BSHD.mT
        square_BST = ((gram_BSHN @ a_BSHT) * a_BSHT).sum(2)
        return square_BST.clamp(min=0).sqrt().mT

    with torch.no_grad():
        return [norms(layer) for layer in layers]


if __name__ == "__main__":
    serve(load, JOBS)
