"""Factors side by side on one model, as functions, for notebooks: perplexity by length, and needles."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from etils import epath

from longrope_jax.data.corpus import Document
from longrope_jax.data.tokenizer import ByteTokenizer, Tokenizer
from longrope_jax.data.windows import Windows
from longrope_jax.evaluation.perplexity import DocumentNll, nll_by_file
from longrope_jax.evaluation.retrieval import RetrievalSettings, run_retrieval
from longrope_jax.evaluation.run import Arm, Subject
from longrope_jax.model import Llama
from longrope_jax.rope import FactorTable, RopeFactors
from longrope_jax.runtime.mesh import Layout

Arms = Mapping[str, RopeFactors | FactorTable]
"""By name: factors for all lengths, or a table of them, from which every length takes its own."""


def nll_by_length(
    model: Llama,
    params: dict,
    arms: Arms,
    windows: Windows,
    lengths: Sequence[int],
    *,
    layout: Layout | None = None,
) -> dict[int, dict[str, DocumentNll]]:
    """Length (tokens) -> arm -> NLL by document, to be given to `perplexity.perplexity` and `perplexity.compare`.

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
                name: nll_by_file(model, layout, params, _at(arm, length), windows, length)
                for name, arm in arms.items()
            }
            for length in lengths
        }


def find_numbers(
    model: Llama,
    params: dict,
    arms: Arms,
    documents: Sequence[Document],
    settings: RetrievalSettings,
    *,
    tokenizer: Tokenizer | None = None,
    layout: Layout | None = None,
) -> tuple[RetrievalSettings, list[dict[str, Any]]]:
    """Hides numbers and has the model find them, as the stage `retrieval` does, but keeps nothing on disk.

    Args:
        documents: to hide them in.
        settings: its `arms` and `data` are about an experiment and mean nothing here.
        tokenizer: of the documents; without it bytes.
        layout: of the devices.

    Returns:
        The settings with these arms, and the records, as `report.retrieval.summarize_retrieval` wants them.

    Raises:
        ValueError: a length is too short for the prompts, too long for the documents, or beyond the end of a table.
    """
    layout, tokenizer = layout or Layout(), tokenizer or ByteTokenizer()
    settings = replace(settings, arms={name: Arm(name) for name in arms})
    subjects = {name: Subject(lambda: params, partial(_at, arm)) for name, arm in arms.items()}
    with layout.active(), tempfile.TemporaryDirectory() as folder:
        made = run_retrieval(model, layout, subjects, settings, tokenizer, documents, epath.Path(folder), "retrieval")
    return settings, made


def _at(arm: RopeFactors | FactorTable, length: int) -> RopeFactors:
    return arm.select(length) if isinstance(arm, FactorTable) else arm
