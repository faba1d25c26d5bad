"""What candidates are asked: which tokens of which documents count how much. An objective is a sum of such terms.

Every kind of term is a pure function (text, settings) -> rows of tokens with a weight for each target; `OBJECTIVES` has
them by name, and another one is another function.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from longrope_jax.data.corpus import Document
from longrope_jax.data.needles import Prompt, needle, needle_cloze
from longrope_jax.data.tokenizer import Tokenizer
from longrope_jax.data.windows import fixed_windows
from longrope_jax.settings import NonNegativeInt, PositiveFloat, Settings


@dataclass(frozen=True)
class TermSettings(Settings):
    """One term of an objective.

    Attributes:
        kind: of `OBJECTIVES`: "perplexity" of documents (LongRoPE), "needle", that of the digits of a number which is
            hidden in them and asked for at the end (LongRoPE2), or "needle_cloze", the same without instructions, for
            models that were not taught to follow any.
        share: of the score, relative to the other terms' shares.
        length: tokens; 0 is the target length. A term for every length of 1x to 8x gives factors that serve them all.
        documents: how many; 0 as many as the search has.
    """

    kind: str = "perplexity"
    share: PositiveFloat = 1.0
    length: NonNegativeInt = 0
    documents: NonNegativeInt = 0

    def __post_init__(self):
        super().__post_init__()
        if self.kind not in OBJECTIVES:
            raise ValueError(f"kind = {self.kind!r} must be one of {', '.join(OBJECTIVES)}")


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

    Raises:
        ValueError: no document is long enough.
    """
    windows = fixed_windows(documents, length, count, seed)
    return Term(windows.tokens, np.full((len(windows.tokens), length), 1 / length, np.float32), windows.names)


def needle_term(documents: Sequence[Document], tokenizer: Tokenizer, length: int, count: int, seed: int) -> Term:
    """Only the digits of an answer count (LongRoPE2, arXiv 2502.20082, sec. 3.3): a sentence with a 7-digit number in
    text of `length` tokens, the question and the answer at its end; depths spread evenly from the beginning to the end.

    Raises:
        ValueError: the length does not hold what has to be in it, or no document is as long.
    """
    return _needles(needle, documents, tokenizer, length, count, seed)


def needle_cloze_term(documents: Sequence[Document], tokenizer: Tokenizer, length: int, count: int, seed: int) -> Term:
    """The same with needles that a question only begins again, see `data.retrieval.needle_cloze`.

    Raises:
        ValueError: as for `needle_term`.
    """
    return _needles(needle_cloze, documents, tokenizer, length, count, seed)


OBJECTIVES: dict[str, Callable[[Sequence[Document], Tokenizer, int, int, int], Term]] = {
    "perplexity": perplexity_term,
    "needle": needle_term,
    "needle_cloze": needle_cloze_term,
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
        try:
            made = OBJECTIVES[term.kind](
                documents, tokenizer, term.length or target_length, term.documents or count, seed
            )
        except ValueError as error:
            raise ValueError(f"objective.{name}: {error}") from None
        terms[name] = made._replace(share=term.share)
    return terms


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
