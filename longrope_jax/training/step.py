"""One training step as a pure function of (state, batch, factors by length)."""

from dataclasses import dataclass
from functools import cache, partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState
from jaxtyping import Array, Float

from longrope_jax.data.sequences import IGNORED, Batch
from longrope_jax.model import Llama
from longrope_jax.model.sharding import constrain, shards, tree_shardings
from longrope_jax.rope import FactorTable, unscaled
from longrope_jax.settings import NonNegativeFloat, NonNegativeInt, PositiveFloat, Rule, Settings, one_of

SCHEDULES = ("cosine", "linear", "constant")
BUCKETS = 8  # equal ranges of positions by which the loss is reported


_Decay = Annotated[float, Rule(lambda beta: 0 <= beta < 1, "must lie in [0, 1)")]


@dataclass(frozen=True)
class OptimizerSettings(Settings):
    """AdamW with a linear warmup, a decay, and clipping by the global norm.

    Attributes:
        learning_rate: at its peak.
        schedule: after the warmup: "cosine" falls to a tenth of the peak, "linear" to zero, "constant" stays.
        warmup_steps: from zero to the peak.
        weight_decay: on matrices; the scales of norms have none.
        clip_norm: gradients are scaled down to at most this norm.
        beta1, beta2: AdamW's decay rates.
    """

    learning_rate: PositiveFloat = 3e-3
    schedule: Annotated[str, one_of(SCHEDULES)] = "cosine"
    warmup_steps: NonNegativeInt = 100
    weight_decay: NonNegativeFloat = 0.1
    clip_norm: PositiveFloat = 1.0
    beta1: _Decay = 0.9
    beta2: _Decay = 0.95


class StepResult(NamedTuple):
    """Sums over one step, so that they can be added over steps before a division.

    Attributes:
        nll: summed over the tokens of every range of positions (`BUCKETS` equal parts of the window), nats.
        tokens: number of scored tokens of every range.
        gradient_norm: of the mean loss, before clipping.
    """

    nll: Float[Array, "buckets"]
    tokens: Float[Array, "buckets"]
    gradient_norm: Float[Array, ""]


def learning_rate(settings: OptimizerSettings, steps: int) -> optax.Schedule:
    """Step -> learning rate over a run of `steps`."""
    peak = settings.learning_rate
    warmup = min(settings.warmup_steps, steps - 1)
    if settings.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, end_value=0.1 * peak)
    end = {"linear": 0.0, "constant": peak}[settings.schedule]
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, warmup), optax.linear_schedule(peak, end, steps - warmup)], [warmup]
    )


@cache
def make_optimizer(settings: OptimizerSettings, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `steps`; cached, as `train_step` compiles for each object."""
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(
            learning_rate(settings, steps),
            b1=settings.beta1,
            b2=settings.beta2,
            weight_decay=settings.weight_decay,
            mask=partial(jax.tree_util.tree_map_with_path, lambda path, _: path[-1].key != "scale"),
        ),
    )


def init_params(model: Llama, seed: int) -> dict:
    """Initial parameters, made by one compiled function; under a mesh each device makes only its own part."""
    factors = unscaled(model.config.head_dim)

    def init(key):
        tokens = jnp.zeros((shards("batch"), shards("length")), jnp.int32)  # the fewest that the mesh splits evenly
        return _sharded(model.init(key, tokens, factors)["params"])

    return jax.jit(init)(jax.random.key(seed))


def init_state(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; the optimizer's moments are sharded like their parameters."""
    moments = jax.jit(lambda params: _sharded(optimizer.init(params)))(params)
    fields: Any = dict(step=jnp.int32(0), apply_fn=None, params=params, tx=optimizer, opt_state=moments)
    return TrainState(**fields)


@partial(jax.jit, static_argnames=("model", "accumulate"), donate_argnames="state")
def train_step(
    model: Llama, accumulate: int, state: TrainState, batch: Batch, table: FactorTable
) -> tuple[TrainState, StepResult]:
    """The next state, and loss and gradient norm of the given state.

    Every sequence uses the factors that `table` has for its own context window. The loss is the sum over all
    scored tokens, of all devices and parts of the batch, divided by their number once.

    Args:
        accumulate: parts that the batch is split into; their gradients are summed one after the other.

    Compiled once per shape of the batch. Time O(B T) in the matrices and O(B T^2) in attention; memory O(B T /
    accumulate) for activations, split over the mesh's data, fsdp and seq axes, plus one gradient.
    """

    def summed_nll(params, part: Batch):
        factors = table.select(part.context)
        targets = jnp.maximum(part.targets, 0)
        nll: Any = model.apply(
            {"params": params}, part.tokens, targets, factors, part.positions, part.segment_ids, method="token_nll"
        )
        nll = jnp.where(part.targets == IGNORED, 0.0, nll)
        bucket = part.positions * BUCKETS // part.tokens.shape[1]
        sums = jnp.stack([jnp.sum(nll, where=bucket == k) for k in range(BUCKETS)])
        counts = jnp.stack([jnp.sum((bucket == k) & (part.targets != IGNORED)) for k in range(BUCKETS)])
        return sums.sum(), (sums, jnp.float32(counts))

    def gradient(part):
        (_, sums), gradients = jax.value_and_grad(summed_nll, has_aux=True)(state.params, part)
        return _sharded(gradients), sums

    if accumulate == 1:
        gradients, (sums, counts) = gradient(batch)
    else:
        # Part k has the rows k, k + accumulate, ...: every device keeps its share of each.
        parts = jax.tree.map(lambda x: _constrain_parts(x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)), batch)
        zeros = jax.tree.map(jnp.zeros_like, state.params), (jnp.zeros(BUCKETS), jnp.zeros(BUCKETS))
        add_part = lambda total, part: (jax.tree.map(jnp.add, total, gradient(part)), None)  # noqa: E731
        gradients, (sums, counts) = jax.lax.scan(add_part, zeros, parts)[0]
    with jax.named_scope("optimizer"):
        gradients = jax.tree.map(lambda g: g / counts.sum().astype(g.dtype), gradients)
        new_state = state.apply_gradients(grads=gradients)
    return _sharded(new_state), StepResult(constrain(sums), constrain(counts), constrain(optax.global_norm(gradients)))


def _sharded(tree):
    """Parameters, or a train state, with every leaf sharded over the current mesh by its name."""
    mesh = jax.sharding.get_abstract_mesh()
    return tree if mesh.empty else jax.lax.with_sharding_constraint(tree, tree_shardings(mesh, tree))


def _constrain_parts(x: Array) -> Array:
    """[parts, rows] or [parts, rows, T]: parts are processed in sequence, so that axis is not sharded."""
    return constrain(x, None, "batch", *["length"] * (x.ndim - 2))
