"""Which tokens caused the prediction? And are they the right ones?

Occlusion on one prompt puts the mean embedding in place of each token in turn, and says what the
logit difference loses. Then the same over 64 prompts: tokens are deleted, those of the largest
attribution first. The area under the deletion curve is the mean logit difference on the way. It
is lower than in random order if the attribution names the tokens whose loss costs most.

Prints:

    ┏━━━━━┳━━━━━━━━━━┳━━━━━━━━┳━━━━━━━━━━━━━┓
    ┃ row ┃ position ┃ token  ┃ attribution ┃
    ┡━━━━━╇━━━━━━━━━━╇━━━━━━━━╇━━━━━━━━━━━━━┩
    │   0 │        0 │ <bos>  │      +1.803 │
    │   0 │        1 │  When  │      +14.06 │
    │   0 │        2 │  Mary  │      +18.77 │
    │   0 │        3 │  and   │     -0.7023 │
    │   0 │        4 │  John  │      -3.586 │
    │   0 │        5 │  went  │      +5.522 │
    │   0 │        6 │  to    │      +18.65 │
    │   0 │        7 │  the   │      +25.66 │
    │   0 │        8 │  store │      +21.05 │
    │   0 │        9 │ ,      │      +21.32 │
    │   0 │       10 │  John  │      +26.41 │
    │   0 │       11 │  gave  │      +18.38 │
    │   0 │       12 │  a     │        +4.2 │
    │   0 │       13 │  drink │      +1.851 │
    │   0 │       14 │  to    │      +26.29 │
    └─────┴──────────┴────────┴─────────────┘
    area under deletion -5.3, in random order 0.9
"""

import numpy as np

from arrakis_jax import (
    Logit,
    demo_model,
    encode,
    feature_attribution,
    token_faithfulness,
    token_id,
)
from arrakis_jax.demo.text import indirect_object

model, tokenizer = demo_model()
tokens, mask = encode(tokenizer, "When Mary and John went to the store, John gave a drink to")
mary, john = token_id(tokenizer, " Mary"), token_id(tokenizer, " John")
of_one = feature_attribution(model, tokens, Logit(mary, john), method="occlusion", mask=mask)
print(of_one.to_table(tokenizer))

rng = np.random.default_rng(0)
prompts = [indirect_object(rng, order=order, held_out=True) for order in ("ABBA", "BABA") * 32]
tokens, mask = encode(tokenizer, [p.text for p in prompts])
target = Logit(
    np.array([token_id(tokenizer, p.answer) for p in prompts]),
    against=np.array([token_id(tokenizer, p.other) for p in prompts]),
)
attribution = feature_attribution(model, tokens, target, method="occlusion", mask=mask)
curves = token_faithfulness(model, tokens, attribution.tokens, target, draws=4, mask=mask)
print(f"area under deletion {curves.found.deletion_auc.mean():.1f}", end=", ")
print(f"in random order {curves.random.deletion_auc.mean():.1f}")
