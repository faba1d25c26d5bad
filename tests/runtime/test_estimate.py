"""Times by hand, on a chip whose numbers make that easy."""

import itertools

import pytest

from longrope_jax.model.flops import Flops
from longrope_jax.runtime.collectives import RING, Traffic
from longrope_jax.runtime.estimate import ATTENTION_MFU, CHIPS, MATRICES_MFU, TPUS, Chip, chip_of, estimate

CHIP = Chip("made_up", "Made Up", peak_flops=100.0, hbm_bytes=1000, hbm_bandwidth=1000.0, link_bandwidth=10.0, torus=2)
NEEDED, EXECUTED = Flops(600.0, 200.0), Flops(900.0, 300.0)
MATRICES, ATTENTION = 900 / 200 / MATRICES_MFU, 300 / 200 / ATTENTION_MFU  # 6 s and 3 s on two devices


def on_two(collectives=None, held=0):
    return estimate(CHIP, 2, NEEDED, EXECUTED, collectives or {}, held)


def test_work_alone():
    found = on_two()
    assert (found.matrices, found.attention) == (MATRICES, ATTENTION) == (6.0, 3.0)
    assert found.total == 9.0 and found.ring == found.others == found.memory == 0
    assert found.bound == 800 / 200
    assert found.mfu == pytest.approx(600 / (200 * 9)) and found.mfu_with_attention == pytest.approx(800 / (200 * 9))
    assert found.attention_share == pytest.approx(1 / 3)


def test_what_is_sent_is_hidden_behind_the_work_beside_it_and_no_other():
    """Keys and values take one link of 10 bytes a second, what is sent of parameters two."""
    hidden = on_two({RING: Traffic(3, 29), "all-gather": Traffic(1, 60), "all-reduce": Traffic(1, 59)})
    assert (hidden.ring, hidden.others) == (2.9, 119 / 20) and hidden.total == 9.0
    ring = on_two({RING: Traffic(3, 50)})
    assert ring.ring == 5.0 and ring.total == MATRICES + 5.0
    parameters = on_two({"collective-permute": Traffic(8, 100), "all-gather": Traffic(1, 100)})
    assert parameters.others == 10.0 and parameters.ring == 0 and parameters.total == 10.0 + ATTENTION


def test_memory_is_a_bound_of_its_own():
    assert on_two(held=4000).total == 9.0
    assert on_two(held=5000).memory == on_two(held=5000).total == 10.0


def test_a_total_is_never_below_the_bound_and_no_utilisation_above_one():
    for devices, matrices, attention, sent, held in itertools.product(
        (1, 64), (0.0, 1e3, 1e18), (1.0, 1e20), (0, 10**12), (0, 10**11)
    ):
        needed = Flops(matrices, attention)
        for name in TPUS:
            collectives = {RING: Traffic(1, sent), "all-gather": Traffic(1, sent)}
            found = estimate(CHIPS[name], devices, needed, needed, collectives, held)
            assert 0 < found.bound <= found.total
            assert 0 <= found.mfu <= found.mfu_with_attention <= 1
            assert found.mfu_with_attention == pytest.approx(found.bound / found.total)


@pytest.mark.parametrize(
    "kind, name", [("TPU v5e", "v5e"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU7x", "tpu7x")]
)
def test_chips_are_known_by_what_jax_calls_them(kind, name):
    assert chip_of(kind) is CHIPS[name]


def test_other_devices_are_no_chip():
    assert chip_of("cpu") is None
    assert all(CHIPS[name].link_bandwidth > 0 for name in TPUS) and "h100" not in TPUS
