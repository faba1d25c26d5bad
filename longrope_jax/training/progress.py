"""What a training tells while it runs: noted when a step is dispatched, read while the devices do the next one."""

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
from longrope_jax.runtime import processes, records
from longrope_jax.runtime.checkpoints import Checkpoints
from longrope_jax.runtime.estimate import chip_of
from longrope_jax.runtime.mesh import Layout
from longrope_jax.training.step import BUCKETS, StepResult


class Metrics:
    """Appends to `workdir/metrics.jsonl` and `workdir/tensorboard/<stage>`, in process 0. A context manager.

    Args:
        start: the step to go on from; what a killed run wrote of this stage beyond it is forgotten.
    """

    def __init__(self, workdir: epath.Path, stage: str, start: int = 0):
        self._stage, self._path = stage, workdir / "metrics.jsonl"
        records.keep(self._path, lambda record: record["stage"] != stage or record["step"] <= start, {"step": int})
        # TensorBoard hides what was written beyond the purge step.
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
        records.append(self._path, [{"stage": self._stage, "step": step, **scalars}])
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)


class Diverged(RuntimeError):
    """The loss is not a number any more."""


class _Note(NamedTuple):
    """What is still on the devices of a step, and what the host counted up to it."""

    step: int
    result: StepResult
    parameter_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    is_logged: bool
    shape: tuple[int, int]
    pairs: int


class Progress:
    """Metrics, the bar's numbers, and the refusal to go on from what is no number.

    Args:
        start: the step that the run goes on from.
        bits_per_nat: what a nat per token is in bits per byte.
        checkpoints: where the last good state is, for the message.
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
        self._note: _Note | None = None
        self._pairs, self._shape = 0, (0, 0)
        self._told_step, self._told_time = start, time.monotonic()

    def count(self, batch: Batch) -> None:
        """Hears of every step's batch, this process's share of it."""
        shares = self._layout.share[1]
        self._pairs += shares * attended_pairs(np.asarray(batch.positions))
        self._shape = (shares * batch.tokens.shape[0], batch.tokens.shape[1])

    def note(self, step: int, result: StepResult, params: dict, learning_rate: Array, *, is_logged: bool) -> None:
        """A step to be told of; does not wait for it. One that is not logged is looked at all the same.

        Args:
            learning_rate: f32[], of the step.
        """
        norm = _norm(params)  # now: the next step overwrites them
        self._note = _Note(step, result, norm, learning_rate, is_logged, self._shape, self._pairs)
        if is_logged:
            self._pairs = 0

    def tell(self) -> None:
        """Waits for the step that was noted, if there is one, and writes what is to be logged of it.

        Raises:
            Diverged: names the last good checkpoint.
        """
        if self._note is None:
            return
        note, self._note = self._note, None
        result, norm, rate = jax.device_get((note.result, note.parameter_norm, note.learning_rate))
        scalars = {**_scalars(result, note.shape[1], self._bits_per_nat), "parameter_norm": float(norm)}
        _refuse_nonsense(self._stage, note.step, scalars, self._checkpoints)
        if not note.is_logged:
            return
        now = time.monotonic()
        steps = note.step - self._told_step
        seconds = (now - self._told_time) / steps
        speed = throughput(
            training_flops(self._config, *note.shape, note.pairs / steps),
            math.prod(note.shape),
            seconds,
            math.prod(self._layout.shape.values()),
            jax.local_devices()[0].device_kind,
        )
        scalars |= {"learning_rate": float(rate), "step_seconds": seconds, **speed}
        scalars |= memory(device.memory_stats() for device in jax.local_devices())
        self._metrics.write(note.step, **scalars)
        self._bar.set_postfix(loss=f"{scalars['loss']:.3f}", tokens_per_s=f"{scalars['tokens_per_second']:,.0f}")
        self._told_step, self._told_time = note.step, now

    def skip(self, seconds: float) -> None:
        """Takes time that was spent on something else out of the speed."""
        self._told_time += seconds


_norm = jax.jit(optax.global_norm)  # a program for all leaves, not several for each


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


def _refuse_nonsense(stage: str, step: int, scalars: dict[str, float], checkpoints: Checkpoints) -> None:
    """Loss and gradient are those before the step, the norm is of the parameters after it, which would be saved."""
    watched = {name: scalars[name] for name in ("loss", "gradient_norm", "parameter_norm")}
    if not all(map(math.isfinite, watched.values())):
        good = checkpoints.latest()
        told = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in watched.items())
        raise Diverged(
            f"{stage}: {told} at step {step}; "
            f"last good checkpoint: {checkpoints.directory / str(good) if good else 'none'}"
        )


def attended_pairs(positions: Int[np.ndarray, "B T"]) -> int:
    """Pairs of a query and a key that it sees: a token sees those of its own text up to itself, and positions begin
    anew in every text that shares a sequence. Padding counts one a token.
    """
    return int(positions.sum(dtype=np.int64)) + positions.size


def training_flops(config: LlamaConfig, sequences: int, length: int, pairs: float) -> Flops:
    """Model FLOPs of training on so many sequences, with attention over `pairs` (`attended_pairs`) only.

    `count_flops` alone would count sequences of one text, an upper bound where texts are packed.
    """
    full = count_flops(config, sequences, length, TRAINING)
    return full._replace(attention=full.attention * pairs / (sequences * length * (length + 1) / 2))


def throughput(flops: Flops, tokens: int, seconds: float, devices: int, device_kind: str) -> dict[str, float]:
    """Metrics of work that took so long on so many devices (as JAX counts them).

    Returns:
        tokens_per_second, and the same per device. Where the chip is known (`runtime/estimate.py`) also the share of
        its bfloat16 peak that the model's own arithmetic is, recomputation not counted: `mfu` of products with
        parameters only, `mfu_with_attention` of those of queries, keys and values too.
    """
    per_second = tokens / seconds
    told = {"tokens_per_second": per_second, "tokens_per_second_per_device": per_second / devices}
    chip = chip_of(device_kind)
    if chip is not None:
        available = chip.peak_flops * devices * seconds
        told |= {"mfu": flops.matrices / available, "mfu_with_attention": flops.total / available}
    return told


def memory(statistics: Iterable[Mapping[str, int] | None]) -> dict[str, float]:
    """Bytes of the fullest device, in use now and at most so far.

    Args:
        statistics: `device.memory_stats()` of every local device; None where the platform does not tell.
    """
    known = [told for told in statistics if told]
    names = {"hbm_bytes_in_use": "bytes_in_use", "hbm_peak_bytes": "peak_bytes_in_use"}
    return {
        name: float(max(told[key] for told in known if key in told))
        for name, key in names.items()
        if any(key in told for told in known)
    }
