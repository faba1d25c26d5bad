"""Metrics of a running training: a step's results are read while the devices compute the next step."""

import math
import time
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np
import optax
import tensorboardX
from etils import epath
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from longrope_jax.data.sequences import Batch
from longrope_jax.model import LlamaConfig
from longrope_jax.model.flops import TRAINING, Flops, count_flops
from longrope_jax.runtime import json_lines, processes
from longrope_jax.runtime.checkpoints import Checkpoints
from longrope_jax.runtime.estimate import chip_of
from longrope_jax.runtime.mesh import Layout
from longrope_jax.training.step import BUCKETS, StepResult


class Metrics:
    """Appends to `workdir/metrics.jsonl` and `workdir/tensorboard/<stage>`, in process 0. A context manager.

    Args:
        start: the step that training resumes from; later records of this stage, by a killed run, are removed.
    """

    def __init__(self, workdir: epath.Path, stage: str, start: int = 0):
        self._stage, self._path = stage, workdir / "metrics.jsonl"
        json_lines.keep(self._path, lambda record: record["stage"] != stage or record["step"] <= start, {"step": int})
        # TensorBoard hides events from the purge step on.
        self._board = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard" / stage), purge_step=start + 1, write_to_disk=processes.is_first()
        )

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_):
        self._board.close()

    def write(self, step: int, **scalars: float) -> None:
        """One line: the stage, the step and the scalars."""
        scalars = {name: float(value) for name, value in scalars.items()}
        json_lines.append(self._path, [{"stage": self._stage, "step": step, **scalars}])
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)


class Diverged(RuntimeError):
    """The loss, the gradient or a parameter is not finite."""


class _Pending(NamedTuple):
    """A dispatched step: its results on the devices, and what the host counted up to it."""

    step: int
    result: StepResult
    parameter_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    is_logged: bool
    shape: tuple[int, int]
    pairs: int


class Progress:
    """Writes metrics, updates the progress bar, and stops a training that has diverged.

    Args:
        start: the step that the run resumes from.
        bits_per_nat: factor from nats per token to bits per byte.
        checkpoints: name the last good checkpoint in an error.
    """

    def __init__(
        self,
        stage: str,
        start: int,
        config: LlamaConfig,
        layout: Layout,
        bits_per_nat: float,
        metrics: Metrics,
        bar: tqdm,
        checkpoints: Checkpoints,
    ):
        self._stage, self._config, self._layout, self._bits_per_nat = stage, config, layout, bits_per_nat
        self._metrics, self._bar, self._checkpoints = metrics, bar, checkpoints
        self._pending: _Pending | None = None
        self._pairs, self._shape = 0, (0, 0)
        self._logged_step, self._logged_time = start, time.monotonic()

    def count(self, batch: Batch) -> None:
        """Counts the tokens of a step's batch, of which this process has a share."""
        shares = self._layout.share[1]
        self._pairs += shares * attended_pairs(np.asarray(batch.positions))
        self._shape = (shares * batch.tokens.shape[0], batch.tokens.shape[1])

    def dispatched(self, step: int, result: StepResult, params: dict, learning_rate: Array, *, is_logged: bool) -> None:
        """Registers a dispatched step without waiting for it. `report` checks it, and logs it if `is_logged`.

        Args:
            learning_rate: f32[], of the step.
        """
        norm = _norm(params)  # now, as the next step overwrites them
        self._pending = _Pending(step, result, norm, learning_rate, is_logged, self._shape, self._pairs)
        if is_logged:
            self._pairs = 0

    def report(self) -> None:
        """Waits for the registered step, if there is one, checks that it is finite and writes its metrics.

        Raises:
            Diverged: names the last good checkpoint.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        result, norm, rate = jax.device_get((pending.result, pending.parameter_norm, pending.learning_rate))
        scalars = {**_scalars(result, pending.shape[1], self._bits_per_nat), "parameter_norm": float(norm)}
        _check_finite(self._stage, pending.step, scalars, self._checkpoints)
        if not pending.is_logged:
            return
        now = time.monotonic()
        steps = pending.step - self._logged_step
        seconds = (now - self._logged_time) / steps
        speed = throughput(
            training_flops(self._config, *pending.shape, pending.pairs / steps),
            math.prod(pending.shape),
            seconds,
            math.prod(self._layout.shape.values()),
            jax.local_devices()[0].device_kind,
        )
        scalars |= {"learning_rate": float(rate), "step_seconds": seconds, **speed}
        scalars |= memory(device.memory_stats() for device in jax.local_devices())
        self._metrics.write(pending.step, **scalars)
        self._bar.set_postfix(loss=f"{scalars['loss']:.3f}", tokens_per_s=f"{scalars['tokens_per_second']:,.0f}")
        self._logged_step, self._logged_time = pending.step, now

    def skip(self, seconds: float) -> None:
        """Excludes seconds that were spent on something else from the speed."""
        self._logged_time += seconds


_norm = jax.jit(optax.global_norm)  # one program for all leaves


def _scalars(result: StepResult, length: int, bits_per_nat: float) -> dict[str, float]:
    """A step's result as numbers by name."""
    nll, tokens = (np.asarray(numbers, np.float64) for numbers in (result.nll, result.tokens))
    loss = nll.sum() / tokens.sum()
    by_position = {
        f"nll/{k * length // BUCKETS}-{(k + 1) * length // BUCKETS}": nll[k] / tokens[k]
        for k in range(BUCKETS)
        if tokens[k]
    }
    return {
        "loss": loss,
        "bits_per_byte": loss * bits_per_nat,
        "gradient_norm": float(result.gradient_norm),
        **by_position,
    }


def _check_finite(stage: str, step: int, scalars: dict[str, float], checkpoints: Checkpoints) -> None:
    """Loss and gradient are those before the step, the parameter norm is after it."""
    watched = {name: scalars[name] for name in ("loss", "gradient_norm", "parameter_norm")}
    if not all(map(math.isfinite, watched.values())):
        good = checkpoints.latest()
        values = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in watched.items())
        raise Diverged(
            f"{stage}: {values} at step {step}; "
            f"last good checkpoint: {checkpoints.directory / str(good) if good else 'none'}"
        )


def attended_pairs(positions: Int[np.ndarray, "B T"]) -> int:
    """Pairs of a query and a key that it attends to.

    A token attends to its own text up to itself; positions restart in every text of a packed sequence. A padding token
    counts as one pair.
    """
    return int(positions.sum(dtype=np.int64)) + positions.size


def training_flops(config: LlamaConfig, sequences: int, length: int, pairs: float) -> Flops:
    """Model FLOPs of training on `sequences`, with attention over `pairs` (`attended_pairs`).

    `count_flops` alone assumes one text per sequence, an upper bound for packed texts.
    """
    full = count_flops(config, sequences, length, TRAINING)
    return full._replace(attention=full.attention * pairs / (sequences * length * (length + 1) / 2))


def throughput(flops: Flops, tokens: int, seconds: float, devices: int, device_kind: str) -> dict[str, float]:
    """Speed of work that took `seconds` on `devices` (as JAX counts them).

    Returns:
        tokens_per_second, and the same per device. For a known chip (`runtime/estimate.py`) also the model FLOPs
        utilisation, a share of its bfloat16 peak without recomputation: `mfu` counts products with parameters only,
        `mfu_with_attention` also those of queries, keys and values.
    """
    per_second = tokens / seconds
    metrics = {"tokens_per_second": per_second, "tokens_per_second_per_device": per_second / devices}
    chip = chip_of(device_kind)
    if chip is not None:
        available = chip.peak_flops * devices * seconds
        metrics |= {"mfu": flops.matrices / available, "mfu_with_attention": flops.total / available}
    return metrics


def memory(statistics: Iterable[Mapping[str, int] | None]) -> dict[str, float]:
    """Memory of the fullest device: bytes in use now, and the peak so far.

    Args:
        statistics: `device.memory_stats()` of every local device; None if the platform has none.
    """
    known = [device for device in statistics if device]
    names = {"hbm_bytes_in_use": "bytes_in_use", "hbm_peak_bytes": "peak_bytes_in_use"}
    found = {name: [device[key] for device in known if key in device] for name, key in names.items()}
    return {name: float(max(sizes)) for name, sizes in found.items() if sizes}
