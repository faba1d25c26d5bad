"""What a search starts from: the published methods, LongRoPE2's constants above a critical pair, and one's own."""

import dataclasses
from collections.abc import Collection

import numpy as np

from longrope_jax.rope import RopeFactors, Trained, extend, unscaled
from longrope_jax.search.candidates import Genes
from longrope_jax.search.space import SearchSpace

PUBLISHED = ("linear", "ntk", "yarn")
"""Algorithm 1's first individuals, by the names that `SearchSettings.published` may have."""

PAPER_SEEDS = (*PUBLISHED, "yarn_mistral", "yarn_with_temperature", "unscaled", "trained", "trained_clipped")
"""All names that `paper_seeds` gives."""


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

    Beyond the window that the model was trained with, they are PI, NTK and YaRN as its next extension, on its
    *effective* wavelengths; for a model that was extended before also YaRN with its wider ramp, as two extensions
    leave a step between the pairs that neither touched and those that both stretched. For a shorter target (short-
    context recovery) they are the same methods on the original model, no method at all, and the trained factors. All
    have the temperature that the model was trained with, as a search compares rotations; where it is searched too there
    is also YaRN with its own.

    Args:
        published: the methods; where it is not all three there is nothing beside them.
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
    return _different({name: _within(seed, space) for name, seed in seeds.items()})


def critical_seeds(
    space: SearchSpace, head_dim: int, count: int, mscale: float, seed: int
) -> tuple[dict[str, RopeFactors], list[int]]:
    """LongRoPE2's first individuals (arXiv 2502.20082, sec. 3.2) and the critical pair of each: all pairs of the space
    in turn, and from there on a constant factor drawn from the space.
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
    """Factors made for an extension by `scale`, carried to another: lam - 1 grows as s - 1 does (the released code's
    `rescale`). From no extension at all nothing can be carried: they stay.
    """
    if scale <= 1:
        return factors
    lam = 1 + (np.asarray(factors.lam, float) - 1) * (new_scale - 1) / (scale - 1)
    return dataclasses.replace(factors, lam=np.asarray(lam, np.float32))


def as_genes(
    seeds: dict[str, RopeFactors], space: SearchSpace, critical: list[int] | None = None
) -> tuple[list[str], Genes]:
    """Candidates of the space, each once, and their names.

    Args:
        critical: the critical pair of each; without it they get the last that there is, which frees the fewest pairs.
    """
    factors = [_within(seed, space) for seed in seeds.values()]
    pairs = np.array([space.critical[-1]] * len(seeds) if critical is None else critical, np.int32)
    genes = Genes(
        np.asarray(space.completed(np.stack([seed.lam for seed in factors]), pairs)),
        np.array([seed.n_hat for seed in factors], np.int32),
        np.array([seed.mscale for seed in factors], np.float32),
        pairs,
    )
    first = _first_of_each([(*lam.tolist(), *rest) for lam, *rest in zip(*genes, strict=True)])
    return [list(seeds)[row] for row in first], Genes(*(leaf[first] for leaf in genes))


def _different(seeds: dict[str, RopeFactors]) -> dict[str, RopeFactors]:
    first = _first_of_each([(*seed.lam.tolist(), int(seed.n_hat), float(seed.mscale)) for seed in seeds.values()])
    return {list(seeds)[row]: list(seeds.values())[row] for row in first}


def _first_of_each(keys: list[tuple]) -> list[int]:
    return [row for row, key in enumerate(keys) if key not in keys[:row]]


def _within(seed: RopeFactors, space: SearchSpace) -> RopeFactors:
    low, high = np.float32(space.low), np.float32(space.high)
    return RopeFactors(
        np.clip(np.asarray(seed.lam, np.float32), low, high),
        np.int32(seed.n_hat),
        np.clip(np.float32(seed.mscale), *np.asarray(space.mscale, np.float32)),
    )
