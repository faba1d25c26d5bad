"""Profiles of a few steps of a stage, for TensorBoard's profiler or ui.perfetto.dev."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

import jax
from etils import epath

from longrope_jax.files import copy_tree
from longrope_jax.runtime import processes
from longrope_jax.settings import Settings

T = TypeVar("T")


@dataclass(frozen=True)
class ProfileSettings(Settings):
    """Which steps are profiled; none by default. It may change between the runs of a work directory.

    Attributes:
        steps: (first, one after the last), such as (10, 13): steps of training as the metrics number them; batches of
            candidates of a search and evaluations (one method at one length), counted from 1 in every process.
        stage: the stage; "" for all.
    """

    steps: tuple[int, ...] = ()
    stage: str = ""

    def __post_init__(self):
        super().__post_init__()
        if self.steps and not (len(self.steps) == 2 and 1 <= self.steps[0] < self.steps[1]):
            raise ValueError(f"steps = {self.steps} must be (first, one after the last), such as (10, 13), or ()")
        if self.stage and not self.steps:
            raise ValueError(f"stage = {self.stage!r} needs steps, such as (10, 13)")

    def check_stages(self, stages: tuple[str, ...]) -> None:
        """Raises ValueError if there is no such stage."""
        if self.stage and self.stage not in stages:
            raise ValueError(f"stage = {self.stage!r} must be one of config.stages = {stages}, or '' for all")


class _Profile:
    """Traces the selected steps of one stage into a folder, in process 0."""

    def __init__(self, settings: ProfileSettings, folder: epath.Path):
        self._first, self._end = settings.steps
        self._folder = folder
        self._local: tempfile.TemporaryDirectory | None = None  # of the running trace

    def step(self, name: str, number: int, call: Callable[[], T]) -> T:
        if self._local is None and self._first <= number < self._end:
            self._local = tempfile.TemporaryDirectory(prefix="profile-")
            jax.profiler.start_trace(self._local.name)
        with jax.profiler.StepTraceAnnotation(name, step_num=number):
            result = call()
        if self._local is not None and number >= self._end - 1:
            jax.block_until_ready(result)
            self.finish()
        return result

    def finish(self) -> None:
        """Stops a running trace and copies it to the folder, as JAX itself writes to local disks only."""
        if self._local is None:
            return
        running, self._local = self._local, None
        with running as local:
            jax.profiler.stop_trace()
            copy_tree(epath.Path(local), self._folder)


_current: ContextVar[_Profile | None] = ContextVar("profile", default=None)


@contextlib.contextmanager
def of_stage(settings: ProfileSettings, stage: str, workdir: epath.Path) -> Iterator[None]:
    """Inside this context `step` traces the selected steps of the stage, into `workdir/profile/<stage>`."""
    if not settings.steps or settings.stage not in ("", stage) or not processes.is_first():
        yield
        return
    profile = _Profile(settings, workdir / "profile" / stage)
    before = _current.set(profile)
    try:
        yield
    finally:
        _current.reset(before)
        profile.finish()


def step(name: str, number: int, call: Callable[[], T]) -> T:
    """Returns `call()`, profiled as step `number` of `name`; see `ProfileSettings`."""
    profile = _current.get()
    return call() if profile is None else profile.step(name, number, call)
