"""A model with random parameters that takes milliseconds, text for it, and what its losses are by hand."""

from functools import cache

import jax
import numpy as np

import longrope_jax as lr
from longrope_jax import rope
from longrope_jax.runtime.mesh import Layout
from longrope_jax.search.objective import Objective, Term

L, VOCABULARY = 16, 31


@cache
def make():
    """The model and its parameters; random ones, sharpened so that factors make a difference."""
    sizes = dict(hidden_size=16, intermediate_size=16, num_layers=1, num_heads=1, num_kv_heads=1)
    model = lr.Llama(lr.LlamaConfig(vocab_size=VOCABULARY, **sizes, head_dim=8, original_length=L))
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8), np.int32), rope.unscaled(8))["params"]
    return model, jax.tree.map(lambda leaf: 1.5 * leaf if leaf.ndim > 1 else leaf, params)


def make_term(documents, length, seed=0, share=1.0, last=None):
    """Random text; all targets count the same, or only the `last` ones."""
    rng = np.random.default_rng(seed)
    weights = np.zeros((documents, length), np.float32)
    weights[:, -(last or length) :] = 1 / (last or length)
    tokens = rng.integers(0, VOCABULARY, (documents, length + 1)).astype(np.int32)
    return Term(tokens, weights, [f"text {number}" for number in range(documents)], share)


def make_objective(terms, candidates_at_once=1, documents_at_once=1, layout=None, params=None):
    model, own = make()
    terms = terms if isinstance(terms, dict) else {"perplexity": terms}
    params = own if params is None else params
    return Objective.of(model, layout or Layout(), params, terms, candidates_at_once, documents_at_once)


def losses_by_hand(terms, population):
    """Of every candidate on every document, from the logits, in float64."""
    model, params = make()
    logits_of = jax.jit(lambda tokens, factors: model.apply({"params": params}, tokens, factors))
    rows = []
    for row in range(len(population.lam)):
        factors = jax.tree.map(lambda leaf, row=row: np.asarray(leaf)[row], population)
        found = []
        for term in terms.values():
            logits = np.asarray(logits_of(term.tokens[:, :-1], factors), np.float64)
            likely = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            nll = -np.take_along_axis(likely, term.tokens[:, 1:, None], axis=-1)[..., 0]
            found += (nll * term.weights).sum(1).tolist()
        rows.append(found)
    return np.array(rows)


def population():
    """Four candidates that differ in all that candidates differ in."""
    return rope.stack(
        [
            rope.unscaled(8),
            rope.linear(8, 4.0),
            rope.ntk(8, 4.0).replace(n_hat=np.int32(4)),
            rope.yarn(8, 4.0, original_length=L).replace(mscale=np.float32(1.3)),
        ]
    )
