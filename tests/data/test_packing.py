import re

import numpy as np
import pytest

from longrope_jax.data.sequences import pack


def text_sizes(rng, count, room):
    """Documents whose lengths are spread as those of real text are (log-normal), cut at the room."""
    lengths = np.exp(rng.normal(np.log(room / 8), 1.3, count)).astype(int) + 2
    return np.concatenate([[room] * (length // room) + [length % room + 1] for length in lengths])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("smallest", "room"), [(1, 7), (1, 100), (60, 100)])
def test_every_piece_is_in_one_bin_and_no_bin_overflows(smallest, room, seed):
    sizes = np.random.default_rng(seed).integers(smallest, room, 300, endpoint=True)
    bins = pack(sizes, room, seed)
    assert sorted(piece for members in bins for piece in members) == list(range(300))
    assert max(sizes[members].sum() for members in bins) <= room
    assert min(map(len, bins)) >= 1


@pytest.mark.parametrize("seed", range(5))
def test_little_room_is_left_by_real_text(seed):
    sizes = text_sizes(np.random.default_rng(seed), 1000, 4096)
    assert sizes.sum() / (4096 * len(pack(sizes, 4096, seed))) > 0.95


@pytest.mark.parametrize("seed", range(5))
def test_a_bin_is_opened_only_for_a_piece_that_fits_in_no_other(seed):
    sizes = np.random.default_rng(seed).integers(1, 60, 200)
    bins = pack(sizes, 100, seed)  # in the order in which they were opened
    left = [100 - sizes[members].sum() for members in bins]
    for number, members in enumerate(bins):
        assert all(room < sizes[members[0]] for room in left[:number])


@pytest.mark.parametrize("seed", range(5))
def test_a_piece_goes_where_it_leaves_the_least_room(seed):
    sizes = np.random.default_rng(seed).integers(1, 60, 200)
    bins, left = [], []
    for piece in np.random.default_rng(seed).permutation(200):
        fitting = [(room, number) for number, room in enumerate(left) if room >= sizes[piece]]
        if not fitting:
            bins.append([])
            left.append(100)
        _, chosen = min(fitting, default=(100, len(bins) - 1))
        bins[chosen].append(piece)
        left[chosen] -= sizes[piece]
    assert pack(sizes, 100, seed) == bins


def test_the_seed_decides_which_pieces_meet():
    sizes = np.random.default_rng(0).integers(1, 50, 100)
    first, again, other = (pack(sizes, 64, seed) for seed in (1, 1, 2))
    assert first == again
    assert {frozenset(members) for members in first} != {frozenset(members) for members in other}


def test_a_bin_can_be_full_with_one_piece_and_there_may_be_no_pieces():
    assert sorted(pack(np.array([9, 9]), 9, 0)) == [[0], [1]]
    assert pack(np.zeros(0, int), 9, 0) == []


def test_a_piece_larger_than_the_room_is_an_error():
    with pytest.raises(ValueError, match=re.escape("the largest piece has 11 tokens, more than the room for it, 10")):
        pack(np.array([3, 11]), 10, 0)
