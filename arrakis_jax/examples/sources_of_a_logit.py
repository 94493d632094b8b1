"""Where did a logit come from?

The table has the largest terms by the head that wrote and the column of `tokens` that it read
(`source`). The lines below it have the tokens of the prompt that the logit difference goes back
to through all layers (ALTI-Logit), in logits.

Prints:

    ┏━━━━━━━━━━━━━━━┳━━━━━━━┳━━━━━━┳━━━━━━━┳━━━━━━━━┳━━━━━┳━━━━━━━━┓
    ┃ term          ┃ layer ┃ kind ┃ index ┃ source ┃ row ┃  value ┃
    ┡━━━━━━━━━━━━━━━╇━━━━━━━╇━━━━━━╇━━━━━━━╇━━━━━━━━╇━━━━━╇━━━━━━━━┩
    │ L3 head 2 @ 4 │     3 │ head │     2 │      4 │   0 │  -5.68 │
    │ L2 head 2 @ 2 │     2 │ head │     2 │      2 │   0 │ +3.441 │
    │ L2 head 1 @ 2 │     2 │ head │     1 │      2 │   0 │ +2.768 │
    │ L2 head 0 @ 2 │     2 │ head │     0 │      2 │   0 │ +2.727 │
    └───────────────┴───────┴──────┴───────┴────────┴─────┴────────┘
    +6.16 ' When' at 1
    +4.90 ' Mary' at 2
    +3.03 '<bos>' at 0
"""

import numpy as np

from arrakis_jax import demo_model, encode, information_flow, token_id, top_attribution

model, tokenizer = demo_model()
tokens, mask = encode(tokenizer, "When Mary and John went to the store, John gave a drink to")
mary, john = token_id(tokenizer, " Mary"), token_id(tokenizer, " John")

print(top_attribution(model, tokens, mary, 4, against=john, by="source", mask=mask).to_table())

flow = information_flow(model, tokens, mary, against=john, method="alti_logit", mask=mask)
to_last = flow.tokens[0, -1]
for column in np.argsort(-np.abs(to_last))[:3]:
    print(f"{to_last[column]:+.2f} {tokenizer.decode(int(tokens[0, column]))!r} at {column}")
