"""The first sentence of a report, and an evaluation with losses that are not finite."""

import numpy as np
import pytest
from tiny_experiment import SIZES

from longrope_jax.evaluation.evaluate import EvaluationSettings, Method
from longrope_jax.model import LlamaConfig
from longrope_jax.report.page import Picture
from longrope_jax.report.perplexity import evaluation_section, summarize_evaluation

L, LONG, TOKENS = 16, 64, 64
METHODS = {"yarn": Method("yarn"), "second": Method("yarn_mistral"), "ntk": Method("ntk"), "longrope": Method("search")}
BASE = np.array([1.0, 1.5, 2.0, 1.2])


def evaluation(shifts, late=0.0, beyond=(), controls=()):
    """Settings and records of methods that have the NLL of `BASE`, shifted by so many nats per token."""
    settings = EvaluationSettings((L, LONG), methods={name: METHODS[name] for name in shifts}, controls=controls)
    records = [
        dict(
            length=length,
            method=name,
            documents=["a", "b", "c", "d"],
            nll_sums=((BASE + shift) * TOKENS).tolist(),
            counts=[TOKENS] * 4,
            nll_by_position=[float(np.mean(BASE + shift)) + (name == "longrope") * late * (k == 7) for k in range(8)],
            nll_beyond=beyond if name == "longrope" else beyond and [1.0],
            factors=dict(lam=[1.0], n_hat=0, mscale=1.0),
        )
        for length in (L, LONG)
        for name, shift in shifts.items()
    ]
    return settings, records


def headline(*args, **kwargs):
    return summarize_evaluation(*evaluation(*args, **kwargs), L)["headline"]


@pytest.mark.parametrize(
    "shifts, text",
    [
        (
            dict(yarn=0.2, second=0.1, ntk=-1, longrope=0),
            "9.5 % below the best YaRN (4.60; second) [95 % interval 9.5",
        ),
        (dict(yarn=0.2, second=0.1, longrope=0.3), "22.1 % above the best YaRN (4.60; second) [95 % interval 22.1 to"),
        (
            dict(yarn=np.array([0.1, -0.1, 0.1, -0.1]), longrope=0),
            "no clear difference from the best YaRN (4.16",
        ),
        (dict(ntk=0.1, longrope=0), "9.5 % below the best other method (4.60; NTK)"),
        (dict(longrope=0), "LongRoPE: perplexity 4.16; no other method to compare with."),
        (dict(yarn=0.1, ntk=0), "At 4x (64 tokens), NTK: perplexity 4.16, the lowest of 2 methods."),
        (dict(yarn=np.inf, longrope=0), "LongRoPE: perplexity 4.16; the best YaRN (inf; YaRN); the difference has no"),
    ],
)
def test_the_headline_compares_longrope_with_the_best_yarn(shifts, text):
    assert text in headline(shifts)


def test_the_headline_warns_of_a_part_of_the_window_in_which_longrope_is_worse():
    text = headline(dict(yarn=0.1, longrope=0), late=0.2)
    assert text.endswith("LongRoPE is worse in parts of the window: eighth 8 (5.08, YaRN 4.60).")
    assert "worse" not in headline(dict(yarn=0.1, longrope=0), late=0.05)
    assert "worse" not in headline(dict(yarn=0.0, longrope=0), late=0.004)


@pytest.mark.parametrize("beyond", [[np.inf], [None], [2.0]])
def test_the_headline_warns_of_what_fails_beyond_the_window(beyond):
    assert "the tokens just beyond it (" in headline(dict(yarn=0.1, longrope=0), beyond=beyond)


def test_a_loss_that_is_not_finite_is_a_gap_in_the_curve_by_position():
    settings, records = evaluation(dict(yarn=0.1, longrope=0), controls=("yarn",))
    for record in records:
        if record["method"] == "longrope":
            record["nll_by_position"][3] = None  # as JSON has it
    summary, config = (
        summarize_evaluation(settings, records, L),
        LlamaConfig(vocab_size=258, original_length=L, **SIZES),
    )
    section = evaluation_section("evaluate", summary, settings, records, config)
    (figure,) = (part.figure for part in section if isinstance(part, Picture) and "by_position" in part.name)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert np.flatnonzero(np.isnan(lines["LongRoPE (searched)"].get_ydata())).tolist() == [3]
