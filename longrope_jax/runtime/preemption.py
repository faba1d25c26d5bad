"""Preemption: after SIGTERM a stage saves a checkpoint and stops; the same command resumes it, on any machine."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

_received = False
_asked = itertools.count()  # never restarts: the processes agree on a number at which all stop


class Preempted(Exception):
    """A stage stopped on request; nothing is lost.

    Args:
        saved: what is saved, in words.
    """

    def __init__(self, stage: str, saved: str):
        super().__init__(f"{stage}: asked to stop, {saved}; the same command continues from there")


@contextlib.contextmanager
def watch() -> Iterator[None]:
    """Inside this context SIGTERM does not end the process; `requested` reports it. Save and close inside.

    More signals change nothing, so none interrupts the saving of a checkpoint. A nested `watch` does nothing, and so
    does one outside of the main thread, as only the main thread can have signal handlers.
    """
    global _received
    # JAX's coordination service has its own handler, which informs the other processes.
    is_watched = jax.distributed.is_initialized() or signal.getsignal(signal.SIGTERM) is _receive
    if is_watched or threading.current_thread() is not threading.main_thread():
        yield
        return
    _received = False
    previous = signal.signal(signal.SIGTERM, _receive)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def requested() -> bool:
    """Whether to save now and stop. All processes must call this equally often; they stop together."""
    global _received
    # The sync point says yes once; a caller that could not stop then gets the same answer again.
    _received = _received or multihost_utils.reached_preemption_sync_point(next(_asked))
    return _received


def _receive(*_) -> None:
    global _received  # not an Event: its lock could be held by the very code that a second signal interrupts
    _received = True
