"""One step: the mean loss of the right tokens with the right factors, whatever the parts; optimizer and schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import longrope_jax as lr
from longrope_jax.data.sequences import IGNORED, Batch
from longrope_jax.rope import FactorTable, linear, unscaled
from longrope_jax.training.step import (
    BUCKETS,
    OptimizerSettings,
    init_params,
    init_state,
    learning_rate,
    make_optimizer,
    train_step,
)

SIZES = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8)
MODEL = lr.Llama(lr.LlamaConfig(**SIZES, original_length=8, attention="dense"))
SETTINGS = OptimizerSettings(learning_rate=1e-2, warmup_steps=0, clip_norm=0.5)
OPTIMIZER = make_optimizer(SETTINGS, 10)
TABLE = FactorTable.of({8: unscaled(8), 16: linear(8, 2.0).replace(n_hat=np.int32(3), mscale=np.float32(1.1))})
TOLERANCE = dict(rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def params():
    return init_params(MODEL, seed=0)


def make_batch(seed=0):
    """Four rows, two of a short context, with ignored targets, more of them in some rows."""
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(0, 32, (2, 4, 16)).astype(np.int32)
    for row, count in enumerate([0, 3, 9, 1]):
        targets[row, rng.permutation(16)[:count]] = IGNORED
    positions = np.tile(np.arange(16, dtype=np.int32), (4, 1))
    segments = np.ones((4, 16), np.int32)
    for row in (1, 3):  # short ones: two pieces
        positions[row], segments[row, 8:] = np.tile(np.arange(8), 2), 2
    return Batch(tokens, targets, positions, segments, np.array([16, 8, 16, 8], np.int32))


def step(params, batch, accumulate=1):
    params = jax.tree.map(jnp.array, params)  # the step overwrites them
    return train_step(MODEL, accumulate, init_state(params, OPTIMIZER), batch, TABLE)


def row_nll(params, batch, row):
    """NLL of the targets of one row by itself, straight from the logits; a short one has the short factors."""
    entry = {16: 1, 8: 0}[int(batch.context[row])]
    factors = jax.tree.map(lambda leaf: jnp.asarray(leaf)[entry], TABLE.factors)
    one = jax.tree.map(lambda field: field[row][None], batch)
    logits = MODEL.apply({"params": params}, one.tokens, factors, one.positions, one.segment_ids)
    targets = jnp.where(one.targets == IGNORED, 0, one.targets)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[0, :, 0]


def loss_by_rows(params, batch):
    """Mean over all targets that are not ignored, row by row."""
    scored = [row_nll(params, batch, row) for row in range(4)]
    kept = batch.targets != IGNORED
    return sum(jnp.sum(nll, where=keep) for nll, keep in zip(scored, kept, strict=True)) / kept.sum()


def test_the_step_is_adamw_on_the_mean_loss_every_row_with_factors_of_its_own(params):
    batch = make_batch()
    loss, gradients = jax.jit(jax.value_and_grad(lambda params: loss_by_rows(params, batch)))(params)
    updates, _ = jax.jit(OPTIMIZER.update)(gradients, jax.jit(OPTIMIZER.init)(params), params)
    expected = jax.tree.map(lambda p, u: np.asarray(p + u), params, updates)
    state, result = step(params, batch)
    assert result.nll.sum() / result.tokens.sum() == pytest.approx(float(loss), rel=1e-5)
    assert result.gradient_norm == pytest.approx(float(optax.global_norm(gradients)), rel=1e-5)
    assert result.gradient_norm > SETTINGS.clip_norm  # told before clipping
    assert int(state.step) == 1
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **TOLERANCE), state.params, expected)
    # With the same factors for all rows it would be another loss.
    same = batch._replace(context=np.full(4, 16, np.int32))
    other = step(params, same)[1]
    assert abs(other.nll.sum() / other.tokens.sum() - float(loss)) > 1e-4


@pytest.mark.parametrize("accumulate", [2, 4])
def test_in_how_many_parts_a_batch_is_cut_changes_nothing(params, accumulate):
    """Parts have different numbers of tokens: a mean of their means would be another loss."""
    batch = make_batch()
    (state, result), (parts_state, parts) = step(params, batch), step(params, batch, accumulate)
    np.testing.assert_array_equal(parts.tokens, result.tokens)
    np.testing.assert_allclose(parts.nll, result.nll, **TOLERANCE)
    np.testing.assert_allclose(parts.gradient_norm, result.gradient_norm, **TOLERANCE)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **TOLERANCE), parts_state.params, state.params)


def test_ignored_targets_contribute_nothing(params):
    """A row of ignored targets alone might as well say anything, and the others' share of the loss is whole."""
    batch = make_batch()
    batch.targets[2] = IGNORED
    changed = batch._replace(tokens=batch.tokens.copy())
    changed.tokens[2] = (changed.tokens[2] + 7) % 32
    (state, result), (other_state, other) = step(params, batch), step(params, changed)
    assert result.tokens.sum() == (batch.targets != IGNORED).sum() == 16 + 13 + 15
    np.testing.assert_array_equal(result.nll, other.nll)
    np.testing.assert_allclose(other.gradient_norm, result.gradient_norm, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), other_state.params, state.params)
    assert result.nll.sum() / result.tokens.sum() == pytest.approx(float(loss_by_rows(params, batch)), rel=1e-5)


def test_the_loss_is_reported_by_position_in_the_piece(params):
    batch = make_batch()
    result = step(params, batch)[1]
    sums, counts = np.zeros(BUCKETS), np.zeros(BUCKETS)
    for row in range(4):
        nll = np.asarray(row_nll(params, batch, row), np.float64)
        for token in np.flatnonzero(batch.targets[row] != IGNORED):
            bucket = batch.positions[row, token] // 2  # 16 tokens, eight ranges
            sums[bucket] += nll[token]
            counts[bucket] += 1
    np.testing.assert_array_equal(result.tokens, counts)
    np.testing.assert_allclose(result.nll, sums, rtol=1e-5)
    assert counts[0] > counts[-1] > 0  # a short piece has early positions alone


def test_a_sequence_beyond_the_table_gives_no_number(params):
    batch = make_batch()._replace(context=np.array([16, 8, 17, 8], np.int32))
    assert np.isnan(step(params, batch)[1].nll).any()


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("cosine", 4, {0: 0, 1: 0.25, 4: 1, 12: 0.1 + 0.9 / 2, 20: 0.1}),
        ("linear", 4, {0: 0, 2: 0.5, 4: 1, 12: 0.5, 20: 0}),
        ("constant", 4, {0: 0, 3: 0.75, 4: 1, 12: 1, 20: 1}),
        ("cosine", 0, {0: 1, 10: 0.1 + 0.9 / 2, 20: 0.1}),
        ("linear", 0, {0: 1, 10: 0.5, 20: 0}),
        ("constant", 0, {0: 1, 20: 1}),
        ("linear", 100, {0: 0, 19: 1, 20: 0}),  # a warmup longer than the run ends with its last step
    ],
)
def test_schedules(schedule, warmup, expected):
    settings = OptimizerSettings(learning_rate=0.02, schedule=schedule, warmup_steps=warmup)
    rates = learning_rate(settings, 20)
    np.testing.assert_allclose([rates(step) / 0.02 for step in expected], list(expected.values()), atol=1e-6)


def test_a_run_of_one_step_learns_at_the_peak():
    for schedule in ("cosine", "linear", "constant"):
        assert learning_rate(OptimizerSettings(learning_rate=0.02, schedule=schedule), 1)(0) == pytest.approx(0.02)


def test_weight_decay_spares_norms(params):
    optimizer = make_optimizer(OptimizerSettings(learning_rate=0.1, warmup_steps=0, weight_decay=0.5), 10)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, jax.jit(optimizer.init)(params), params)
    assert (updates["final_norm"]["scale"] == 0).all()
    np.testing.assert_allclose(updates["lm_head"], -0.05 * params["lm_head"], rtol=1e-5)


@pytest.mark.parametrize(
    "bad",
    [
        dict(learning_rate=0.0),
        dict(clip_norm=-1.0),
        dict(beta1=1.0),
        dict(weight_decay=-1.0),
        dict(warmup_steps=-1),
        dict(schedule="step"),
    ],
)
def test_optimizer_settings_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        OptimizerSettings(**bad)
