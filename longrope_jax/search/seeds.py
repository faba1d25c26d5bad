"""What a search starts from: published methods, LongRoPE2's constants above a critical pair, random ramps, your seeds.

A score has many local minima, and mutations of a few seeds stay near them. A random ramp leaves the first pairs alone,
climbs, and stays at its height, as YaRN and the piecewise operators of the released search do, with ends, height and
bend at random. Of a hundred ramps some are far better than every published method.
"""

import dataclasses
from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from longrope_jax.rope import RopeFactors, Trained, extend, unscaled
from longrope_jax.search.candidates import (
    Genes,
    Score,
    SearchState,
    concatenate,
    evaluate,
    new_candidates,
    remove_duplicates,
)
from longrope_jax.search.space import SearchSpace

PUBLISHED = ("linear", "ntk", "yarn")
"""Algorithm 1's first individuals, by the names that `SearchSettings.published` may have."""

PAPER_SEEDS = (*PUBLISHED, "yarn_mistral", "yarn_with_temperature", "unscaled", "trained", "trained_clipped")
"""All names that `paper_seeds` gives."""

_RAMPS_BATCH = 32  # ramps scored before the threshold of their race is set again
_THRESHOLD_RANK = 8  # the threshold is the score of this candidate, counted from the best
# Ranges of a ramp: begin and width in shares of all pairs, height in shares of log high, and the exponent of the climb.
_BEGIN, _WIDTH, _HEIGHT, _BEND = (-0.1, 0.6), (0.03, 0.7), (0.75, 1.0), (0.5, 2.0)


def paper_seeds(
    head_dim: int,
    target_length: int,
    base: float,
    original_length: int,
    trained: Trained,
    space: SearchSpace,
    published: Collection[str] = PUBLISHED,
) -> dict[str, RopeFactors]:
    """Algorithm 1's first individuals by name, lam within the space.

    For a target longer than the model was trained with, they are PI, NTK and YaRN as its next extension, on its
    *effective* wavelengths. A model that was extended before also has YaRN with a wider ramp, because two extensions
    leave a step between the pairs that neither touched and those that both stretched. For a shorter target (short-
    context recovery) they are the same methods on the original model, the unscaled rotation, and the trained factors.
    All have the temperature that the model was trained with. Where the temperature is searched too, there is also YaRN
    with its own.

    Args:
        published: the methods; if it is not all three, the other seeds are left out.
    """
    methods = {"linear": "linear", "ntk": "ntk", "yarn": "yarn_without_temperature"}
    if trained.length > original_length:
        methods["yarn_mistral"] = "yarn_mistral"
    seeds = {}
    if target_length > trained.length:
        start = trained
    else:
        start = Trained(original_length, unscaled(head_dim))
        is_clipped = np.max(trained.factors.lam) > space.high
        seeds = {"trained_clipped" if is_clipped else "trained": trained.factors, "unscaled": start.factors}
    seeds |= {name: extend(method, start, target_length, head_dim, base) for name, method in methods.items()}
    seeds = {name: dataclasses.replace(seed, mscale=np.asarray(trained.factors.mscale)) for name, seed in seeds.items()}
    if space.mscale[0] < space.mscale[1]:
        seeds["yarn_with_temperature"] = extend("yarn", start, target_length, head_dim, base)
    if set(published) != set(PUBLISHED):
        seeds = {name: seed for name, seed in seeds.items() if name in published}
    return _without_duplicates({name: _clip(seed, space) for name, seed in seeds.items()})


def critical_seeds(
    space: SearchSpace, head_dim: int, count: int, mscale: float, seed: int
) -> tuple[dict[str, RopeFactors], list[int]]:
    """LongRoPE2's first individuals (arXiv 2502.20082, sec. 3.2) and the critical pair of each. The pairs of the space
    take turns; from the critical pair on, lam is a constant drawn from the space.
    """
    rng = np.random.default_rng(seed)
    steps = int((space.high - space.low) / space.step)
    seeds, pairs = {}, []
    for number in range(count):
        critical = space.critical[number % len(space.critical)]
        factor = space.low + space.step * rng.integers(steps + 1)
        lam = np.asarray(space.completed(np.full(head_dim // 2, factor, np.float32), np.int32(critical)))
        seeds[f"critical_{critical}_{number}"] = RopeFactors(lam, np.int32(0), np.float32(mscale))
        pairs.append(critical)
    return seeds, pairs


def rescaled(factors: RopeFactors, scale: float, new_scale: float) -> RopeFactors:
    """Factors made for an extension by `scale`, rescaled to another: lam - 1 grows as s - 1 does (the released code's
    `rescale`). Factors for no extension stay as they are.
    """
    if scale <= 1:
        return factors
    lam = 1 + (np.asarray(factors.lam, float) - 1) * (new_scale - 1) / (scale - 1)
    return dataclasses.replace(factors, lam=np.asarray(lam, np.float32))


def as_genes(
    seeds: dict[str, RopeFactors], space: SearchSpace, critical: list[int] | None = None
) -> tuple[list[str], Genes]:
    """Names and genes of the seeds as candidates of the space, each once.

    Args:
        critical: the critical pair of each; by default the last one of the space, which frees the fewest pairs.
    """
    factors = [_clip(seed, space) for seed in seeds.values()]
    pairs = np.array([space.critical[-1]] * len(seeds) if critical is None else critical, np.int32)
    genes = Genes(
        np.asarray(space.completed(np.stack([seed.lam for seed in factors]), pairs)),
        np.array([seed.n_hat for seed in factors], np.int32),
        np.array([seed.mscale for seed in factors], np.float32),
        pairs,
    )
    first = _first_of_each([(*lam.tolist(), *rest) for lam, *rest in zip(*genes, strict=True)])
    return [list(seeds)[row] for row in first], Genes(*(leaf[first] for leaf in genes))


def scan_ramps(
    key: PRNGKeyArray,
    state: SearchState,
    iteration: int,
    space: SearchSpace,
    count: int,
    score: Score,
    restart: int = 0,
) -> SearchState:
    """Appends `count` scored random ramps of a restart, with the other genes of its best candidate so far.

    The first batch is read in full. Later ramps may race for a place among the best.
    """
    key = jax.random.fold_in(key, iteration)
    lam = np.asarray(draw_ramps(key, count, state.lam.shape[1], space))
    known = state.take(state.candidates_of_restart(restart))
    fixed = jax.tree.map(lambda leaf: np.repeat(leaf[known.top(1)], count, axis=0), known.genes)
    critical = np.asarray(space.critical, np.int32)[np.arange(count) % len(space.critical)]
    genes = Genes(np.asarray(space.completed(lam, critical)), fixed.n_hat, fixed.mscale, critical)
    documents = state.documents.shape[1]
    new = remove_duplicates(new_candidates(genes, "ramp", documents, restart=restart), state)
    for first in range(0, len(new), _RAMPS_BATCH):
        batch = new.take(np.arange(first, min(first + _RAMPS_BATCH, len(new))))
        threshold = np.sort(state.nll[state.candidates_of_restart(restart)])[:_THRESHOLD_RANK][-1]
        incumbents = state.incumbents(threshold) if first else None
        state = concatenate(state, evaluate(batch, score, incumbents, iteration))
    return state


def draw_ramps(key: PRNGKeyArray, count: int, half: int, space: SearchSpace) -> Float[Array, "count half"]:
    """log lam = log height * climb(pair), rounded to the step of the space and within its bounds. A height is in the
    upper quarter of the space, in logarithms.
    """
    begin, width, height, bend = jax.random.uniform(key, (4, count, 1))
    begin, width, height = (
        low + (high - low) * drawn for (low, high), drawn in ((_BEGIN, begin), (_WIDTH, width), (_HEIGHT, height))
    )
    bend = _BEND[0] * (_BEND[1] / _BEND[0]) ** bend
    climb = jnp.clip((jnp.arange(half) / half - begin) / width, 0, 1) ** bend
    low, high = np.log(space.low), np.log(space.high)
    lam = jnp.exp(low + (high - low) * height * climb)
    return jnp.clip(jnp.round(lam / space.step) * space.step, space.low, space.high)


def _without_duplicates(seeds: dict[str, RopeFactors]) -> dict[str, RopeFactors]:
    first = _first_of_each([(*seed.lam.tolist(), int(seed.n_hat), float(seed.mscale)) for seed in seeds.values()])
    return {list(seeds)[row]: list(seeds.values())[row] for row in first}


def _first_of_each(keys: list[tuple]) -> list[int]:
    return [row for row, key in enumerate(keys) if key not in keys[:row]]


def _clip(seed: RopeFactors, space: SearchSpace) -> RopeFactors:
    low, high = np.float32(space.low), np.float32(space.high)
    return RopeFactors(
        np.clip(np.asarray(seed.lam, np.float32), low, high),
        np.int32(seed.n_hat),
        np.clip(np.float32(seed.mscale), *np.asarray(space.mscale, np.float32)),
    )
