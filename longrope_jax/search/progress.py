"""The progress bar of a search, which counts candidates but is told parts of them."""

import contextlib
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from longrope_jax.runtime import processes


class Bar:
    """Shows whole candidates."""

    def __init__(self, bar: tqdm, done: float):
        self._bar, self._done = bar, done

    def advance(self, candidates: float) -> None:
        """So many more were dealt with."""
        self._done += candidates
        self._bar.update(int(self._done + 1e-6) - self._bar.n)

    def tell_best(self, nll: float) -> None:
        """Shows the best score so far, nats per token, as a perplexity."""
        self._bar.set_postfix(best_perplexity=f"{np.exp(nll):.3f}")


@contextlib.contextmanager
def open_bar(name: str, total: float, done: float = 0.0) -> Iterator[Bar]:
    """On the first process, of `total` candidates, of which so many are done already."""
    with tqdm(
        desc=name, total=round(total), initial=int(done), unit="candidate", dynamic_ncols=True,
        disable=not processes.is_first(),
    ) as bar:  # fmt: skip
        yield Bar(bar, done)
