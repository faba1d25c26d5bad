"""The stage `evaluate`: perplexity of every method at every length, on the same documents, as records in a file."""

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, NamedTuple

import numpy as np
from etils import epath

from longrope_jax.data.corpus import Document
from longrope_jax.data.pairs import find_answers
from longrope_jax.data.windows import fixed_windows
from longrope_jax.evaluation.perplexity import DocumentNll, by_document, by_file, by_position, token_nll
from longrope_jax.model import Llama
from longrope_jax.rope import METHODS, RopeFactors
from longrope_jax.runtime import json_lines, profiling
from longrope_jax.runtime.mesh import Layout
from longrope_jax.settings import (
    DistinctLengths,
    DocumentCount,
    NonNegativeInt,
    PositiveInt,
    Rule,
    Seed,
    Settings,
    one_of,
)

POSITION_BUCKETS = 32
EVALUATION_RECORD = {
    "length": int,
    "method": str,
    "documents": [str],
    "nll_sums": [float],
    "counts": [int],
    "seconds": float,
    "nll_by_position": [float],
    "nll_beyond": [float],
    "factors": {"lam": [float], "n_hat": int, "mscale": float},
}
"""The fields of a record in evaluation.jsonl that readers need, beside the name of the stage."""


@dataclass(frozen=True)
class Method(Settings):
    """A method to evaluate: factors on a model.

    Attributes:
        factors: a table stage, which has factors for every window length; a search stage; or a published method, such
            as "yarn" or "dynamic_ntk", for the longest of the lengths.
        model: the stage whose parameters are used; "" is the last model stage before.
    """

    factors: str
    model: str = ""


def published_methods() -> dict[str, Method]:
    """The published methods, on the model of the last model stage."""
    return {name: Method(name) for name in (*METHODS, "dynamic_ntk")}


@dataclass(frozen=True)
class EvaluationSettings(Settings):
    """The methods, window lengths and documents of an evaluation.

    Attributes:
        lengths: window lengths, tokens; the longest is the length of the documents and the methods' target.
        methods: name -> model and factors.
        controls: methods whose disjoint windows of the original length are the control.
        compared: pairs of methods for a paired comparison at every length.
        documents: how many windows of the longest length, from different documents as far as there are enough.
        margin: how much is read beyond the longest length, as a share of it: factors that only just hold to the end
            show it there. It is not part of the perplexity.
        split: "evaluation", for development; "test" is for results that are published, and tunes nothing.
        stride: of the sliding window beyond the original length, tokens; 0 for disjoint windows. Up to the original
            length windows are always disjoint, as the control is.
        seed: of the documents.
        tokens_at_once: how many tokens one forward pass takes.
        data: the section of the text.
    """

    lengths: DistinctLengths
    methods: dict[str, Method] = field(default_factory=published_methods)
    controls: tuple[str, ...] = ("unscaled",)
    compared: tuple[tuple[str, ...], ...] = ()
    documents: DocumentCount = 64
    margin: Annotated[float, Rule(lambda share: 0 <= share <= 1, "must lie between 0 and 1")] = 1 / 32
    split: Annotated[str, one_of(("evaluation", "test"))] = "evaluation"
    stride: NonNegativeInt = 0
    seed: Seed = 0
    tokens_at_once: PositiveInt = 8192
    data: str = "data"

    def __post_init__(self):
        super().__post_init__()
        if not self.methods:
            raise ValueError("methods is empty; name at least one")
        if set(self.controls) - set(self.methods):
            raise ValueError(f"controls = {self.controls} must be methods; those are {', '.join(self.methods)}")
        for pair in self.compared:
            if len(pair) != 2 or not set(pair) <= set(self.methods):
                raise ValueError(f"compared: {pair} must be a pair of methods; those are {', '.join(self.methods)}")

    def window(self, length: int) -> int:
        """How many tokens are read of windows of `length`: with the margin for the longest one."""
        return length + round(self.margin * length) if length == max(self.lengths) else length


class EvaluatedMethod(NamedTuple):
    """A method, resolved.

    Attributes:
        params: reads the parameters.
        factors: length (tokens) -> factors.
    """

    params: Callable[[], dict]
    factors: Callable[[int], RopeFactors]


def run_evaluation(
    model: Llama,
    layout: Layout,
    evaluated: dict[str, EvaluatedMethod],
    settings: EvaluationSettings,
    documents: Sequence[Document],
    workdir: epath.Path,
    stage: str,
    bos: int | None = None,
) -> list[dict[str, Any]]:
    """One record for every (length, method): NLL sums and counts by document, and the curve over positions.

    All lengths score the same tokens: documents of the longest length are cut into windows of each. Values of planted
    pairs (see `data.pairs`) are recorded one by one, as the mean NLL of their digits. Records are
    appended to `workdir/evaluation.jsonl` one by one; records that are there already are not computed again. Their
    tokens_per_second counts the tokens that are scored; the first of a length has compiling in it.

    Args:
        bos: what every window begins with, see `token_nll`.

    Raises:
        preemption.Preempted: the process was asked to stop; finished records are kept.
    """
    target, numbers = max(settings.lengths), itertools.count(1)
    windows = fixed_windows(documents, settings.window(target), settings.documents, settings.seed)
    answers = find_answers(windows.names, windows.tokens[:, : target + 1])

    def evaluate(length: int, method: str, stop_if_asked: Callable[[], None]) -> dict[str, Any]:
        stop_if_asked()
        params, chosen = evaluated[method].params(), evaluated[method].factors(length)
        window = settings.window(length)
        stride = window_stride(settings, model.config.original_length, window)
        tokens = windows.tokens[:, : max(target, window) + 1]
        started = time.monotonic()
        read = partial(token_nll, model, layout, params, chosen, tokens, window, stride, settings.tokens_at_once, bos)
        nll = profiling.step("evaluation", next(numbers), read)
        seconds = time.monotonic() - started
        nll, beyond = nll[:, :target], nll[:, target:]
        sums, counts = by_document(nll)
        record: dict[str, Any] = {
            "documents": windows.names,
            "nll_sums": sums.tolist(),
            "counts": counts.tolist(),
            "seconds": seconds,
            "tokens_per_second": nll.size / seconds,
            "nll_by_position": by_position(nll, min(POSITION_BUCKETS, target)).tolist(),
            "nll_beyond": [float(beyond.mean(dtype=np.float64))] if beyond.size else [],
            "factors": {
                "lam": np.asarray(chosen.lam).tolist(),
                "n_hat": int(chosen.n_hat),
                "mscale": float(chosen.mscale),
            },
        }
        if len(answers.rows):
            record["answers"] = {
                "documents": answers.rows.tolist(),
                "distances": answers.distances.tolist(),
                "nll": nll[answers.places()].mean(1).tolist(),
            }
        return record

    # Method by method, so that only one model's parameters are in memory.
    lengths = sorted(settings.lengths)
    wanted = [{"length": length, "method": name} for name in by_model(settings.methods) for length in lengths]
    return json_lines.make_missing(
        workdir / "evaluation.jsonl", stage, EVALUATION_RECORD, wanted, evaluate, "evaluation"
    )


def window_stride(settings: EvaluationSettings, original_length: int, length: int) -> int:
    """Of windows of `length` tokens."""
    return length if length <= original_length else min(settings.stride or length, length)


def by_model(methods: dict[str, Method]) -> Iterable[str]:
    """Names of the methods, grouped by model."""
    models = [method.model for method in methods.values()]
    return sorted(methods, key=lambda name: models.index(methods[name].model))


def recorded_nll(record: dict[str, Any]) -> DocumentNll:
    """The NLL by file of a record of `run_evaluation`; null in JSON stands for infinity."""
    sums = np.array([np.inf if value is None else value for value in record["nll_sums"]])
    return by_file(DocumentNll(sums, np.asarray(record["counts"])), record["documents"])
