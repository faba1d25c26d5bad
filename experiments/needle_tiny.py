"""Compares a search by needles with one by perplexity, on a tiny model that retrieves at its original length.

    python -m longrope_jax.main --config=experiments/needle_tiny.py:64 --workdir=runs/needle/64_0
    python experiments/needle_tiny.py runs/needle/*

The quickstart's model, with heads of 32 or 64 and L = 128, trains mostly on needles (`PretrainSettings.needle_share`).
For some hundred steps the NLL of an answer's digits stays at 2.2 nats; then it falls, earlier with some seeds. Three
hybrid searches of the same budget extend the model to 8L: by perplexity, by needles (LongRoPE2 sec. 3.3) and by both.
The second command prints the NLL of the digits at 8L on evaluation documents. Ten minutes a model on two cores; figures
in docs/results/needles.md.
"""

import json
import sys

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from longrope_jax.data.corpus import DataSettings
from longrope_jax.evaluation.evaluate import EvaluationSettings, Method
from longrope_jax.evaluation.perplexity import DocumentNll, compare
from longrope_jax.evaluation.retrieval import RetrievalSettings
from longrope_jax.experiment import prepare, reopen
from longrope_jax.model import LlamaConfig
from longrope_jax.report.tables import markdown_table
from longrope_jax.rope import stack
from longrope_jax.runtime.mesh import MeshSettings
from longrope_jax.runtime.profiling import ProfileSettings
from longrope_jax.search.objective import Objective, TermSettings, make_terms
from longrope_jax.search.settings import EvolutionSettings, GradientSettings, SearchSettings
from longrope_jax.settings import section
from longrope_jax.training.pretrain import PretrainSettings
from longrope_jax.training.step import OptimizerSettings

L, TARGET = 128, 1024
STEPS = {"32": 1500, "64": 900}  # by head dimension
OBJECTIVES = {
    "perplexity": {"perplexity": TermSettings()},
    "needle": {"needle": TermSettings("needle_cloze")},
    "mix": {"perplexity": TermSettings(share=0.5), "needle": TermSettings("needle_cloze", share=0.5)},
}
NEEDLES, NEEDLE_SEED = 128, 1  # needles in evaluation documents


def get_config(head_dim: str = "32") -> ConfigDict:
    """The experiment, for a head dimension of "32" or "64"."""
    if head_dim not in STEPS:
        raise ValueError(f"experiments/needle_tiny.py:{head_dim} must be {' or '.join(STEPS)}")
    config = ConfigDict()
    searches = [f"search_{name}" for name in OBJECTIVES]
    config.stages = ("pretrain", "retrieval", *searches, "evaluate", "retrieval_8x")
    config.model = section(LlamaConfig.preset("tiny", head_dim=int(head_dim)))
    config.data = section(DataSettings())
    config.pretrain = section(
        PretrainSettings(
            steps=STEPS[head_dim],
            batch=32,
            needle_share=0.9,
            checkpoint_every=300,
            optimizer=OptimizerSettings(learning_rate=3e-3, warmup_steps=100),
        )
    )
    cloze = dict(task="needle_cloze", prompts_at_once=50)
    config.retrieval = section(
        RetrievalSettings(lengths=(L,), methods={"original": Method("original")}, tries=200, **cloze)
    )
    for name, objective in OBJECTIVES.items():
        config[f"search_{name}"] = section(
            SearchSettings(
                target_length=TARGET,
                documents=10,
                objective=objective,
                method="hybrid",
                racing=0.9,
                ramps=128,
                gradient=GradientSettings(rounds=2, starts=3, remat="none"),
                evolution=EvolutionSettings.paper(reach=4, iterations=9),
            )
        )
    methods = {name: Method(f"search_{name}") for name in OBJECTIVES} | {"yarn": Method("yarn_without_temperature")}
    config.evaluate = section(EvaluationSettings(lengths=(TARGET,), split="test", methods=methods, controls=()))
    config.retrieval_8x = section(RetrievalSettings(lengths=(TARGET,), methods=methods, tries=100, **cloze))
    config.mesh = section(MeshSettings())
    config.profile = section(ProfileSettings())
    return config


def main(*workdirs: str) -> None:
    """Prints the NLL of the digits of needles at 8L for every run, and paired differences between the searches."""
    rows = []
    for workdir in workdirs:
        nll = needle_nll(workdir)
        cells = [f"{found.sums.mean():.3f}" for found in nll.values()]
        pairs = (("needle", "perplexity"), ("mix", "perplexity"), ("perplexity", "yarn"))
        differences = [compare(nll[one], nll[other]) for one, other in pairs]
        cells += [f"{d.difference:+.3f} [{d.ci95[0]:+.3f}, {d.ci95[1]:+.3f}]" for d in differences]
        rows.append([workdir, *cells])
    names = "needle minus perplexity", "mix minus perplexity", "perplexity minus yarn"
    print(markdown_table(["nats a digit, 8L", *nll, *names], rows))


def needle_nll(workdir: str) -> dict[str, DocumentNll]:
    """Mean NLL of the digits of every needle, by search."""
    config = ConfigDict(json.loads((epath.Path(workdir) / "config.json").read_text()))
    _, context = prepare(config, workdir)
    documents, found = context.documents["data"]["evaluation"], reopen(config, workdir)
    objective = {"needle": TermSettings("needle_cloze")}
    terms = make_terms(objective, documents, context.tokenizer, TARGET, NEEDLES, NEEDLE_SEED)
    objective = Objective.of(found.model, found.layout, found.params("pretrain"), terms)
    methods = {name: f"search_{name}" for name in OBJECTIVES} | {"yarn": "yarn_without_temperature"}
    nll = {}
    for name, source in methods.items():
        factors = stack([found.source(source, "pretrain", TARGET)(TARGET)])
        losses = [objective.block_nll(block, factors)[0] for block in range(len(objective.blocks))]
        nll[name] = DocumentNll(np.concatenate(losses), np.ones(NEEDLES, int))
    return nll


if __name__ == "__main__":
    main(*sys.argv[1:])
