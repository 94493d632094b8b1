"""Which head does the answer need most? And how do many tools read one forward?

`run` gives a plain pytree of arrays, and every tool accepts it in place of tokens. An edit is
data: a `vmap` over its layer and head takes every head away in turn, in one program.

Prints:

    resid_pre (4, 1, 15, 128)
    pattern (4, 1, 4, 15, 15)
    z (4, 1, 15, 4, 64)
    norms of 21 terms at every position (21, 1, 15)
    angles between all pairs of 9 stream points (9, 9, 1, 15)
    the difference needs layer 0 head 1 most
"""

import jax
import jax.numpy as jnp

from arrakis_jax import Set, decompose, demo_model, encode, movement_matrix, run, token_id

model, tokenizer = demo_model()
tokens, mask = encode(tokenizer, "When Mary and John went to the store, John gave a drink to")
mary, john = token_id(tokenizer, " Mary"), token_id(tokenizer, " John")

out = run(model, tokens, mask=mask, capture="all")
for field in ("resid_pre", "pattern", "z"):
    print(field, getattr(out.residuals, field).shape)
norms, angles = decompose(model, out, by="head").norms(), movement_matrix(model, out).angle
print(f"norms of {len(norms)} terms at every position {norms.shape}")
print(f"angles between all pairs of {len(angles)} stream points {angles.shape}")


def difference_without(layer, head):
    """The logit difference when the output of one head is zero."""
    logits = run(model, tokens, mask=mask, edits=Set("z", 0.0, layer=layer, head=head)).logits
    return logits[0, -1, mary] - logits[0, -1, john]


n_layers, n_heads = model.config.n_layers, model.config.n_heads
of_heads = jax.vmap(difference_without, in_axes=(None, 0))
of_layers_and_heads = jax.vmap(of_heads, in_axes=(0, None))
differences = of_layers_and_heads(jnp.arange(n_layers), jnp.arange(n_heads))
layer, head = divmod(int(differences.argmin()), n_heads)
print(f"the difference needs layer {layer} head {head} most")
