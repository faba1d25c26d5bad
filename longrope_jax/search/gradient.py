"""Search by gradient: lam is a pytree that the loss can be differentiated by, whatever the parameters of the model.

lam goes through a parametrisation that is monotone by construction, and bounded by projection. Every step descends on
one block of documents, a stochastic gradient: it costs a fraction of a whole one, and its noise leads out of some of
the many local minima. Start tokens are not differentiated by: they are swept at the end.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Annotated, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jaxtyping import Array, Float, Int, PRNGKeyArray

from longrope_jax.evaluation.perplexity import window_nll
from longrope_jax.model import Llama
from longrope_jax.model.config import REMAT_POLICIES
from longrope_jax.model.sharding import constrain
from longrope_jax.rope import RopeFactors
from longrope_jax.search.candidates import OPERATORS, Genes, Score, SearchState, joined, scored, unscored, without_known
from longrope_jax.search.objective import Block, Objective
from longrope_jax.search.space import SearchSpace
from longrope_jax.settings import PositiveFloat, PositiveInt, Settings, one_of

Variables = dict[str, Float[Array | np.ndarray, "..."]]
"""What is optimised: "logs" [C, D/2] of lam, and "mscale" [C], a logit between its bounds."""


@dataclass(frozen=True)
class GradientSettings(Settings):
    """How to descend.

    Attributes:
        rounds: each begins from the best candidates so far, and ends with factors on the grid of the space.
        starts: how many candidates a round begins from.
        steps: of Adam in a round, each on one block of documents.
        learning_rate: at the first step of the first round, that of every other is half of the one before; within a
            round it falls to a twentieth along a cosine.
        cost: of a gradient in forward passes over the same documents, to account for steps; measured on a CPU.
        remat: what the backward pass keeps of a block of the model, see `LlamaConfig`.
    """

    rounds: PositiveInt = 1
    starts: PositiveInt = 2
    steps: PositiveInt = 40
    learning_rate: PositiveFloat = 0.01
    cost: PositiveFloat = 5.0
    remat: Annotated[str, one_of(REMAT_POLICIES)] = "nothing_saveable"


class Kept(Protocol):
    """Where a descent under way is kept, so that one that is stopped goes on at its last step."""

    def load(self, name: str, like: Any) -> tuple[int, Any]:
        """(steps done, variables and optimizer state); (0, like) if there is nothing of that name."""

    def save_if_due(self, name: str, step: int, tree: Any, is_last: bool) -> None:
        """Keeps it once in a while and at the end; then raises `preemption.Preempted` if the process shall stop."""


class Forgotten:
    """Keeps nothing: a descent that is stopped begins again."""

    def load(self, name: str, like: Any) -> tuple[int, Any]:
        """Nothing was kept."""
        return 0, like

    def save_if_due(self, name: str, step: int, tree: Any, is_last: bool) -> None:
        """Keeps nothing."""


def to_lam(
    logs: Float[Array | np.ndarray, "C half"], critical: Int[Array | np.ndarray, "C"], space: SearchSpace
) -> Float[Array, "C half"]:
    """lam is exp of the logarithms in rising order, so it never falls whatever they are, and each of them has a
    gradient, those of a plateau too. Those of pairs that follow by NTK take no part.
    """
    is_free = jnp.arange(logs.shape[-1]) >= critical[:, None]
    rising = jnp.sort(jnp.where(is_free, logs, -jnp.inf), axis=-1)
    return space.followed(jnp.exp(jnp.where(is_free, rising, np.log(space.low))), critical)


def from_lam(lam: Float[Array | np.ndarray, "C half"], space: SearchSpace) -> Float[np.ndarray, "C half"]:
    """The inverse of `to_lam`, within the bounds of the space."""
    return np.asarray(np.log(np.clip(np.asarray(lam, np.float64), space.low, space.high)), np.float32)


def descend(
    key: PRNGKeyArray,
    state: SearchState,
    iteration: int,
    space: SearchSpace,
    settings: GradientSettings,
    objective: Objective,
    score: Score,
    kept: Kept | None = None,
    progress: Callable[[float], Any] = lambda candidates: None,
    restart: int = 0,
) -> SearchState:
    """One round: steps from the best candidates of a start so far; what they lead to, on the grid of the space and with
    every number of start tokens, is scored and appended.

    Time O(steps T^2) as for training on a block of documents; memory O(T) by device with remat, and the model's
    parameters have no gradient and no optimizer state.

    Args:
        kept: where a descent under way is kept; nowhere without it.
        progress: is told what a step costs, in candidates scored.
    """
    kept, key = kept or Forgotten(), jax.random.fold_in(key, iteration)
    own = state.own(restart)
    starts = own[_different(state.take(own), settings.starts)]
    rounds = len(np.unique(state.iteration[own][state.operator[own] == OPERATORS.index("gradient")]))
    at_once = objective.candidates_at_once
    found = []
    for first in range(0, len(starts), at_once):
        # With another number at once it is another descent: of other candidates, or on other blocks.
        name = f"{iteration}_{first}_by_{at_once}_on_{objective.documents_at_once}"
        chosen = state.take(starts[first : first + at_once])
        found.append(_descend_from(key, name, chosen, space, settings, rounds, objective, kept, progress))
    ends = jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)
    genes = jax.tree.map(lambda leaf: np.repeat(leaf, len(space.n_hat), axis=0), ends)
    genes = genes._replace(n_hat=np.tile(space.n_hat, len(starts)))
    parents = np.stack([np.repeat(starts, len(space.n_hat)), np.full(len(genes.n_hat), -1)], axis=1)
    documents = state.documents.shape[1]
    new = without_known(unscored(genes, "gradient", documents, parents, restart), state)
    if len(new):
        new.cost[0] += len(starts) * settings.steps * step_cost(settings, objective)
    return joined(state, scored(new, score, state.standing(bar=state.nll.min()), iteration))


def _different(state: SearchState, count: int) -> Int[np.ndarray, "starts"]:
    """Rows of the best candidates whose lam differ; one with other start tokens would lead to the same place."""
    order = state.top(len(state))
    _, first = np.unique(state.lam[order], axis=0, return_index=True)
    return order[np.sort(first)[:count]]


def step_cost(settings: GradientSettings, objective: Objective) -> float:
    """Of a step from one candidate, in forward equivalents: on average a block is an even part of all documents."""
    return settings.cost / len(objective.blocks)


def _descend_from(key, name, chosen, space, settings, rounds, objective, kept, progress) -> Genes:
    """Where up to `candidates_at_once` candidates get to; each for itself, they only share the model's batch axis."""
    count, at_once = len(chosen), objective.candidates_at_once
    rows = np.minimum(np.arange(at_once), count - 1)
    padded = chosen.take(rows)
    layout = objective.layout
    model = Llama(dataclasses.replace(objective.model.config, remat=settings.remat))
    variables, fixed = layout.replicate((variables_of(padded.genes, space), padded.genes))
    optimizer, scale = make_optimizer(settings), layout.replicate(np.float32(0.5**rounds))
    steps, (variables, moments) = kept.load(name, (variables, layout.replicate(optimizer.init(variables))))
    shares = [row_shares(objective, block) for block in objective.blocks]
    descend_once = partial(step, model, space, optimizer, objective.documents_at_once)
    for done, number in enumerate(_order(key, len(objective.blocks), settings.steps)):
        if done < steps:
            continue
        block = objective.blocks[number]
        variables, moments = descend_once(
            objective.params, variables, moments, fixed, scale, shares[number], block.weights, *block.rows
        )
        progress(count * step_cost(settings, objective))
        kept.save_if_due(name, done + 1, (variables, moments), is_last=done + 1 == settings.steps)
    ends = jax.device_get(_genes(variables, fixed, space))
    sound = np.isfinite(ends.lam).all(1) & np.isfinite(ends.mscale)
    if not sound.all():
        logging.warning("%d of %d descents ended in something that is not a number", (~sound[:count]).sum(), count)
        ends = ends._replace(
            lam=np.where(sound[:, None], ends.lam, padded.lam), mscale=np.where(sound, ends.mscale, padded.mscale)
        )
    return jax.tree.map(lambda leaf: leaf[:count], on_grid(ends, space))


@partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=(5, 6))
def step(
    model: Llama,
    space: SearchSpace,
    optimizer: optax.GradientTransformation,
    documents_at_once: int,
    params: dict,
    variables: Variables,
    moments: optax.OptState,
    fixed: Genes,
    scale: Float[Array, ""],
    shares: Float[Array, "R"],
    weights: Float[Array, "R T"],
    *rows: Int[Array, "R T"],
) -> tuple[Variables, optax.OptState]:
    """One step of all candidates on one block: variables and moments, which are overwritten.

    Args:
        fixed: genes of the candidates; those that are not variables stay.
        scale: of the step.
        shares: what each row counts.
        weights, rows: of a `Block`.
    """

    def loss(variables):
        genes = _genes(variables, fixed, space)
        factors = RopeFactors(genes.lam, genes.n_hat, genes.mscale)
        if len(genes.n_hat) > 1:
            factors = jax.tree.map(lambda leaf: jnp.repeat(leaf, documents_at_once, axis=0), factors)
        # Candidates share nothing, so the gradient of the sum is each one's own.
        return ((window_nll(model, params, factors, *rows) * weights).sum(1) * shares).sum()

    # What is not a number, of one candidate, must not spoil the others, nor its own later steps.
    gradient = jax.tree.map(lambda leaf: jnp.where(jnp.isfinite(leaf), leaf, 0), jax.grad(loss)(variables))
    updates, moments = optimizer.update(gradient, moments, variables)
    variables = optax.apply_updates(variables, jax.tree.map(lambda update: update * scale, updates))
    within = jnp.clip(variables["logs"], np.log(space.low), np.log(space.high))
    return jax.tree.map(constrain, (variables | {"logs": within}, moments))  # whole on every device, as they came


@cache
def make_optimizer(settings: GradientSettings) -> optax.GradientTransformation:
    """Adam on the falling learning rate of a first round; one object, so that no round compiles its steps anew."""
    return optax.adam(optax.cosine_decay_schedule(settings.learning_rate, settings.steps, alpha=0.05))


def _order(key: PRNGKeyArray, blocks: int, steps: int) -> list[int]:
    """Which block each step is for: all of them in random order, again and again."""
    epochs = -(-steps // blocks)
    orders = jax.vmap(lambda key: jax.random.permutation(key, blocks))(jax.random.split(key, epochs))
    return np.asarray(orders).ravel()[:steps].tolist()


def row_shares(objective: Objective, block: Block) -> Float[Array, "R"]:
    """What each row of a block counts, so that the mean over blocks is the score; on the devices."""
    shares = np.zeros(objective.documents_at_once, np.float32)
    shares[: len(block.documents)] = objective.weights[block.documents] * len(objective.blocks)
    return objective.layout.place(np.tile(shares, objective.candidates_at_once))


def variables_of(genes: Genes, space: SearchSpace) -> Variables:
    """The point that a descent from these candidates starts at."""
    low, high = space.mscale
    place = np.clip((genes.mscale - low) / max(high - low, 1e-9), 0.05, 0.95)
    return {
        "logs": from_lam(genes.lam, space),
        "mscale": np.asarray(np.log(place / (1 - place)), np.float32),
    }


def _genes(variables: Variables, fixed: Genes, space: SearchSpace) -> Genes:
    low, high = space.mscale
    mscale = fixed.mscale if low == high else low + (high - low) * jax.nn.sigmoid(variables["mscale"])
    return fixed._replace(lam=to_lam(variables["logs"], fixed.critical, space), mscale=mscale)


def on_grid(genes: Genes, space: SearchSpace) -> Genes:
    """The nearest candidate of the space whose numbers are multiples of its step; rounding keeps their order."""
    rounded = np.asarray(np.round(np.asarray(genes.lam, np.float64) / space.step) * space.step, np.float32)
    mscale = genes.mscale
    if space.mscale[0] < space.mscale[1]:
        mscale = np.asarray(np.clip(np.round(mscale / space.step) * space.step, *space.mscale), np.float32)
    return genes._replace(lam=np.asarray(space.completed(rounded, genes.critical)), mscale=mscale)
