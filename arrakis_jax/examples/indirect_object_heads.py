"""Which heads does the model need to name the indirect object?

A gradient estimates, to first order, what it costs to set a head to its mean output. The heads
that should cost the most are chosen on half of the prompts. On the other half they are set to
their mean. The numbers are mean logit differences between the right name and the wrong one.

As many other heads, drawn at random, cost at most 20 % on average:
`tests/circuits/test_demo_heads.py` holds this task and that of `induction_heads.py` to it. The
four induction heads all do the same thing, so there the random heads are drawn from outside of
the circuit.

Prints:

    without []: 18.18
    without [[0, 2], [0, 3], [1, 3]]: 0.20
"""

import numpy as np

from arrakis_jax import (
    Set,
    demo_model,
    encode,
    logit_attribution,
    residual_gradients,
    run,
    token_id,
)
from arrakis_jax.demo.text import indirect_object

model, tokenizer = demo_model()
rng = np.random.default_rng(0)
prompts = [indirect_object(rng, order=order, held_out=True) for order in ("ABBA", "BABA") * 128]
tokens, mask = encode(tokenizer, [prompt.text for prompt in prompts])
right = np.array([token_id(tokenizer, prompt.answer) for prompt in prompts])
wrong = np.array([token_id(tokenizer, prompt.other) for prompt in prompts])
chosen_on, tested_on = slice(0, 128), slice(128, 256)

options = {"mask": mask[chosen_on], "capture": ("z",)}
z = run(model, tokens[chosen_on], **options).residuals.z
gradients = residual_gradients(
    model, tokens[chosen_on], right[chosen_on], against=wrong[chosen_on], **options
)
# The mean over real tokens: z is zero at padding.
mean_z = z.sum((1, 2)) / mask[chosen_on].sum()
cost = ((z - mean_z[:, None, None]) * gradients.z).sum((2, 4)).mean(1)

for heads in ([], np.argwhere(cost > cost.max() / 3).tolist()):
    edits = [Set("z", mean_z[layer, head], layer=layer, head=head) for layer, head in heads]
    out = run(model, tokens[tested_on], mask=mask[tested_on], edits=edits)
    difference = logit_attribution(model, out, right[tested_on], against=wrong[tested_on]).logit
    print(f"without {heads}: {difference.mean():.2f}")
