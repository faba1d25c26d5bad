"""What batches of every kind do: shapes, seeds, states, and rows shared by processes."""

import json
from functools import partial
from itertools import islice

import jax
import pytest
from numbered_documents import KINDS, assert_equal, joined, make_texts


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_has_its_shape_and_type(kind):
    for batch in islice(KINDS[kind](make_texts(), batch=3, seed=0), 4):
        length = 8 if kind == "pretraining" else 32
        shapes = [(field.shape, field.dtype.name) for field in jax.tree.leaves(batch)]
        assert shapes[:-1] == [((3, length), "int32")] * (len(shapes) - 1)
        assert shapes[-1] == ((3,), "int32")
        assert (batch.segment_ids is None) == (kind in ("pretraining", "segments"))


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_batches_and_another_seed_others(kind):
    first, again, other = (joined(list(islice(KINDS[kind](make_texts(), batch=3, seed=s), 20))) for s in (1, 1, 2))
    assert_equal(first, again)
    assert (first.tokens != other.tokens).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("done", [0, 1, 7, 30])  # within the first epoch and after several
def test_set_state_goes_on_exactly_there(kind, done):
    make = partial(KINDS[kind], make_texts(), batch=4, seed=5)
    batches = make()
    for _ in range(done):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))  # it is kept in a JSON record
    expected = joined(list(islice(batches, 6)))

    batches.set_state(state)
    assert_equal(joined(list(islice(batches, 6))), expected)

    fresh = make()
    fresh.set_state(state)
    assert_equal(joined(list(islice(fresh, 6))), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [2, 4])
def test_the_rows_of_all_processes_are_the_batch_of_one(kind, count):
    make = partial(KINDS[kind], make_texts(), batch=4, seed=1)
    processes = [make(process=(index, count)) for index in range(count)]
    for whole, *parts in islice(zip(make(), *processes, strict=True), 15):
        assert len(parts[0].tokens) == 4 // count
        assert_equal(joined(parts), whole)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 2), (2, 1)])
def test_a_state_holds_for_another_number_of_processes(kind, before, after):
    make = partial(KINDS[kind], make_texts(), batch=4, seed=1)
    whole = make()
    states = []
    for index in range(before):
        batches = make(process=(index, before))
        for _ in range(13):
            next(batches)
        states.append(batches.get_state())
    for _ in range(13):
        next(whole)
    assert states == [whole.get_state()] * before

    parts = []
    for index in range(after):
        batches = make(process=(index, after))
        batches.set_state(states[0])
        parts.append(next(batches))
    assert_equal(joined(parts), next(whole))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_processes_cannot_share_evenly_is_an_error(kind):
    with pytest.raises(ValueError, match="batch = 3 must be divisible by the number of processes, 2"):
        KINDS[kind](make_texts(), batch=3, seed=0, process=(0, 2))
