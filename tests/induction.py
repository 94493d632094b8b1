"""A hand-built two-layer induction model, in which every tool's answer is known exactly."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from arrakis_jax import ModelConfig, Transformer

V, P, BETA = 9, 19, 60.0
N = 7
TOK, POS, PREV, OUT, ONE = 0, V, V + P, 2 * V + P, 3 * V + P
D, K = 3 * V + P + 1, max(V, P) + 1
SECOND = np.arange(N + 1, 2 * N)  # queries in the second copy whose next token is in the prompt


def induction_model() -> Transformer:
    """Layer 0 attends to the previous token and copies it to `prev`; layer 1 looks there."""
    config = ModelConfig(
        n_layers=2, d_model=D, n_heads=1, n_kv_heads=1, d_head=K, d_mlp=0, vocab_size=V,
        norm=None, norm_eps=None, positions="learned", max_positions=P, dtype="float64",
    )  # fmt: skip
    s = np.sqrt(K)
    w_e, w_pos, w_u = np.zeros((V, D)), np.zeros((P, D)), np.zeros((D, V))
    q, k, v = (np.zeros((2, D, 1, K)) for _ in range(3))
    o = np.zeros((2, 1, K, D))
    tokens, places = np.arange(V), np.arange(P)
    w_e[tokens, TOK + tokens] = 1
    w_e[:, ONE] = 1
    w_pos[places, POS + places] = 1
    q[0, POS + places[1:], 0, places[1:]] = BETA * s
    k[0, POS + places[:-1], 0, places[1:]] = 1
    v[:, TOK + tokens, 0, tokens] = 1
    o[0, 0, tokens[1:], PREV + tokens[1:]] = 1
    q[1, TOK + tokens, 0, tokens] = BETA * s
    k[1, PREV + tokens, 0, tokens] = 1
    o[1, 0, tokens[1:], OUT + tokens[1:]] = 1
    q[1, ONE, 0, K - 1] = BETA * s / 2
    k[1, TOK, 0, K - 1] = 1
    w_u[OUT + tokens, tokens] = 1
    model = Transformer(config, rngs=nnx.Rngs(0))
    attn = model.blocks.attn
    for parameter, value in (
        (model.w_e, w_e), (model.w_pos, w_pos), (model.w_u, w_u),
        (attn.w_q, q), (attn.w_k, k), (attn.w_v, v), (attn.w_o, o),
    ):  # fmt: skip
        parameter[...] = jnp.asarray(value)
    return model


def induction_tokens():
    """`[3,2N+1]`: token 0, and N others twice."""
    rng = np.random.default_rng(0)
    once = np.stack([1 + rng.permutation(V - 1)[:N] for _ in range(3)])
    return np.concatenate([np.zeros((3, 1), int), once, once], 1)
