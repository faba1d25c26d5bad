"""What a search is told: for which length, on what, where and how."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from longrope_jax.model import LlamaConfig
from longrope_jax.runtime.mesh import Layout
from longrope_jax.search.cma_es import CmaEsSettings
from longrope_jax.search.evolution import EvolutionSettings
from longrope_jax.search.gradient import GradientSettings
from longrope_jax.search.seeds import PAPER_SEEDS, PUBLISHED
from longrope_jax.search.space import N_HAT, SPACES, SearchSpace, critical_space, paper_space
from longrope_jax.search.terms import TermSettings
from longrope_jax.settings import NonNegativeInt, PositiveInt, Rule, Seed, Settings, one_of

METHODS = {
    "evolution": ("evolution",),
    "gradient": ("gradient",),
    "hybrid": ("gradient", "evolution"),
    "cma_es": ("cma_es",),
    "start_tokens": (),
}
"""Ways to search, and the sections of `SearchSettings` that each of them goes by."""


@dataclass(frozen=True)
class SeedSettings(Settings):
    """Factors of one's own to start from.

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
        model: the stage whose parameters are asked; "" is the latest before this one.
        documents: how many documents a candidate is scored on, from different files as far as there are enough.
        seed: of the documents and of the search.
        objective: what a candidate is asked, by names of your own; see `TermSettings`. Nothing is the paper's: the
            perplexity of documents of the target length.
        method: "evolution", LongRoPE's Algorithm 1; "gradient"; "hybrid", the gradient from a few starts and then
            Algorithm 1 around what it led to; "cma_es", a baseline; "start_tokens", the seeds with every n_hat
            (LongRoPE table 2).
        racing: confidence (0.99, say) with which it is plain before all documents are read whether a candidate comes
            under the best, see `search/racing.py`; 0 reads all. A block of `documents_at_once` is the least that is
            read.
        published: which of linear, ntk and yarn to start from; with all three come the others that `paper_seeds` has.
        seeds: factors of one's own to start from, by names of your own.
        ramps: random ramps to look for better starts among, see `search/ramps.py`.
        space: "paper", LongRoPE's table 4, or "critical_dimension", LongRoPE2's.
        lower_bound: smallest lam of the paper's space (1.0 in table 4).
        upper_bound: its largest lam in units of the scale L'/L (1.25 in table 4); seeds are clipped to it.
        step: of lam (0.01 in table 4).
        n_hat: numbers of start tokens to choose from; those above the original length are left out.
        mscale: bounds of the attention temperature, in units of the one that the model was trained with; different
            ones have it searched.
        candidates_at_once: how many candidates are a batch axis of the model: 1 is best on a CPU, more on an
            accelerator that one candidate does not fill.
        documents_at_once: how many documents of one candidate are evaluated together; also the block that a race, or
            a step of a gradient search, takes at a time.
        evolution, gradient, cma_es: the numbers of the methods.
        held_out_documents: the best candidate of every iteration is judged on so many documents of the evaluation
            split in the end, to see what it learnt of the search documents only; nothing is chosen by that.
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
    published: tuple[str, ...] = PUBLISHED
    seeds: dict[str, SeedSettings] = field(default_factory=dict)
    ramps: NonNegativeInt = 0
    space: Annotated[str, one_of(SPACES)] = "paper"
    lower_bound: float = 1.0
    upper_bound: float = 1.25
    step: float = 0.01
    n_hat: tuple[int, ...] = N_HAT
    mscale: Annotated[tuple[float, ...], Rule(lambda bounds: len(bounds) == 2, "must be two bounds")] = (1.0, 1.0)
    candidates_at_once: PositiveInt = 1
    documents_at_once: PositiveInt = 1
    evolution: EvolutionSettings = field(default_factory=EvolutionSettings)
    gradient: GradientSettings = field(default_factory=GradientSettings)
    cma_es: CmaEsSettings = field(default_factory=CmaEsSettings)
    held_out_documents: NonNegativeInt = 0
    data: str = "data"

    def __post_init__(self):
        super().__post_init__()
        for name in ("racing", "ramps"):
            if getattr(self, name) and self.method in ("cma_es", "start_tokens"):
                raise ValueError(f"{name} = {getattr(self, name)} is not for method = {self.method!r}")
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
    def moves(self) -> int:
        """How many moves the method makes, see `methods.plan`; after each there may be a better candidate."""
        is_scan = self.ramps > 0
        evolve = 1 + is_scan + self.evolution.iterations
        return {
            "evolution": self.evolution.restarts * evolve + is_scan,
            "gradient": 1 + is_scan + self.gradient.rounds,
            "hybrid": 1 + self.evolution.restarts * (evolve + self.gradient.rounds),
            "cma_es": 1 + self.cma_es.iterations,
            "start_tokens": 2,
        }[self.method]

    def check_layout(self, layout: Layout) -> None:
        """Raises ValueError if documents can't be spread over the devices."""
        for name, term in self.terms.items():
            where = f"objective.{name}.length" if term.length else "target_length"
            layout.check_length(term.length or self.target_length, where)

    def search_space(self, config: LlamaConfig, mscale: float = 1.0) -> SearchSpace:
        """All candidates for a model, whose temperature is `mscale`; raises ValueError where there are none."""
        length = config.original_length
        temperatures = tuple(bound * mscale for bound in self.mscale)
        common: dict[str, Any] = dict(step=self.step, n_hat=self.n_hat, mscale=temperatures)
        scale = self.target_length / length
        if self.space == "critical_dimension":
            return critical_space(scale, length, config.head_dim, config.rope_theta, **common)
        return paper_space(scale, length, self.lower_bound, self.upper_bound, **common)

    def candidates(self, start_tokens: int) -> int:
        """How many candidates the whole search scores, where no race drops any and none comes twice.

        Args:
            start_tokens: how many n_hat there are to try.
        """
        constants = self.evolution.population if self.space == "critical_dimension" else len(self.published)
        seeds = constants + len(self.seeds)
        ends = self.gradient.rounds * self.gradient.starts * start_tokens

        def evolved(found: int) -> int:
            """So many are there already when a start makes its population 0."""
            grown = max(found - self.evolution.population, 0)
            return seeds + self.evolution.restarts * (grown + self.evolution.evaluations - seeds)

        return {
            "evolution": evolved(seeds + self.ramps),
            "gradient": seeds + self.ramps + ends,
            "hybrid": evolved(seeds + self.ramps + ends),
            "cma_es": seeds + self.cma_es.evaluations,
            "start_tokens": seeds * start_tokens,
        }[self.method]

    def forward_equivalents(self, blocks: int, start_tokens: int) -> float:
        """The same with its gradient steps, each on one of so many blocks of documents."""
        descents = {"gradient": 1, "hybrid": self.evolution.restarts}.get(self.method, 0)
        steps = descents * self.gradient.rounds * self.gradient.starts * self.gradient.steps
        return self.candidates(start_tokens) + steps * self.gradient.cost / blocks
