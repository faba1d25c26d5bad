import contextlib
import dataclasses
from functools import cache, partial

import jax
import numpy as np
import pytest

from longrope_jax.model import Llama, LlamaConfig, decode
from longrope_jax.model import cache as kv_cache
from longrope_jax.model.cache import empty_cache, slots_for
from longrope_jax.model.decode import Sampling, advance, complete, generate
from longrope_jax.model.sharding import make_mesh, tree_shardings
from longrope_jax.rope import FactorTable, RopeFactors

VOCABULARY, LONGEST, NEW = 64, 64, 15
MODEL = Llama(
    LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        original_length=16,
        rope_theta=100.0,
    )
)


def factors(scale, n_hat, mscale):
    return RopeFactors(np.float32([1, 1.2, 2, scale]), np.int32(n_hat), np.float32(mscale))


# Every prompt crosses a boundary on its way, the second one two, all of them at different steps.
TABLE = FactorTable.of({16: factors(2, 0, 1.0), 24: factors(4, 3, 1.2), LONGEST: factors(8, 2, 1.3)})
PROMPTS = [np.random.default_rng(0).integers(0, VOCABULARY, n).astype(np.uint16) for n in (5, 11, 20)]
SWITCHES = ("ahead", "running")
MESHES = {"one device": None, "data, seq and tensor": dict(data=2, seq=2, tensor=2), "seq": dict(seq=4)}
CHUNK = 4


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    monkeypatch.setattr(kv_cache, "BLOCK", 4)
    monkeypatch.setattr(kv_cache, "READS", 3)


@cache
def make_params():
    """Larger than at initialisation, so that the most likely token leads by more than rounding."""
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), np.zeros((1, 1), np.int32), factors(2, 0, 1.0))["params"]
    rng = np.random.default_rng(6)
    fill = lambda x: 1.7 * rng.standard_normal(x.shape) / np.sqrt(x.shape[-2]) if x.ndim > 1 else np.ones(x.shape)  # noqa: E731
    return jax.tree.map(lambda x: fill(x).astype(np.float32), shapes)


@contextlib.contextmanager
def active(mesh):
    """Yields the parameters on the mesh that is set meanwhile."""
    if mesh is None:
        yield make_params()
        return
    with jax.set_mesh(make_mesh(**mesh)):
        yield jax.device_put(make_params(), tree_shardings(make_mesh(**mesh), make_params()))


@jax.jit
def full_forward(params, tokens, factors):
    dense = Llama(dataclasses.replace(MODEL.config, attention="dense"))
    return dense.apply({"params": params}, tokens, factors)


def full_logits(sequence, factors):
    """After every token of it, by one pass; filled up behind, for there to be one program."""
    tokens = np.pad(np.asarray(sequence, np.int32), (0, LONGEST - len(sequence)))[None]
    return np.asarray(full_forward(make_params(), tokens, factors))[0, : len(sequence)]


@cache
def wanted(row, switch):
    """NEW tokens by a full recompute for each, and how far the most likely led at least."""
    sequence, leads = list(PROMPTS[row]), []
    for _ in range(NEW):
        length = len(PROMPTS[row]) + NEW if switch == "ahead" else len(sequence)
        logits = full_logits(sequence, TABLE.select(length))[-1]
        second, first = np.sort(logits)[-2:]
        leads.append(first - second)
        sequence.append(int(logits.argmax()))
    return np.array(sequence[len(PROMPTS[row]) :]), min(leads)


def wanted_tokens(switch):
    return [wanted(row, switch)[0] for row in range(len(PROMPTS))]


def assert_same(got, expected):
    assert [row.tolist() for row in got] == [row.tolist() for row in expected]


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_every_token_is_the_argmax_of_the_full_forward_pass(mesh):
    """Of mixed lengths, over the boundaries of the table, with factors ahead and of the running length."""
    with active(mesh) as params:
        for switch in SWITCHES:
            assert min(wanted(row, switch)[1] for row in range(len(PROMPTS))) > 1e-2  # no near ties
            assert_same(complete(MODEL, params, TABLE, PROMPTS, NEW, switch=switch, chunk=CHUNK), wanted_tokens(switch))


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_logits_agree_with_the_full_forward_pass(mesh):
    """Of two sequences with factors of their own, read in chunks."""
    rng, lengths = np.random.default_rng(1), np.int32([12, 24])
    tokens = rng.integers(0, VOCABULARY, (2, 24)).astype(np.int32)
    full = [full_logits(row, TABLE.select(int(length))) for row, length in zip(tokens, lengths, strict=True)]
    last = np.int32([1, CHUNK - 1])
    with active(mesh) as params:
        extend = jax.jit(lambda *arguments: MODEL.apply({"params": params}, *arguments, method="extend"))
        held = empty_cache(MODEL.config, 2, slots_for(24))
        for start in range(0, 24, CHUNK):
            positions = np.broadcast_to(start + np.arange(CHUNK, dtype=np.int32), (2, CHUNK))
            logits, held = extend(tokens[:, start : start + CHUNK], TABLE.select(lengths), positions, held, last)
            assert logits.dtype == np.float32
            for row in range(2):
                np.testing.assert_allclose(logits[row], full[row][start + last[row]], atol=1e-4)


def test_a_cache_that_is_not_rebuilt_at_a_boundary_gives_other_tokens(monkeypatch):
    """The mistake that "running" avoids: keys rotated by the old factors, queries by the new ones."""
    prefill, calls = decode._prefill, []

    def once(read, chunk, factors, held, sequences, lengths):
        calls.append(lengths.copy())
        if len(calls) == 1:
            return prefill(read, chunk, factors, held, sequences, lengths)
        newest = sequences[np.arange(len(lengths)), lengths - 1]
        chosen, held = read(factors, held, newest[:, None], lengths - 1, np.zeros_like(lengths))
        return np.asarray(chosen), held

    monkeypatch.setattr(decode, "_prefill", once)
    stale = complete(MODEL, make_params(), TABLE, PROMPTS, NEW, switch="running", chunk=CHUNK)
    crossings = np.array(calls[1:]) - [len(prompt) for prompt in PROMPTS]  # by the number of new tokens
    assert crossings.tolist() == [[5] * 3, [6] * 3, [12] * 3, [14] * 3]
    differ = []
    for got, right, unharmed in zip(stale, wanted_tokens("running"), (12, 6, 5), strict=True):
        assert got[:unharmed].tolist() == right[:unharmed].tolist()
        differ.append(got.tolist() != right.tolist())
    assert differ == [False, True, True]  # the first has three tokens left after its boundary: too few to go astray


def test_factors_ahead_are_those_of_prompt_and_new_tokens():
    """And not of the prompt: both choices give other tokens, and neither boundary on the way changes anything."""
    running, ahead = wanted_tokens("running"), wanted_tokens("ahead")
    assert all((a != b).any() for a, b in zip(running, ahead, strict=True))


@pytest.mark.parametrize("chunk", [1, 512])
def test_the_chunk_does_not_matter(chunk):
    got = complete(MODEL, make_params(), TABLE, PROMPTS, NEW, switch="running", chunk=chunk)
    assert_same(got, wanted_tokens("running"))


def test_one_program_for_chunks_and_one_for_steps():
    run = partial(complete, MODEL, make_params())
    run(TABLE, PROMPTS, NEW, chunk=CHUNK)
    programs = advance._cache_size()
    other = FactorTable.of({20: factors(3, 1, 1.1), LONGEST: factors(9, 0, 0.9)})
    for switch in SWITCHES:
        run(other, [PROMPTS[2], PROMPTS[0][:3], PROMPTS[1]], NEW - 1, switch=switch, seed=3, stops=(1, 2), chunk=CHUNK)
    assert advance._cache_size() == programs
    run(TABLE, PROMPTS, LONGEST - 20, chunk=1)  # more slots; the chunk is a step
    assert advance._cache_size() == programs + 1


def test_rows_end_at_a_stop_token_and_the_iterator_with_the_last():
    rows = wanted_tokens("ahead")
    stops = [rows[0][3], rows[1][7], rows[2][0]]
    expected = [row[: np.flatnonzero(np.isin(row, stops))[0]] for row in rows]
    assert max(map(len, expected)) < NEW
    arguments = MODEL, make_params(), TABLE, PROMPTS, NEW
    steps = np.stack(list(generate(*arguments, stops=stops, chunk=CHUNK)))
    assert steps.dtype == np.int32
    assert len(steps) == max(map(len, expected))
    for got, row in zip(steps.T, expected, strict=True):
        assert got.tolist() == [*row, *[-1] * (len(steps) - len(row))]
    assert_same(complete(*arguments, stops=stops, chunk=CHUNK), expected)
    assert_same(complete(*arguments, stops=range(VOCABULARY), chunk=CHUNK), [np.array([])] * 3)


def test_tokens_come_one_at_a_time():
    steps = generate(MODEL, make_params(), TABLE, PROMPTS, NEW, chunk=CHUNK)
    assert next(steps).tolist() == [row[0] for row in wanted_tokens("ahead")]
    assert next(steps).tolist() == [row[1] for row in wanted_tokens("ahead")]


def test_draws_depend_on_the_seed_the_place_and_nothing_else():
    def draw(prompts, seed=0):
        options = dict(sampling=Sampling(1.0, top_k=20, top_p=0.9), seed=seed, chunk=1)
        return [row.tolist() for row in complete(MODEL, make_params(), TABLE, prompts, NEW, **options)]

    a, b, c = PROMPTS
    first = draw([a, b, c])
    assert draw([a, b, c]) == first
    assert draw([a, c, b])[0] == first[0]  # whoever the others are
    same = draw([c, c, c])
    assert same[2] == first[2]
    assert len(set(map(tuple, same))) == 3
    assert all(got != row for got, row in zip(draw([a, b, c], seed=1), first, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(prompts=[]), r"prompts = \[\] must have one"),
        (dict(prompts=[[1, 2], []]), r"prompts\[1\] must be one token id or more"),
        (dict(prompts=[[1.5]]), r"prompts\[0\] must be one token id or more, not float64"),
        (dict(prompts=[[1], [[2]]]), r"prompts\[1\] must be one token id or more, not int64\[1, 1\]"),
        (dict(prompts=[[1], [2, 64]]), r"prompts\[1\] has token id 64, outside of 0..63"),
        (dict(prompts=[[-1]]), r"prompts\[0\] has token id -1, outside of 0..63"),
        (dict(max_new_tokens=0), "max_new_tokens = 0 must be 1 or more"),
        (dict(chunk=0), "chunk = 0 must be 1 or more"),
        (dict(switch="later"), "switch = 'later' must be one of ahead, running"),
        (
            dict(max_new_tokens=LONGEST - 1),
            "prompt of 2 tokens and max_new_tokens = 63 make 65; the table of factors ends at 64",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_computed(changes, message):
    arguments = dict(prompts=[[1, 2]], max_new_tokens=5, switch="running", chunk=4) | changes
    with pytest.raises(ValueError, match=message) as error:
        generate(MODEL, None, TABLE, **arguments)
    assert "\n" not in str(error.value)
