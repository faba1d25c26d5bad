"""Pictures for reports and notebooks; each function draws one figure from plain numbers and returns it."""

from longrope_jax.report.plots.evaluation import (
    nll_after_switch,
    nll_by_position,
    perplexity_by_length,
    retrieval_by_length,
    retrieval_heatmap,
)
from longrope_jax.report.plots.factors import (
    factors_by_length,
    factors_by_pair,
    nll_by_changed_factor,
    rotation_by_position,
    score_by_distance,
    sensitivity_by_pair,
    trained_range,
)
from longrope_jax.report.plots.learning import search_convergence, search_overfitting, training_curves
from longrope_jax.report.plots.style import STYLES, control_label, label, ordered

__all__ = [
    "STYLES",
    "control_label",
    "factors_by_length",
    "factors_by_pair",
    "label",
    "nll_after_switch",
    "nll_by_changed_factor",
    "nll_by_position",
    "ordered",
    "perplexity_by_length",
    "retrieval_by_length",
    "retrieval_heatmap",
    "rotation_by_position",
    "score_by_distance",
    "search_convergence",
    "search_overfitting",
    "sensitivity_by_pair",
    "trained_range",
    "training_curves",
]
