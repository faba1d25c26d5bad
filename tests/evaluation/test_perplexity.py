import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import scipy.stats

from longrope_jax import rope
from longrope_jax.evaluation.perplexity import (
    DocumentNll,
    by_document,
    by_position,
    compare,
    perplexity,
    token_nll,
    window_nll,
)
from longrope_jax.model import Llama, LlamaConfig
from longrope_jax.rope import RopeFactors
from longrope_jax.runtime.mesh import Layout, MeshSettings

CONFIG = LlamaConfig(
    vocab_size=17,
    hidden_size=16,
    intermediate_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    original_length=16,
    attention="dense",  # compiles fastest
)
MODEL = Llama(CONFIG)
FACTORS = RopeFactors(jnp.array([1.0, 1.5, 2.0, 4.0]), jnp.int32(2), jnp.float32(1.2))
TOKENS = np.random.default_rng(0).integers(0, 17, (3, 14)).astype(np.int32)  # three documents, up to 13 targets
TOLERANCE = dict(rtol=1e-5, atol=1e-5)


@functools.cache
def make_params():
    return jax.jit(MODEL.init)(jax.random.key(0), TOKENS[:1, :4], FACTORS)["params"]


def score(tokens=TOKENS, window=4, stride=None, factors=FACTORS, at_once=8):
    """`token_nll` with the shapes that most tests share: two windows of four tokens at once."""
    return token_nll(MODEL, Layout(), make_params(), factors, tokens, window, stride, at_once)


@jax.jit
def model_logits(params, tokens):
    return MODEL.apply({"params": params}, tokens, FACTORS)


@functools.cache
def one_window(document, start, window):
    """NLL of every target of one window by itself, straight from the model's logits."""
    block = TOKENS[document, start : start + window + 1]
    return reference.token_nll(model_logits(make_params(), block[None, :-1])[0], block[1:])


def first_window_of(target, length, window, stride):
    """Where the first window that holds the target begins: windows begin every `stride` tokens, the last one ends at
    the end.
    """
    return min(max(0, math.ceil((target - window + 1) / stride)) * stride, length - window)


def direct(length, window, stride):
    """Every target by itself, in the first window that holds it."""
    result = np.empty((len(TOKENS), length))
    for document in range(len(TOKENS)):
        for target in range(length):
            start = first_window_of(target, length, window, stride)
            result[document, target] = one_window(document, start, window)[target - start]
    return result


def make_normal(seed, documents, scale=1.0):
    return np.random.default_rng(seed).normal(0, scale, documents)


def log_width(result):
    low, high = np.log(result.ci95)
    return high - low


# --- windows -------------------------------------------------------------------------------------------------------


def test_context_matters_to_the_model_of_these_tests():
    long, short = one_window(0, 0, 7), one_window(0, 3, 4)
    assert np.abs(long[3:] - short).max() > 0.1


def test_one_window_of_the_whole_document():
    nll = score(TOKENS[:, :8], 7)
    assert nll.shape == (3, 7)
    assert nll.dtype == np.float32
    np.testing.assert_allclose(nll, direct(7, 7, 7), **TOLERANCE)


def test_no_stride_means_disjoint_windows():
    nll = score(TOKENS[:, :9], 4)
    expected = [np.concatenate([one_window(document, 0, 4), one_window(document, 4, 4)]) for document in range(3)]
    np.testing.assert_allclose(nll, expected, **TOLERANCE)


@pytest.mark.parametrize("window", [1, 4, 7])
@pytest.mark.parametrize("length", [7, 8, 12, 13])
def test_every_target_is_scored_once_in_the_first_window_that_holds_it(length, window):
    for stride in range(1, window + 1):
        nll = score(TOKENS[:, : length + 1], window, stride)
        assert np.isfinite(nll).all(), stride
        np.testing.assert_allclose(nll, direct(length, window, stride), err_msg=f"stride {stride}", **TOLERANCE)


@pytest.mark.parametrize(("length", "window", "stride"), [(13, 4, 1), (13, 4, 2), (12, 7, 3), (13, 7, 4), (13, 7, 7)])
def test_context_is_between_window_minus_stride_and_window(length, window, stride):
    """Changing what lies further back changes nothing; changing the token `window - stride` back does."""
    nll = score(TOKENS[:, : length + 1], window, stride)
    for changed in range(length):
        tokens = TOKENS[:, : length + 1].copy()
        tokens[:, changed] = (tokens[:, changed] + 5) % 17
        differs = np.abs(score(tokens, window, stride) - nll).max(0) > 1e-4
        context = np.arange(length) - changed + 1  # tokens from the changed one to the target's input, both included
        assert not differs[context > window].any()
        must = (context >= 1) & (context <= window - stride + 1)
        assert differs[must].all()


def test_start_tokens_and_positions_begin_anew_in_every_window():
    repeated = np.tile(TOKENS[:, :4], (1, 4))[:, :13]
    nll = score(repeated, 4)
    np.testing.assert_allclose(nll[:, 4:8], nll[:, :4], **TOLERANCE)
    np.testing.assert_allclose(nll[:, 8:], nll[:, :4], **TOLERANCE)


def test_factors_reach_the_model():
    changes = dict(lam=FACTORS.lam * 3, n_hat=jnp.int32(0), mscale=jnp.float32(2.0))
    for name, value in changes.items():
        assert np.abs(score(factors=FACTORS.replace(**{name: value})) - score()).max() > 1e-3, name


@pytest.mark.parametrize("at_once", [1, 12, 20, 8192])  # 1, 3, 5 and all 12 windows at once; 5 leaves a remainder of 2
def test_how_many_windows_are_scored_at_once_changes_nothing(at_once):
    np.testing.assert_allclose(score(stride=3, at_once=at_once), direct(13, 4, 3), **TOLERANCE)


def test_one_compilation_a_window_length_whatever_the_factors_and_documents():
    before = window_nll._cache_size()
    score(window=5, at_once=10)
    assert window_nll._cache_size() == before + 1
    methods = [rope.unscaled(8), rope.linear(8, 4.0), rope.ntk(8, 4.0), rope.yarn(8, 4.0, original_length=16)]
    for factors in methods:
        score(window=5, at_once=10, factors=factors)
    score((TOKENS + 1) % 17, window=5, at_once=10)
    score(TOKENS[:2, :12], window=5, stride=2, at_once=10)
    assert window_nll._cache_size() == before + 1
    score(window=6, at_once=10)
    assert window_nll._cache_size() == before + 2


@pytest.mark.parametrize(("window", "stride"), [(4, 0), (4, -1), (4, 5), (14, 14), (14, 1), (0, 0)])
def test_windows_that_make_no_sense_are_an_error(window, stride):
    with pytest.raises(ValueError, match=f"need 1 <= stride <= window <= length, not {stride}, {window}, 13"):
        score(window=window, stride=stride)


@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
def test_windows_spread_over_a_mesh_have_the_same_nll(order):
    layout = Layout.of(MeshSettings("data:2,seq:2", order))
    model = Llama(dataclasses.replace(CONFIG, attention="blockwise"))
    with layout.active():  # a batch of two windows, then five that leave one row of padding
        for tokens, at_once in [(TOKENS[:, :9], 8), (TOKENS, 20)]:
            nll = token_nll(model, layout, make_params(), FACTORS, tokens, 4, 3, at_once)
            np.testing.assert_allclose(nll, direct(tokens.shape[1] - 1, 4, 3), **TOLERANCE)


BOS = 16


def exact_nll(inputs, targets):
    """NLL of one window by the independent float64 implementation."""
    sizes = {
        name: getattr(CONFIG, name) for name in ("num_heads", "num_kv_heads", "head_dim", "norm_eps", "rope_theta")
    }
    factors = dict(lam=FACTORS.lam, n_hat=int(FACTORS.n_hat), mscale=float(FACTORS.mscale))
    logits = reference.llama_logits(make_params(), np.array([inputs]), **sizes, **factors)
    return reference.token_nll(logits[0], targets)


@pytest.mark.parametrize(("window", "stride"), [(4, 4), (4, 3), (13, 13)])
def test_every_window_begins_with_bos_and_the_same_targets_are_scored(window, stride):
    expected = np.empty((3, 13))
    for document, tokens in enumerate(TOKENS):
        for target in range(13):
            start = first_window_of(target, 13, window, stride)
            scored = tokens[start + 1 : start + window + 1]
            expected[document, target] = exact_nll([BOS, *scored[:-1]], scored)[target - start]
    score(window=window, stride=stride)
    compiled, before = window_nll._cache_size(), TOKENS.copy()
    nll = token_nll(MODEL, Layout(), make_params(), FACTORS, TOKENS, window, stride, 8, bos=BOS)
    np.testing.assert_allclose(nll, expected, **TOLERANCE)
    np.testing.assert_allclose(perplexity(by_document(nll)).nll, expected.mean(), rtol=1e-6)
    assert np.abs(nll - score(window=window, stride=stride)).max() > 0.1
    assert window_nll._cache_size() == compiled
    np.testing.assert_array_equal(TOKENS, before)


def test_a_document_s_own_bos_is_not_read_twice():
    documents = np.concatenate([np.full((3, 1), BOS, np.int32), TOKENS[:, :8]], axis=1)
    nll = token_nll(MODEL, Layout(), make_params(), FACTORS, documents, 8, bos=BOS)
    np.testing.assert_array_equal(nll, score(documents, 8))


# --- sums ----------------------------------------------------------------------------------------------------------

NAN = float("nan")
UNEVEN = np.array([[1.0, 2.0, 3.0, 4.0], [NAN, NAN, NAN, 9.0], [0.5, NAN, 0.25, NAN]], np.float32)


def test_by_document_sums_and_counts_what_was_scored():
    sums, counts = by_document(UNEVEN)
    np.testing.assert_array_equal(sums, [10.0, 9.0, 0.75])
    np.testing.assert_array_equal(counts, [4, 1, 2])


def test_by_document_sums_in_double_precision():
    nll = np.full((1, 100_000), 0.1, np.float32)
    np.testing.assert_allclose(by_document(nll).sums, 100_000 * float(np.float32(0.1)), rtol=1e-12)


def test_by_position_means_over_buckets_of_all_documents():
    nll = np.random.default_rng(0).normal(2, 1, (5, 12)).astype(np.float32)
    expected = [nll[:, 0:3].mean(), nll[:, 3:6].mean(), nll[:, 6:9].mean(), nll[:, 9:12].mean()]
    np.testing.assert_allclose(by_position(nll, 4), expected, rtol=1e-6)
    np.testing.assert_allclose(by_position(nll, 1), [nll.mean()], rtol=1e-6)
    np.testing.assert_allclose(by_position(nll, 12), nll.mean(0), rtol=1e-6)


@pytest.mark.parametrize(("length", "buckets"), [(10, 3), (11, 4), (7, 7), (100, 32)])
def test_buckets_of_positions_are_in_order_and_differ_by_one_at_most(length, buckets):
    nll = np.tile(np.arange(length, dtype=np.float32), (2, 1))
    means = by_position(nll, buckets)
    assert means.shape == (buckets,)
    # A bucket of the positions first..last has the mean (first + last) / 2, which gives its end back.
    first, sizes = 0, []
    for mean in means:
        last = round(2 * mean - first)
        sizes.append(last - first + 1)
        first = last + 1
    assert sum(sizes) == length
    assert max(sizes) - min(sizes) <= 1


def test_by_position_is_weighted_by_tokens_where_some_are_not_scored():
    np.testing.assert_allclose(by_position(UNEVEN, 2), [(1 + 2 + 0.5) / 3, (3 + 4 + 9 + 0.25) / 4])


# --- perplexity ----------------------------------------------------------------------------------------------------


def test_perplexity_is_weighted_by_tokens_not_a_mean_of_means():
    result = perplexity(by_document(UNEVEN))
    np.testing.assert_allclose(result.nll, (1 + 2 + 3 + 4 + 9 + 0.5 + 0.25) / 7)
    np.testing.assert_allclose(result.ppl, math.exp(result.nll))
    assert abs(result.nll - np.mean([2.5, 9.0, 0.375])) > 1


def test_interval_is_of_the_weighted_mean_where_long_documents_are_easier():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 200, 300)
    means = 4 - counts / 100 + rng.normal(0, 0.1, 300)
    result = perplexity(DocumentNll(means * counts, counts))
    low, high = np.log(result.ci95)
    assert low < result.nll < high
    assert high < means.mean()
    # The delta method for a ratio of sums.
    residuals = (means - result.nll) * counts
    error = residuals.std(ddof=1) / counts.mean() / math.sqrt(300)
    np.testing.assert_allclose([low, high], result.nll + np.array([-1.96, 1.96]) * error, atol=0.2 * error)


@pytest.mark.parametrize("count", [2, 5, 200])
def test_interval_is_the_t_interval_where_documents_have_one_length(count):
    means = 2 + make_normal(0, count, 0.3)
    result = perplexity(DocumentNll(50 * means, np.full(count, 50)))
    expected = scipy.stats.t.interval(0.95, count - 1, means.mean(), scipy.stats.sem(means))
    np.testing.assert_allclose(np.log(result.ci95), expected, rtol=1e-12)


@pytest.mark.parametrize("count", [4, 5, 16])
def test_interval_covers_with_few_documents(count):
    """2,000 simulations, so with a standard error of 0.5 %. Lengths that differ by factors cost some coverage."""
    rng = np.random.default_rng(count)
    for spread, least in ((0.0, 0.935), (0.6, 0.9)):
        covered = 0
        for _ in range(2000):
            counts = np.round(1000 * np.exp(rng.normal(0, spread, count)))
            low, high = compare(
                DocumentNll(rng.normal(0, 1, count) * counts, counts), DocumentNll(0 * counts, counts)
            ).ci95
            covered += low <= 0 <= high
        assert covered / 2000 > least


def test_interval_narrows_with_the_root_of_the_number_of_documents():
    few, many = (perplexity(DocumentNll(100 + make_normal(0, n), np.full(n, 50))) for n in (50, 800))
    assert log_width(few) / log_width(many) == pytest.approx(4, rel=0.3)


def test_a_single_document_has_a_perplexity_but_no_interval():
    single = DocumentNll(np.array([100.0]), np.array([50]))
    assert perplexity(single).ppl == pytest.approx(math.exp(2))
    assert np.isnan(perplexity(single).ci95).all()
    assert compare(single, single).difference == 0
    assert np.isnan(compare(single, single).ci95).all()


# --- comparison ----------------------------------------------------------------------------------------------------


def test_comparison_against_plain_numpy():
    counts = np.array([4, 1, 2, 10])
    a, b = np.array([8.0, 3.0, 5.0, 11.0]), np.array([9.0, 2.5, 7.0, 13.0])
    result = compare(DocumentNll(a, counts), DocumentNll(b, counts))
    np.testing.assert_allclose(result.difference, a.sum() / 17 - b.sum() / 17)
    np.testing.assert_allclose(result.improvement, 1 - math.exp(a.sum() / 17) / math.exp(b.sum() / 17))
    assert result.documents_better == 3 / 4


def test_turning_a_comparison_round_turns_its_sign():
    counts = np.array([4, 1, 2, 10])
    a, b = DocumentNll(np.array([8.0, 3, 5, 11]), counts), DocumentNll(np.array([9.0, 2.5, 7, 13]), counts)
    forth, back = compare(a, b), compare(b, a)
    assert forth.difference == -back.difference < 0
    assert forth.improvement > 0 > back.improvement
    np.testing.assert_allclose(forth.ci95, [-back.ci95[1], -back.ci95[0]])


@pytest.mark.parametrize("shift", [-0.01, 0.01])
def test_a_constant_shift_is_significant_however_different_the_documents(shift):
    counts = np.random.default_rng(0).integers(10, 100, 20)
    b = (5 + make_normal(1, 20)) * counts
    result = compare(DocumentNll(b + shift * counts, counts), DocumentNll(b, counts))
    np.testing.assert_allclose([result.difference, *result.ci95], shift, rtol=1e-6)
    assert result.documents_better == (shift < 0)


def test_noise_is_significant_about_once_in_twenty():
    counts, significant = np.full(50, 100), 0
    for seed in range(60):
        base = 200 + make_normal(seed, 50, 20)
        low, high = compare(*(DocumentNll(base + make_normal((seed, i), 50), counts) for i in range(2))).ci95
        significant += not low < 0 < high
    assert 1 <= significant <= 8


def test_paired_interval_is_much_narrower_than_unpaired_for_correlated_documents():
    counts, base = np.full(40, 100), 300 + make_normal(0, 40, 50)
    a, b = (DocumentNll(base + make_normal(seed, 40), counts) for seed in (1, 2))
    low, high = compare(a, b).ci95
    unpaired = math.hypot(log_width(perplexity(a)), log_width(perplexity(b)))
    assert high - low < 0.1 * unpaired


def test_comparison_interval_is_weighted_by_tokens():
    counts = np.array([1000] * 10 + [1] * 10)  # a is better on the long documents, worse on the short ones
    difference = np.where(counts == 1000, -0.1, 0.1) + make_normal(0, 20, 0.001)
    base = 3.0 * counts
    result = compare(DocumentNll(base + difference * counts, counts), DocumentNll(base, counts))
    assert result.difference == pytest.approx(-0.1, abs=0.01)
    assert -0.11 < result.ci95[0] < result.ci95[1] < -0.09
    assert result.documents_better == 0.5


@pytest.mark.parametrize("counts", [[4, 1, 3], [4, 2, 1], [4, 1], [4, 1, 2, 2]])
def test_comparing_different_tokens_is_an_error(counts):
    a = DocumentNll(np.ones(3), np.array([4, 1, 2]))
    b = DocumentNll(np.ones(len(counts)), np.array(counts))
    with pytest.raises(ValueError, match="needs the same tokens scored on both sides"):
        compare(a, b)


@pytest.mark.parametrize("what", ["replicate", "place"])
def test_reading_takes_nothing_from_the_host_unasked(monkeypatch, what):
    monkeypatch.setattr(Layout, what, lambda self, tree: jax.device_get(tree))
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        score()
