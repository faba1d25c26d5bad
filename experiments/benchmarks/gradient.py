"""Measures the cost of a gradient by lam in forward passes over the same documents (forward equivalents).

    python experiments/benchmarks/gradient.py

Compares a step of a gradient search with the score of a candidate on the same documents, alternating in one process.
The models are the quickstart's with heads of 32 and 64 and random parameters; windows have 1,024 tokens.
"""

import numpy as np
from timing import Ratio, median_seconds

from longrope_jax.data.corpus import Document
from longrope_jax.data.tokenizer import ByteTokenizer
from longrope_jax.model import Llama, LlamaConfig
from longrope_jax.rope import RopeFactors, Trained, unscaled
from longrope_jax.runtime.mesh import Layout
from longrope_jax.search.find import prepare
from longrope_jax.search.gradient import make_optimizer, row_shares, step, variables_of
from longrope_jax.search.settings import GradientSettings, SearchSettings
from longrope_jax.training.step import init_params

LENGTH, HEAD_DIMS = 1024, (32, 64)
DOCUMENTS_AT_ONCE, REMATS = (1, 5), ("none", "nothing_saveable")


def main() -> None:
    """Prints the table."""
    print("| heads | documents at once | remat | seconds a candidate | seconds a step | a gradient costs |")
    print("|" + " --- |" * 6)
    for head_dim in HEAD_DIMS:
        for documents_at_once in DOCUMENTS_AT_ONCE:
            for remat in REMATS:
                forward, gradient = measure(head_dim, documents_at_once, remat)
                numbers = f"{forward:.4f} | {gradient:.4f} | {gradient / forward:.2f}"
                print(f"| {head_dim} | {documents_at_once} | {remat} | {numbers} |", flush=True)


def ratios() -> list[Ratio]:
    """The quickstart's model, a document at a time."""
    forward, gradient = measure(32, 1, "none")
    return [Ratio("a step of the search by gradient", gradient / forward, "step / candidate", "lower")]


def measure(head_dim: int, documents_at_once: int, remat: str) -> tuple[float, float]:
    """Median seconds of (a candidate, a step) on one block of documents."""
    config = LlamaConfig.preset("tiny", head_dim=head_dim, remat=remat)
    model, layout = Llama(config), Layout()
    params = init_params(model, 0)
    rng = np.random.default_rng(0)
    documents = [Document(str(number), rng.integers(0, 256, LENGTH + 1), LENGTH + 1) for number in range(5)]
    settings = SearchSettings(
        target_length=LENGTH, documents_at_once=documents_at_once, gradient=GradientSettings(remat=remat)
    )
    trained = Trained(config.original_length, unscaled(head_dim))
    space, _, seeds, _, objective = prepare(
        model, layout, params, trained, settings, documents, ByteTokenizer(), own_seeds={}
    )
    one = type(seeds)(*(leaf[:1] for leaf in seeds))
    factors = RopeFactors(one.lam, one.n_hat, one.mscale)
    block, optimizer = objective.blocks[0], make_optimizer(settings.gradient)
    variables, (fixed, scale) = variables_of(one, space), layout.replicate((one, np.float32(1)))
    shares = row_shares(objective, block)

    def take_step():
        # A step overwrites what it is given.
        start, moments = layout.replicate((variables, optimizer.init(variables)))
        options = model, space, optimizer, documents_at_once
        return step(*options, params, start, moments, fixed, scale, shares, block.weights, *block.rows)

    seconds = median_seconds({"candidate": lambda: objective.block_nll(0, factors), "step": take_step})
    return seconds["candidate"], seconds["step"]


if __name__ == "__main__":
    main()
