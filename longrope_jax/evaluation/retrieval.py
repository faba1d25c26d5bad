"""Retrieval tests: does a model find a number that it read a long time ago? Scored from what it generates."""

import itertools
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any

import numpy as np
import scipy.stats
from etils import epath

from longrope_jax.data.corpus import Document
from longrope_jax.data.needles import ANSWER_DIGITS, Prompt, max_answer_tokens, needle, needle_cloze, passkey
from longrope_jax.data.tokenizer import ByteTokenizer, Tokenizer
from longrope_jax.evaluation.evaluate import EvaluatedMethod, Method, by_model, published_methods
from longrope_jax.evaluation.perplexity import Methods, factors_at
from longrope_jax.model import Llama
from longrope_jax.model.decode import complete
from longrope_jax.rope import FactorTable
from longrope_jax.runtime import json_lines
from longrope_jax.runtime.mesh import Layout
from longrope_jax.settings import DistinctLengths, PositiveInt, Seed, Settings, one_of

RETRIEVAL_RECORD = {"method": str, "length": int, "depth": float, "hits": int, "tries": int, "seconds": float}
"""What readers of the records rely on, beside the name of the stage."""


@dataclass(frozen=True)
class RetrievalSettings(Settings):
    """What has to be found, where, by whom.

    Attributes:
        lengths: tokens of prompt and answer together; the longest is the methods' target.
        task: "passkey", a number in filler text; "needle", one in the evaluation documents; or "needle_cloze", the same
            for models that only continue text.
        depths: where it is, shares of the text before the question; () draws one for every try, as for the paper's
            passkey test.
        methods: name -> model and factors.
        tries: prompts for every length and depth, the same for all methods.
        prompts_at_once: how many are answered in one batch.
        tokens_at_once: so many of a prompt are read together; more keep larger devices busy.
        seed: of the prompts.
        data: the section of the text that needles are hidden in.
    """

    lengths: DistinctLengths
    task: Annotated[str, one_of(ANSWER_DIGITS)] = "passkey"
    depths: tuple[float, ...] = ()
    methods: dict[str, Method] = field(default_factory=published_methods)
    tries: PositiveInt = 10
    prompts_at_once: PositiveInt = 1
    tokens_at_once: PositiveInt = 512
    seed: Seed = 0
    data: str = "data"

    def __post_init__(self):
        super().__post_init__()
        if any(not 0 <= depth <= 1 for depth in self.depths) or len(set(self.depths)) < len(self.depths):
            raise ValueError(f"depths = {self.depths} must be different shares of the text, from 0 to 1")
        if not self.methods:
            raise ValueError("methods is empty; name at least one")

    @property
    def places(self) -> tuple[float | None, ...]:
        """The depths to go through; None is drawn."""
        return self.depths or (None,)


def make_prompts(
    settings: RetrievalSettings, tokenizer: Tokenizer, documents: Sequence[Document], length: int, depth: float | None
) -> list[Prompt]:
    """The prompts of all tries for one length (prompt and answer, tokens) and depth; each has a seed of its own.

    Raises:
        ValueError: the length is too short for them, or longer than all documents.
    """
    room = max_answer_tokens(settings.task, tokenizer)
    place = [] if depth is None else [settings.depths.index(depth)]
    prompts = []
    for attempt in range(settings.tries):
        rng = np.random.default_rng([settings.seed, length, attempt, *place])
        try:
            if settings.task == "passkey":
                prompts.append(passkey(length - room, tokenizer, rng, depth))
            else:
                chosen = float(rng.uniform()) if depth is None else depth
                make = {"needle": needle, "needle_cloze": needle_cloze}[settings.task]
                prompts.append(make(length - room, chosen, tokenizer, rng, documents))
        except ValueError as error:
            raise ValueError(f"lengths: of {length} tokens {room} are for the answer, but {error}") from None
    return prompts


def is_found(text: str, answer: str) -> bool:
    """Whether the first number in a generated text is the answer."""
    first = re.search(r"\d+", text)
    return first is not None and first[0] == answer


def run_retrieval(
    model: Llama,
    layout: Layout,
    evaluated: dict[str, EvaluatedMethod],
    settings: RetrievalSettings,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    workdir: epath.Path,
    stage: str,
) -> list[dict[str, Any]]:
    """One record for every (method, length, depth): how many of the tries were hits, and what was generated.

    Answers are greedy, with the factors that the method has for prompt and answer together. Records are appended to
    `workdir/retrieval.jsonl` one by one; records that are there already are not computed again.

    Raises:
        preemption.Preempted: the process was asked to stop; finished records are kept.
    """
    at_once, chunk, room = (
        settings.prompts_at_once,
        settings.tokens_at_once,
        max_answer_tokens(settings.task, tokenizer),
    )

    def answer(method: str, length: int, depth: float | None, stop_if_asked: Callable[[], None]) -> dict[str, Any]:
        params, table = evaluated[method].params(), FactorTable.of({length: evaluated[method].factors(length)})
        prompts = make_prompts(settings, tokenizer, documents, length, depth)
        started, texts = time.monotonic(), []
        for first in range(0, len(prompts), at_once):
            stop_if_asked()
            rows = [prompt.tokens for prompt in prompts[first : first + at_once]]
            padded = rows + [rows[-1]] * (at_once - len(rows))  # a smaller last batch would compile anew
            with layout.active():
                answers = complete(model, params, table, padded, room, stops=tokenizer.stops, chunk=chunk)
            texts += [tokenizer.decode(tokens) for tokens in answers[: len(rows)]]
        hits = [is_found(text, prompt.answer) for text, prompt in zip(texts, prompts, strict=True)]
        return {
            "task": settings.task,
            "hits": sum(hits),
            "tries": len(hits),
            "answers": [prompt.answer for prompt in prompts],
            "texts": texts,
            "depths": [prompt.depth for prompt in prompts],
            "starts": [prompt.start for prompt in prompts],
            "seed": settings.seed,
            "seconds": time.monotonic() - started,
        }

    # Method by method, so that only one model's parameters are in memory.
    cells = itertools.product(by_model(settings.methods), sorted(settings.lengths), settings.places)
    wanted = [{"method": name, "length": length, "depth": depth} for name, length, depth in cells]
    return json_lines.make_missing(workdir / "retrieval.jsonl", stage, RETRIEVAL_RECORD, wanted, answer, "cell")


def find_numbers(
    model: Llama,
    params: dict,
    methods: Methods,
    documents: Sequence[Document],
    settings: RetrievalSettings,
    *,
    tokenizer: Tokenizer | None = None,
    layout: Layout | None = None,
) -> tuple[RetrievalSettings, list[dict[str, Any]]]:
    """Hides numbers in text and asks the model for them, as `run_retrieval` does, but writes no records; for notebooks.

    Args:
        documents: to hide them in.
        settings: its `methods` and `data` are ignored.
        tokenizer: of the documents; without it bytes.
        layout: of the devices.

    Returns:
        The settings with these methods, and the records, as `report.retrieval.summarize_retrieval` wants them.

    Raises:
        ValueError: a length is too short for the prompts, too long for the documents, or beyond the end of a table.
    """
    layout, tokenizer = layout or Layout(), tokenizer or ByteTokenizer()
    settings = replace(settings, methods={name: Method(name) for name in methods})
    evaluated = {name: EvaluatedMethod(lambda: params, partial(factors_at, method)) for name, method in methods.items()}
    with tempfile.TemporaryDirectory() as folder:
        found = run_retrieval(model, layout, evaluated, settings, tokenizer, documents, epath.Path(folder), "retrieval")
    return settings, found


def accuracy(hits: int, tries: int) -> tuple[float, tuple[float, float]]:
    """The share of hits and its 95 % interval (Wilson's score interval, right for few tries and for all or none)."""
    interval = scipy.stats.binomtest(hits, tries).proportion_ci(0.95, method="wilson")
    return hits / tries, (float(interval.low), float(interval.high))
