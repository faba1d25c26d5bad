"""The kinds of stages: what each checks before anything starts, does, and hands on to the stages after it."""

from longrope_jax.experiment.stage import Stage
from longrope_jax.experiment.stages.evaluation import EVALUATE, RETRIEVAL
from longrope_jax.experiment.stages.export import EXPORT, ExportSettings
from longrope_jax.experiment.stages.load import LOAD
from longrope_jax.experiment.stages.search import SEARCH
from longrope_jax.experiment.stages.settings import LoadSettings, TableSettings
from longrope_jax.experiment.stages.table import TABLE
from longrope_jax.experiment.stages.training import FINETUNE, PRETRAIN

STAGES = {
    "load": LOAD,
    "pretrain": PRETRAIN,
    "search": SEARCH,
    "finetune": FINETUNE,
    "table": TABLE,
    "evaluate": EVALUATE,
    "retrieval": RETRIEVAL,
    "export": EXPORT,
}

__all__ = ["STAGES", "ExportSettings", "LoadSettings", "Stage", "TableSettings"]
