"""Methods side by side on one model, in memory, for notebooks: perplexity by length, and needles."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from etils import epath

from longrope_jax.data.corpus import Document
from longrope_jax.data.tokenizer import ByteTokenizer, Tokenizer
from longrope_jax.data.windows import Windows
from longrope_jax.evaluation.evaluate import Method, Subject
from longrope_jax.evaluation.perplexity import DocumentNll, nll_by_file
from longrope_jax.evaluation.retrieval import RetrievalSettings, run_retrieval
from longrope_jax.model import Llama
from longrope_jax.rope import FactorTable, RopeFactors
from longrope_jax.runtime.mesh import Layout

Methods = Mapping[str, RopeFactors | FactorTable]
"""By name: factors for all lengths, or a table of them, from which every length takes its own."""


def nll_by_length(
    model: Llama,
    params: dict,
    methods: Methods,
    windows: Windows,
    lengths: Sequence[int],
    *,
    layout: Layout | None = None,
) -> dict[int, dict[str, DocumentNll]]:
    """Length (tokens) -> method -> NLL by document, to be given to `perplexity.perplexity` and `perplexity.compare`.

    All lengths score the same tokens, cut into disjoint windows of each.

    Args:
        windows: of at least the longest of the lengths, see `data.windows.fixed_windows`.
        layout: of the devices.

    Raises:
        ValueError: a length is above that of the windows, or beyond the end of a table.
    """
    layout = layout or Layout()
    with layout.active():
        return {
            length: {
                name: nll_by_file(model, layout, params, _at(method, length), windows, length)
                for name, method in methods.items()
            }
            for length in lengths
        }


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
    """Hides numbers and has the model find them, as the stage `retrieval` does, but keeps nothing on disk.

    Args:
        documents: to hide them in.
        settings: its `methods` and `data` are about an experiment and mean nothing here.
        tokenizer: of the documents; without it bytes.
        layout: of the devices.

    Returns:
        The settings with these methods, and the records, as `report.retrieval.summarize_retrieval` wants them.

    Raises:
        ValueError: a length is too short for the prompts, too long for the documents, or beyond the end of a table.
    """
    layout, tokenizer = layout or Layout(), tokenizer or ByteTokenizer()
    settings = replace(settings, methods={name: Method(name) for name in methods})
    subjects = {name: Subject(lambda: params, partial(_at, method)) for name, method in methods.items()}
    with layout.active(), tempfile.TemporaryDirectory() as folder:
        made = run_retrieval(model, layout, subjects, settings, tokenizer, documents, epath.Path(folder), "retrieval")
    return settings, made


def _at(method: RopeFactors | FactorTable, length: int) -> RopeFactors:
    return method.select(length) if isinstance(method, FactorTable) else method
