"""The model card of an exported model: what it is, how it was made, what was dropped for the format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import numpy as np

from longrope_jax import __version__
from longrope_jax.evaluation.factor_switching import Cost
from longrope_jax.evaluation.perplexity import Perplexity
from longrope_jax.model import LlamaConfig
from longrope_jax.report.tables import markdown_table
from longrope_jax.rope import FactorTable

PAPER = "https://arxiv.org/abs/2402.13753"


@dataclass(frozen=True)
class Card:
    """The content of a card.

    Attributes:
        title: the model's name.
        config: its architecture.
        form: Transformers' class for it and the dtype of its tensors, in words.
        factors: its factors by length.
        exported: the factors that are exported.
        dropped: properties of the factors that the exported ones lack, in words, by kind.
        costs: the measured cost of this.
        text: the text on which it was measured, in words.
        steps: how it was made: stages or sources by name, in order, with their settings.
        perplexity: of the evaluated methods, by length.
        exported_methods: the methods that are this model with `factors`.
    """

    title: str
    config: LlamaConfig
    form: str
    factors: FactorTable
    exported: FactorTable
    dropped: Mapping[str, str] = field(default_factory=dict)
    costs: Sequence[Cost] = ()
    text: str = ""
    steps: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    perplexity: Mapping[str, Mapping[int, Perplexity]] = field(default_factory=dict)
    exported_methods: Sequence[str] = ()


def model_card(card: Card) -> str:
    """The content of README.md, with metadata for the Hugging Face hub."""
    config, original, longest = card.config, card.config.original_length, int(card.exported.boundaries[-1])
    layers = "1 layer" if config.num_layers == 1 else f"{config.num_layers} layers"
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- longrope\n- long-context\n---\n",
        f"# {card.title}\n",
        f"A language model of {layers}, width {config.hidden_size} and {config.vocab_size:,} tokens in its vocabulary, "
        f"pretrained for contexts of {original:,} tokens. Its rotary position embedding is rescaled for up to "
        f"{longest:,}, in the format of [LongRoPE]({PAPER}), by longrope_jax {__version__}. Tensors: "
        f"{card.form}. Licence and training data are those of the model that it was made from.\n",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained(".")  # or the name of this repository\n'
        'model = AutoModelForCausalLM.from_pretrained(".")\n```\n',
        "## Context\n",
        _factor_table(card.exported),
        *_switching(card),
        *_dropped(card),
        *_perplexity(card),
        *_steps(card),
        "## Rescale factors\n",
        "One per rotary pair, high frequencies first; it multiplies the pair's wavelength. In config.json they are "
        "`rope_parameters.short_factor` and `long_factor`, repeated in `rope_scaling` for Transformers before 5.\n",
        *(
            f"* up to {int(boundary):,} tokens: {', '.join(f'{value:.4g}' for value in lam)}"
            for boundary, lam in zip(card.exported.boundaries, card.exported.factors.lam, strict=True)
        ),
    ]
    return "\n".join(parts) + "\n"


def _factor_table(table: FactorTable) -> str:
    factors = table.factors
    leaves = map(np.asarray, (table.boundaries, factors.lam, factors.mscale, factors.n_hat))
    rows = [
        [f"{int(boundary):,}", f"{np.min(lam):.3g} to {np.max(lam):.3g}", f"{float(mscale):.4g}", str(int(n_hat))]
        for boundary, lam, mscale, n_hat in zip(*leaves, strict=True)
    ]
    return markdown_table(["up to tokens", "factors", "attention temperature", "start tokens"], rows)


def _switching(card: Card) -> list[str]:
    """What a user of two sets of factors should know, because other programs do not say it."""
    boundaries = [int(boundary) for boundary in card.exported.boundaries]
    if len(boundaries) < 2:
        return []
    notes = [
        f"Sequences of up to {boundaries[0]:,} tokens use the short factors, longer ones the long; a batch uses "
        f"one set. Cached keys keep their rotation. So if a generated text grows beyond {boundaries[0]:,} tokens, "
        "Transformers' classes for Llama and Mistral are only exact with `use_cache=False` or a new prompt; its class "
        "for Phi-3 recomputes the cache. Serving engines may choose one set for all requests.\n"
    ]
    if boundaries[0] != card.config.original_length:
        notes.append(
            f"`original_max_position_embeddings` in config.json is where the factors change, {boundaries[0]:,} tokens, "
            "because the format has one number for both; the model was pretrained for "
            f"{card.config.original_length:,}.\n"
        )
    return notes


def _dropped(card: Card) -> list[str]:
    heading = "## What the format does not support\n"
    if not card.dropped:
        return [heading, "Nothing was dropped: the factors above are the original ones.\n"]
    what = "; ".join(card.dropped.values())
    parts = [heading, f"Dropped, as allowed: {what}. The original factors:\n", _factor_table(card.factors)]
    if card.costs:
        parts += [
            f"The cost of this on {card.text}; nats per token, paired 95 % intervals over documents:\n",
            cost_table(card.costs),
        ]
    else:
        parts.append("This changes the factors of no sequence length.\n")
    return parts


def cost_table(costs: Sequence[Cost]) -> str:
    """Perplexity with the original factors and with the exported ones, by length."""
    rows = [
        [
            f"{cost.length:,}",
            f"{cost.found.ppl:.4f}",
            f"{cost.others.ppl:.4f}",
            "{:+.2g} [{:+.2g}, {:+.2g}]".format(cost.difference.difference, *cost.difference.ci95),
            f"{cost.windows} from {cost.documents}",
        ]
        for cost in costs
    ]
    return markdown_table(["tokens", "perplexity, original", "exported", "difference", "windows, documents"], rows)


def _perplexity(card: Card) -> list[str]:
    if not card.perplexity:
        return []
    lengths = sorted({length for row in card.perplexity.values() for length in row})
    rows = [
        [
            method + " (this model)" * (method in card.exported_methods),
            *(f"{row[length].ppl:.2f}" if length in row else "" for length in lengths),
        ]
        for method, row in card.perplexity.items()
    ]
    return [
        "## Perplexity\n",
        "Per token, by window length, on documents that neither training nor search used"
        f"{', before anything was dropped' if card.dropped else ''}.\n",
        markdown_table(["", *(f"{length:,}" for length in lengths)], rows),
    ]


def _steps(card: Card) -> list[str]:
    lines = [
        f"* **{name}**: " + ", ".join(f"{key} = {_format_setting(key, value)}" for key, value in settings.items())
        for name, settings in card.steps.items()
    ]
    return ["## How it was made\n", *lines, ""] if lines else []


def _format_setting(key: str, value: Any) -> str:
    """A setting for readers elsewhere: rounded numbers, and file names without folders."""
    if key == "path":
        return PurePath(str(value)).name
    return f"{value:.4g}" if isinstance(value, float) else str(value)
