"""What a training tells while it runs: noted when a step is dispatched, read while the devices do the next one."""

import math
import time
from typing import NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Array, Float
from tqdm import tqdm

from longrope_jax.data.sequences import Batch
from longrope_jax.model import LlamaConfig
from longrope_jax.runtime.checkpoints import Checkpoints
from longrope_jax.runtime.mesh import Layout
from longrope_jax.runtime.metrics import Metrics
from longrope_jax.runtime.speed import attended_pairs, memory, throughput, training_flops
from longrope_jax.training.step import BUCKETS, StepResult


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
