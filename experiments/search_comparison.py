"""Compares the results and costs of searches: evolution, races, gradients and CMA-ES.

    python experiments/search_comparison.py runs/comparison

It pretrains the quickstart's model with heads of 32 and of 64, six seeds each. On every model it runs every search
below for 8L, on the same five documents, and evaluates the result on 64 documents that no search has seen. It prints
the tables and writes them with the figure to runs/comparison/comparison.md. A stopped comparison resumes. Two hours
on two cores; results in docs/results/search.md. One model is an experiment:

    python -m longrope_jax.main --config=experiments/search_comparison.py:64 --workdir=runs/comparison/64_0

The unit of cost is the forward equivalent: 1 for a candidate on all documents, `GRADIENT_COST` for a gradient
(measured by experiments/benchmarks/gradient.py).
"""

import json
import sys

import numpy as np
import scipy.stats
from etils import epath
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from longrope_jax.data.corpus import DataSettings
from longrope_jax.evaluation.evaluate import EvaluationSettings, Method, recorded_nll
from longrope_jax.evaluation.perplexity import DocumentNll
from longrope_jax.experiment import run
from longrope_jax.model import LlamaConfig
from longrope_jax.report.tables import markdown_table
from longrope_jax.runtime import json_lines
from longrope_jax.runtime.mesh import MeshSettings
from longrope_jax.runtime.profiling import ProfileSettings
from longrope_jax.search.settings import CmaEsSettings, EvolutionSettings, GradientSettings, SearchSettings
from longrope_jax.settings import section
from longrope_jax.training.pretrain import PretrainSettings
from longrope_jax.training.step import OptimizerSettings

HEAD_DIMS, SEEDS = ("32", "64"), (0, 1, 2, 5, 6, 7)  # settings were chosen with seeds 3 and 4
LENGTH = 1024
GRADIENT_COST = 5.0
BUDGET = 1344  # of Algorithm 1: P 64 and T 40
LABELS = {
    "narrow": "Algorithm 1, narrow",
    "released": "Algorithm 1, released code",
    "narrow_racing": "narrow, racing",
    "cma_es": "CMA-ES",
    "gradient": "ramps, then gradient",
    "modelled": "with a surrogate",
    "hybrid": "hybrid, four starts",
    "hybrid_third": "hybrid, one start",
}
EVOLUTION = ("narrow", "released")
"""Algorithm 1 by its two readings; what others are compared with is the better one of each model."""


def searches() -> dict[str, SearchSettings]:
    """All searches by name."""
    racing = dict(racing=0.9, ramps=128)

    def gradient_steps(**numbers: int) -> GradientSettings:
        return GradientSettings(cost=GRADIENT_COST, remat="none", **numbers)

    few_steps = gradient_steps(rounds=1, starts=3, steps=20)
    return {
        "narrow": _search(evolution=EvolutionSettings.paper()),
        "released": _search(evolution=EvolutionSettings.released()),
        "narrow_racing": _search(racing=0.9, evolution=EvolutionSettings.paper()),
        "cma_es": _search(method="cma_es", cma_es=CmaEsSettings(population=32, iterations=14)),
        "gradient": _search(**racing, method="gradient", gradient=gradient_steps(rounds=2, starts=4, steps=40)),
        "modelled": _search(**racing, evolution=EvolutionSettings(iterations=22)),
        "hybrid_third": _search(
            **racing, method="hybrid", gradient=few_steps, evolution=EvolutionSettings(iterations=19)
        ),
        "hybrid": _search(
            **racing,
            method="hybrid",
            gradient=few_steps,
            evolution=EvolutionSettings(iterations=19, restarts=4),
        ),
    }


def get_config(head_dim: str = "32") -> ConfigDict:
    """All searches on one model, with heads of "32" or "64"."""
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"experiments/search_comparison.py:{head_dim} must be {' or '.join(HEAD_DIMS)}")
    config = ConfigDict()
    ways = searches()
    config.stages = ("pretrain", *(f"search_{name}" for name in ways), "evaluate")
    config.model = section(LlamaConfig.preset("tiny", head_dim=int(head_dim)))
    config.data = section(DataSettings())
    config.mesh = section(MeshSettings())
    config.profile = section(ProfileSettings())
    config.pretrain = section(
        PretrainSettings(
            steps=1300, batch=16, checkpoint_every=260, optimizer=OptimizerSettings(learning_rate=5e-3, warmup_steps=50)
        )
    )
    for name, settings in ways.items():
        config[f"search_{name}"] = section(settings)
    methods = {name: Method(f"search_{name}") for name in ways} | {"yarn": Method("yarn_without_temperature")}
    config.evaluate = section(EvaluationSettings(lengths=(LENGTH,), split="test", methods=methods, controls=()))
    return config


def main(workdir: str) -> None:
    """Runs the missing experiments, and writes the tables and the figure."""
    folder = epath.Path(workdir)
    runs = {}
    for head_dim in HEAD_DIMS:
        for seed in SEEDS:
            path = folder / f"{head_dim}_{seed}"
            config = get_config(head_dim)
            config.pretrain.seed = seed
            for name in searches():
                config[f"search_{name}"].seed = seed
            run(config, path)
            runs[f"{head_dim}_{seed}"] = read_run(path)
    text = f"{comparison_table(runs)}\n{reached_table(runs)}"
    (folder / "comparison.md").write_text(text)
    convergence(runs).savefig(folder / "search_comparison.png")
    print(text)


def read_run(path: epath.Path) -> dict[str, dict]:
    """Curve, cost and held-out NLL of every search on one model."""
    report = json.loads((path / "report.json").read_text())
    found = {summary["stage"].removeprefix("search_"): summary for summary in report["search"]}
    held_out = {r["method"]: recorded_nll(r) for r in json_lines.read(path / "evaluation.jsonl")}
    return {
        name: {
            "curve": np.array(summary["curve"], float),
            "costs": np.array(summary["costs"]),
            "dropped": summary["dropped"],
            "held_out": held_out[name],
        }
        for name, summary in found.items()
    }


def comparison_table(runs: dict[str, dict]) -> str:
    """A row per search: its cost, its result, and the difference to the better Algorithm 1 of the same model."""
    rows = []
    for name in next(iter(runs.values())):
        of_all = [run[name] for run in runs.values()]
        costs, scores = [run["costs"][-1] for run in of_all], np.array([run["curve"][-1] for run in of_all])
        held = np.array([_mean(run["held_out"]) for run in of_all])
        rows.append(
            [
                LABELS[name],
                f"{np.mean(costs):.0f}",
                f"{np.exp(scores.mean()):.3f}",
                f"{np.exp(held.mean()):.3f}",
                _interval(scores - [reference(run)[0] for run in runs.values()]),
                _interval(held - [reference(run)[1] for run in runs.values()]),
            ]
        )
    header = ["", "forward equivalents", "search perplexity", "held-out perplexity"]
    return markdown_table([*header, "search, nats minus evolution's", "held out, nats minus evolution's"], rows)


def reference(run: dict[str, dict]) -> tuple[float, float]:
    """Search and held-out score of the better Algorithm 1 on one model, chosen by its search score."""
    name = min(EVOLUTION, key=lambda name: run[name]["curve"][-1])
    return float(run[name]["curve"][-1]), _mean(run[name]["held_out"])


def reached_table(runs: dict[str, dict]) -> str:
    """Forward equivalents until a search reaches the final score of the better Algorithm 1, by model."""

    def when(run, name):
        reached = run[name]["curve"] <= reference(run)[0]
        return f"{run[name]['costs'][np.argmax(reached)]:.0f}" if reached.any() else "never"

    rows = [[LABELS[name], *(when(run, name) for run in runs.values())] for name in next(iter(runs.values()))]
    return markdown_table(["reaches evolution's final score after", *runs], rows)


def convergence(runs: dict[str, dict]) -> Figure:
    """Best score so far by forward equivalents, minus the final one of the better Algorithm 1: mean over the models."""
    figure = Figure(figsize=(7.2, 4.2), dpi=140, layout="constrained")
    axes = figure.subplots()
    grid = np.arange(10, BUDGET + 1)
    for number, (name, label) in enumerate(LABELS.items()):
        lines = []
        for of_model in runs.values():
            costs, curve = of_model[name]["costs"], of_model[name]["curve"]
            place = np.searchsorted(costs, grid, side="right") - 1
            lines.append(np.where(place < 0, np.nan, curve[np.maximum(place, 0)]) - reference(of_model)[0])
            lines[-1][grid > costs[-1]] = np.nan
        mean = np.mean(lines, axis=0)
        is_hybrid, is_prefix = name.startswith("hybrid"), name == "hybrid_third"  # its four starts begin with this one
        axes.plot(
            grid, mean, label=label, color="black" if is_prefix else f"C{number}", linewidth=2.2 if is_hybrid else 1.2,
            linestyle=":" if is_prefix else "-", zorder=2 + is_hybrid + is_prefix,
        )  # fmt: skip
    axes.axhline(0, color="black", linewidth=0.8, linestyle=":")
    axes.axvline(BUDGET / 3, color="black", linewidth=0.8, alpha=0.4)
    axes.annotate("a third", (BUDGET / 3, 1), xycoords=("data", "axes fraction"), xytext=(3, -10),
                  textcoords="offset points", fontsize=8)  # fmt: skip
    axes.set_ylim(-0.1, 0.25)
    axes.set_xlabel("forward equivalents")
    axes.set_ylabel("search score minus evolution's final one (nats per token)")
    axes.set_title(f"Searches for 8L, mean of {len(runs)} models")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _search(**changes) -> SearchSettings:
    return SearchSettings(target_length=LENGTH, **changes)


def _mean(nll: DocumentNll) -> float:
    return float(nll.sums.sum() / nll.counts.sum())


def _interval(differences: np.ndarray) -> str:
    """Mean and its 95 % t interval over models."""
    mean, count = differences.mean(), len(differences)
    if count < 2 or not differences.any():
        return f"{mean:+.4f}"
    half = scipy.stats.t.ppf(0.975, count - 1) * scipy.stats.sem(differences)
    return f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]"


if __name__ == "__main__":
    main(*sys.argv[1:])
