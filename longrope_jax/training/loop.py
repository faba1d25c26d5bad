"""The pretraining stage: batches in, checkpoints and metrics out, resumed exactly where it stopped."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import optax
from etils import epath
from tqdm import tqdm

from longrope_jax import rope
from longrope_jax.data.corpus import Document
from longrope_jax.data.windows import training_batches
from longrope_jax.model import Llama
from longrope_jax.runtime.checkpoints import Checkpoints
from longrope_jax.runtime.metrics import Metrics
from longrope_jax.training.step import (
    OptimizerSettings,
    init_params,
    init_state,
    learning_rate,
    make_optimizer,
    train_step,
)


@dataclass(frozen=True)
class PretrainSettings:
    """How a model is trained from scratch at its original length.

    Attributes:
        steps: how many.
        batch: sequences a step, each of `original_length` tokens.
        seed: of parameters and of the order of the data.
        checkpoint_every: steps.
        log_every: steps; the loss is looked at that often, and at every checkpoint.
        optimizer: see `OptimizerSettings`.
    """

    steps: int
    batch: int
    seed: int = 0
    checkpoint_every: int = 500
    log_every: int = 20
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)

    def __post_init__(self):
        for name in ("steps", "batch", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be positive")


class Diverged(RuntimeError):
    """The loss is not a number any more."""


def pretrain(
    model: Llama, settings: PretrainSettings, documents: Sequence[Document], workdir: epath.Path, stage: str
) -> float:
    """Trains, and returns the seconds it took; goes on from the newest checkpoint in `workdir/checkpoints/<stage>`.

    The parameters are in the last checkpoint, see `load_params`. A resumed run gives bit for bit the parameters of an
    uninterrupted one: parameters, optimizer, step and the data iterator's state are one checkpoint, and batches depend
    on nothing else.

    Raises:
        Diverged: names the last good checkpoint; a bad state is never saved.
    """
    length = model.config.original_length
    factors = rope.unscaled(model.config.head_dim)
    optimizer = make_optimizer(settings.optimizer, settings.steps)
    schedule = learning_rate(settings.optimizer, settings.steps)
    batches = training_batches(documents, length, settings.batch, settings.seed)
    bits_per_byte = _tokens_per_byte(documents) / math.log(2)

    with (
        Checkpoints(workdir / "checkpoints" / stage) as checkpoints,
        Metrics(workdir, stage, checkpoints.latest() or 0) as metrics,
    ):
        state = init_state(init_params(model, factors, settings.seed), optimizer)
        start, spent = checkpoints.latest() or 0, 0.0
        if start:
            state, record = checkpoints.restore(start, like=state)
            batches.set_state(record["batches"])
            spent = record["seconds"]
        bar = tqdm(total=settings.steps, initial=start, desc=stage, unit="step", dynamic_ncols=True)
        began = logged_time = time.monotonic()
        logged_step = start
        for step in range(start + 1, settings.steps + 1):
            state, result = train_step(model, optimizer, state, next(batches), factors)
            bar.update()
            is_saved = step % settings.checkpoint_every == 0 or step == settings.steps
            if step % settings.log_every == 0 or is_saved:
                result["parameter_norm"] = optax.global_norm(state.params)
                result = {name: float(value) for name, value in result.items()}  # waits for the device
                # Loss and gradient are those before the step, the norm is of the parameters after it, which are saved.
                if not all(map(math.isfinite, result.values())):
                    good = checkpoints.latest()
                    raise Diverged(
                        f"{stage}: loss {result['loss']}, gradient norm {result['gradient_norm']}, parameter norm "
                        f"{result['parameter_norm']} at step {step}; "
                        f"last good checkpoint: {checkpoints.directory / str(good) if good else 'none'}"
                    )
                now = time.monotonic()
                speed = (step - logged_step) * settings.batch * length / (now - logged_time)
                metrics.write(
                    step,
                    **result,
                    bits_per_byte=result["loss"] * bits_per_byte,
                    learning_rate=schedule(step - 1),
                    tokens_per_second=speed,
                )
                bar.set_postfix(loss=f"{result['loss']:.3f}", tokens_per_s=f"{speed:,.0f}")
                logged_step, logged_time = step, now
            if is_saved:
                seconds = spent + time.monotonic() - began
                checkpoints.save(step, state, {"batches": batches.get_state(), "seconds": seconds})
        bar.close()
    return spent + time.monotonic() - began


def load_params(workdir: epath.Path, stage: str) -> dict:
    """The parameters that a finished `pretrain` left behind."""
    with Checkpoints(workdir / "checkpoints" / stage) as checkpoints:
        arrays, _ = checkpoints.restore(checkpoints.latest())
    return jax.tree.map(jax.numpy.asarray, arrays["params"])


def _tokens_per_byte(documents: Sequence[Document]) -> float:
    return sum(len(d.tokens) for d in documents) / sum(d.size for d in documents)
