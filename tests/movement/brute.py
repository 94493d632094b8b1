"""What attention of every layer brings, written out: all vectors `[T,T,H,D]` of one prompt."""

from typing import NamedTuple

import numpy as np


class Brought(NamedTuple):
    """One layer of one prompt: `f[i,j,h]` is what head h brings from j to i; `own`, `y` `[T,D]`."""

    f: np.ndarray
    own: np.ndarray
    y: np.ndarray
    mlp: np.ndarray
    post: np.ndarray
    pattern: np.ndarray
    norms: tuple


def _norm(norm, layer, scale):
    """The linear part of a norm with its scale as it was, and its bias."""
    if norm is None:
        return (lambda x: x), 0.0
    gain = 1.0 if norm.w is None else np.asarray(norm.w[...])[layer] + norm.config.norm_offset
    bias = 0.0 if norm.b is None else np.asarray(norm.b[...])[layer]

    def through(x):
        x = x if norm.config.norm == "rmsnorm" else x - x.mean(-1, keepdims=True)
        return gain * x / scale.reshape(-1, *[1] * (x.ndim - 1))

    return through, bias


def alone(r, b):
    """The fields of one prompt of a padded batch, at its real tokens, as numpy arrays."""
    real = np.asarray(r.mask)[b]
    one = r.example(b)

    def at(name):
        x = getattr(one, name)
        if x is None:
            return None
        x = np.asarray(x)
        if name == "pattern":
            return x[:, :, real][..., real]
        return x[real] if name in ("embed", "final", "norm_final_scale") else x[:, real]

    return at


def brought(m, at):
    """The layers of one prompt."""
    cfg = m.config
    resid_post = np.concatenate([at("resid_pre")[1:], at("final")[None]])
    layers = []
    for blocks, indices in m.stacks():
        for n, i in enumerate(indices):
            here = lambda name, i=i: None if at(name) is None else at(name)[i]  # noqa: E731
            a, v = here("pattern"), here("v")
            x, post, mlp = here("resid_pre"), resid_post[i], here("mlp_out")
            w_o = np.asarray(blocks.attn.w_o[...])[n]
            t, d = x.shape
            f = np.zeros((t, t, cfg.n_heads, d))
            for h in range(cfg.n_heads):
                u = v[:, h // (cfg.n_heads // cfg.n_kv_heads)] @ w_o[h]
                f[:, :, h] = a[h][:, :, None] * u[None]
            out_norm, _ = _norm(blocks.norm_attn_out, n, here("norm_attn_out_scale"))
            f = out_norm(f) * cfg.residual_scale
            own, y = x, x + here("attn_out")
            attn_norm = mlp_norm = ((lambda x: x), 0.0)
            if cfg.norms_stream:
                attn_norm = _norm(blocks.norm_attn, n, here("norm_attn_scale"))
                mlp_norm = _norm(blocks.norm_mlp, n, here("norm_mlp_scale"))
                own = attn_norm[0](x)
                if cfg.norm_placement == "stream_after":
                    f, y = attn_norm[0](f), attn_norm[0](y) + attn_norm[1]
                else:
                    y = own + attn_norm[1] + here("attn_out")
            if not cfg.parallel:
                np.testing.assert_allclose(y, here("resid_mid"), atol=1e-10)
            layers.append(Brought(f, own, y, mlp, post, a, (attn_norm, mlp_norm)))
    return layers


def nearness(p, y):
    return np.maximum(0, np.abs(y).sum(-1) - np.abs(y - p).sum(-1))


def raw(layer, method):
    """Contributions `[T,T]` before rows are normalised."""
    t = len(layer.own)
    phi, eye = layer.f.sum(2), np.eye(t)
    whole = phi + eye[:, :, None] * layer.own[None]
    if method == "attention":
        return layer.pattern.mean(0)
    if method == "rollout":
        return layer.pattern.mean(0) + eye
    if method == "value_weighted":
        return np.linalg.norm(phi, axis=-1)
    if method == "mixing":
        return np.linalg.norm(whole, axis=-1)
    return nearness(whole, layer.y[:, None])


def own_rows(c):
    return c / c.sum(-1, keepdims=True)


def later(m, layers, first, p):
    """Vectors `[T,...,D]` written after attention of layer `first`, as they reach `final`."""
    for n in range(first, len(layers)):
        attn, mlp = layers[n].norms
        p = attn[0](p) if n > first else p
        p = mlp[0](p)
    return p


def logits(m, layers, at, u):
    """For each layer `[T,T]` what attention brings to the logits `u [T,D]`; embedding's; MLPs'."""
    final, _ = _norm(m.norm_final, ..., at("norm_final_scale"))
    q = [
        np.einsum("tjd,td->tj", final(later(m, layers, n, layer.f.sum(2))), u)
        for n, layer in enumerate(layers)
    ]
    x = later(m, layers, 0, layers[0].norms[0][0](at("embed")))
    embed = (final(x) * u).sum(-1)
    mlps = []
    for n, layer in enumerate(layers):
        x = np.zeros_like(layer.own) if layer.mlp is None else layer.mlp
        x = layer.norms[1][0](x) if m.config.norm_placement == "stream_after" else x
        if n + 1 < len(layers):
            x = later(m, layers, n + 1, layers[n + 1].norms[0][0](x))
        mlps.append((final(x) * u).sum(-1))
    return q, embed, mlps


def importances(m, layer):
    """Of attention `[T,T,H]` and its residual `[T]`, and of the MLP and its residual or None."""
    together = m.config.parallel and layer.mlp is not None
    y = layer.post if together else layer.y
    attn, own = nearness(layer.f, y[:, None, None]), nearness(layer.own, y)
    total = attn.sum((1, 2)) + own
    share = lambda x, whole: np.divide(x, whole, out=0 * x, where=whole > 0)  # noqa: E731
    if together:
        mlp = nearness(layer.mlp, y)
        total = total + mlp
        return share(attn, total[:, None, None]), share(own, total), share(mlp, total), None
    mlp = kept = None
    if layer.mlp is not None:
        through, place = layer.norms[1][0], m.config.norm_placement
        mlp = nearness(through(layer.mlp) if place == "stream_after" else layer.mlp, layer.post)
        kept = nearness(through(layer.y), layer.post)
        mlp, kept = share(mlp, mlp + kept), share(kept, mlp + kept)
    return share(attn, total[:, None, None]), share(own, total), mlp, kept


def by_hand(a, b):
    """The relative norm, cosine and angle from a to b, in float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norm = lambda x: np.linalg.norm(x, axis=-1)  # noqa: E731
    with np.errstate(invalid="ignore"):
        cosine = (a * b).sum(-1) / (norm(a) * norm(b))
        found = norm(b - a) / norm(a), cosine, np.arccos(np.clip(cosine, -1, 1))
    return [np.nan_to_num(x) for x in found]
