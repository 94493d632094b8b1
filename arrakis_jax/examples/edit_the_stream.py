"""What would the model predict if its stream were another?

Edits change the forward at any site: they set or scale heads, add a direction, take one out, or
put the activations of another run in place. Each line is the logit of " Mary" less the logit of
" John" after one edit. The other prompt names the other giver, so its answer is " John".

Prints:

    +20.48 with nothing changed
    -18.87 with the stream before layer 2 of the other prompt
    -18.88 with the same, only at the last token
    -18.21 with a step toward John
    +0.24 with no direction between the names
"""

from arrakis_jax import Add, Project, Replace, demo_model, encode, run, token_id

model, tokenizer = demo_model()
prompt = encode(tokenizer, "When Mary and John went to the store, John gave a drink to")
swapped = encode(tokenizer, "When Mary and John went to the store, Mary gave a drink to")
mary, john = token_id(tokenizer, " Mary"), token_id(tokenizer, " John")

other = run(model, swapped).residuals
toward_john = model.unembedding(john) - model.unembedding(mary)
# The stream before layer 2, at the last token alone.
last = other.resid_pre[2, :, -1]
edits = {
    "nothing changed": (),
    "the stream before layer 2 of the other prompt": Replace("resid_pre", other.resid_pre, layer=2),
    "the same, only at the last token": Replace("resid_pre", last, layer=2, position=-1),
    "a step toward John": Add("resid_post", 50 * toward_john, layer=2, position=-1),
    "no direction between the names": Project("final", toward_john),
}
for name, edit in edits.items():
    logits = run(model, prompt, edits=edit).logits[0, -1]
    print(f"{logits[mary] - logits[john]:+.2f} with {name}")
