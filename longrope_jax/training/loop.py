"""The training loop: batches in, checkpoints and metrics out, resumed exactly where it stopped."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from etils import epath
from tqdm import tqdm

from longrope_jax.model import Llama
from longrope_jax.rope import FactorTable
from longrope_jax.runtime import preemption, processes
from longrope_jax.runtime.checkpoints import Checkpoints
from longrope_jax.runtime.mesh import Layout
from longrope_jax.runtime.metrics import Metrics
from longrope_jax.training.step import (
    BUCKETS,
    OptimizerSettings,
    StepResult,
    TrainState,
    init_params,
    init_state,
    learning_rate,
    make_optimizer,
    train_step,
)


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """What every kind of training has.

    Attributes:
        steps: how many.
        batch: sequences a step, on all devices together.
        accumulate: into how many parts a batch is cut; only one part's activations are in memory at a time.
        seed: of fresh parameters and of the order of the data.
        checkpoint_every: steps.
        log_every: steps; the loss is looked at that often, and at every checkpoint.
        optimizer: see `OptimizerSettings`.
    """

    steps: int
    batch: int
    accumulate: int = 1
    seed: int = 0
    checkpoint_every: int = 500
    log_every: int = 20
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)

    def __post_init__(self):
        for name in ("steps", "batch", "accumulate", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be positive")
        if self.batch % self.accumulate:
            raise ValueError(f"batch = {self.batch} can't be cut into accumulate = {self.accumulate} equal parts")

    def check_layout(self, layout: Layout, length: int) -> None:
        """Raises ValueError if a batch of sequences of `length` tokens can't be spread over the devices."""
        layout.check_rows(self.batch // self.accumulate, "batch / accumulate")
        layout.check_length(length, "length")


class Diverged(RuntimeError):
    """The loss is not a number any more."""


@dataclass(frozen=True)
class HeldOut:
    """An evaluation during training: every so many steps, params -> scalars by name."""

    every: int
    evaluate: Callable[[dict], dict[str, float]]


def train(
    model: Llama,
    layout: Layout,
    settings: LoopSettings,
    batches: Any,
    table: FactorTable,
    first_params: Callable[[], dict],
    workdir: epath.Path,
    stage: str,
    bits_per_nat: float,
    held_out: HeldOut | None = None,
) -> float:
    """Trains, and returns the seconds it took; goes on from the newest checkpoint in `workdir/checkpoints/<stage>`.

    The parameters are in the last checkpoint, see `load_params`. A resumed run gives bit for bit the parameters of an
    uninterrupted one: parameters, optimizer, step, factors and the data iterator's state are one checkpoint, and
    batches depend on nothing else. On another mesh it goes on with the same numbers up to the order of sums.

    Args:
        batches: iterator of `Batch`es, this process's share of rows, with get_state and set_state.
        table: factors by context window.
        first_params: makes or loads the parameters of step 0; not called when there is a checkpoint.
        bits_per_nat: what a nat per token is in bits per byte.

    Raises:
        Diverged: names the last good checkpoint; a bad state is never saved.
        preemption.Preempted: the process was asked to stop; the step it had come to is saved.
    """
    optimizer = make_optimizer(settings.optimizer, settings.steps)
    schedule = learning_rate(settings.optimizer, settings.steps)
    with (
        preemption.watch(),  # outermost: a save that is still running is not to be cut short either
        Checkpoints(workdir / "checkpoints" / stage) as checkpoints,
        Metrics(workdir, stage, checkpoints.latest() or 0) as metrics,
    ):
        start, spent = checkpoints.latest() or 0, 0.0
        if start:
            state, table, record = _restored(checkpoints, start, model, layout, optimizer, table)
            batches.set_state(record["batches"])
            spent = record["seconds"]
        else:
            state = init_state(first_params(), optimizer)
        began = logged_time = time.monotonic()
        logged_step = start

        def save(step):
            seconds = spent + time.monotonic() - began
            items = {
                "params": state.params,
                "optimizer": {"step": state.step, "state": state.opt_state},
                "factors": table,
            }
            checkpoints.save(step, items, {"batches": batches.get_state(), "seconds": seconds})

        with tqdm(
            total=settings.steps,
            initial=start,
            desc=stage,
            unit="step",
            dynamic_ncols=True,
            disable=not processes.is_first(),
        ) as bar:
            for step in range(start + 1, settings.steps + 1):
                batch = layout.place(next(batches), layout.share)
                state, result = train_step(model, optimizer, settings.accumulate, state, batch, table)
                bar.update()
                is_saved = step % settings.checkpoint_every == 0 or step == settings.steps
                is_stopped = preemption.requested() and step < settings.steps
                if step % settings.log_every == 0 or is_saved or is_stopped:
                    scalars = _scalars(result, batch.tokens.shape[1], bits_per_nat)
                    scalars["parameter_norm"] = float(_norm(state.params))
                    _refuse_nonsense(stage, step, scalars, checkpoints)
                if step % settings.log_every == 0 or is_saved:
                    now = time.monotonic()
                    step_seconds = (now - logged_time) / (step - logged_step)
                    scalars |= {"learning_rate": float(schedule(step - 1)), "step_seconds": step_seconds}
                    scalars["tokens_per_second"] = batch.tokens.size / step_seconds
                    metrics.write(step, **scalars)
                    bar.set_postfix(loss=f"{scalars['loss']:.3f}", tokens_per_s=f"{scalars['tokens_per_second']:,.0f}")
                    logged_step, logged_time = step, now
                if held_out and (step % held_out.every == 0 or step == settings.steps):
                    paused = time.monotonic()
                    metrics.write(step, **held_out.evaluate(state.params))
                    logged_time += time.monotonic() - paused  # speed is that of training
                if is_saved or is_stopped:
                    save(step)
                if is_stopped:
                    checkpoints.latest()  # waits, and raises if it could not be saved
                    raise preemption.Preempted(stage, f"step {step} of {settings.steps} is saved")
    return spent + time.monotonic() - began


def load_params(workdir: epath.Path, stage: str, model: Llama, layout: Layout, steps: int) -> dict:
    """The parameters that a finished stage left behind, alone and straight onto their devices.

    Raises:
        LookupError: the checkpoint of the last step is not there, or no longer what was written.
    """
    with Checkpoints(workdir / "checkpoints" / stage) as checkpoints:
        if checkpoints.latest() != steps:
            raise LookupError(
                f"{checkpoints.directory}: the newest sound checkpoint is step {checkpoints.latest()}, not {steps}"
            )
        like = layout.abstract(jax.eval_shape(partial(init_params, model, 0)))
        return checkpoints.restore(steps, {"params": like})[0]["params"]


def _restored(checkpoints, step, model, layout, optimizer, table) -> tuple[TrainState, FactorTable, dict]:
    """A state that was never made first: only its shapes are, then every device reads its part."""
    abstract = jax.eval_shape(lambda: init_state(init_params(model, 0), optimizer))
    like = layout.abstract(abstract)
    items, record = checkpoints.restore(
        step,
        {
            "params": like.params,
            "optimizer": {"step": like.step, "state": like.opt_state},
            "factors": layout.abstract(jax.tree.map(np.asarray, table)),
        },
    )
    optimizer_items = items["optimizer"]
    return TrainState(optimizer_items["step"], items["params"], optimizer_items["state"]), items["factors"], record


_norm = jax.jit(optax.global_norm)  # a program for all leaves, not several for each


def _scalars(result: StepResult, length: int, bits_per_nat: float) -> dict[str, float]:
    """A step's result as numbers by name; waits for the device."""
    nll, tokens = np.asarray(result.nll, np.float64), np.asarray(result.tokens, np.float64)
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
