"""An experiment: a config's stages in order, each resumed where it stopped and skipped once it has finished.

A stage takes what the ones before it left in the work directory. Its name is its kind, with a suffix where a kind
occurs more than once (`search`, `search_64x`); the config section of the same name holds its settings.
"""

from longrope_jax.experiment.config import Experiment, check_layout, kind_of, parse_experiment
from longrope_jax.experiment.running import execute, prepare, reopen, run

__all__ = [
    "Experiment",
    "check_layout",
    "execute",
    "kind_of",
    "parse_experiment",
    "prepare",
    "reopen",
    "run",
]
