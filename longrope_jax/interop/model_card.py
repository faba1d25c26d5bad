"""The model card of an exported model: what it is, how it was made, what of it the format could not hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np

from longrope_jax.evaluation.perplexity import Perplexity
from longrope_jax.evaluation.substitution import Cost
from longrope_jax.markdown import table as markdown_table
from longrope_jax.model import LlamaConfig
from longrope_jax.rope import FactorTable

PAPER = "https://arxiv.org/abs/2402.13753"


@dataclass(frozen=True)
class Card:
    """What a card tells.

    Attributes:
        title: the model's name.
        config: its architecture.
        found: its factors by length.
        carried: those that are exported.
        dropped: what of the former has no place in the latter, in words, by kind.
        costs: what that costs, measured.
        text: which text it was measured on, in words.
        steps: how it was made: stages or sources by name, in order, with their settings or numbers.
        perplexity: of arms by length, as far as it was evaluated.
    """

    title: str
    config: LlamaConfig
    found: FactorTable
    carried: FactorTable
    dropped: Mapping[str, str] = field(default_factory=dict)
    costs: Sequence[Cost] = ()
    text: str = ""
    steps: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    perplexity: Mapping[str, Mapping[int, Perplexity]] = field(default_factory=dict)


def model_card(card: Card) -> str:
    """README.md, with the metadata that the Hugging Face hub reads."""
    original, longest = card.config.original_length, int(card.carried.boundaries[-1])
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- longrope\n- long-context\n---\n",
        f"# {card.title}\n",
        f"A language model of {card.config.num_layers} layers and head dimension {card.config.head_dim}, pretrained "
        f"for {original:,} tokens, with rotary position embeddings rescaled for up to {longest:,} tokens "
        f"({longest / original:g} times as many). Rescale factors: [LongRoPE]({PAPER}); made with longrope_jax "
        f"{version('longrope_jax')}.\n",
        "## Context\n",
        _entries(card.carried),
        *_dropped(card),
        *_perplexity(card),
        *_steps(card),
        "## Rescale factors\n",
        "One for every rotary pair, high frequencies first; a pair's wavelength is multiplied by it. In config.json "
        "they are `rope_parameters.short_factor` and `long_factor`; readers older than Transformers 5 find them in "
        "`rope_scaling`.\n",
        *(f"* {line}" for line in _lambdas(card.carried)),
    ]
    return "\n".join(parts) + "\n"


def _entries(table: FactorTable) -> str:
    rows = []
    after = 0
    for boundary, lam, mscale in zip(table.boundaries, table.factors.lam, table.factors.mscale, strict=True):
        span = f"up to {int(boundary):,} tokens" if not after else f"{after + 1:,} to {int(boundary):,} tokens"
        rows.append([span, f"{np.min(lam):.3g} to {np.max(lam):.3g}", f"{float(mscale):.4g}"])
        after = int(boundary)
    return markdown_table(["sequences of", "factors", "attention temperature"], rows)


def _lambdas(table: FactorTable) -> list[str]:
    return [
        f"up to {int(boundary):,} tokens: {', '.join(f'{value:.4g}' for value in lam)}"
        for boundary, lam in zip(table.boundaries, table.factors.lam, strict=True)
    ]


def _dropped(card: Card) -> list[str]:
    heading = "## What the format could not carry\n"
    if not card.dropped:
        return [heading, "Nothing: these are the factors that the model was made and judged with.\n"]
    what = "; ".join(card.dropped.values())
    parts = [heading, f"Dropped, on demand: {what}. The factors that were found:\n", _found(card.found)]
    if card.costs:
        parts += [
            f"What this costs, on {card.text}; nats per token, 95 % intervals over documents, paired:\n",
            cost_table(card.costs),
        ]
    else:
        parts.append("No length of a sequence gets other factors for it.\n")
    return parts


def _found(table: FactorTable) -> str:
    rows = [
        [f"{int(boundary):,}", str(int(n_hat)), f"{float(mscale):.4g}", f"{np.min(lam):.3g} to {np.max(lam):.3g}"]
        for boundary, lam, n_hat, mscale in zip(
            table.boundaries, table.factors.lam, table.factors.n_hat, table.factors.mscale, strict=True
        )
    ]
    return markdown_table(["up to tokens", "start tokens", "temperature", "factors"], rows)


def cost_table(costs: Sequence[Cost]) -> str:
    """Perplexity with the factors that were found and with those that are exported, by length."""
    rows = []
    for cost in costs:
        low, high = cost.difference.ci95
        rows.append([
            f"{cost.length:,}",
            f"{cost.found.ppl:.4f}",
            f"{cost.others.ppl:.4f}",
            f"{cost.difference.difference:+.4f} [{low:+.4f}, {high:+.4f}]",
            f"{cost.windows} from {cost.documents}",
        ])  # fmt: skip
    return markdown_table(["tokens", "perplexity as found", "as exported", "difference", "windows, documents"], rows)


def _perplexity(card: Card) -> list[str]:
    if not card.perplexity:
        return []
    lengths = sorted({length for row in card.perplexity.values() for length in row})
    rows = [
        [arm, *(f"{row[length].ppl:.2f}" if length in row else "" for length in lengths)]
        for arm, row in card.perplexity.items()
    ]
    return [
        "## Perplexity\n",
        "By length of the window, on documents that neither training nor search has seen"
        f"{', before anything was dropped' if card.dropped else ''}.\n",
        markdown_table(["", *(f"{length:,}" for length in lengths)], rows),
    ]


def _steps(card: Card) -> list[str]:
    lines = [
        f"* **{name}**: " + ", ".join(f"{key} = {value}" for key, value in settings.items())
        for name, settings in card.steps.items()
    ]
    return ["## How it was made\n", *lines, ""] if lines else []
