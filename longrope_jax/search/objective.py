"""The score of candidates: the loss of the frozen model on documents, smaller is better.

An objective is a weighted sum of terms. A term says which tokens of which documents count; `OBJECTIVES` has the kinds
of terms by name. Each is a pure function (text, settings) -> rows of tokens with a weight for each target, so a new
kind is a new function. The model reads the documents block by block.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Int

from longrope_jax.data.corpus import Document, too_short
from longrope_jax.data.needles import Prompt, needle, needle_cloze
from longrope_jax.data.pairs import MARK, find_answers
from longrope_jax.data.tokenizer import Tokenizer
from longrope_jax.data.windows import fixed_windows
from longrope_jax.evaluation.perplexity import window_nll
from longrope_jax.model import Llama, LlamaConfig
from longrope_jax.model.flops import count_flops
from longrope_jax.model.sharding import constrain
from longrope_jax.rope import RopeFactors
from longrope_jax.runtime import profiling
from longrope_jax.runtime.mesh import Layout
from longrope_jax.settings import NonNegativeInt, PositiveFloat, PositiveInt, Rule, Settings


@dataclass(frozen=True)
class TermSettings(Settings):
    """One term of an objective.

    Attributes:
        kind: of `OBJECTIVES`: "perplexity" of documents (LongRoPE), "needle", that of the digits of a number which is
            hidden in them and asked for at the end (LongRoPE2), "needle_cloze", the same without instructions, for
            models that were not taught to follow any, or "pairs", that of the values of planted pairs (`data.pairs`).
        share: of the score, relative to the other terms' shares.
        length: tokens; 0 is the target length. A term for every length of 1x to 8x gives factors that serve them all.
        documents: how many; 0 as many as the search has.
        margin: of perplexity, how much is read and scored beyond the length, as a share of it. Without it, which is the
            paper's objective (`paper`), a search gives up the last tokens of the window for a lower mean; see
            docs/results/quickstart.md.
    """

    kind: str = "perplexity"
    share: PositiveFloat = 1.0
    length: NonNegativeInt = 0
    documents: NonNegativeInt = 0
    margin: Annotated[float, Rule(lambda share: 0 <= share <= 1, "must lie between 0 and 1")] = 1 / 8

    def __post_init__(self):
        super().__post_init__()
        if self.kind not in OBJECTIVES:
            raise ValueError(f"kind = {self.kind!r} must be one of {', '.join(OBJECTIVES)}")

    @classmethod
    def paper(cls, **changes: Any) -> "TermSettings":
        """The paper's objective: all tokens of the length count the same, and nothing is read beyond (sec. 3.2)."""
        return cls(**dict(margin=0.0) | changes)

    def window(self, target_length: int) -> int:
        """How many tokens are read, the margin included."""
        length = self.length or target_length
        return length + (round(self.margin * length) if self.kind == "perplexity" else 0)


@dataclass(frozen=True)
class ScreeningSettings(Settings):
    """Skipped positions: a few pieces of each document, far apart, are read at their true positions in place of the
    whole window. Only the candidates that look best there are read in full, see `racing.estimate`.

    Attributes:
        share: of the window's tokens that all pieces have together; 0 does not screen.
        pieces: of a document, of equal length and evenly spread; the first one begins it, the last one ends it.
        reduction_factor: one of so many candidates of a generation is read in full, as in successive halving.
    """

    share: Annotated[float, Rule(lambda share: 0 <= share <= 0.5, "must lie between 0 and 0.5")] = 0.0
    pieces: Annotated[int, Rule(lambda count: count >= 2, "must be at least 2")] = 8
    reduction_factor: PositiveInt = 8

    def positions(self, length: int) -> Int[np.ndarray, "S"]:
        """Which tokens of a window of `length` are read.

        Raises:
            ValueError: the share is too small for a token a piece.
        """
        size = round(self.share * length / self.pieces)
        if not size:
            raise ValueError(
                f"screening: share = {self.share} of {length} tokens has none for each of pieces = {self.pieces}"
            )
        starts = np.round(np.linspace(0, length - size, self.pieces)).astype(int)
        return (starts[:, None] + np.arange(size)).ravel()


class Term(NamedTuple):
    """N rows of text, and what of it counts.

    Attributes:
        tokens: inputs and, one further, their targets.
        weights: of every target in the loss of its row, where they sum to 1.
        names: of the documents.
        share: of the term in the score.
    """

    tokens: Int[np.ndarray, "N T+1"]
    weights: Float[np.ndarray, "N T"]
    names: list[str]
    share: float = 1.0


def perplexity_term(documents: Sequence[Document], tokenizer: Tokenizer, length: int, count: int, seed: int) -> Term:
    """Windows of documents, every target counts the same: the paper's objective (LongRoPE sec. 3.2).

    The tokenizer says whether BOS takes the first position of every window.

    Raises:
        ValueError: no document is long enough.
    """
    windows = fixed_windows(documents, length, count, seed)
    if tokenizer.window_bos is not None:
        windows.tokens[:, 0] = tokenizer.window_bos  # only an input: the first target is the token after it
    return Term(windows.tokens, np.full((len(windows.tokens), length), 1 / length, np.float32), windows.names)


def needle_term(documents: Sequence[Document], tokenizer: Tokenizer, length: int, count: int, seed: int) -> Term:
    """Only the digits of an answer count (LongRoPE2, arXiv 2502.20082, sec. 3.3): a sentence with a 7-digit number in
    text of `length` tokens, the question and the answer at its end; depths spread evenly from the beginning to the end.

    Raises:
        ValueError: the length does not hold what has to be in it, or no document is as long.
    """
    return _needles(needle, documents, tokenizer, length, count, seed)


def needle_cloze_term(documents: Sequence[Document], tokenizer: Tokenizer, length: int, count: int, seed: int) -> Term:
    """The same with needles that a question only begins again, see `data.needles.needle_cloze`.

    Raises:
        ValueError: as for `needle_term`.
    """
    return _needles(needle_cloze, documents, tokenizer, length, count, seed)


def pairs_term(documents: Sequence[Document], tokenizer: Tokenizer, length: int, count: int, seed: int) -> Term:
    """Windows of documents with planted pairs, where only values count whose pair stands earlier in the window.

    Raises:
        ValueError: no document with pairs is long enough, or a window has no such value.
    """
    planted = [document for document in documents if document.name.endswith(MARK)]
    if not planted:
        raise ValueError("no document has pairs; set pair_share in the section of the text")
    try:
        windows = fixed_windows(planted, length, count, seed)
    except ValueError:
        raise too_short(planted, f"documents with pairs has the {length + 1} tokens of a window of {length}") from None
    answers = find_answers(windows.names, windows.tokens)
    weights = np.zeros((len(windows.tokens), length), np.float32)
    weights[answers.places()] = 1
    for name, row in zip(windows.names, weights, strict=True):
        if not row.any():
            raise ValueError(f"length = {length}: the window of {name!r} has no pair twice; take a longer one")
    return Term(windows.tokens, weights / weights.sum(1, keepdims=True), windows.names)


OBJECTIVES: dict[str, Callable[[Sequence[Document], Tokenizer, int, int, int], Term]] = {
    "perplexity": perplexity_term,
    "needle": needle_term,
    "needle_cloze": needle_cloze_term,
    "pairs": pairs_term,
}
"""Name -> (documents, tokenizer, length, how many, seed) -> term."""


def make_terms(
    settings: dict[str, TermSettings],
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    target_length: int,
    count: int,
    seed: int,
) -> dict[str, Term]:
    """The terms of a search, by their names.

    Raises:
        ValueError: the text does not hold what a term takes; the term is named.
    """
    terms = {}
    for name, term in settings.items():
        make, window = OBJECTIVES[term.kind], term.window(target_length)
        try:
            made = make(documents, tokenizer, window, term.documents or count, seed)
        except ValueError as error:
            raise ValueError(f"objective.{name}: {error}{_margin(term, target_length)}") from None
        terms[name] = made._replace(share=term.share)
    return terms


def _margin(term: TermSettings, target_length: int) -> str:
    length = term.length or target_length
    beyond = term.window(target_length) - length
    return f" ({length} tokens and a margin of {beyond})" if beyond else ""


def document_weights(terms: Sequence[Term]) -> Float[np.ndarray, "D"]:
    """What each document of all terms counts; they sum to 1, and those of a term count the same."""
    shares = np.concatenate([np.full(len(term.tokens), term.share / len(term.tokens)) for term in terms])
    return shares / shares.sum()


def _needles(make, documents, tokenizer, length, count, seed) -> Term:
    prompts = [
        _prompt(make, documents, tokenizer, length, (number + 0.5) / count, np.random.default_rng([seed, number]))
        for number in range(count)
    ]
    tokens = np.stack([np.concatenate([prompt.tokens, prompt.answer_tokens]) for prompt in prompts]).astype(np.int32)
    weights = np.stack([_digits(prompt, tokenizer, length) for prompt in prompts])
    return Term(tokens, weights, [f"needle at {prompt.depth:.0%}" for prompt in prompts])


def _prompt(make, documents, tokenizer, length, depth, rng) -> Prompt:
    """A prompt that with its answer has length + 1 tokens: an answer is as long as its digits are to the tokenizer."""
    state = rng.bit_generator.state
    room = length
    for _ in range(8):
        rng.bit_generator.state = state  # the same number and text, whatever the room
        prompt = make(room, depth, tokenizer, rng, documents)
        missing = length + 1 - len(prompt.tokens) - len(prompt.answer_tokens)
        if missing == 0:
            return prompt
        room += missing
    raise ValueError(f"length = {length}: no needle prompt comes out at exactly that many tokens")


def _digits(prompt: Prompt, tokenizer: Tokenizer, length: int) -> Float[np.ndarray, "T"]:
    weights = np.zeros(length, np.float32)
    answer = [any(map(str.isdigit, tokenizer.decode(token[None]))) for token in prompt.answer_tokens]
    weights[length - len(answer) :] = answer
    return weights / weights.sum()


@partial(jax.jit, static_argnames="model")
def rows_nll(
    model: Llama, params: dict, factors: RopeFactors, weights: Float[Array, "R T"], *rows: Int[Array, "R T"]
) -> Float[Array, "R"]:
    """Weighted NLL (nats per token) of every row, a document with the factors of one candidate, on every device.

    `factors` has a leading axis R, or of 1 where all rows share a candidate; `rows` are tokens, targets and positions.
    They are split over the mesh's data and fsdp axes, tokens over seq: time O(R T) in the matrices and O(R T^2) in
    attention, memory O(R T), by device.
    """
    return constrain((window_nll(model, params, factors, *rows) * weights).sum(1))


def fitting_candidates(layout: Layout, candidates_at_once: int, documents_at_once: int) -> int:
    """So many candidates, or a few more, that their rows, one a document, can be split evenly over the devices."""
    fitting = layout.row_shards // math.gcd(layout.row_shards, documents_at_once)
    return -(-candidates_at_once // fitting) * fitting


class Block(NamedTuple):
    """Documents of one term that are read together, as often as there are candidates at once.

    Attributes:
        documents: which of the objective's.
        flops: what a candidate costs here.
        weights: of every target, [candidates_at_once * documents_at_once, T], on the devices.
        rows: tokens, targets and positions, likewise.
    """

    documents: Int[np.ndarray, "B"]
    flops: float
    weights: Float[Array, "R T"]
    rows: tuple[Int[Array, "R T"], Int[Array, "R T"], Int[Array, "R T"]]


@dataclass(frozen=True, eq=False)
class Objective:
    """Candidates x blocks -> losses. Every call of the compiled function has one of as many shapes as terms have
    lengths (what is missing is padded), so a whole search compiles once a length.

    Attributes:
        model: the architecture.
        layout: of the devices.
        params: of the frozen model, on them.
        weights: what each document counts in the score.
        blocks: the documents.
        screens: their skipped positions, in the same blocks; none without screening.
        candidates_at_once: how many are a batch axis of the model; under a mesh more than were asked for, where that is
            needed to fill its data and fsdp axes.
        documents_at_once: of a block.
    """

    model: Llama
    layout: Layout
    params: dict
    weights: Float[np.ndarray, "D"]
    blocks: list[Block]
    screens: list[Block]
    candidates_at_once: int
    documents_at_once: int
    _numbers: itertools.count = field(default_factory=lambda: itertools.count(1))

    @classmethod
    def of(
        cls,
        model: Llama,
        layout: Layout,
        params: dict,
        terms: Mapping[str, Term],
        candidates_at_once: int = 1,
        documents_at_once: int = 1,
        screening: ScreeningSettings = ScreeningSettings(),
    ) -> "Objective":
        """Places the text of all terms on the devices."""
        together = fitting_candidates(layout, candidates_at_once, documents_at_once)
        place = partial(_blocks, model.config, layout, together=together, at_once=documents_at_once)
        blocks, screens, first = list[Block](), list[Block](), 0
        for term in terms.values():
            length = term.weights.shape[1]
            blocks += place(term, first, positions=np.arange(length))
            if screening.share:
                screens += place(term, first, positions=screening.positions(length))
            first += len(term.tokens)
        weights = document_weights(list(terms.values()))
        return cls(model, layout, params, weights, blocks, screens, together, documents_at_once)

    def block_nll(self, block: int, candidates: RopeFactors) -> Float[np.ndarray, "C B"]:
        """Losses of up to `candidates_at_once` candidates on the documents of a block, nats per token.

        `block` counts the `blocks`, and then the `screens`.
        What is not a number, or overflows, is inf, with a warning.
        """
        count, chosen = len(candidates.lam), [*self.blocks, *self.screens][block]
        rows = self.spread(candidates)
        nll = profiling.step("candidates", next(self._numbers), partial(self._losses, chosen, rows))
        nll = nll.reshape(-1, self.documents_at_once)[:count, : len(chosen.documents)]
        failed = ~np.isfinite(nll)
        if failed.any():
            logging.warning(
                "%d of %d candidates have a loss that is not a number on documents %s; they count as the worst",
                *(failed.any(1).sum(), count, chosen.documents[failed.any(0)].tolist()),
            )
        return np.where(failed, np.inf, nll)

    def spread(self, candidates: RopeFactors) -> RopeFactors:
        """Up to `candidates_at_once` candidates as factors of all rows of a block, on the devices."""
        chosen = np.minimum(np.arange(self.candidates_at_once), len(candidates.lam) - 1)
        if self.candidates_at_once > 1:
            chosen = np.repeat(chosen, self.documents_at_once)
        return self.layout.replicate(jax.tree.map(lambda leaf: np.asarray(leaf)[chosen], candidates))

    def _losses(self, block: Block, rows: RopeFactors) -> Float[np.ndarray, "R"]:
        with jax.transfer_guard_host_to_device("disallow"):
            running = rows_nll(self.model, self.params, rows, block.weights, *block.rows)
        return np.asarray(jax.device_get(running), np.float64)


def _blocks(
    config: LlamaConfig,
    layout: Layout,
    term: Term,
    first: int,
    together: int,
    at_once: int,
    positions: Int[np.ndarray, "S"],
) -> list[Block]:
    """The tokens of a term at some positions; each predicts the token after it in the document."""
    count, length = len(term.tokens), len(positions)
    weights = term.weights[:, positions]
    weights = weights / weights.sum(1, keepdims=True) if length < term.weights.shape[1] else weights
    inputs, targets = term.tokens[:, positions], term.tokens[:, positions + 1]
    rows = np.broadcast_to(positions.astype(np.int32), (together * at_once, length))
    blocks = []
    for start in range(0, count, at_once):
        chosen = np.arange(start, start + at_once)
        there = np.minimum(chosen, count - 1)
        placed = layout.place((*(np.tile(leaf[there], (together, 1)) for leaf in (weights, inputs, targets)), rows))
        real = chosen[chosen < count]
        flops = count_flops(config, len(real), length).total
        blocks.append(Block(first + real, flops, placed[0], tuple(placed[1:])))
    return blocks
