"""The evaluation stage: every method at every length on the same documents."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from longrope_jax import rope
from longrope_jax.data.corpus import Document
from longrope_jax.data.windows import fixed_windows
from longrope_jax.evaluation.perplexity import by_document, by_position, token_nll
from longrope_jax.model import Llama, LlamaConfig
from longrope_jax.rope import RopeFactors
from longrope_jax.runtime import records

METHODS: dict[str, Callable[[LlamaConfig, float, int], RopeFactors]] = {
    "unscaled": lambda c, scale, length: rope.unscaled(c.head_dim),
    "linear": lambda c, scale, length: rope.linear(c.head_dim, scale),
    "ntk": lambda c, scale, length: rope.ntk(c.head_dim, scale),
    "dynamic_ntk": lambda c, scale, length: rope.dynamic_ntk(c.head_dim, length, c.original_length),
    "yarn": lambda c, scale, length: rope.yarn(c.head_dim, scale, c.rope_theta, c.original_length),
    "yarn_without_temperature": lambda c, scale, length: rope.yarn(
        c.head_dim, scale, c.rope_theta, c.original_length, temperature=False
    ),
}
"""Name -> (model, scale, evaluated length) -> factors. All but dynamic NTK keep the target's factors at every length.
"""

SEARCHED = "longrope"
POSITION_BUCKETS = 32


@dataclass(frozen=True)
class EvaluationSettings:
    """Which methods are judged, how long their windows are, and on what.

    Attributes:
        lengths: window lengths, tokens; the longest is the length of the documents and the methods' target.
        documents: how many windows of the longest length, from different documents as far as there are enough.
        stride: of the sliding window beyond the original length, tokens; 0 for disjoint windows. Up to the original
            length windows are always disjoint, as the control is.
        methods: besides the searched factors.
        seed: of the documents.
        tokens_at_once: how many tokens one forward pass takes.
    """

    lengths: tuple[int, ...]
    documents: int = 64
    stride: int = 0
    methods: tuple[str, ...] = tuple(METHODS)
    seed: int = 0
    tokens_at_once: int = 8192

    def __post_init__(self):
        if not self.lengths or min(self.lengths) < 1 or len(set(self.lengths)) < len(self.lengths):
            raise ValueError(f"lengths = {self.lengths} must be different positive numbers of tokens")
        if self.documents < 2:
            raise ValueError(f"documents = {self.documents} must be at least 2: intervals are over documents")
        if self.tokens_at_once < 1:
            raise ValueError(f"tokens_at_once = {self.tokens_at_once} must be positive")
        if self.stride < 0:
            raise ValueError(f"stride = {self.stride} must not be negative")
        unknown = set(self.methods) - set(METHODS)
        if unknown:
            raise ValueError(f"unknown methods {sorted(unknown)}; known are {', '.join(METHODS)}")


def run_evaluation(
    model: Llama,
    params: dict,
    factors: RopeFactors | None,
    settings: EvaluationSettings,
    documents: Sequence[Document],
    workdir: epath.Path,
    stage: str,
) -> list[dict[str, Any]]:
    """One record for every (length, method): NLL sums and counts by document, and the curve over positions.

    All lengths score the same tokens: documents of the longest length are cut into windows of each. Records are
    appended to `workdir/evaluation.jsonl` as they are made; those that are there already are not made again.

    Args:
        factors: the searched ones, judged under the name "longrope", or None.
    """
    config, path = model.config, workdir / "evaluation.jsonl"
    target = max(settings.lengths)
    scale = max(target / config.original_length, 1.0)
    windows = fixed_windows(documents, target, settings.documents, settings.seed)
    methods = [*settings.methods, *([SEARCHED] if factors is not None else [])]

    records.keep(path, lambda record: True)  # drops a line cut off by a kill
    done = {(r["length"], r["method"]): r for r in records.read(path) if r["stage"] == stage}
    wanted = [(length, method) for length in sorted(settings.lengths) for method in methods]
    bar = tqdm(wanted, desc=stage, unit="evaluation", dynamic_ncols=True)
    for length, method in bar:
        bar.set_postfix(length=length, method=method)
        if (length, method) in done:
            continue
        chosen = factors if method == SEARCHED else METHODS[method](config, scale, length)
        stride = length if length <= config.original_length else min(settings.stride or length, length)
        began = time.monotonic()
        nll = token_nll(model, params, chosen, windows.tokens, length, stride, settings.tokens_at_once)
        sums, counts = by_document(nll)
        record = {
            "stage": stage,
            "length": length,
            "method": method,
            "documents": windows.names,
            "nll_sums": sums.tolist(),
            "counts": counts.tolist(),
            "seconds": time.monotonic() - began,
            "nll_by_position": by_position(nll, min(POSITION_BUCKETS, target)).tolist(),
            "factors": {
                "lam": np.asarray(chosen.lam).tolist(),
                "n_hat": int(chosen.n_hat),
                "mscale": float(chosen.mscale),
            },
        }
        records.append(path, [record])
        done[length, method] = record
    return [done[key] for key in wanted]
