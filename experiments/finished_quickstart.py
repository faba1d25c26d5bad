"""Reads the model and documents of a finished quickstart, for experiments that call the search as a library."""

import json
from collections.abc import Mapping

import numpy as np
from etils import epath
from jaxtyping import Float

from longrope_jax import DataSettings, Llama, LlamaConfig, find_factors, read_documents
from longrope_jax.data.windows import fixed_windows
from longrope_jax.evaluation.perplexity import Perplexity, by_document, perplexity, token_nll
from longrope_jax.rope import RopeFactors
from longrope_jax.runtime.mesh import Layout
from longrope_jax.search.candidates import SearchState
from longrope_jax.search.settings import SearchSettings
from longrope_jax.training.loop import load_params


class Quickstart:
    """The pretrained model of a work directory, and the embedded corpus.

    Attributes:
        config: of the model.
    """

    def __init__(self, workdir: str):
        path = epath.Path(workdir)
        settings = json.loads((path / "config.json").read_text())
        self.config = LlamaConfig(**settings["model"])
        self._model, self._layout = Llama(self.config), Layout()
        self._params = load_params(path, "pretrain", self._model, self._layout, settings["pretrain"]["steps"])
        self._documents = read_documents(DataSettings(), path / "data")

    def search(self, settings: SearchSettings, seeds: Mapping[str, RopeFactors] | None = None) -> SearchState:
        """Runs a search on the search documents; returns all its candidates."""
        return find_factors(self._model, self._params, self._documents["search"], settings, seeds=seeds)

    def token_nll(self, factors: RopeFactors, length: int, documents: int) -> Float[np.ndarray, "N T"]:
        """NLL (nats) of every token in windows of `length` tokens of evaluation documents."""
        windows = fixed_windows(self._documents["evaluation"], length, documents, seed=0).tokens
        return token_nll(self._model, self._layout, self._params, factors, windows, length)

    def evaluate(self, factors: RopeFactors, length: int, documents: int) -> Perplexity:
        """Perplexity on windows of `length` tokens of evaluation documents."""
        return perplexity(by_document(self.token_nll(factors, length, documents)))


def mean_and_range(values, digits: int = 3) -> str:
    """Mean and range over the seeds, as a cell of a table."""
    return f"{np.mean(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"
