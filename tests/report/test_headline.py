"""The first sentence of a report."""

import numpy as np
import pytest

from longrope_jax.evaluation.evaluate import EvaluationSettings, Method
from longrope_jax.report.perplexity import summarize_evaluation

L, LONG, TOKENS = 16, 64, 64
METHODS = {"yarn": Method("yarn"), "second": Method("yarn_mistral"), "ntk": Method("ntk"), "longrope": Method("search")}
BASE = np.array([1.0, 1.5, 2.0, 1.2])


def headline(shifts, methods=METHODS, late=0.0, beyond=()):
    """Of an evaluation whose methods have the NLL of `BASE`, shifted by so many nats per token."""
    settings = EvaluationSettings(lengths=(L, LONG), methods={name: methods[name] for name in shifts}, controls=())
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
    return summarize_evaluation(settings, records, L)["headline"]


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
    told = headline(dict(yarn=0.1, longrope=0), late=0.2)
    assert told.endswith("LongRoPE is worse in parts of the window: eighth 8 (5.08, YaRN 4.60).")
    assert "worse" not in headline(dict(yarn=0.1, longrope=0), late=0.05)
    assert "worse" not in headline(dict(yarn=0.0, longrope=0), late=0.004)


@pytest.mark.parametrize("beyond", [[np.inf], [None], [2.0]])
def test_the_headline_warns_of_what_fails_beyond_the_window(beyond):
    assert "the tokens just beyond it (" in headline(dict(yarn=0.1, longrope=0), beyond=beyond)
