"""The command line in the process of the test: imports and compiled programs are there already."""

import contextlib
import io
import os
from types import SimpleNamespace

from absl.testing import flagsaver

from longrope_jax import main


def run(*arguments: os.PathLike | str) -> SimpleNamespace:
    """Exit status, stdout and stderr of `python -m longrope_jax.main` with these arguments."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with flagsaver.flagsaver(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main.main(main.parse_flags(["longrope_jax.main", *map(os.fspath, arguments)]))
        except SystemExit as ended:
            status = ended.code or 0
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())
