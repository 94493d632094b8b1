"""Which activations decide, exactly? And does a cheap estimate find them?

Each clean prompt has a corrupt one, in which the other name gives. `patch_sweep` takes the queries
of one head after the other from the corrupt run, puts them into the clean run, and runs the rest
of the model. Its `base`, `source` and effects hold a number for every pair in the batch. An effect
is the target of the patched run minus the target of the base run: what favours the clean prompt
is negative here. The means have intervals. `attribution_patching` estimates all heads at once; it
costs three forwards.

Prints:

    Once Scott and Diana were at the park, Diana passed a new watch to
    Once Scott and Diana were at the park, Scott passed a new watch to
    logit difference 18.9, of the corrupt prompts -19.2
    queries of L2 head 0: -5.69 (-6.42 to -4.97)
    atp: rank correlation 0.83 over 12 heads
    atp_star: rank correlation 1.00 over 12 heads
"""

import numpy as np

from arrakis_jax import (
    Logit,
    agreement,
    attribution_patching,
    demo_model,
    encode,
    patch_sweep,
    token_id,
)
from arrakis_jax.demo.text import indirect_object

model, tokenizer = demo_model()
rng = np.random.default_rng(0)
prompts = [indirect_object(rng, order=order, held_out=True) for order in ("ABBA", "BABA") * 32]
clean_texts = [p.text for p in prompts]
# The last mention of a name is the giver.
corrupt_texts = [p.answer.join(p.text.rsplit(p.other, 1)) for p in prompts]
clean = encode(tokenizer, clean_texts)
corrupt = encode(tokenizer, corrupt_texts)
target = Logit(
    np.array([token_id(tokenizer, p.answer) for p in prompts]),
    against=np.array([token_id(tokenizer, p.other) for p in prompts]),
)

options = {"sites": "q", "over": ("layer", "head")}
exact = patch_sweep(model, clean, corrupt, target, **options)
print(clean_texts[0], corrupt_texts[0], sep="\n")
print(f"logit difference {exact.base.mean():.1f}", end=", ")
print(f"of the corrupt prompts {exact.source.mean():.1f}")
mean, low, high = exact.mean()
layer, head = np.unravel_index(np.abs(mean).argmax(), mean.shape)
print(f"queries of L{layer} head {head}: {mean[layer, head]:.2f}", end=" ")
print(f"({low[layer, head]:.2f} to {high[layer, head]:.2f})")

for method in ("atp", "atp_star"):
    estimate = attribution_patching(model, clean, corrupt, target, method=method, **options)
    near = agreement(estimate.effects.mean(-1)[..., None], mean[..., None], least=0.1)
    print(f"{method}: rank correlation {near.rank_correlation[0]:.2f} over {near.n[0]} heads")
