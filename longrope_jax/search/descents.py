"""Descents in checkpoints, so that a gradient search that is stopped goes on at its last step."""

import contextlib
import time
from typing import Any

from etils import epath

from longrope_jax.runtime import preemption, processes
from longrope_jax.runtime.checkpoints import Checkpoints

_SAVE_EVERY = 60.0  # seconds; a step takes a minute at a million tokens and milliseconds on a small model


class Descents:
    """What `gradient.descend` keeps: the variables and the optimizer's moments of every descent.

    Args:
        directory: of their checkpoints.
        stage: named when the process is asked to stop.
    """

    def __init__(self, directory: epath.PathLike, stage: str):
        self._directory, self._stage = epath.Path(directory), stage
        self._stack, self._saved = contextlib.ExitStack(), time.monotonic()
        self._opened: dict[str, Checkpoints] = {}

    def __enter__(self) -> "Descents":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def load(self, name: str, like: Any) -> tuple[int, Any]:
        """(steps done, the tree) of the descent of this name; (0, like) if it has not begun."""
        checkpoints = self._open(name)
        latest = checkpoints.latest()
        if latest is None:
            return 0, like
        items, record = checkpoints.restore(latest, {"descent": like})
        return record["steps"], items["descent"]

    def save_if_due(self, name: str, steps: int, tree: Any, is_last: bool) -> None:
        """Saves it once a minute, at its last step, and where the process was asked to stop.

        Raises:
            preemption.Preempted: it was; the step is saved.
        """
        is_asked = preemption.requested()
        is_due = processes.any_of(time.monotonic() - self._saved > _SAVE_EVERY)  # all save, or none
        if not (is_asked or is_due or is_last):
            return
        checkpoints = self._open(name)
        checkpoints.save(steps, {"descent": tree}, {"steps": steps})
        self._saved = time.monotonic()
        if is_asked:
            checkpoints.latest()  # waits, and raises if it could not be saved
            raise preemption.Preempted(self._stage, f"step {steps} of descent {name} is saved")

    def _open(self, name: str) -> Checkpoints:
        if name not in self._opened:
            self._opened[name] = self._stack.enter_context(Checkpoints(self._directory / name, keep=1))
        return self._opened[name]
