"""edge_attribution: against gradients at every reader, attribution of nodes, exact patches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from arrakis_jax import EAP, EAPIG, Add, Continuation, Logit, LogProb
from arrakis_jax.attribution.integrated_gradients import rule_nodes
from arrakis_jax.attribution.residual_gradients import tapped_gradients, target_value
from arrakis_jax.core.checks import checked_tokens
from arrakis_jax.edges.edge_attribution import edge_attribution
from arrakis_jax.edges.graph import WRITTEN, Graph, Node, writer_changes
from arrakis_jax.forward.targets import checked_target
from tests.cost import flops
from tests.models import chosen, close, compilations, gpt2_small, model
from tests.patching.others import TARGET, pairs


class Ends:
    """Both runs of a pair, and gradients at readers with plain taps of zeros."""

    def __init__(self, m, base, source, mask, target=TARGET):
        base, self.mask = checked_tokens(m.config, base, mask)
        source, _ = checked_tokens(m.config, source, mask)
        self.model, self.graph = m, Graph.of(m.config)
        self.target = checked_target(m, base, target, self.mask)
        self.embed = [m.embed(tokens, mask=self.mask) for tokens in (base, source)]

        @jax.jit
        def both(m, embed):
            ends = [target_value(m, x, self.mask, self.target, capture=WRITTEN) for x in embed]
            return ends, writer_changes(m, ends[0][1], ends[1][1], linear=True)

        found, self.changes = both(m, self.embed)
        (self.base, self.stream), (self.source, self.other) = found
        self._gradient = jax.jit(self._at_readers)

    def _at_readers(self, m, x_BTD, edits=()):
        """`[R,B,T,D]`."""
        config, (b, t, d) = m.config, x_BTD.shape
        n_layers, h, g = config.n_layers, config.n_heads, config.n_kv_heads
        shapes = {"q_in": (b, t, h, d), "k_in": (b, t, g, d), "v_in": (b, t, g, d)}
        shapes |= {"mlp_in": (b, t, d)} if self.graph.has_mlp else {}
        taps = {name: jnp.zeros((n_layers, *shape)) for name, shape in shapes.items()}
        taps["final"] = jnp.zeros((b, t, d))

        def total(taps):
            return target_value(m, x_BTD, self.mask, self.target, taps=taps, edits=edits)[0].sum()

        found = jax.grad(total)(taps)
        inside = [
            jnp.moveaxis(found[name].reshape(n_layers, b, t, -1, d), 3, 1)
            for name in taps
            if name != "final"
        ]
        inside = jnp.concatenate(inside, 1).reshape(-1, b, t, d)
        return jnp.concatenate([inside, found["final"][None]])

    def effects(self, gradient):
        """`[R,W,B]`."""
        products = np.einsum("RBTD,WBTD->RWB", gradient, self.changes)
        return np.where(self.graph.edges[..., None], products, 0)

    def gradient(self, alpha, edits=()):
        x_BTD = (1 - alpha) * self.embed[0] + alpha * self.embed[1]
        return np.asarray(self._gradient(self.model, x_BTD, edits))

    def along_inputs(self, rule, steps):
        nodes = zip(*rule_nodes(rule, steps), strict=True)
        return self.effects(sum(weight * self.gradient(alpha) for alpha, weight in nodes))

    def along_activations(self, rule, steps):
        found = np.zeros((self.graph.n_readers, self.graph.n_writers, len(self.mask)))
        for w, writer in enumerate(self.graph.writers):
            for alpha, weight in zip(*rule_nodes(rule, steps), strict=True):
                if writer.kind == "embed":
                    gradient = self.gradient(alpha)
                else:
                    site = "mlp_out" if writer.kind == "mlp" else "z"
                    runs = (getattr(s, site)[writer.layer] for s in (self.other, self.stream))
                    step = alpha * np.subtract(*runs)
                    gradient = self.gradient(0.0, (Add(site, step, layer=writer.layer),))
                found[:, w] += weight * self.effects(gradient)[:, w]
        return found


VARIANTS = {
    **dict.fromkeys(("gpt2", "post", "shared_norm"), {}),
    "both": dict(window_layers=(True, False)),
    "mixed": dict(moe_layers=(False, True)),
}


@pytest.mark.parametrize("variant", chosen(VARIANTS, ["post"]))
def test_the_sum_over_readers_is_attribution_patching(variant, x64):
    """G10, through norms of the output too: the gradient at z, mlp_out and the embedding."""
    m = model(variant, dtype="float64", n_layers=2, **VARIANTS[variant])
    clean, corrupt, mask, *_ = pairs()
    found = edge_attribution(m, clean, corrupt, TARGET, mask=mask)
    ends = Ends(m, clean, corrupt, mask)
    sites = ("embed", "z", "mlp_out")[: 2 + ends.graph.has_mlp]

    @jax.jit
    def attribution(m, x):
        gradients = tapped_gradients(m, x, ends.mask, ends.target, sites)[1]
        return {s: gradients[s] * (getattr(ends.other, s) - getattr(ends.stream, s)) for s in sites}

    product = jax.tree.map(np.asarray, attribution(m, ends.embed[0]))
    z_LHB = product["z"].sum((2, 4)).transpose(0, 2, 1)
    layers = [z_LHB]
    if ends.graph.has_mlp:
        layers.append(product["mlp_out"].sum((2, 3))[:, None])
    inside = np.concatenate(layers, 1).reshape(-1, len(clean))
    wanted = np.concatenate([product["embed"].sum((1, 2))[None], inside])
    close(found.by_writer(), wanted, 1e-12)
    close(found.base, ends.base, 1e-12)
    close(found.source, ends.source, 1e-12)
    assert not np.asarray(found.effects)[~found.graph.edges].any()
    assert np.abs(found.effects)[found.graph.edges].min() > 0


@pytest.mark.parametrize(
    ("rule", "steps", "step_batch"),
    chosen([("left", 1, None), ("right", 3, None), ("trapezoid", 3, 3)], [("trapezoid", 3, 3)]),
)
def test_gradients_at_every_reader_and_along_the_inputs(rule, steps, step_batch, x64):
    """Against taps of zeros, which hold the gradient of every reader in full."""
    m = model("both", dtype="float64", n_layers=2, window_layers=(True, False))
    clean, corrupt, mask, *_ = pairs()
    ends = Ends(m, clean, corrupt, mask)
    found = edge_attribution(
        m, clean, corrupt, TARGET, mask=mask, steps=steps, rule=rule, step_batch=step_batch
    )
    close(found.effects, ends.along_inputs(rule, steps), 1e-12, rule)
    close(found.base, ends.base, 1e-12)
    close(found.source, ends.source, 1e-12)


def test_along_activations(x64):
    m = model("post", dtype="float64", n_layers=2)
    clean, corrupt, mask, *_ = pairs()
    ends = Ends(m, corrupt, clean, mask)
    options = dict(mask=mask, steps=3, step_batch=2, along="activations", base="corrupt")
    found = edge_attribution(m, clean, corrupt, TARGET, **options)
    close(found.effects, ends.along_activations("right", 3), 1e-12)
    close(found.base, ends.base, 1e-12)
    close(found.source, ends.source, 1e-12)


def test_it_is_exact_where_the_target_is_linear_in_what_is_read(x64):
    """One layer, no norms: values and the output are linear in the stream (G6)."""
    m = model("attention_only", dtype="float64", n_layers=1, norm=None, norm_eps=None)
    clean, corrupt, mask, *_ = pairs()
    found = edge_attribution(m, clean, corrupt, TARGET, mask=mask)
    ends, graph = Ends(m, clean, corrupt, mask), found.graph
    for reader, site in ((Node(0, "v", 2), "v_in"), (Node(None, "final"), "final")):
        head = {} if reader.head is None else {"head": reader.head}
        edit = Add(site, ends.changes[0], **head)
        patched, _ = jax.jit(target_value)(m, ends.embed[0], ends.mask, ends.target, edits=(edit,))
        r = graph.index(reader, "readers")
        close(found.effects[r, 0], patched - ends.base, 1e-11)


def test_padded_equals_one_by_one(x64):
    m = model("gpt2", dtype="float64", n_layers=1)
    options = dict(steps=2, rule="gauss_legendre")
    clean, corrupt, mask, prompts, others = pairs((4, 1), side="both")
    found = edge_attribution(m, clean, corrupt, TARGET, mask=mask, **options)
    for b, (prompt, other) in enumerate(zip(prompts, others, strict=True)):
        alone = edge_attribution(m, prompt[None], other[None], TARGET, **options)
        np.testing.assert_allclose(found.effects[..., b], alone.effects[..., 0], atol=1e-10)
        np.testing.assert_allclose(found.source[b], alone.source[0], atol=1e-10)


def test_one_compilation_and_export():
    m = model("gpt2", n_layers=2)
    clean, corrupt, mask, *_ = pairs()
    found = edge_attribution(m, clean, corrupt, TARGET, mask=mask, steps=2)
    with compilations() as names:
        edge_attribution(m, corrupt, clean, Logit([3, 5], 2, position=0), mask=mask, steps=2)
    assert names == []
    leaves, structure = jax.tree.flatten(m)

    def flat(leaves, clean, corrupt, mask):
        m = jax.tree.unflatten(structure, leaves)
        return edge_attribution(m, clean, corrupt, TARGET, mask=mask, steps=2).effects

    args = (leaves, *(jnp.asarray(x) for x in (clean, corrupt, mask)))
    exported = export.export(jax.jit(flat), platforms=("cpu", "cuda", "tpu"))(*args)
    close(export.deserialize(exported.serialize()).call(*args), found.effects, 1e-5)


def test_results():
    m = model("moe", n_layers=1, dtype="bfloat16")
    clean, corrupt, mask, *_ = pairs()
    found = edge_attribution(m, clean, corrupt, Continuation(1), mask=mask)
    assert found.effects.dtype == jnp.float32 and np.isfinite(found.effects).all()
    graph = found.graph
    assert repr(found.labels) == f"Edges(14 readers x 8 writers, {graph.edges.sum()})"
    assert str(found.labels[0]) == "embed -> L0 q 0"
    assert str(found.labels[-2]) == "L0 head 5 -> final" and len(found.labels[-8:]) == 8
    assert sum(1 for _ in found.labels) == found.terms.shape[0]
    top = found.top(3)
    for b in range(2):
        largest = np.argsort(-np.abs(found.terms[:, b]))[:3]
        np.testing.assert_array_equal(top.index[:, b], largest)
        np.testing.assert_array_equal(top.value[:, b], found.terms[largest, b])
    table = found.to_table(3)
    assert table["edge"][0] == str(found.labels[int(top.index[0, 0])])
    assert table["row"] == [0, 0, 0, 1, 1, 1]
    assert found.to_table().n_rows == 2 * graph.edges.sum()
    mean = found.mean(draws=10)
    close(mean.mean, found.effects.mean(-1), 1e-6)
    assert (mean.low <= mean.high).all() and mean.low.shape == graph.edges.shape
    assert found.meaning.endswith("estimated by EAP")
    with pytest.raises(IndexError, match="`i` must be in"):
        found.labels[112]
    with pytest.raises(ValueError, match="`k` must be an int"):
        found.top(57)


def test_cost():
    """In forwards at GPT-2 small shape, 8 x 128 tokens; the contraction is done once."""
    m, tokens = gpt2_small(), jax.ShapeDtypeStruct((8, 128), jnp.int32)
    forward = flops(lambda m, t: m(t, capture=("final",)), m, tokens)

    def cost(**options):
        def tool(m, t, c):
            return edge_attribution(m, t, c, TARGET, **options).effects

        return flops(tool, m, tokens, tokens) / forward

    contraction = 2 * 445 * 157 * 8 * 128 * 768 / forward
    assert cost() <= 3.3 + contraction
    for m_steps in (1, 5, 10):
        assert cost(steps=m_steps) <= 2 + 2.06 * m_steps + 0.5
    assert cost(steps=5, rule="midpoint") <= 2 + 2.04 * 5 + contraction + 0.1
    chunked = cost(steps=4, step_batch=2)
    assert chunked <= 2 + 2.04 * 4 + 2 * contraction + 0.1


def test_bad_input():
    m = model("gpt2", n_layers=1)
    tokens = np.arange(4)[None]

    def call(*args, m=m, **options):
        return edge_attribution(m, *args, **options)

    for function, error, message in [
        (lambda: call(tokens, tokens[:, :3], TARGET), ValueError, "of clean's shape"),
        (lambda: call(tokens, None, TARGET), TypeError, "`corrupt` must be token ids"),
        (lambda: call(tokens, tokens, Logit(99)), ValueError, r"in \[0, 31\)"),
        (lambda: call(tokens, tokens, LogProb(3), along="in"), ValueError, "`along` must be one"),
        (lambda: call(tokens, tokens, 3, rule="x", steps=2), ValueError, "`rule` must be one of"),
        (lambda: call(tokens, tokens, 3, along="activations"), ValueError, "with steps=None"),
        (lambda: call(tokens, tokens, 3, rule="left"), ValueError, "`rule` must be 'right' with"),
        (lambda: call(tokens, tokens, 3, step_batch=2), ValueError, "`step_batch` must be None"),
        (lambda: call(tokens, tokens, 3, steps=0), ValueError, "`steps` must be an int"),
        (lambda: call(tokens, tokens, 3, steps=2, step_batch=0), ValueError, "`step_batch` must"),
        (lambda: call(tokens, tokens, 3, base="both"), ValueError, "`base` must be one of"),
        (
            lambda: call(tokens, tokens, 3, m=model("stream_rms", n_layers=1)),
            ValueError,
            "one whose stream is a sum of writes",
        ),
    ]:
        with pytest.raises(error, match=message):
            function()


def test_a_method_as_a_value_is_its_keywords():
    m = model("gpt2", n_layers=1)
    tokens = np.arange(4)[None]
    call = functools.partial(edge_attribution, m, tokens, tokens[:, ::-1], TARGET)
    for value, options in (
        (EAP(), {}),
        (EAPIG(steps=2), dict(steps=2)),
        (
            EAPIG(steps=3, along="activations", rule="midpoint", step_batch=2),
            dict(steps=3, along="activations", rule="midpoint", step_batch=2),
        ),
    ):
        by_value, by_keywords = call(method=value), call(**options)
        assert by_value.method == by_keywords.method
        jax.tree.map(np.testing.assert_array_equal, by_value, by_keywords)
    for function, error, message in [
        (lambda: EAPIG(), TypeError, "steps"),
        (lambda: EAPIG(steps=0), ValueError, "`steps` must be an int"),
        (lambda: EAPIG(steps=2, along="in"), ValueError, "`along` must be one of"),
        (lambda: EAPIG(steps=2, rule="x"), ValueError, "`rule` must be one of"),
        (lambda: EAPIG(steps=2, step_batch=0), ValueError, "`step_batch` must be an int"),
        (lambda: call(method=EAPIG(steps=2), steps=2), ValueError, "`steps` must be left out with"),
        (
            lambda: call(method=EAP(), along="activations"),
            ValueError,
            r"`along` must be left out with method=EAP\(...\), got 'activations'; it has no such",
        ),
        (lambda: call(method="eap"), TypeError, r"`method` must be EAP\(\), EAPIG\(...\) or None"),
    ]:
        with pytest.raises(error, match=message):
            function()
