"""Prompts that hide a number far from where it is asked for: the passkey test, and needles in real text.

A prompt is instruction, haystack, needle, the rest of the haystack, question, and has exactly as many tokens as were
asked for. The parts are tokenized one by one and begin and end where lines do, so that they read like one text to any
tokenizer; it is the haystack, at its far end, that is cut to fit.
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
PASSKEY_DIGITS = 5
NEEDLE_DIGITS = 7
_REMARK_TOKENS = 10  # of an answer, beside the number: quotation marks, or digits too many, which make it a wrong one


class Prompt(NamedTuple):
    """A question whose answer lies somewhere before it.

    Attributes:
        tokens: ends where the answer has to follow.
        answer: the digits.
        answer_tokens: the answer as the tokens that follow `tokens`.
        depth: how much of the haystack is before the needle, from 0 to 1.
        start: where in `tokens` the needle begins.
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
        depth: where the number is, a share of the filler; None draws it uniformly. It goes to the end of a sentence.

    Raises:
        ValueError: the length does not hold the fixed parts.
    """
    answer = _number(rng, PASSKEY_DIGITS)
    depth = float(rng.uniform()) if depth is None else depth
    parts = _Parts.of(
        tokenizer,
        "There is important information hidden in a lot of irrelevant text. Find it and memorize it. I will quiz you "
        "about it.\n",
        f"\nThe pass key is {answer}. Remember it. {answer} is the pass key.\n",
        "\nWhat is the pass key? The pass key is",
        answer,
    )
    room = parts.room(length, "passkey")
    once = _encode(tokenizer, FILLER)
    again = _encode(tokenizer, f"{FILLER} {FILLER}")[len(once) :]  # with what a tokenizer makes of the space
    haystack = np.concatenate([once, np.tile(again, room // len(again) + 1)])[:room]
    return _hide(parts, haystack, depth, tokenizer)


def needle(
    length: int, depth: float, tokenizer: Tokenizer, rng: np.random.Generator, documents: Sequence[Document]
) -> Prompt:
    """A sentence with a 7-digit number in a stretch of one of the documents (LongRoPE2, arXiv 2502.20082, sec. 3.3).

    Args:
        length: tokens of the prompt.
        depth: where the sentence is, a share of the stretch; it goes to the nearest end of a sentence or a line.
        documents: made by the same tokenizer. One that is long enough is drawn, and a stretch of it.

    Raises:
        ValueError: the length does not hold the fixed parts, or no document is as long as the stretch.
    """
    answer, city = _number(rng, NEEDLE_DIGITS), CITIES[rng.integers(len(CITIES))]
    parts = _Parts.of(
        tokenizer,
        "There is a magic number hidden in the following text. Find it and memorize it. I will quiz you about it.\n",
        f"\nThe magic number of {city} is {answer}.\n",
        f"\nWhat is the magic number of {city}? The magic number of {city} is",
        answer,
    )
    return _hide(parts, _stretch(parts, length, "needle", tokenizer, rng, documents), depth, tokenizer)


def needle_cloze(
    length: int, depth: float, tokenizer: Tokenizer, rng: np.random.Generator, documents: Sequence[Document]
) -> Prompt:
    """The same without instruction and question: the needle's sentence begins again at the end, to be completed.

    For models that only continue text, and for short windows: all but the text takes 70 bytes or less. The number's 7
    digits are all different: what follows one is then told by it alone, which the tiniest models learn to look up in a
    fraction of the time (they do not know long what to make of 4 in 4147263).

    Arguments are those of `needle`.

    Raises:
        ValueError: as for `needle`.
    """
    parts = _draw_cloze(tokenizer, rng)
    return _hide(parts, _stretch(parts, length, "needle_cloze", tokenizer, rng, documents), depth, tokenizer)


def cloze_example(
    length: int, tokenizer: Tokenizer, rng: np.random.Generator, documents: Sequence[Document]
) -> Int[np.ndarray, "length"]:
    """A prompt as `needle_cloze` makes them, at a random depth, and its answer: `length` tokens to train on.

    In every other one that has room for it the needle stands twice. That is twice as much to look up, since the second
    can be told from the first, and models learn it so much sooner.

    Raises:
        ValueError: as for `needle`.
    """
    parts, depth = _draw_cloze(tokenizer, rng), float(rng.uniform())
    asked, more = length - len(parts.answer_tokens), len(parts.needle)
    if rng.integers(2) and asked >= parts.fixed + more:
        text = _stretch(parts, asked - more, "needle_cloze", tokenizer, rng, documents)
        place = _nearest_break(text, int(rng.integers(len(text) + 1)), tokenizer)
        text = np.concatenate([text[:place], parts.needle, text[place:]])
    else:
        text = _stretch(parts, asked, "needle_cloze", tokenizer, rng, documents)
    prompt = _hide(parts, text, depth, tokenizer)
    return np.concatenate([prompt.tokens, prompt.answer_tokens])


def cloze_size(tokenizer: Tokenizer) -> int:
    """How many tokens a prompt of `needle_cloze` and its answer take at most, with no text around the needle."""
    largest = [_cloze(tokenizer, city, "8" * NEEDLE_DIGITS) for city in CITIES]
    return max(len(parts.answer_tokens) + parts.fixed for parts in largest)


def answer_room(task: str, tokenizer: Tokenizer) -> int:
    """How many tokens a model may take for the answer, to the task "passkey", "needle" or "needle_cloze"."""
    digits = {"passkey": PASSKEY_DIGITS, "needle": NEEDLE_DIGITS, "needle_cloze": NEEDLE_DIGITS}[task]
    return len(_encode(tokenizer, " " + "8" * digits)) + _REMARK_TOKENS


class _Parts(NamedTuple):
    """The fixed parts of a prompt, as tokens."""

    instruction: np.ndarray
    needle: np.ndarray
    question: np.ndarray
    answer: str
    answer_tokens: np.ndarray

    @classmethod
    def of(cls, tokenizer: Tokenizer, instruction: str, needle: str, question: str, answer: str) -> "_Parts":
        asked = _encode(tokenizer, question)
        return cls(
            tokenizer.encode(instruction, eos=False).astype(np.int32),
            _encode(tokenizer, needle),
            asked,
            answer,
            # Of the answer by itself a tokenizer may make something else than of an answer after the question.
            _encode(tokenizer, f"{question} {answer}")[len(asked) :],
        )

    @property
    def fixed(self) -> int:
        """Tokens of a prompt without a haystack."""
        return len(self.instruction) + len(self.needle) + len(self.question)

    def room(self, length: int, task: str) -> int:
        """Tokens that are left for the haystack."""
        if length < self.fixed:
            raise ValueError(
                f"length = {length} tokens is too short for a {task} prompt, whose fixed parts take {self.fixed}"
            )
        return length - self.fixed


def _draw_cloze(tokenizer: Tokenizer, rng: np.random.Generator) -> _Parts:
    digits = rng.permutation(10)
    answer = "".join(map(str, digits[int(digits[0] == 0) :][:NEEDLE_DIGITS]))  # no number begins with 0
    return _cloze(tokenizer, CITIES[rng.integers(len(CITIES))], answer)


def _cloze(tokenizer: Tokenizer, city: str, answer: str) -> _Parts:
    begun = f"\nThe magic number of {city} is"
    return _Parts.of(tokenizer, "", f"{begun} {answer}.\n", begun, answer)


def _stretch(
    parts: _Parts,
    length: int,
    task: str,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    documents: Sequence[Document],
) -> np.ndarray:
    """As much text of one document as fills the prompt; which document and where is drawn."""
    room = parts.room(length, task)
    # Which are long enough is seen without reading them, but for the few where it depends on their markers.
    fitting = [tokens for tokens in (document.tokens for document in documents) if len(tokens) >= room]
    fitting = [tokens for tokens in fitting if len(tokens) >= room + 2 or len(_text(tokens, tokenizer)) >= room]
    if not fitting:
        longest = max((len(document.tokens) for document in documents), default=0)
        ends = [d.tokens for d in documents if len(d.tokens) >= longest - 2]
        raise ValueError(
            f"none of {len(documents)} documents has the {room} tokens of text that a {task} prompt of length = "
            f"{length} takes; the longest has {max((len(_text(tokens, tokenizer)) for tokens in ends), default=0)}"
        )
    tokens = fitting[rng.integers(len(fitting))]
    text = _text(tokens, tokenizer)
    start = text.start + rng.integers(len(text) - room + 1)
    return tokens[start : start + room]


def _hide(parts: _Parts, haystack: np.ndarray, depth: float, tokenizer: Tokenizer) -> Prompt:
    if not 0 <= depth <= 1:
        raise ValueError(f"depth = {depth} must lie between 0 and 1")
    place = _nearest_break(haystack, round(depth * len(haystack)), tokenizer)
    before = np.concatenate([parts.instruction, haystack[:place]])
    tokens = np.concatenate([before, parts.needle, haystack[place:], parts.question]).astype(np.int32)
    return Prompt(tokens, parts.answer, parts.answer_tokens, place / max(len(haystack), 1), len(before))


def _nearest_break(tokens: np.ndarray, wanted: int, tokenizer: Tokenizer) -> int:
    """The index nearest to `wanted` before which a sentence or a line ends; both ends of the text are such."""
    for distance in range(len(tokens)):
        for place in (wanted - distance, wanted + distance):
            if place in (0, len(tokens)) or (0 < place < len(tokens) and _is_break(tokens, place, tokenizer)):
                return place
    return wanted  # no text at all


def _is_break(tokens: np.ndarray, place: int, tokenizer: Tokenizer) -> bool:
    before, both = tokenizer.decode(tokens[place - 1 : place]), tokenizer.decode(tokens[place - 1 : place + 1])
    # The space tells a sentence's end from the dot in 3.14. The token after the border has it, or the one before; and
    # a decoder may leave it out at the beginning of what it is given, so the two are decoded together.
    sentence = before.rstrip()
    return before.endswith("\n") or (sentence.endswith((".", "!", "?")) and both[len(sentence) :][:1].isspace())


def _number(rng: np.random.Generator, digits: int) -> str:
    return str(rng.integers(10 ** (digits - 1), 10**digits))


def _encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return tokenizer.encode(text, bos=False, eos=False).astype(np.int32)


def _text(tokens: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> range:
    """Where the text of a document, or of a stretch of one, is: markers are at its ends, if anywhere."""
    first = int(len(tokens) > 0 and tokens[0] == tokenizer.bos)
    return range(first, len(tokens) - int(len(tokens) > first and tokens[-1] == tokenizer.eos))
