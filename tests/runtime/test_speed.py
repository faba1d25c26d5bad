import jax.numpy as jnp
import numpy as np
import pytest

from longrope_jax.model import LlamaConfig
from longrope_jax.model.flops import TRAINING, count_flops
from longrope_jax.runtime.estimate import CHIPS
from longrope_jax.training.progress import attended_pairs, memory, throughput, training_flops

CONFIG = LlamaConfig.preset("tiny")


def test_pairs_are_those_that_the_mask_of_packed_texts_leaves():
    segments = np.array([[1, 1, 1, 2, 2, 3], [1, 1, 1, 1, 1, 1]])
    positions = np.array([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]], np.int32)
    seen = np.tril(segments[:, :, None] == segments[:, None, :])
    assert attended_pairs(positions) == seen.sum()


def test_sequences_of_one_text_are_what_the_model_counts_and_packed_ones_less():
    rows, length = 3, 64
    whole = attended_pairs(np.tile(np.arange(length), (rows, 1)))
    full = count_flops(CONFIG, rows, length, TRAINING)
    assert training_flops(CONFIG, rows, length, whole) == pytest.approx(full)
    halves = attended_pairs(np.tile(np.arange(length) % (length // 2), (rows, 1)))
    packed = training_flops(CONFIG, rows, length, halves)
    assert packed.matrices == full.matrices
    assert packed.attention == pytest.approx(full.attention * halves / whole) and halves < 0.52 * whole


@pytest.mark.parametrize("kind, name", [("TPU v5 lite", "v5e"), ("TPU v5p", "v5p"), ("NVIDIA H100 80GB HBM3", "h100")])
def test_a_known_chip_is_held_to_its_peak(kind, name):
    flops = training_flops(CONFIG, 8, 128, 8 * 128 * 129 / 2)
    record = throughput(flops, tokens=1024, seconds=0.5, devices=4, device_kind=kind)
    assert record["tokens_per_second"] == 2048 and record["tokens_per_second_per_device"] == 512
    assert record["mfu"] == pytest.approx(flops.matrices / 0.5 / 4 / CHIPS[name].peak_flops)
    assert record["mfu_with_attention"] == pytest.approx(record["mfu"] * flops.total / flops.matrices)


def test_an_unknown_chip_has_a_speed_only():
    record = throughput(training_flops(CONFIG, 1, 8, 36), 8, 1.0, 1, "cpu")
    assert set(record) == {"tokens_per_second", "tokens_per_second_per_device"}


def test_memory_is_that_of_the_fullest_device():
    record = memory([{"bytes_in_use": 5, "peak_bytes_in_use": 9}, {"bytes_in_use": 7, "peak_bytes_in_use": 8}, None])
    assert record == {"hbm_bytes_in_use": 7, "hbm_peak_bytes": 9}
    assert memory([{"bytes_in_use": 5}]) == {"hbm_bytes_in_use": 5}
    assert memory([None, {}]) == {}


def test_memory_of_this_machine_can_be_asked_for():
    assert all(value >= 0 for value in memory(device.memory_stats() for device in jnp.ones(1).devices()).values())
