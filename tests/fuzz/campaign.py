"""Reads damaged files of every format: each is read, or refused in words that name it, in bounded time and memory."""

import contextlib
import faulthandler
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from absl import logging
from fuzz.formats import FORMATS, Format

SECONDS = 20  # of the processor for one file: a busy machine makes nothing a hang
MEMORY = 6 << 30  # bytes of addresses beyond what the process has already
LONGEST = 3_000  # characters of a message


class Failure(NamedTuple):
    """An input that was neither read nor refused properly."""

    format: str
    number: int
    why: str


class Hang(BaseException):
    """A reader took too long."""


def timed_run(name: str, numbers: range) -> tuple[Counter, list[Failure], float]:
    """`run`, and the seconds of a core that it took; ends the process with its stack if it hangs outside of Python."""
    faulthandler.dump_traceback_later(3600, exit=True)
    start = time.process_time()
    try:
        return *run(name, numbers), time.process_time() - start
    finally:
        faulthandler.cancel_dump_traceback_later()


def run(name: str, numbers: range) -> tuple[Counter, list[Failure]]:
    """Inputs of one format, by their numbers: how many were read and how many refused, and what went wrong."""
    counts, failures, form = Counter(), [], FORMATS[name]
    with tempfile.TemporaryDirectory(dir=_fast_disk()) as base, _guarded(Path(base) / "elsewhere"):
        folder = Path(base) / "here"
        folder.mkdir()
        targets = form.make(folder)
        shutil.copytree(folder, Path(base) / "elsewhere")  # valid files that nothing should lead a reader to
        originals = {target: (folder / target).read_bytes() for target in targets}
        for target in targets:
            form.read(folder, target)
        for number in numbers:
            try:
                counts[_outcome(name, form, folder, originals, number)] += 1
            except AssertionError as failure:
                failures.append(Failure(name, number, str(failure)))
    return counts, failures


def _fast_disk() -> str | None:
    """A disk in memory where there is a roomy one: files are written anew for every input."""
    with contextlib.suppress(OSError):
        if os.access("/dev/shm", os.W_OK) and shutil.disk_usage("/dev/shm").free > 1 << 30:
            return "/dev/shm"
    return None


def _outcome(name: str, form: Format, folder: Path, originals: dict[str, bytes], number: int) -> str:
    rng = random.Random(f"{name} {number}")
    target = rng.choice(list(originals))
    lures = [f"../elsewhere/{Path(target).name}", str(folder.parent / "elsewhere" / Path(target).name), "../elsewhere"]
    (folder / target).write_bytes(form.mutate(rng, originals[target], lures))
    _OPENED.clear()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        form.read(folder, target)
        outcome = "read"
    except (ValueError, OSError) as error:
        outcome = "refused"
        if str(folder) not in str(error):
            raise AssertionError(f"names no file: {_told(error)}") from error
        if len(str(error)) > LONGEST:
            raise AssertionError(f"a message of {len(str(error))} characters: {_told(error)}") from error
    except (Exception, Hang) as error:
        raise AssertionError(_told(error)) from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        for path, content in originals.items():
            if path == target or not _holds(folder / path, content):  # a reader may write to others
                (folder / path).write_bytes(content)
    if _OPENED:
        raise AssertionError(f"opened {_OPENED[0]}")
    return outcome


def _told(error: BaseException) -> str:
    frames, last = error.__traceback__, ""
    while frames:
        if "longrope_jax" in frames.tb_frame.f_code.co_filename:
            last = f"{Path(frames.tb_frame.f_code.co_filename).name}:{frames.tb_lineno}"
        frames = frames.tb_next
    return f"{type(error).__name__} at {last}: {str(error)[:160]}"


def _holds(file: Path, content: bytes) -> bool:
    with contextlib.suppress(OSError):
        return file.read_bytes() == content
    return False


_OPENED: list[str] = []
_FORBIDDEN: list[str] = []


def _watch(event: str, arguments: tuple) -> None:
    if event == "open" and _FORBIDDEN and isinstance(arguments[0], str | bytes):
        path = arguments[0] if isinstance(arguments[0], str) else arguments[0].decode(errors="replace")
        if "elsewhere" in path:
            _OPENED.append(path)


sys.addaudithook(_watch)


@contextlib.contextmanager
def _guarded(forbidden: Path) -> Iterator[None]:
    """Within it time and memory end, and what is opened in the forbidden folder is noted."""

    def too_long(*_):
        raise Hang(f"more than {SECONDS} s")

    before, limits = signal.signal(signal.SIGPROF, too_long), resource.getrlimit(resource.RLIMIT_AS)
    level = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    resource.setrlimit(resource.RLIMIT_AS, (_addresses() + MEMORY, limits[1]))
    _FORBIDDEN.append(str(forbidden))
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # progress bars
            warnings.simplefilter("ignore")
            yield
    finally:
        _FORBIDDEN.clear()
        resource.setrlimit(resource.RLIMIT_AS, limits)
        logging.set_verbosity(level)
        signal.signal(signal.SIGPROF, before)


def _addresses() -> int:
    with contextlib.suppress(OSError), open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
    return 0
