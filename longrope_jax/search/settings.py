"""The settings of a search: for which length, on what, where and how."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from longrope_jax.model import LlamaConfig
from longrope_jax.model.config import REMAT_POLICIES
from longrope_jax.rope import longrope_mscale
from longrope_jax.runtime.mesh import Layout
from longrope_jax.search.objective import ScreeningSettings, TermSettings
from longrope_jax.search.operators import CROSSOVERS, MUTATIONS
from longrope_jax.search.seeds import PAPER_SEEDS, PUBLISHED, YARN_GRID_SIZE
from longrope_jax.search.space import N_HAT, SPACES, SearchSpace, critical_space, paper_space
from longrope_jax.settings import (
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    Rule,
    Seed,
    Settings,
    one_of,
)

METHODS = {
    "evolution": ("evolution",),
    "gradient": ("gradient",),
    "hybrid": ("gradient", "evolution"),
    "cma_es": ("cma_es",),
    "yarn_grid": (),
}
"""Search methods, and the sections of `SearchSettings` that each uses."""


@dataclass(frozen=True)
class EvolutionSettings(Settings):
    """Algorithm 1's numbers and operators. The numbers are the paper's up to 512k tokens (sec. 4.1); the paper's
    operators are in `paper`.

    The defaults were measured, with races and random ramps (docs/results/search.md): most mutations are small, and of
    sixteen children the surrogate selects one. The reach is wider than the paper's narrowest reading. On two tiny
    models extended four times it took the one with 64 dimensions a head from a search perplexity of 7.31 [7.30, 7.33]
    to 7.17 [7.14, 7.20] (mean and range of two searches of 1344 candidates on one document of 512 tokens), and the one
    with 32 from 6.60 [6.59, 6.62] to 6.54 [6.42, 6.66], which is no clear difference.

    Attributes:
        population: P, candidates in population 0, the seeds included.
        mutations, crossovers: N1 and N2, new candidates per iteration.
        parents: k, the best candidates so far, which are the parents of all children.
        iterations: T.
        mutation: how a candidate is changed, one of `operators.MUTATIONS`.
        mutation_probability: p, of every gene.
        reach: breadth of a redraw in rotary pairs, see `operators.redraw`; 1 is the narrowest reading of the paper.
        crossover: how two parents are mixed, one of `operators.CROSSOVERS`.
        restarts: how often the search starts from the seeds, with random ramps of its own if there are any. A
            population settles after a while, and another one settles elsewhere.
        candidates_per_evaluation: children made for each one that is scored; with more than one, a surrogate selects
            by expected improvement, see `search/surrogate.py`.
    """

    population: PositiveInt = 64
    mutations: NonNegativeInt = 16
    crossovers: NonNegativeInt = 16
    parents: PositiveInt = 32
    iterations: NonNegativeInt = 40
    mutation: Annotated[str, one_of(MUTATIONS)] = "redraw_few"
    mutation_probability: Probability = 0.3
    reach: Annotated[int, Rule(lambda pairs: 0 < pairs <= 10_000, "must lie between 1 and 10,000 pairs")] = 4
    crossover: Annotated[str, one_of(CROSSOVERS)] = "uniform"
    restarts: PositiveInt = 1
    candidates_per_evaluation: PositiveInt = 16

    @classmethod
    def paper(cls, **changes: Any) -> "EvolutionSettings":
        """Algorithm 1 read literally: every gene is redrawn with p = 0.3, within the gap between its neighbours."""
        literal = dict(mutation="redraw", mutation_probability=0.3, reach=1, crossover="uniform", restarts=1)
        return cls(**{**literal, "candidates_per_evaluation": 1, **changes})

    @classmethod
    def released(cls, **changes: Any) -> "EvolutionSettings":
        """The operators of LongRoPE's released code (its `dim_mono`): a crossover is mostly one pair."""
        return cls.paper(**dict(crossover="released") | changes)

    @property
    def evaluations(self) -> int:
        """How many candidates one restart scores, the seeds included."""
        return self.population + self.iterations * (self.mutations + self.crossovers)


@dataclass(frozen=True)
class GradientSettings(Settings):
    """Gradient refinement.

    Attributes:
        rounds: each starts from the best candidates so far, and ends with factors on the grid of the space.
        starts: how many candidates a round starts from.
        steps: of Adam in a round, each on one block of documents.
        learning_rate: at the first step of the first round. Every later round has half the rate of the one before.
            Within a round it falls to a twentieth along a cosine.
        cost: of a gradient in forward passes over the same documents, to account for steps; measured on a CPU.
        remat: what the backward pass keeps of a block of the model, see `LlamaConfig`.
    """

    rounds: PositiveInt = 1
    starts: PositiveInt = 2
    steps: PositiveInt = 40
    learning_rate: PositiveFloat = 0.01
    cost: PositiveFloat = 5.0
    remat: Annotated[str, one_of(REMAT_POLICIES)] = "nothing_saveable"


@dataclass(frozen=True)
class CmaEsSettings(Settings):
    """CMA-ES.

    Attributes:
        population: candidates per generation.
        iterations: generations.
    """

    population: Annotated[int, Rule(lambda count: count >= 2, "must be at least 2")] = 32
    iterations: PositiveInt = 40

    @property
    def evaluations(self) -> int:
        """How many candidates it scores, not counting repeated ones."""
        return self.population * self.iterations


@dataclass(frozen=True)
class SeedSettings(Settings):
    """Factors of your own to start from.

    Attributes:
        factors: a search, table or load stage before this one, or a file: our JSON, a CSV of the released search, a
            config.json. Of several by length, those for the target length.
        target_length: that they were made for, tokens; other lengths are rescaled. 0 is what the stage or file says.
    """

    factors: Annotated[str, Rule(bool, "is empty; name a stage before this one or a file")]
    target_length: NonNegativeInt = 0


@dataclass(frozen=True)
class SearchSettings(Settings):
    """What is searched for, on what, and how.

    Attributes:
        target_length: L', tokens.
        model: the stage whose model is searched on; "" is the latest before this one.
        documents: how many documents a candidate is scored on, from different files as far as there are enough.
        seed: of the documents and of the search.
        objective: terms of the score, by names of your own; see `TermSettings`. Empty is the perplexity of
            documents of the target length and a margin.
        method: "evolution", LongRoPE's Algorithm 1; "gradient", gradient refinement; "hybrid", gradient refinement of a
            few candidates and then Algorithm 1 from the results; "cma_es", a baseline; "yarn_grid", the baseline of a
            YaRN whose ramp and scale are the best on the search documents.
        racing: confidence (0.99, say) with which a race decides before all documents are read whether a candidate is
            among the best, see `search/racing.py`; 0 reads all. A block of `documents_at_once` is the least that is
            read.
        screening: skipped positions as the first rung of a race: which candidates of a generation are read at all is
            decided on a few pieces of the documents.
        published: which of linear, ntk and yarn to start from; all three bring the other seeds of `paper_seeds` too.
        seeds: factors of your own to start from, by names of your own.
        ramps: number of random ramps to start from, see `search/seeds.py`.
        space: "paper", LongRoPE's table 4, or "critical_dimension", LongRoPE2's.
        upper_bound: largest lam of the paper's space in units of the scale L'/L (1.25 in table 4); seeds are clipped.
        n_hat: numbers of start tokens to choose from; those above the original length are left out.
        mscale: bounds of the attention temperature, in units of the one that the model was trained with; the search
            includes the temperature if they differ.
        candidates_at_once: how many candidates are a batch axis of the model: 1 is best on a CPU, more on an
            accelerator that one candidate does not fill.
        documents_at_once: how many documents of one candidate are evaluated together; also the block that a race, or
            a gradient step, reads at a time.
        evolution, gradient, cma_es: the numbers of the methods.
        held_out_documents: the best candidate of every iteration is evaluated at the end on so many documents of the
            evaluation split, to show how much the search overfits its documents; nothing is chosen by that.
        data: the section of the text.
    """

    target_length: PositiveInt
    model: str = ""
    documents: PositiveInt = 5
    seed: Seed = 0
    objective: dict[str, TermSettings] = field(default_factory=dict)
    method: Annotated[str, one_of(METHODS)] = "evolution"
    racing: Annotated[
        float, Rule(lambda p: p == 0 or 0.5 < p < 1, "must be a confidence between 0.5 and 1, or 0 for none")
    ] = 0.0
    screening: ScreeningSettings = field(default_factory=ScreeningSettings)
    published: tuple[str, ...] = PUBLISHED
    seeds: dict[str, SeedSettings] = field(default_factory=dict)
    ramps: NonNegativeInt = 0
    space: Annotated[str, one_of(SPACES)] = "paper"
    upper_bound: float = 1.25
    n_hat: tuple[int, ...] = N_HAT
    mscale: Annotated[tuple[float, ...], Rule(lambda bounds: len(bounds) == 2, "must be two bounds")] = (1.0, 1.0)
    candidates_at_once: PositiveInt = 1
    documents_at_once: PositiveInt = 1
    evolution: EvolutionSettings = field(default_factory=EvolutionSettings)
    gradient: GradientSettings = field(default_factory=GradientSettings)
    cma_es: CmaEsSettings = field(default_factory=CmaEsSettings)
    held_out_documents: NonNegativeInt = 0
    data: str = "data"

    @classmethod
    def released(cls, target_length: int, original_length: int, **changes: Any) -> "SearchSettings":
        """The search of LongRoPE's released code: its operators, YaRN as the only seed, no start tokens, lam up to
        1 + s, the "su" temperature (`rope.longrope_mscale`), nothing read beyond the target. Lengths are tokens.

        What differs still: its YaRN blends factors instead of frequencies. It puts BOS before every window: set
        `LoadSettings.bos` to "windows", if the tokenizer does not say so already.

        Raises:
            ValueError: an original length of a single token.
        """
        if original_length < 2:
            raise ValueError(f"original_length = {original_length} must be at least 2 tokens")
        scale = target_length / original_length
        mscale = longrope_mscale(scale, original_length)
        released: dict[str, Any] = dict(
            published=("yarn",),
            n_hat=(0,),
            upper_bound=(1 + scale) / scale,
            mscale=(mscale, mscale),
            objective={"perplexity": TermSettings.paper()},
            evolution=EvolutionSettings.released(),
        )
        return cls(target_length, **released | changes)

    def __post_init__(self):
        super().__post_init__()
        for name, methods in (("racing", ("cma_es",)), ("ramps", ("cma_es", "yarn_grid"))):
            if getattr(self, name) and self.method in methods:
                raise ValueError(f"{name} = {getattr(self, name)} is not for method = {self.method!r}")
        if self.screening.share and self.method == "cma_es":
            raise ValueError(f"screening.share = {self.screening.share} is not for method = 'cma_es'")
        for name, term in self.terms.items() if self.screening.share else ():
            if term.kind != "perplexity":
                raise ValueError(f"screening.share is for perplexity, not for objective.{name}.kind = {term.kind!r}")
            self.screening.positions(term.window(self.target_length))
        if self.method == "yarn_grid" and self.space != "paper":
            raise ValueError(f"space = {self.space!r} is not for method = 'yarn_grid', which has the space of YaRN")
        if unknown := set(self.published) - set(PUBLISHED):
            raise ValueError(f"published = {self.published}: {unknown.pop()!r} is none of {', '.join(PUBLISHED)}")
        if not self.published and not self.seeds and self.space == "paper":
            raise ValueError("published and seeds are empty; there is nothing to start from")
        if taken := set(self.seeds) & set(PAPER_SEEDS):
            raise ValueError(f"seeds.{taken.pop()}: another seed has that name already; take one of your own")

    @property
    def terms(self) -> dict[str, TermSettings]:
        """The terms of the objective."""
        return self.objective or {"perplexity": TermSettings()}

    @property
    def steps(self) -> int:
        """How many steps the method has, see `methods.search_steps`; after each there may be a better candidate."""
        has_ramps = self.ramps > 0
        evolution = 1 + has_ramps + self.evolution.iterations
        return {
            "evolution": self.evolution.restarts * evolution + has_ramps,
            "gradient": 1 + has_ramps + self.gradient.rounds,
            "hybrid": 1 + self.evolution.restarts * (evolution + self.gradient.rounds),
            "cma_es": 1 + self.cma_es.iterations,
            "yarn_grid": 2,
        }[self.method]

    def check_layout(self, layout: Layout) -> None:
        """Raises ValueError if documents can't be spread over the devices."""
        for name, term in self.terms.items():
            where = f"objective.{name}.length" if term.length else "target_length"
            window = term.window(self.target_length)
            has_margin = window > (term.length or self.target_length)
            layout.check_length(window, f"{where} and margin" if has_margin else where)
            if self.screening.share:
                layout.check_length(len(self.screening.positions(window)), "screening: tokens of all pieces")

    def search_space(self, config: LlamaConfig, mscale: float = 1.0) -> SearchSpace:
        """All candidates for a model with the temperature `mscale`; raises ValueError where there are none."""
        length = config.original_length
        temperatures = (self.mscale[0] * mscale, self.mscale[1] * mscale)
        scale = self.target_length / length
        if self.space == "critical_dimension":
            return critical_space(scale, length, config.head_dim, config.rope_theta, self.n_hat, temperatures)
        return paper_space(scale, length, self.upper_bound, self.n_hat, temperatures)

    def candidates(self, start_tokens: int) -> int:
        """How many candidates the whole search scores, without repeated ones and ones that a race drops.

        Args:
            start_tokens: how many n_hat the space has.
        """
        constants = self.evolution.population if self.space == "critical_dimension" else len(self.published)
        seeds = constants + len(self.seeds)
        refined = self.gradient.rounds * self.gradient.starts * start_tokens

        def evolved(found: int) -> int:
            """`found` candidates of a restart exist when it makes its population 0."""
            grown = max(found - self.evolution.population, 0)
            return seeds + self.evolution.restarts * (grown + self.evolution.evaluations - seeds)

        return {
            "evolution": evolved(seeds + self.ramps),
            "gradient": seeds + self.ramps + refined,
            "hybrid": evolved(seeds + self.ramps + refined),
            "cma_es": seeds + self.cma_es.evaluations,
            # At most: some ramps of the grid are the same. Where the temperature is searched, each has two.
            "yarn_grid": seeds + YARN_GRID_SIZE * (1 + (self.mscale[0] < self.mscale[1])),
        }[self.method]

    def forward_equivalents(self, blocks: int, start_tokens: int) -> float:
        """The same plus the cost of gradient steps, each on one of `blocks` blocks of documents."""
        refinements = {"gradient": 1, "hybrid": self.evolution.restarts}.get(self.method, 0)
        steps = refinements * self.gradient.rounds * self.gradient.starts * self.gradient.steps
        return self.candidates(start_tokens) + steps * self.gradient.cost / blocks
