"""What other factors cost: measured where they turn tokens otherwise, on the same windows."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

import longrope_jax as lr
from longrope_jax.data.corpus import Document
from longrope_jax.evaluation.factor_switching import Cost, changed_lengths, cost_windows, replacement_cost
from longrope_jax.evaluation.perplexity import Comparison, Perplexity
from longrope_jax.json_files import to_json
from longrope_jax.report.model_card import cost_table
from longrope_jax.runtime.mesh import Layout, MeshSettings
from longrope_jax.training.step import init_params

CONFIG = lr.LlamaConfig(24, 16, 20, 2, 2, 2, 8, 16)
PLAIN, WIDE = lr.rope.unscaled(8), lr.rope.linear(8, 4.0)
FOUND = lr.FactorTable.of({16: PLAIN, 32: lr.rope.linear(8, 2.0), 64: WIDE.replace(n_hat=np.int32(8))})


def test_only_lengths_that_are_turned_otherwise_count():
    assert changed_lengths(FOUND, FOUND) == ()
    assert changed_lengths(FOUND, lr.FactorTable.of({16: PLAIN, 64: WIDE})) == (32, 64)
    assert changed_lengths(FOUND, lr.FactorTable.of({16: PLAIN, 64: WIDE.replace(n_hat=np.int32(8))})) == (32,)
    idle = lr.FactorTable.of({16: PLAIN.replace(n_hat=np.int32(4)), 64: WIDE.replace(n_hat=np.int32(1))})
    assert changed_lengths(idle, lr.FactorTable.of({16: PLAIN, 64: WIDE})) == ()
    assert changed_lengths(lr.FactorTable.of({64: WIDE.replace(mscale=np.float32(2))}), FOUND) == (64,)


@pytest.mark.parametrize("bos", [None, 23])
def test_the_cost_is_that_of_the_same_tokens_with_both(bos):
    rng = np.random.default_rng(0)
    sizes = (65, 65, 130)  # the last one gives two windows of 64
    documents = [Document(f"d{k}", rng.integers(0, 24, size).astype(np.uint16), size) for k, size in enumerate(sizes)]
    model = lr.Llama(CONFIG)
    params = init_params(model, 0)
    others = lr.FactorTable.of({16: PLAIN, 64: lr.rope.linear(8, 64.0)})
    windows = cost_windows(FOUND, others, documents, (64,), 4)
    (cost,) = replacement_cost(model, Layout.of(MeshSettings()), params, FOUND, others, windows, bos)
    assert (cost.length, cost.windows, cost.documents) == (64, 4, 3)

    def nll(table, tokens):
        tokens = jnp.asarray(tokens, jnp.int32)[None]
        inputs = tokens[:, :-1] if bos is None else tokens[:, :-1].at[:, 0].set(bos)
        arguments = inputs, tokens[:, 1:], table.select(64)
        return np.asarray(model.apply({"params": params}, *arguments, method="token_nll"), np.float64).mean()

    wanted = [np.mean([nll(table, window) for window in windows[64].tokens]) for table in (FOUND, others)]
    np.testing.assert_allclose([cost.found.nll, cost.others.nll], wanted, rtol=1e-6)
    assert abs(wanted[0] - wanted[1]) > 1e-4
    assert cost.difference.difference == pytest.approx(cost.others.nll - cost.found.nll, abs=1e-9)
    assert Cost.from_record(cost.to_record()) == cost


def test_a_cost_that_is_no_number_survives_its_file():
    """JSON has no nan and no infinity; a report is made from what was read back."""
    nothing = Perplexity(math.inf, math.inf, (math.nan, math.nan))
    difference = Comparison(math.inf, (math.nan, math.inf), -math.inf, 0.0)
    record = json.loads(to_json(Cost(64, nothing, nothing, difference, 2, 2).to_record()))
    assert "| 64     | nan " in cost_table([Cost.from_record(record)])


@pytest.mark.parametrize(
    ("lengths", "sizes", "message"),
    [
        ((16,), (200, 200), "nothing changes at 16 tokens, only up to 32, 64"),
        ((65,), (200, 200), "65 must be a number of tokens from 1 to 64"),
        ((-1,), (200, 200), "-1 must be a number of tokens from 1 to 64"),
        ((), (200, 60), "only 'd0' has the 65 tokens of a window, and intervals need two documents"),
        ((), (30, 30), "what is dropped has to be measured, but none of 2 documents has the 33 tokens"),
    ],
)
def test_where_it_can_t_be_measured_is_reported(lengths, sizes, message):
    documents = [Document(f"d{k}", np.zeros(size, np.uint16), size) for k, size in enumerate(sizes)]
    with pytest.raises(ValueError, match=message):
        cost_windows(FOUND, lr.FactorTable.of({16: PLAIN, 64: WIDE}), documents, lengths, 4)
    assert cost_windows(FOUND, FOUND, documents, lengths, 4) == {}
