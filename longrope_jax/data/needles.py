"""Retrieval prompts: a number is hidden in a long text. The passkey test, and needles in real text.

A prompt is: instruction, haystack, needle, rest of the haystack, question. It has exactly the requested number of
tokens: the haystack is truncated to fit. Each part is tokenized alone, and begins and ends with a line, so that any
tokenizer makes the same tokens of the whole text.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from longrope_jax.data.corpus import Document
from longrope_jax.data.tokenizer import Tokenizer

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
CITIES = (
    "Accra", "Bergen", "Bogota", "Cairo", "Dakar", "Delhi", "Dublin", "Hanoi", "Havana", "Kyoto", "Lagos", "Lima",
    "Lisbon", "Lusaka", "Lyon", "Manila", "Osaka", "Oslo", "Prague", "Quito", "Riga", "Sofia", "Turin", "Vienna",
)  # fmt: skip
ANSWER_DIGITS = {"passkey": 5, "needle": 7, "needle_cloze": 7}
"""Task -> digits of the hidden number."""

_EXTRA_TOKENS = 10  # of an answer beside the number: quotation marks, or too many digits, which make the answer wrong


class Prompt(NamedTuple):
    """A question whose answer is hidden in the text before it.

    Attributes:
        tokens: the prompt; the answer follows it.
        answer: the digits.
        answer_tokens: the answer as the tokens that follow `tokens`.
        depth: share of the haystack before the needle, from 0 to 1.
        start: index of the needle's first token in `tokens`.
    """

    tokens: Int[np.ndarray, "tokens"]
    answer: str
    answer_tokens: Int[np.ndarray, "answer"]
    depth: float
    start: int


def passkey(length: int, tokenizer: Tokenizer, rng: np.random.Generator, depth: float | None = None) -> Prompt:
    """A 5-digit number in filler text (Mohtashami and Jaggi, arXiv 2305.16300; LongRoPE sec. 4.2, passkey retrieval).

    Args:
        length: tokens of the prompt.
        depth: where the number is, as a share of the filler, rounded to the nearest end of a sentence; None draws it
            uniformly.

    Raises:
        ValueError: the length does not hold the fixed parts.
    """
    answer = _number(rng, ANSWER_DIGITS["passkey"])
    depth = float(rng.uniform()) if depth is None else depth
    parts = _Parts.of(
        "passkey",
        tokenizer,
        "There is important information hidden in a lot of irrelevant text. Find it and memorize it. I will quiz you "
        "about it.\n",
        f"\nThe pass key is {answer}. Remember it. {answer} is the pass key.\n",
        "\nWhat is the pass key? The pass key is",
        answer,
    )
    room = parts.haystack_size(length)
    once = _encode(tokenizer, FILLER)
    again = _encode(tokenizer, f"{FILLER} {FILLER}")[len(once) :]  # with what a tokenizer makes of the space
    haystack = np.concatenate([once, np.tile(again, room // len(again) + 1)])[:room]
    return _insert_needle(parts, haystack, depth)


def needle(
    length: int, depth: float, tokenizer: Tokenizer, rng: np.random.Generator, documents: Sequence[Document]
) -> Prompt:
    """A sentence with a 7-digit number, hidden in text of one document (LongRoPE2, arXiv 2502.20082, sec. 3.3).

    Args:
        length: tokens of the prompt.
        depth: where the sentence is, as a share of the text; it is rounded to the nearest end of a sentence or a line.
        documents: made by the same tokenizer. One that is long enough is drawn, and a part of it.

    Raises:
        ValueError: the length does not hold the fixed parts, or no document is long enough.
    """
    answer, city = _number(rng, ANSWER_DIGITS["needle"]), CITIES[rng.integers(len(CITIES))]
    parts = _Parts.of(
        "needle",
        tokenizer,
        "There is a magic number hidden in the following text. Find it and memorize it. I will quiz you about it.\n",
        f"\nThe magic number of {city} is {answer}.\n",
        f"\nWhat is the magic number of {city}? The magic number of {city} is",
        answer,
    )
    return _insert_needle(parts, _sample_haystack(parts, length, rng, documents), depth)


def needle_cloze(
    length: int, depth: float, tokenizer: Tokenizer, rng: np.random.Generator, documents: Sequence[Document]
) -> Prompt:
    """`needle` without instruction and question: the prompt ends with the beginning of the needle's sentence.

    For models that only continue text, and for short windows: everything but the text takes at most 70 bytes. The 7
    digits are all different, so each digit determines the next one; tiny models learn this lookup much faster.

    Args:
        length: tokens of the prompt.
        depth: see `needle`.
        documents: see `needle`.

    Raises:
        ValueError: as for `needle`.
    """
    parts = _draw_cloze(tokenizer, rng)
    return _insert_needle(parts, _sample_haystack(parts, length, rng, documents), depth)


def cloze_example(
    length: int, tokenizer: Tokenizer, rng: np.random.Generator, documents: Sequence[Document]
) -> Int[np.ndarray, "length"]:
    """A training example of `length` tokens: a prompt of `needle_cloze`, at a random depth, and its answer.

    In about half of the examples (if there is room) the needle occurs twice. The second occurrence can be predicted
    from the first, so these examples train the lookup twice, and models learn it sooner.

    Raises:
        ValueError: as for `needle`.
    """
    parts, depth = _draw_cloze(tokenizer, rng), float(rng.uniform())
    asked, more = length - len(parts.answer_tokens), len(parts.needle)
    is_twice = rng.integers(2) and asked >= parts.fixed_size + more
    text = _sample_haystack(parts, asked - more if is_twice else asked, rng, documents)
    if is_twice:
        place = _nearest_boundary(text, int(rng.integers(len(text) + 1)), tokenizer)
        text = np.concatenate([text[:place], parts.needle, text[place:]])
    prompt = _insert_needle(parts, text, depth)
    return np.concatenate([prompt.tokens, prompt.answer_tokens])


def cloze_size(tokenizer: Tokenizer) -> int:
    """Upper bound on the tokens of a prompt of `needle_cloze` and its answer, without the haystack."""
    largest = [_cloze(tokenizer, city, "8" * ANSWER_DIGITS["needle_cloze"]) for city in CITIES]
    return max(len(parts.answer_tokens) + parts.fixed_size for parts in largest)


def max_answer_tokens(task: str, tokenizer: Tokenizer) -> int:
    """How many tokens a model may generate as the answer to the task "passkey", "needle" or "needle_cloze"."""
    return len(_encode(tokenizer, " " + "8" * ANSWER_DIGITS[task])) + _EXTRA_TOKENS


class _Parts(NamedTuple):
    """The fixed parts of a task's prompt, as tokens."""

    task: str
    tokenizer: Tokenizer
    instruction: np.ndarray
    needle: np.ndarray
    question: np.ndarray
    answer: str
    answer_tokens: np.ndarray

    @classmethod
    def of(cls, task: str, tokenizer: Tokenizer, instruction: str, needle: str, question: str, answer: str) -> "_Parts":
        asked = _encode(tokenizer, question)
        return cls(
            task,
            tokenizer,
            tokenizer.encode(instruction, eos=False).astype(np.int32),
            _encode(tokenizer, needle),
            asked,
            answer,
            # A tokenizer may encode the answer alone differently than after the question.
            _encode(tokenizer, f"{question} {answer}")[len(asked) :],
        )

    @property
    def fixed_size(self) -> int:
        """Tokens of a prompt without its haystack."""
        return len(self.instruction) + len(self.needle) + len(self.question)

    def haystack_size(self, length: int) -> int:
        """Tokens that remain for the haystack; raises ValueError if the length is too short."""
        if length < self.fixed_size:
            raise ValueError(
                f"length = {length} tokens is too short for a {self.task} prompt, whose fixed parts take "
                f"{self.fixed_size}"
            )
        return length - self.fixed_size


def _draw_cloze(tokenizer: Tokenizer, rng: np.random.Generator) -> _Parts:
    digits = rng.permutation(10)
    first = int(digits[0] == 0)  # no number begins with 0
    answer = "".join(map(str, digits[first : first + ANSWER_DIGITS["needle_cloze"]]))
    return _cloze(tokenizer, CITIES[rng.integers(len(CITIES))], answer)


def _cloze(tokenizer: Tokenizer, city: str, answer: str) -> _Parts:
    statement = f"\nThe magic number of {city} is"
    return _Parts.of("needle_cloze", tokenizer, "", f"{statement} {answer}.\n", statement, answer)


def _sample_haystack(parts: _Parts, length: int, rng: np.random.Generator, documents: Sequence[Document]) -> np.ndarray:
    """Text of one document that fills the prompt; the document and the place are drawn."""
    room, tokenizer = parts.haystack_size(length), parts.tokenizer
    # The length decides without reading the tokens, except where it depends on BOS and EOS.
    fitting = [tokens for tokens in (document.tokens for document in documents) if len(tokens) >= room]
    fitting = [tokens for tokens in fitting if len(tokens) >= room + 2 or len(_text(tokens, tokenizer)) >= room]
    if not fitting:
        longest = max((len(_text(document.tokens, tokenizer)) for document in documents), default=0)
        raise ValueError(
            f"none of {len(documents)} documents has the {room} tokens of text that a {parts.task} prompt of length = "
            f"{length} takes; the longest has {longest}"
        )
    tokens = fitting[rng.integers(len(fitting))]
    text = _text(tokens, tokenizer)
    start = text.start + rng.integers(len(text) - room + 1)
    return tokens[start : start + room]


def _insert_needle(parts: _Parts, haystack: np.ndarray, depth: float) -> Prompt:
    if not 0 <= depth <= 1:
        raise ValueError(f"depth = {depth} must lie between 0 and 1")
    place = _nearest_boundary(haystack, round(depth * len(haystack)), parts.tokenizer)
    before = np.concatenate([parts.instruction, haystack[:place]])
    tokens = np.concatenate([before, parts.needle, haystack[place:], parts.question]).astype(np.int32)
    return Prompt(tokens, parts.answer, parts.answer_tokens, place / max(len(haystack), 1), len(before))


def _nearest_boundary(tokens: np.ndarray, wanted: int, tokenizer: Tokenizer) -> int:
    """The index nearest to `wanted` where a sentence or a line has just ended; both ends of the text count too."""
    for distance in range(len(tokens)):
        for place in (wanted - distance, wanted + distance):
            if place in (0, len(tokens)) or (0 < place < len(tokens) and _is_boundary(tokens, place, tokenizer)):
                return place
    return wanted  # the text is empty


def _is_boundary(tokens: np.ndarray, place: int, tokenizer: Tokenizer) -> bool:
    before, both = tokenizer.decode(tokens[place - 1 : place]), tokenizer.decode(tokens[place - 1 : place + 1])
    # A space tells the end of a sentence from the dot in 3.14. Either token may hold it, and a decoder may drop it at
    # the beginning, so the two are decoded together.
    sentence = before.rstrip()
    return before.endswith("\n") or (sentence.endswith((".", "!", "?")) and both[len(sentence) :][:1].isspace())


def _number(rng: np.random.Generator, digits: int) -> str:
    return str(rng.integers(10 ** (digits - 1), 10**digits))


def _encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return tokenizer.encode(text, bos=False, eos=False).astype(np.int32)


def _text(tokens: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> range:
    """The indices of a document's text, without BOS and EOS."""
    first = int(len(tokens) > 0 and tokens[0] == tokenizer.bos)
    return range(first, len(tokens) - int(len(tokens) > first and tokens[-1] == tokenizer.eos))
