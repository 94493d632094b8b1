"""Our side of a comparison: the jobs by arrakis_jax's public functions, one call each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax import (
    Logit,
    Transformer,
    attribution_patching,
    edge_attribution,
    feature_attribution,
    from_pretrained,
    information_flow,
    logit_attribution,
    logit_lens,
    movement_matrix,
    patch_sweep,
    residual_gradients,
    run,
)
from benchmarks import workloads
from benchmarks.serve import Job, serve
from benchmarks.workloads import AGAINST, TARGET, WORKLOADS, Workload

GOAL = Logit(TARGET, against=AGAINST)
# What peers take for the run that is patched, and the gradient of.
BASE = "corrupt"
STEPS = 32


@dataclass(frozen=True)
class State:
    """A model and the tokens `[B,T]` that jobs are done on."""

    model: Transformer
    tokens: jax.Array
    following: jax.Array
    corrupt: jax.Array
    integral: jax.Array
    sweep: tuple[jax.Array, jax.Array]
    edges: tuple[jax.Array, jax.Array]


def state_of(model: Transformer, workload: Workload) -> State:
    """A model with the workload's tokens on its device."""

    def tokens(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
        return workloads.tokens(shape, model.config.vocab_size, seed)

    clean = tokens(workload.batch)
    state = State(
        model,
        jnp.asarray(clean),
        jnp.asarray(workloads.following(clean)),
        jnp.asarray(tokens(workload.batch, 1)),
        jnp.asarray(tokens(workload.integral)),
        (jnp.asarray(tokens(workload.sweep)), jnp.asarray(tokens(workload.sweep, 1))),
        (jnp.asarray(tokens(workload.edges)), jnp.asarray(tokens(workload.edges, 1))),
    )
    jax.block_until_ready(vars(state))
    return state


def load(request: dict[str, Any]) -> tuple[State, dict[str, Any]]:
    if jax.default_backend() != request["device"]:
        raise ValueError(f"JAX found no {request['device']}, but {jax.default_backend()}")
    workload = WORKLOADS[request["workload"]]
    model = from_pretrained(
        request["checkpoint"], dtype=request["dtype"], matmul_precision=request["precision"]
    )
    return state_of(model, workload), {"device": jax.devices()[0].device_kind}


def job(run: Callable[[State], Any], **told: Callable[[Any], jax.Array]) -> Job:
    """A job that returns when its result is there."""
    return Job(
        run=lambda state: jax.block_until_ready(run(state)),
        told=lambda found: {name: np.asarray(pick(found)) for name, pick in told.items()},
    )


JOBS = {
    "forward": job(
        lambda s: run(s.model, s.tokens, capture=("logits",)).logits,
        logits=lambda found: found[:, -1],
    ),
    "forward, residuals": job(
        lambda s: run(
            s.model, s.tokens, capture=("resid_pre", "resid_mid", "final")
        ).residuals,
        resid_pre=lambda found: found.resid_pre[:, :, -1],
        resid_mid=lambda found: found.resid_mid[:, :, -1],
        final=lambda found: found.final[:, -1],
    ),
    "components, last position": job(
        lambda s: logit_attribution(s.model, s.tokens, TARGET, against=AGAINST),
        terms=lambda found: found.terms,
    ),
    "components, every position": job(
        lambda s: logit_attribution(
            s.model, s.tokens, s.following, against=AGAINST, position=None
        ),
        terms=lambda found: found.terms,
    ),
    "heads, last position": job(
        lambda s: logit_attribution(
            s.model, s.tokens, TARGET, against=AGAINST, by="head", kinds=("head",)
        ),
        terms=lambda found: found.terms,
    ),
    "heads, every position": job(
        lambda s: logit_attribution(
            s.model, s.tokens, s.following, against=AGAINST, by="head", kinds=("head",),
            position=None,
        ),
        terms=lambda found: found.terms,
    ),
    "logit lens": job(
        lambda s: logit_lens(s.model, s.tokens, TARGET, positions=(-1,), k=5),
        log_prob=lambda found: found.log_prob[..., 0],
        top_log_probs=lambda found: found.top_log_probs[..., 0, :],
    ),
    "movement matrix": job(
        lambda s: movement_matrix(s.model, s.tokens),
        relative_norm=lambda found: found.relative_norm,
        cosine=lambda found: found.cosine,
    ),
    "gradient, every layer": job(
        lambda s: residual_gradients(
            s.model, s.tokens, TARGET, against=AGAINST, capture=("resid_pre",)
        ),
        resid_pre=lambda found: found.resid_pre,
    ),
    "gradient, every site": job(
        lambda s: residual_gradients(
            s.model, s.tokens, TARGET, against=AGAINST, capture=("resid_pre", "resid_mid")
        ),
        resid_pre=lambda found: found.resid_pre,
        resid_mid=lambda found: found.resid_mid,
    ),
    "gradient x input": job(
        lambda s: feature_attribution(s.model, s.tokens, TARGET, against=AGAINST),
        tokens=lambda found: found.tokens,
    ),
    "integrated gradients": job(
        lambda s: feature_attribution(
            s.model, s.integral, TARGET, against=AGAINST, method="integrated_gradients",
            baseline=0, rule="gauss_legendre", steps=STEPS, step_batch=16,
        ),
        tokens=lambda found: found.tokens,
    ),
    "attribution patching": job(
        lambda s: attribution_patching(
            s.model, s.tokens, s.corrupt, GOAL, sites=("embed", "z", "mlp_out"), base=BASE
        ),
        embed=lambda found: found.effects["embed"].mean(-1),
        z=lambda found: found.effects["z"].mean(-1),
        mlp_out=lambda found: found.effects["mlp_out"].mean(-1),
    ),
    "edge attribution patching": job(
        lambda s: edge_attribution(s.model, *s.edges, GOAL, base=BASE),
        effects=lambda found: found.effects.mean(-1),
    ),
    "exact patching": job(
        lambda s: patch_sweep(s.model, *s.sweep, GOAL, base=BASE),
        effects=lambda found: found.effects.mean(-1),
    ),
    "value-weighted flow": job(
        lambda s: information_flow(s.model, s.tokens, method="value_weighted", layers=True),
        norms=lambda found: found.layers * found.total[..., None],
    ),
}  # fmt: skip


if __name__ == "__main__":
    serve(load, JOBS)
