"""The training loop: batches in, checkpoints and metrics out, resumed exactly where it stopped."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.training.train_state import TrainState

from longrope_jax.model import Llama
from longrope_jax.rope import FactorTable
from longrope_jax.runtime import preemption, processes, profiling
from longrope_jax.runtime.checkpoints import Checkpoints
from longrope_jax.runtime.mesh import Layout
from longrope_jax.settings import PositiveInt, Seed, Settings
from longrope_jax.training.progress import Metrics, Progress
from longrope_jax.training.step import (
    OptimizerSettings,
    init_params,
    init_state,
    learning_rate,
    make_optimizer,
    train_step,
)


@dataclass(frozen=True, kw_only=True)
class LoopSettings(Settings):
    """Settings of every kind of training.

    Attributes:
        steps: number of training steps.
        batch: sequences per step, on all devices together.
        accumulate: parts that a batch is split into; only one part's activations are in memory at a time.
        seed: of initial parameters and of the order of the data.
        checkpoint_every: steps between checkpoints.
        log_every: steps between records of metrics; there is one at every checkpoint too.
        optimizer: see `OptimizerSettings`.
    """

    steps: PositiveInt
    batch: PositiveInt
    accumulate: PositiveInt = 1
    seed: Seed = 0
    checkpoint_every: PositiveInt = 500
    log_every: PositiveInt = 20
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)

    def __post_init__(self):
        super().__post_init__()
        if self.batch % self.accumulate:
            raise ValueError(f"batch = {self.batch} can't be cut into accumulate = {self.accumulate} equal parts")

    def check_layout(self, layout: Layout, length: int) -> None:
        """Raises ValueError if a batch of sequences of `length` tokens can't be spread over the devices."""
        layout.check_rows(self.batch // self.accumulate, "batch / accumulate")
        layout.check_length(length, "length")


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
    evaluate: Callable[[dict], dict[str, float]] | None = None,
    evaluate_every: int = 0,
) -> float:
    """Trains, and returns the seconds it took; resumes from the newest checkpoint in `workdir/checkpoints/<stage>`.

    The parameters are in the last checkpoint, see `load_params`. A resumed run gives bit for bit the parameters of an
    uninterrupted one: a checkpoint has parameters, optimizer, step, factors and the data iterator's state, and batches
    depend on nothing else. On another mesh the numbers are the same up to the order of sums.

    Args:
        batches: iterator of `Batch`, this process's share of rows, with get_state and set_state.
        table: factors by context window.
        first_params: makes or loads the parameters of step 0; not called if there is a checkpoint.
        bits_per_nat: factor from nats per token to bits per byte.
        evaluate: params -> scalars by name, which become metrics.
        evaluate_every: steps between evaluations.

    Raises:
        Diverged: names the last good checkpoint; a bad state is never saved.
        preemption.Preempted: the process was asked to stop; its current step is saved.
    """
    optimizer = make_optimizer(settings.optimizer, settings.steps)
    schedule = learning_rate(settings.optimizer, settings.steps)
    with (
        preemption.watch(),  # outermost: it must not interrupt a save that is still running
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
        started = time.monotonic()
        on_devices = layout.replicate(table)

        def fetch():
            batch = next(batches)
            # The checkpoint of this batch's step needs this state: the iterator will have advanced by then.
            return batch, layout.place(batch, layout.share[1]), batches.get_state()

        with processes.progress_bar(total=settings.steps, initial=start, desc=stage, unit="step") as bar:
            progress = Progress(stage, start, model.config, layout, bits_per_nat, metrics, bar, checkpoints)
            upcoming = fetch()
            for step in range(start + 1, settings.steps + 1):
                batch, placed, position = upcoming
                run = partial(train_step, model, settings.accumulate, state, placed, on_devices)
                with jax.transfer_guard("disallow"):
                    state, result = profiling.step("train", step, run)
                del run  # it refers to the donated state
                # While the devices compute: prepare the next batch, and report an earlier step.
                upcoming = fetch() if step < settings.steps else None
                progress.report()
                bar.update()
                progress.count(batch)
                is_saved = step % settings.checkpoint_every == 0 or step == settings.steps
                is_stopped = preemption.requested() and step < settings.steps
                is_logged = step % settings.log_every == 0 or is_saved
                is_evaluated = evaluate and (step % evaluate_every == 0 or step == settings.steps)
                if is_logged or is_stopped:
                    progress.dispatched(step, result, state.params, schedule(step - 1), is_logged=is_logged)
                if is_saved or is_stopped or is_evaluated:
                    progress.report()  # checks the state before it is saved
                if evaluate and is_evaluated:
                    paused = time.monotonic()
                    metrics.write(step, **evaluate(state.params))
                    progress.skip(time.monotonic() - paused)  # tokens per second count training only
                if is_saved or is_stopped:
                    seconds = spent + time.monotonic() - started
                    checkpoints.save(step, _items(state, table), {"batches": position, "seconds": seconds})
                if is_stopped:
                    raise preemption.Preempted(stage, f"step {step} of {settings.steps} is saved")
    return spent + time.monotonic() - started


def load_params(workdir: epath.Path, stage: str, model: Llama, layout: Layout, steps: int) -> dict:
    """The parameters of a finished stage, restored straight onto their devices.

    Raises:
        LookupError: the checkpoint of the last step is missing or damaged.
    """
    with Checkpoints(workdir / "checkpoints" / stage) as checkpoints:
        if checkpoints.latest() != steps:
            raise LookupError(
                f"{checkpoints.directory}: the newest sound checkpoint is step {checkpoints.latest()}, not {steps}"
            )
        like = layout.abstract(jax.eval_shape(partial(init_params, model, 0)))
        return checkpoints.restore(steps, {"params": like})[0]["params"]


def _items(state: TrainState, table: FactorTable) -> dict[str, Any]:
    """What a checkpoint has."""
    return {
        "params": state.params,
        "optimizer": {"step": state.step, "state": state.opt_state},
        "factors": table,
    }


def _restored(checkpoints, step, model, layout, optimizer, table) -> tuple[TrainState, FactorTable, dict]:
    """Restores a state from shapes alone: every device reads its own part."""
    like = layout.abstract(jax.eval_shape(lambda: init_state(init_params(model, 0), optimizer)))
    items, record = checkpoints.restore(step, _items(like, layout.abstract(jax.tree.map(np.asarray, table))))
    stored = items["optimizer"]
    state = like.replace(params=items["params"], step=stored["step"], opt_state=stored["state"])
    return state, items["factors"], record
