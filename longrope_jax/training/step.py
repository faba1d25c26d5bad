"""One training step as a pure function of (state, tokens, factors)."""

from dataclasses import dataclass
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from longrope_jax.model import Llama
from longrope_jax.rope import RopeFactors


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with a linear warmup, cosine decay to a tenth of the peak, and clipping by the global norm.

    Attributes:
        learning_rate: at its peak.
        warmup_steps: from zero to the peak.
        weight_decay: on matrices; norms' scales are spared.
        clip_norm: gradients are scaled down to at most this norm.
        beta1, beta2: AdamW's decay rates.
    """

    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95

    def __post_init__(self):
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)} must be above 0")
        for name in ("warmup_steps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} = {getattr(self, name)} must not be negative")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must lie in [0, 1)")


@flax.struct.dataclass
class TrainState:
    """All that a step changes."""

    step: Int[Array, ""]
    params: dict
    opt_state: optax.OptState


def learning_rate(settings: OptimizerSettings, steps: int) -> optax.Schedule:
    """Step -> learning rate over a run of `steps`."""
    peak = settings.learning_rate
    warmup = min(settings.warmup_steps, steps - 1)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, end_value=0.1 * peak)


def make_optimizer(settings: OptimizerSettings, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `steps`."""
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


def init_params(model: Llama, factors: RopeFactors, seed: int) -> dict:
    """Fresh parameters, made by one compiled function."""
    init = jax.jit(lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32), factors)["params"])
    return init(jax.random.key(seed))


def init_state(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.int32(0), params, jax.jit(optimizer.init)(params))


@partial(jax.jit, static_argnames=("model", "optimizer"), donate_argnames="state")
def train_step(
    model: Llama,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    tokens: Int[Array, "B T+1"],
    factors: RopeFactors,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """The next state, and the loss (nats per token) and gradient norm of the one before it.

    One compilation a shape of tokens. Time O(B T) in the matrices and O(B T^2) in attention, memory O(B T).
    """

    def loss_fn(params):
        nll = model.apply({"params": params}, tokens[:, :-1], tokens[:, 1:], factors, method="token_nll")
        return nll.mean()

    loss, gradients = jax.value_and_grad(loss_fn)(state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {"loss": loss, "gradient_norm": optax.global_norm(gradients)}
    return TrainState(state.step + 1, params, opt_state), metrics
