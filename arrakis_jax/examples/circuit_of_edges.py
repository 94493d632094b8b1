"""Which edges make the circuit?

An edge is what one writer (the embedding, a head, an MLP) adds to the input of one reader (the
queries, keys or values of a head, an MLP, the final norm). All edges are scored at once by
EAP-IG. Then only the best are kept, and every other edge is corrupted. Effects are of patches
from the corrupt run: an edge that favours the clean prompt has a negative one.

Prints:

    -14.59 embed -> L0 v 3
    -7.24 embed -> L0 v 2
    -4.84 L2 head 0 -> final
    42 of 479 edges: 62 % of the clean difference
    95 of 479 edges: 95 % of the clean difference
    240 of 479 edges: 100 % of the clean difference
"""

import numpy as np

from arrakis_jax import (
    Logit,
    circuit_faithfulness,
    demo_model,
    edge_attribution,
    encode,
    token_id,
)
from arrakis_jax.demo.text import indirect_object

model, tokenizer = demo_model()
rng = np.random.default_rng(0)
prompts = [indirect_object(rng, order=order, held_out=True) for order in ("ABBA", "BABA") * 32]
clean = encode(tokenizer, [p.text for p in prompts])
# The last mention of a name is the giver.
corrupt = encode(tokenizer, [p.answer.join(p.text.rsplit(p.other, 1)) for p in prompts])
target = Logit(
    np.array([token_id(tokenizer, p.answer) for p in prompts]),
    against=np.array([token_id(tokenizer, p.other) for p in prompts]),
)

edges = edge_attribution(model, clean, corrupt, target, steps=5)
scores = edges.effects.mean(-1)
flat = scores.reshape(-1)
for i in np.argsort(-np.abs(flat))[:3]:
    print(f"{flat[i]:+.2f} {edges.labels[int(i)]}")

circuits = circuit_faithfulness(
    model, clean, corrupt, target, scores=scores, fractions=(0.1, 0.2, 0.5)
)
for n_edges, share in zip(circuits.n_edges, circuits.of_means, strict=True):
    print(f"{n_edges} of {edges.graph.edges.sum()} edges: {100 * share:.0f} %", end=" ")
    print("of the clean difference")
