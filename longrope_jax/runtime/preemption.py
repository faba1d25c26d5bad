"""Machines that are taken away: SIGTERM asks for a checkpoint, after which the same command goes on elsewhere."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

_received = False
_asked = itertools.count()  # never begins again: the processes agree on a number at which all stop


class Preempted(Exception):
    """A stage stopped because it was asked to; nothing is lost.

    Args:
        saved: what is kept, in words.
    """

    def __init__(self, stage: str, saved: str):
        super().__init__(f"{stage}: asked to stop, {saved}; the same command goes on from there")


@contextlib.contextmanager
def watch() -> Iterator[None]:
    """While it lasts, SIGTERM does not end the process but is what `requested` tells. Save and close within it.

    Any number of them: one that comes while the checkpoint is being saved does not cut it short. Within another `watch`
    it changes nothing, nor outside of the main thread, which alone may have handlers.
    """
    global _received
    # JAX's coordination service has a handler of its own, which tells the other processes.
    if jax.distributed.is_initialized() or threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.getsignal(signal.SIGTERM)
    if previous is _receive:
        yield
        return
    _received = False
    signal.signal(signal.SIGTERM, _receive)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def requested() -> bool:
    """Whether to save now and stop. Processes that work together all have to ask equally often, and stop together."""
    global _received
    # The sync point says yes once; whoever could not stop just then is told again.
    _received = _received or multihost_utils.reached_preemption_sync_point(next(_asked))
    return _received


def _receive(*_) -> None:
    global _received  # not an Event: its lock could be held by the very code that a second signal interrupts
    _received = True
