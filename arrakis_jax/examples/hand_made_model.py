"""How is a model of one's own made?

A model is a `ModelConfig` and its weights. They are random until they are set: here two layers
of attention alone, and an unembedding that is the transposed embedding.

Prints:

    w_o (2, 2, 8, 16)
    logits (1, 3, 11)
"""

from flax import nnx

from arrakis_jax import ModelConfig, Transformer, run

config = ModelConfig(
    n_layers=2,
    d_model=16,
    n_heads=2,
    n_kv_heads=1,
    d_head=8,
    d_mlp=0,
    vocab_size=11,
    norm=None,
    norm_eps=None,
    positions=None,
    max_positions=32,
)
model = Transformer(config, rngs=nnx.Rngs(0))
model.w_u[...] = model.w_e[...].T
# `blocks` is None only where layers differ in kind: some with experts, some without.
assert model.blocks is not None
print("w_o", model.blocks.attn.w_o[...].shape)
print("logits", run(model, [[1, 2, 3]]).logits.shape)
