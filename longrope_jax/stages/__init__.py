"""The kinds of stages: what each checks before anything starts, does, and hands on to the stages after it."""

from longrope_jax.stages.carried import Carried
from longrope_jax.stages.evaluate import EVALUATE
from longrope_jax.stages.export import EXPORT, ExportSettings
from longrope_jax.stages.finetune import FINETUNE
from longrope_jax.stages.kind import Stage
from longrope_jax.stages.load import LOAD
from longrope_jax.stages.pretrain import PRETRAIN
from longrope_jax.stages.retrieval import RETRIEVAL
from longrope_jax.stages.search import SEARCH
from longrope_jax.stages.settings import LoadSettings, TableSettings
from longrope_jax.stages.table import TABLE

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

__all__ = ["STAGES", "Carried", "ExportSettings", "LoadSettings", "Stage", "TableSettings"]
