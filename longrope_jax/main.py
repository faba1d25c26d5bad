"""The command line: `python -m longrope_jax.main --config=FILE --workdir=DIR [--config.any.field=value]`.

Exit status: 0 done, 2 something that the user can mend, 75 (EX_TEMPFAIL) asked to stop and everything saved, 130
interrupted from the keyboard.
"""

import os
import sys
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from longrope_jax import experiment
from longrope_jax.runtime import processes
from longrope_jax.runtime.preemption import Preempted
from longrope_jax.training.loop import Diverged

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, a file with get_config().")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where everything the experiment makes is kept.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0 where several processes work together, or auto: ask the cluster."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes; with a coordinator's address.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.")


def main(argv: list[str]) -> None:
    """Runs the experiment; what the user can mend ends in one line and exit status 2."""
    logging.set_verbosity(logging.WARNING)  # libraries tell their life at INFO
    try:
        processes.join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        prepared = experiment.prepare(_CONFIG.value, _WORKDIR.value)
    except (ValueError, OSError, RuntimeError) as error:
        _fail(error)
    try:
        experiment.execute(*prepared)
    except (Diverged, FloatingPointError, OSError) as error:
        _fail(error)
    except Preempted as saved:
        print(f"\n{saved}", file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, but a config field that does not exist or a value that does not fit is one line, no traceback."""
    try:
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise flags.Error(f"unexpected arguments: {' '.join(rest[1:])}")
        return rest
    except (KeyError, AttributeError) as error:
        while error.args and isinstance(error.args[0], Exception):  # ml_collections wraps one in another
            error = error.args[0]
        _fail(f"no such field in the config: {error.args[0] if error.args else error}")
    except (flags.Error, TypeError, ValueError, OSError, ImportError) as error:
        _fail(error)


def _fail(error: Exception | str) -> NoReturn:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
