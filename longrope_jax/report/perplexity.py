"""The perplexity part of a report: the headline, tables by method and length, paired differences, and figures."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from longrope_jax import rope
from longrope_jax.data.pairs import DIGITS
from longrope_jax.evaluation.evaluate import EvaluationSettings, published_methods, recorded_nll
from longrope_jax.evaluation.perplexity import DocumentNll, by_position, compare, perplexity
from longrope_jax.model import LlamaConfig
from longrope_jax.report import plots
from longrope_jax.report.page import Parts, Picture
from longrope_jax.report.tables import DIFFERENCES, difference_cell, length_heading, markdown_table

Records = list[dict[str, Any]]
Summary = dict[str, Any]
"""The result of `summarize_evaluation`, as in report.json."""

LONGROPE = "longrope"
"""The name of the method that the others are compared with, if an evaluation has it."""


def summarize_evaluation(settings: EvaluationSettings, records: Records, original_length: int) -> Summary:
    """The summary of one evaluation.

    Returns:
        By length and method the perplexity with its 95 % interval; the differences of `settings.compared`; the
        differences of the method `longrope` to all others and, beyond the original length (tokens), to the controls at
        the original length; and the headline. At the longest length also the perplexities of the last eighth of the
        windows, and just beyond them.
    """
    found = {(record["length"], record["method"]): record for record in records}
    nll = {key: recorded_nll(record) for key, record in found.items()}
    lengths, methods = sorted(settings.lengths), list(settings.methods)
    longest = {method: found[lengths[-1], method] for method in methods}
    eighths = {method: [_exp(part) for part in _by_eighth(record)] for method, record in longest.items()}
    controls = settings.controls if original_length in lengths else ()

    def difference(a: tuple[int, str], b: tuple[int, str]) -> dict[str, Any]:
        return compare(nll[a], nll[b])._asdict()

    summary: Summary = {
        "headline": _headline(nll, longest, settings, original_length),
        "perplexity": {str(n): {method: perplexity(nll[n, method])._asdict() for method in methods} for n in lengths},
        "documents": sorted(set(records[0]["documents"])),
        "start_tokens": {method: {str(n): found[n, method]["factors"]["n_hat"] for n in lengths} for method in methods},
        "compared": [
            {"methods": [a, b], "by_length": {str(n): difference((n, a), (n, b)) for n in lengths}}
            for a, b in settings.compared
        ],
        "longrope_minus": {},
        "longrope_minus_disjoint_windows_of_original_length": {},
        "by_eighth": eighths,
        "answers": {method: _answers(record, lengths) for method, record in longest.items() if "answers" in record},
    }
    for method, entry in summary["perplexity"][str(lengths[-1])].items():
        beyond = longest[method]["nll_beyond"]
        entry |= {"last_eighth": eighths[method][-1], "beyond": _exp(beyond[0]) if beyond else None}
    for n in lengths if LONGROPE in methods else ():
        summary["longrope_minus"][str(n)] = {
            method: difference((n, LONGROPE), (n, method)) for method in methods if method != LONGROPE
        }
        if n > original_length:
            summary["longrope_minus_disjoint_windows_of_original_length"][str(n)] = {
                method: difference((n, LONGROPE), (original_length, method)) for method in controls
            }
    return summary


def _answers(record: dict[str, Any], lengths: list[int]) -> dict[str, Any]:
    """Mean NLL (nats per digit) of the values of planted pairs, by the range of distances that ends at each length."""
    found = record["answers"]
    ranges = np.searchsorted(lengths, found["distances"])
    nll = np.array(list(map(_infinite, found["nll"])))
    names = np.array(record["documents"])[found["documents"]]
    return {
        str(length): {
            "nll": float(nll[at].mean()) if np.isfinite(nll[at]).all() else None,
            "answers": int(at.sum()),
            "documents": len(set(names[at])),
        }
        for number, length in enumerate(lengths)
        if (at := ranges == number).any()
    }


_CLEARLY = 0.005  # nats; two perplexities that differ by less look the same in a table


def _exp(nll: float | None) -> float | None:
    """A perplexity; None where it is not finite."""
    return None if nll is None or not np.isfinite(nll) else float(np.exp(nll))


def _headline(
    nll: Mapping[tuple[int, str], DocumentNll],
    longest: Mapping[str, dict[str, Any]],
    settings: EvaluationSettings,
    original_length: int,
) -> str:
    """LongRoPE's perplexity at the longest length and its paired difference to the best YaRN; and a warning where
    LongRoPE is worse in a part of the window.

    Without a YaRN it is the difference to the best other method; without LongRoPE, the method with the lowest
    perplexity.
    """
    length = max(settings.lengths)
    ppl = {method: perplexity(nll[length, method]).ppl for method in settings.methods}
    at = f"At {length / original_length:g}x ({length:,} tokens), "
    if LONGROPE not in ppl:
        best = min(ppl, key=ppl.__getitem__)
        return f"{at}{plots.label(best)}: perplexity {ppl[best]:.2f}, the lowest of {len(ppl)} methods."
    start = f"{at}LongRoPE: perplexity {ppl[LONGROPE]:.2f}"
    others = [method for method in ppl if method != LONGROPE]
    if not others:
        return f"{start}; no other method to compare with."
    yarn = [name for name in others if name.startswith("yarn") or settings.methods[name].factors.startswith("yarn")]
    best = min(yarn or others, key=ppl.__getitem__)
    name = f"the best {'YaRN' if yarn else 'other method'} ({ppl[best]:.2f}; {plots.label(best)})"
    compared = compare(nll[length, LONGROPE], nll[length, best])
    change, low, high = 100 * np.expm1([compared.difference, *compared.ci95])
    if not np.isfinite([low, high]).all():
        return f"{start}; {name}; the difference has no interval."
    if low <= 0 <= high:
        claim = f"no clear difference from {name}: {change:+.1f} %"
        interval = f"{low:+.1f} to {high:+.1f} %, which contains zero"
    else:
        claim = f"{abs(change):.1f} % {'below' if change < 0 else 'above'} {name}"
        interval = "{:.1f} to {:.1f} %".format(*sorted([abs(low), abs(high)]))
    documents = len(nll[length, best].sums)
    return f"{start}, {claim} [95 % interval {interval}, {documents} documents].{_worse_parts(longest, best)}"


def _worse_parts(longest: Mapping[str, dict[str, Any]], other: str) -> str:
    """A sentence on the eighths of the window, and what is read beyond it, in which LongRoPE is worse than another."""
    mine, others = (
        {f"eighth {number}": nll for number, nll in enumerate(_by_eighth(longest[name]), 1)}
        | dict(zip(["the tokens just beyond it"], map(_infinite, longest[name]["nll_beyond"]), strict=False))
        for name in (LONGROPE, other)
    )
    worse = [
        f"{part} ({np.exp(mine[part]):.2f}, {plots.label(other)} {np.exp(others[part]):.2f})"
        for part in mine
        if mine[part] > others[part] + _CLEARLY
    ]
    return f" LongRoPE is worse in parts of the window: {', '.join(worse)}." if worse else ""


def _by_eighth(record: dict[str, Any]) -> Float[np.ndarray, "eighths"]:
    """Mean NLL (nats per token) in every eighth of the windows of a record; fewer parts below eight tokens."""
    curve = np.array([list(map(_infinite, record["nll_by_position"]))])
    return by_position(curve, min(8, curve.shape[1]))


def _infinite(nll: float | None) -> float:
    """An NLL of a record; null in JSON stands for infinity."""
    return np.inf if nll is None else nll


def perplexity_table(summary: Summary, original_length: int) -> str:
    """Perplexity by method and length, in Markdown."""
    rows = [
        [plots.label(method), *(f"{row[method]['ppl']:.2f}" for row in summary["perplexity"].values())]
        for method in plots.ordered(summary["by_eighth"])
    ]
    return _by_length(summary, original_length, rows)


def _by_length(summary: Summary, original_length: int, rows: list[list[str]]) -> str:
    """A table with a column for every length."""
    return markdown_table(["", *(length_heading(int(n), original_length) for n in summary["perplexity"])], rows)


def evaluation_section(
    stage: str, summary: Summary, settings: EvaluationSettings, records: Records, config: LlamaConfig
) -> Parts:
    """The section of a report: the table, the pictures, the comparisons, and what every method is."""
    longest, original = list(summary["perplexity"])[-1], config.original_length
    note = (
        f"Perplexity per token on {len(summary['documents'])} documents of the {settings.split} split, which neither "
        f"training nor search has seen. The documents are cut into windows of every length up to {longest} tokens, so "
        "every length scores the same tokens."
    )
    if str(original) in summary["perplexity"]:
        note += (
            " The column of the original length L is the control for all longer ones: the perplexity of a model that "
            "reads disjoint windows of L tokens."
        )
    return [
        f"## {evaluation_title(stage)}\n",
        perplexity_table(summary, original),
        *_pictures(stage, summary, settings, records, config),
        f"{note}\n",
        *_along_windows(summary, longest),
        *_answers_by_distance(summary, longest),
        *_pairs(summary, original),
        *_comparisons(summary, longest, original),
        *_methods(summary, settings),
    ]


def _pictures(
    stage: str, summary: Summary, settings: EvaluationSettings, records: Records, config: LlamaConfig
) -> list[Picture]:
    """Perplexity by length, and what the records allow of perplexity by position, and of factors by pair and by
    length.
    """
    suffix, original = stage.removeprefix("evaluate"), config.original_length  # several stages have figures each
    by_length = {int(n): {method: e["ppl"] for method, e in row.items()} for n, row in summary["perplexity"].items()}
    controls = settings.controls if original in by_length else ()
    figure = plots.perplexity_by_length(by_length, original, controls)
    pictures = [Picture("perplexity by length", f"perplexity_by_length{suffix}", figure)]
    longest = max(by_length)
    if controls:
        curves = {(r["length"], r["method"]): np.array(r["nll_by_position"], float) for r in records}
        at_longest = {method: curves[longest, method] for method in settings.methods}
        control = curves[original, controls[0]]
        figure = plots.nll_by_position(at_longest, longest, original, controls[0], control)
        pictures.append(Picture("perplexity by position", f"perplexity_by_position{suffix}", figure))
    used = {
        (r["length"], r["method"]): rope.RopeFactors(**{name: np.array(value) for name, value in r["factors"].items()})
        for r in records
    }
    styled = plots.STYLES.keys() - {"unscaled"}
    shown = {method: used[longest, method] for method in settings.methods if method in styled}
    if shown:
        figure = plots.factors_by_pair(shown, longest / original, config.rope_theta, original)
        pictures.append(Picture("rescale factors", f"factors{suffix}", figure))
    chosen = {n: factors for (n, method), factors in used.items() if method == LONGROPE}
    if len({factors.lam.tobytes() for factors in chosen.values()}) > 1:
        figure = plots.factors_by_length(chosen, original)
        pictures.append(Picture("factors by length", f"factors_by_length{suffix}", figure))
    return pictures


def evaluation_title(stage: str) -> str:
    """The heading of an evaluation; with the name of its stage, unless that is `evaluate`."""
    return "Perplexity by window length" + (f" (stage `{stage}`)" if stage != "evaluate" else "")


def _along_windows(summary: Summary, longest: str) -> list[str]:
    """Perplexity in every eighth of the longest windows, and just beyond them."""
    values = {
        method: [*by_eighth, summary["perplexity"][longest][method]["beyond"]]
        for method, by_eighth in summary["by_eighth"].items()
    }
    rows = [
        [plots.label(method), *("" if value is None else f"{value:.2f}" for value in values[method])]
        for method in plots.ordered(values)
    ]
    parts = len(rows[0]) - 2
    header = ["", *(f"{number}/{parts}" for number in range(1, parts + 1)), "beyond"]
    return [f"### Perplexity along windows of {int(longest):,} tokens\n", markdown_table(header, rows)]


def _answers_by_distance(summary: Summary, longest: str) -> list[str]:
    """How well the values of planted pairs are predicted, by their distance from the last line with the pair."""
    found = summary["answers"]
    if not found:
        return []
    first = next(iter(found.values()))
    header = [
        f"up to {int(length):,} bytes ({entry['answers']} in {entry['documents']} documents)"
        for length, entry in first.items()
    ]
    cells = {
        name: [f"{e['nll']:.2f}" if e["nll"] is not None else "inf" for e in found[name].values()] for name in found
    }
    blind = np.log(10.0 - np.arange(DIGITS)).mean()  # all digits differ
    return [
        f"### Values of planted pairs, windows of {int(longest):,} tokens\n",
        "Mean NLL in nats per digit, by the distance from the last line with the same pair. A model that does not read "
        f"that line has {blind:.2f} at best.\n",
        markdown_table(["", *header], [[plots.label(name), *cells[name]] for name in plots.ordered(cells)]),
    ]


def _methods(summary: Summary, settings: EvaluationSettings) -> list[str]:
    """Where the factors and the model of every method come from, and its start tokens (n_hat) by length, if any."""
    columns = {
        "factors from": [
            f"stage `{method.factors}`" if method.factors not in published_methods() else f"formula `{method.factors}`"
            for method in settings.methods.values()
        ]
    }
    if any(method.model for method in settings.methods.values()):
        columns["model from"] = [
            f"stage `{method.model}`" if method.model else "the last model stage before"
            for method in settings.methods.values()
        ]
    tokens = [list(summary["start_tokens"][name].values()) for name in settings.methods]
    if any(map(any, tokens)):
        columns[f"start tokens at {', '.join(summary['perplexity'])}"] = [", ".join(map(str, row)) for row in tokens]
    rows = zip(map(plots.label, settings.methods), *columns.values(), strict=True)
    return ["### Methods\n", markdown_table(["", *columns], [list(row) for row in rows])]


def _pairs(summary: Summary, original_length: int) -> list[str]:
    """The paired differences of `settings.compared`, at every length."""
    rows = [
        [" minus ".join(map(plots.label, pair["methods"])), *map(difference_cell, pair["by_length"].values())]
        for pair in summary["compared"]
    ]
    return [DIFFERENCES, _by_length(summary, original_length, rows)] if rows else []


def _comparisons(summary: Summary, longest: str, original_length: int) -> list[str]:
    """Paired differences of LongRoPE to the others, at the longest and at the original length."""
    parts = []
    for length in dict.fromkeys([longest, str(original_length)]):
        controls = summary["longrope_minus_disjoint_windows_of_original_length"].get(length, {})
        entries = {plots.label(name): entry for name, entry in summary["longrope_minus"].get(length, {}).items()}
        entries |= {plots.control_label(name): entry for name, entry in controls.items()}
        rows = [
            [
                label,
                f"{entry['difference']:+.4f}",
                "[{:+.4f}, {:+.4f}]".format(*entry["ci95"]),
                f"{100 * entry['improvement']:.1f} %",
                f"{100 * entry['documents_better']:.0f} %",
            ]
            for label, entry in entries.items()
        ]
        header = ["LongRoPE minus", "nats per token", "95 % interval", "perplexity lower by", "documents better"]
        if rows:
            parts += [f"### LongRoPE against the others at {length} tokens\n", markdown_table(header, rows)]
    if parts:
        parts.append(
            "Differences are paired by document; the interval is t over documents. A positive difference to "
            "a control means that the model does not use the longer context.\n"
        )
    return parts
