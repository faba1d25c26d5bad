import functools

import jax
import numpy as np
import pytest
import reference

from longrope_jax import rope
from longrope_jax.evaluation import scoring
from longrope_jax.evaluation.scoring import log_likelihoods
from longrope_jax.model import Llama, LlamaConfig
from longrope_jax.rope import FactorTable
from longrope_jax.runtime.mesh import Layout, MeshSettings

CONFIG = LlamaConfig(
    vocab_size=19, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8,
    original_length=16, attention="dense",
)  # fmt: skip
MODEL = Llama(CONFIG)
TABLE = FactorTable.of({12: rope.linear(8, 4.0), 40: rope.yarn(8, 8.0, original_length=16)})
RNG = np.random.default_rng(0)


def draw(*lengths):
    """One list of tokens a length."""
    return tuple(RNG.integers(0, 19, length).tolist() for length in lengths)


REQUESTS = [
    *[draw(*lengths) for lengths in [(12, 1), (1, 1), (3, 3), (11, 2), (31, 10)]],
    *[([4, 5, 6], [token]) for token in range(19)],  # one question, an answer of a token each: one of them is greedy
    ([4, 5], [6, 3]),  # reads the same, and scores one token more
]  # fmt: skip


@functools.cache
def make_params():
    params = jax.jit(MODEL.init)(jax.random.key(0), np.zeros((1, 4), np.int32), TABLE.select(4))["params"]
    # Larger than at the start of training, so that tokens before and factors make a difference.
    return jax.tree.map(lambda leaf: 3 * leaf, params)


def collect(requests, model=None, params=None, table=TABLE, layout=None, **options):
    made = list(
        log_likelihoods(model or MODEL, layout or Layout(), params or make_params(), table, requests, **options)
    )
    assert sorted(index for index, _ in made) == list(range(len(requests)))
    return [result for _, result in sorted(made)]


@functools.partial(jax.jit, static_argnums=0)
def all_logits(model, params, tokens, factors):
    return model.apply({"params": params}, tokens, factors)[0]


def direct(context, continuation, model=MODEL, params=None, table=TABLE):
    """By itself, from all logits; what follows can't be seen, and is there only to have one shape to compile."""
    inputs = [*context, *continuation][:-1]
    tokens = np.array([inputs + [7] * (48 - len(inputs))])
    logits = all_logits(model, params or make_params(), tokens, table.select(len(inputs)))
    logits = np.asarray(logits)[len(inputs) - len(continuation) : len(inputs)]
    return -reference.token_nll(logits, np.array(continuation)).sum(), (logits.argmax(-1) == continuation).all()


def check(requests, results, **given):
    for (context, continuation), (log_probability, is_greedy) in zip(requests, results, strict=True):
        expected, greedy = direct(context, continuation, **given)
        np.testing.assert_allclose(log_probability, expected, rtol=1e-5, atol=1e-5)
        assert is_greedy == greedy


def test_every_request_is_what_the_model_says_of_it_alone():
    results = collect(REQUESTS)
    check(REQUESTS, results)
    one_question = results[5:24]
    assert sum(result.is_greedy for result in one_question) == 1
    np.testing.assert_allclose(sum(np.exp(result.log_probability) for result in one_question), 1, rtol=1e-5)


def test_a_continuation_is_greedy_only_if_all_of_it_is():
    context = [4, 5, 6]
    for _ in range(3):
        best = int(np.argmax([r.log_probability for r in collect([(context, [token]) for token in range(19)])]))
        context.append(best)
    _, first, second, third = context[2:]
    wrong = (first + 1) % 19
    requests = [([4, 5, 6], tail) for tail in ([first, second, third], [wrong, second, third], [first, second, wrong])]
    assert [result.is_greedy for result in collect(requests)][:2] == [True, False]
    assert collect(requests)[2].is_greedy == (third == wrong)


def test_the_size_of_a_batch_changes_nothing():
    one, many = collect(REQUESTS[1:3], tokens_at_once=1), collect(REQUESTS[1:3])
    np.testing.assert_allclose([r.log_probability for r in one], [r.log_probability for r in many], rtol=1e-5)


def test_logits_are_made_some_places_at_a_time(monkeypatch):
    expected = collect(REQUESTS[:3])
    scoring._score.clear_cache()
    monkeypatch.setattr(scoring, "MAX_LOGITS", 19 * 2)
    found = collect(REQUESTS[:3], tokens_at_once=32)
    scoring._score.clear_cache()
    np.testing.assert_allclose([r.log_probability for r in found], [r.log_probability for r in expected], rtol=1e-5)


def test_a_tied_head():
    model = Llama(LlamaConfig(**{**vars(CONFIG), "tie_embeddings": True}))
    params = {name: leaf for name, leaf in make_params().items() if name != "lm_head"}
    check(REQUESTS[1:2], collect(REQUESTS[1:2], model, params), model=model, params=params)


def test_the_factors_are_those_of_the_tokens_that_are_read():
    other = FactorTable.of({12: rope.linear(8, 4.0), 40: rope.unscaled(8)})
    requests = [(list(range(10)), [1, 2, 3]), (list(range(10)), [1, 2, 3, 4])]  # read 12 and 13
    same, different = zip(collect(requests), collect(requests, table=other), strict=True)
    assert same[0] == same[1]
    assert abs(different[0].log_probability - different[1].log_probability) > 1e-3


def test_requests_that_read_the_same_are_read_once(monkeypatch):
    rows = []
    score = scoring._score
    monkeypatch.setattr(scoring, "_score", lambda *args: rows.append(args[3]) or score(*args))
    collect(REQUESTS[5:24], tokens_at_once=16)
    assert len(rows) == 1


def test_a_long_context_loses_its_beginning():
    context, continuation = draw(70, 4)
    [long], [cut] = collect([(context, continuation)]), collect([(context[-37:], continuation)])
    assert long == cut
    check([(context[-37:], continuation)], [long])


def test_few_programs(monkeypatch):
    scoring._score.clear_cache()
    rng = np.random.default_rng(1)
    requests = [
        (rng.integers(0, 19, length).tolist(), rng.integers(0, 19, 2).tolist()) for length in rng.integers(1, 16, 40)
    ]
    collect(requests, tokens_at_once=64)
    assert scoring._score._cache_size() == 1


def test_on_a_mesh():
    model = Llama(LlamaConfig(**{**vars(CONFIG), "attention": "blockwise"}))
    requests, params = REQUESTS[1:3], make_params()
    check(requests, collect(requests, model, params, layout=Layout.of(MeshSettings("data:2,seq:3")), tokens_at_once=64))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (([], [1]), r"requests\[1\] has 0 tokens of context and a continuation of 1; both need one"),
        (([1], []), r"requests\[1\] has 1 tokens of context and a continuation of 0; both need one"),
        (([1], [2] * 41), r"requests\[1\] has a continuation of 41 tokens; the table of factors ends at 40"),
    ],
)
def test_bad_requests(request_, message):
    with pytest.raises(ValueError, match=message):
        collect([([1], [2]), request_])


def test_a_row_begins_with_bos_even_where_the_context_lost_its_beginning():
    bos, (context, continuation) = 18, draw(60, 3)
    [whole] = collect([([bos, 5, 6], [7])], bos=bos)
    assert whole == collect([([bos, 5, 6], [7])])[0]
    [cut] = collect([(context, continuation)], bos=bos)  # 40 tokens are read
    check([([bos, *context[-37:]], continuation)], [cut])
