"""Gradient refinement: lam is a pytree that the loss can be differentiated by, with the model's parameters frozen.

lam goes through a parametrisation that is monotone by construction, and is bounded by projection. Every step uses one
block of documents, a stochastic gradient. It costs a fraction of a full one, and its noise leads out of some local
minima. Start tokens have no gradient: every number of them is scored at the end.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from etils import epath
from jaxtyping import Array, Float, Int, PRNGKeyArray

from longrope_jax.evaluation.perplexity import window_nll
from longrope_jax.model import Llama
from longrope_jax.model.sharding import constrain
from longrope_jax.rope import RopeFactors
from longrope_jax.runtime import preemption, processes
from longrope_jax.runtime.checkpoints import Checkpoints
from longrope_jax.search.candidates import (
    OPERATORS,
    Genes,
    Score,
    SearchState,
    concatenate,
    evaluate,
    new_candidates,
    remove_duplicates,
)
from longrope_jax.search.objective import Block, Objective
from longrope_jax.search.settings import GradientSettings
from longrope_jax.search.space import SearchSpace

_SAVE_EVERY = 60.0  # seconds; a step takes a minute at a million tokens and milliseconds on a small model

Variables = dict[str, Float[Array | np.ndarray, "..."]]
"""What is optimised: "logs" [C, D/2] of lam, and "mscale" [C], a logit between its bounds."""


class RefinementCheckpoint(contextlib.ExitStack):
    """Checkpoints of gradient refinement: variables and optimizer moments, so that it continues at its last step.

    Args:
        directory: of the checkpoints.
        stage: named when the process is asked to stop.
    """

    def __init__(self, directory: epath.PathLike, stage: str):
        super().__init__()
        self._directory, self._stage, self._saved = epath.Path(directory), stage, time.monotonic()
        self._opened: dict[str, Checkpoints] = {}

    def load(self, name: str, like: Any) -> tuple[int, Any]:
        """(steps done, the tree) of the refinement of this name; (0, like) if it has not started."""
        checkpoints = self._open(name)
        latest = checkpoints.latest()
        if latest is None:
            return 0, like
        items, record = checkpoints.restore(latest, {"refinement": like})
        return record["steps"], items["refinement"]

    def save_if_due(self, name: str, steps: int, tree: Any, is_last: bool) -> None:
        """Saves once a minute, at the last step, and when the process is asked to stop.

        Raises:
            preemption.Preempted: it was asked; the step is saved.
        """
        is_asked_to_stop = preemption.requested()
        is_due = processes.any_of(time.monotonic() - self._saved > _SAVE_EVERY)  # all save, or none
        if not (is_asked_to_stop or is_due or is_last):
            return
        checkpoints = self._open(name)
        checkpoints.save(steps, {"refinement": tree}, {"steps": steps})
        self._saved = time.monotonic()
        if is_asked_to_stop:
            raise preemption.Preempted(self._stage, f"step {steps} of gradient refinement {name} is saved")

    def _open(self, name: str) -> Checkpoints:
        if name not in self._opened:
            self._opened[name] = self.enter_context(Checkpoints(self._directory / name, keep=1))
        return self._opened[name]


def to_lam(
    logs: Float[Array | np.ndarray, "C half"], critical: Int[Array | np.ndarray, "C"], space: SearchSpace
) -> Float[Array, "C half"]:
    """lam is exp of the sorted logarithms, so it never falls, and every logarithm of a plateau has a gradient.

    Logarithms of pairs below the critical pair are not used.
    """
    is_free = jnp.arange(logs.shape[-1]) >= critical[:, None]
    rising = jnp.sort(jnp.where(is_free, logs, -jnp.inf), axis=-1)
    return space.followed(jnp.exp(jnp.where(is_free, rising, np.log(space.low))), critical)


def from_lam(lam: Float[Array | np.ndarray, "C half"], space: SearchSpace) -> Float[np.ndarray, "C half"]:
    """The inverse of `to_lam`, within the bounds of the space."""
    return np.asarray(np.log(np.clip(np.asarray(lam, np.float64), space.low, space.high)), np.float32)


def refine(
    key: PRNGKeyArray,
    state: SearchState,
    iteration: int,
    space: SearchSpace,
    settings: GradientSettings,
    objective: Objective,
    score: Score,
    checkpoint: RefinementCheckpoint | None = None,
    progress: Callable[[float], Any] = lambda candidates: None,
    restart: int = 0,
) -> SearchState:
    """One round: refines the best candidates of a restart so far, rounds the results to the grid of the space, and
    appends them, scored, with every number of start tokens.

    Time O(steps T^2) as for training on a block of documents; memory O(T) by device with remat, and the model's
    parameters have no gradient and no optimizer state.

    Args:
        checkpoint: of a running refinement; without it a stopped one starts again.
        progress: is called with the cost of each step, in candidates.
    """
    key = jax.random.fold_in(key, iteration)
    rows = state.candidates_of_restart(restart)
    starts = rows[_best_lam(state.take(rows), settings.starts)]
    rounds = len(np.unique(state.iteration[rows][state.operator[rows] == OPERATORS.index("gradient")]))
    at_once = objective.candidates_at_once
    found = []
    for first in range(0, len(starts), at_once):
        # Other batch sizes are another refinement: of other candidates, or on other blocks.
        name = f"{iteration}_{first}_by_{at_once}_on_{objective.documents_at_once}"
        chosen = state.take(starts[first : first + at_once])
        found.append(_refine_from(key, name, chosen, space, settings, rounds, objective, checkpoint, progress))
    ends = jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)
    genes = jax.tree.map(lambda leaf: np.repeat(leaf, len(space.n_hat), axis=0), ends)
    genes = genes._replace(n_hat=np.tile(space.n_hat, len(starts)))
    parents = np.stack([np.repeat(starts, len(space.n_hat)), np.full(len(genes.n_hat), -1)], axis=1)
    documents = state.documents.shape[1]
    new = remove_duplicates(new_candidates(genes, "gradient", documents, parents, restart), state)
    if len(new):
        new.cost[0] += len(starts) * settings.steps * step_cost(settings, objective)
    return concatenate(state, evaluate(new, score, state.incumbents(threshold=state.nll.min()), iteration))


def _best_lam(state: SearchState, count: int) -> Int[np.ndarray, "starts"]:
    """Rows of the best candidates with different lam. Another n_hat would lead to the same lam."""
    order = state.top(len(state))
    _, first = np.unique(state.lam[order], axis=0, return_index=True)
    return order[np.sort(first)[:count]]


def step_cost(settings: GradientSettings, objective: Objective) -> float:
    """Cost of a step of one candidate, in forward equivalents: on average a block is an equal part of all documents."""
    return settings.cost / len(objective.blocks)


def _refine_from(key, name, chosen, space, settings, rounds, objective, checkpoint, progress) -> Genes:
    """Refines up to `candidates_at_once` candidates. They share nothing but the batch axis of the model."""
    count, at_once = len(chosen), objective.candidates_at_once
    rows = np.minimum(np.arange(at_once), count - 1)
    padded = chosen.take(rows)
    layout = objective.layout
    model = Llama(dataclasses.replace(objective.model.config, remat=settings.remat))
    variables, fixed = layout.replicate((variables_of(padded.genes, space), padded.genes))
    optimizer, scale = make_optimizer(settings), layout.replicate(np.float32(0.5**rounds))
    like = (variables, layout.replicate(optimizer.init(variables)))
    steps, (variables, moments) = checkpoint.load(name, like) if checkpoint else (0, like)
    shares = [row_shares(objective, block) for block in objective.blocks]
    step_once = partial(step, model, space, optimizer, objective.documents_at_once)
    for done, number in enumerate(_order(key, len(objective.blocks), settings.steps)):
        if done < steps:
            continue
        block = objective.blocks[number]
        variables, moments = step_once(
            objective.params, variables, moments, fixed, scale, shares[number], block.weights, *block.rows
        )
        progress(count * step_cost(settings, objective))
        if checkpoint:
            checkpoint.save_if_due(name, done + 1, (variables, moments), is_last=done + 1 == settings.steps)
    ends = jax.device_get(_genes(variables, fixed, space))
    finite = np.isfinite(ends.lam).all(1) & np.isfinite(ends.mscale)
    if not finite.all():
        logging.warning("%d of %d gradient refinements ended with NaN or infinity", (~finite[:count]).sum(), count)
        ends = ends._replace(
            lam=np.where(finite[:, None], ends.lam, padded.lam), mscale=np.where(finite, ends.mscale, padded.mscale)
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
    """One step of all candidates on one block. Returns variables and moments; the old ones are overwritten.

    Args:
        fixed: genes of the candidates; those that are not variables stay.
        scale: of the learning rate.
        shares: weight of each row.
        weights, rows: of a `Block`.
    """

    def loss(variables):
        genes = _genes(variables, fixed, space)
        factors = RopeFactors(genes.lam, genes.n_hat, genes.mscale)
        if len(genes.n_hat) > 1:
            factors = jax.tree.map(lambda leaf: jnp.repeat(leaf, documents_at_once, axis=0), factors)
        # Candidates share nothing, so the gradient of the sum holds the gradient of each.
        return ((window_nll(model, params, factors, *rows) * weights).sum(1) * shares).sum()

    # NaN or infinity of one candidate must not spoil the others, nor its own later steps.
    gradient = jax.tree.map(lambda leaf: jnp.where(jnp.isfinite(leaf), leaf, 0), jax.grad(loss)(variables))
    updates, moments = optimizer.update(gradient, moments, variables)
    variables = optax.apply_updates(variables, jax.tree.map(lambda update: update * scale, updates))
    within = jnp.clip(variables["logs"], np.log(space.low), np.log(space.high))
    return jax.tree.map(constrain, (variables | {"logs": within}, moments))  # replicated, as they came


@cache
def make_optimizer(settings: GradientSettings) -> optax.GradientTransformation:
    """Adam with the learning rate of a first round; one object, so that later rounds do not compile again."""
    return optax.adam(optax.cosine_decay_schedule(settings.learning_rate, settings.steps, alpha=0.05))


def _order(key: PRNGKeyArray, blocks: int, steps: int) -> list[int]:
    """The block of each step: all blocks in random order, again and again."""
    epochs = -(-steps // blocks)
    orders = jax.vmap(lambda key: jax.random.permutation(key, blocks))(jax.random.split(key, epochs))
    return np.asarray(orders).ravel()[:steps].tolist()


def row_shares(objective: Objective, block: Block) -> Float[Array, "R"]:
    """Weight of each row of a block, on the devices, so that the mean over blocks is the score."""
    shares = np.zeros(objective.documents_at_once, np.float32)
    shares[: len(block.documents)] = objective.weights[block.documents] * len(objective.blocks)
    return objective.layout.place(np.tile(shares, objective.candidates_at_once))


def variables_of(genes: Genes, space: SearchSpace) -> Variables:
    """The variables at which the refinement of these candidates starts."""
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
