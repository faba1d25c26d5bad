"""What a search starts from: published methods, LongRoPE2's constants above a critical pair, random ramps, your seeds.

A score has many local minima, and mutations of a few seeds stay near them. A random ramp leaves the first pairs alone,
climbs, and stays at its height, as YaRN and the piecewise operators of the released search do, with ends, height and
bend at random. Of a hundred ramps some are far better than every published method.
"""

import dataclasses
import itertools
from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from longrope_jax.rope import RopeFactors, Trained, compose, extend, unscaled, yarn
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

YARN_BETA_FAST = (1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)
YARN_BETA_SLOW = (0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3)
YARN_SCALES = (0.75, 0.8125, 0.875, 0.9375, 1, 1.0625, 1.125, 1.25)
YARN_GRID_SIZE = len(YARN_BETA_FAST) * len(YARN_BETA_SLOW) * len(YARN_SCALES)
"""The grid of `yarn_grid`: turns in the original length at both ends of the ramp, and scales in units of L'/L."""

PAPER_SEEDS = (*PUBLISHED, "yarn_mistral", "yarn_with_temperature", "unscaled", "trained", "trained_clipped")
"""All names that `paper_seeds` gives."""

_BATCH = 32  # candidates scored before the threshold of their race is set again
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
    start = start_of_extension(trained, original_length, target_length)
    if target_length <= trained.length:
        is_clipped = np.max(trained.factors.lam) > space.high
        seeds = {"trained_clipped" if is_clipped else "trained": trained.factors, "unscaled": start.factors}
    seeds |= {name: extend(method, start, target_length, head_dim, base) for name, method in methods.items()}
    seeds = {name: dataclasses.replace(seed, mscale=np.asarray(trained.factors.mscale)) for name, seed in seeds.items()}
    if space.mscale[0] < space.mscale[1]:
        seeds["yarn_with_temperature"] = extend("yarn", start, target_length, head_dim, base)
    if set(published) != set(PUBLISHED):
        seeds = {name: seed for name, seed in seeds.items() if name in published}
    return _without_duplicates({name: _clip(seed, space) for name, seed in seeds.items()})


def start_of_extension(trained: Trained, original_length: int, target_length: int) -> Trained:
    """What published methods extend: the trained model, or the original one where the target is not longer (tokens)."""
    if target_length > trained.length:
        return trained
    return Trained(original_length, unscaled(2 * len(trained.factors.lam)))


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
    """Appends `count` scored random ramps of a restart, with the other genes of its best candidate so far."""
    key = jax.random.fold_in(key, iteration)
    lam = np.asarray(draw_ramps(key, count, state.lam.shape[1], space))
    known = state.take(state.candidates_of_restart(restart))
    fixed = jax.tree.map(lambda leaf: np.repeat(leaf[known.top(1)], count, axis=0), known.genes)
    critical = np.asarray(space.critical, np.int32)[np.arange(count) % len(space.critical)]
    genes = Genes(np.asarray(space.completed(lam, critical)), fixed.n_hat, fixed.mscale, critical)
    return _scan(state, new_candidates(genes, "ramp", state.documents.shape[1], restart=restart), iteration, score)


def scan_yarn_grid(
    key: PRNGKeyArray,
    state: SearchState,
    iteration: int,
    grid: Collection[RopeFactors],
    space: SearchSpace,
    score: Score,
) -> SearchState:
    """Appends the scored YaRNs of a grid, in random order, so that a race meets good and bad ones early."""
    _, genes = as_genes({str(number): factors for number, factors in enumerate(grid)}, space)
    order = np.asarray(jax.random.permutation(jax.random.fold_in(key, iteration), len(genes.n_hat)))
    genes = jax.tree.map(lambda leaf: leaf[order], genes)
    return _scan(state, new_candidates(genes, "yarn", state.documents.shape[1]), iteration, score)


def _scan(state: SearchState, candidates: SearchState, iteration: int, score: Score) -> SearchState:
    """Scores candidates batch by batch. The first batch has no threshold, so it may be screened, but it does not race;
    later ones may, for a place among the best of their restart.
    """
    new = remove_duplicates(candidates, state)
    for first in range(0, len(new), _BATCH):
        batch = new.take(np.arange(first, min(first + _BATCH, len(new))))
        rivals = state.candidates_of_restart(int(batch.restart[0]))
        threshold = np.sort(state.nll[rivals])[:_THRESHOLD_RANK][-1]
        incumbents = state.incumbents(threshold if first else np.inf)
        state = concatenate(state, evaluate(batch, score, incumbents, iteration))
    return state


def yarn_grid(
    trained: Trained, target_length: int, head_dim: int, base: float, temperatures: bool = False
) -> dict[tuple[float, float, float, bool], RopeFactors]:
    """YaRNs for the target length by (beta_fast, beta_slow, scale, with YaRN's temperature), each once.

    The published beta_fast = 32 and beta_slow = 1 were chosen for LLaMA. With a short original length no pair turns so
    often, so a fair baseline chooses the ramp on the search documents, and the scale within what the search may use.
    """
    scale = max(target_length / trained.length, 1.0)
    grid: dict[tuple[float, float, float, bool], RopeFactors] = {}
    known = set()
    for fast, slow, share, temperature in itertools.product(
        YARN_BETA_FAST, YARN_BETA_SLOW, YARN_SCALES, (False, True) if temperatures else (False,)
    ):
        if fast <= slow or share * scale < 1:
            continue

        def method(wavelengths, fast=fast, slow=slow, share=share, temperature=temperature):
            options = dict(beta_fast=fast, beta_slow=slow, temperature=temperature, wavelengths=wavelengths)
            return yarn(head_dim, share * scale, base, trained.length, **options)

        factors = compose(trained.factors, method, head_dim, base)
        if (name := (np.asarray(factors.lam).tobytes(), float(factors.mscale))) not in known:
            known.add(name)
            grid[fast, slow, share * scale, temperature] = factors
    return grid


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
