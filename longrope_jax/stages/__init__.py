"""The kinds of stages: what each checks before anything starts, does, and hands on to the stages after it."""

from longrope_jax.stages.carried import Carried
from longrope_jax.stages.evaluate import EVALUATE
from longrope_jax.stages.finetune import FINETUNE
from longrope_jax.stages.kind import Stage, TableSettings
from longrope_jax.stages.pretrain import PRETRAIN
from longrope_jax.stages.search import SEARCH
from longrope_jax.stages.table import TABLE

STAGES = {"pretrain": PRETRAIN, "search": SEARCH, "finetune": FINETUNE, "table": TABLE, "evaluate": EVALUATE}

__all__ = ["STAGES", "Carried", "Stage", "TableSettings"]
