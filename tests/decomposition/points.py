"""The points of a stream."""


def points(r, n_layers):
    yield "final", r.final
    for layer in range(n_layers):
        yield ("resid_pre", layer), r.resid_pre[layer]
        if r.resid_mid is not None:
            yield ("resid_mid", layer - n_layers), r.resid_mid[layer]
        yield ("resid_post", layer), r.resid_post[layer]
