"""One run at a time in a work directory."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from absl import logging
from etils import epath

from longrope_jax import files
from longrope_jax.files import is_remote
from longrope_jax.runtime import processes

NAME = ".lock"
_UNSUPPORTED = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)


@contextlib.contextmanager
def hold(workdir: epath.PathLike) -> Iterator[None]:
    """While it lasts no other run gets this work directory, which is made if need be. Who only reads needs no lock.

    It is the kernel's lock on the file `.lock` (`flock`) and goes with its process, however that ends: the file that a
    killed one leaves is in nobody's way. Of the processes of one run the first holds it for all; all have to call this.

    Object stores have no such lock. What could stand in for it, a file whose date is kept fresh, would shut out the
    restart of a killed run for as long as a network may be slow: there nothing keeps two runs apart. Nor on a file
    system that can't lock; a warning tells so.

    Raises:
        OSError: the directory can't be made or written to, or another run has it: says who, and what to do.
    """
    workdir = epath.Path(workdir)
    if is_remote(workdir):
        yield
        return
    is_new = not workdir.exists()
    files.make(workdir)
    lock, problem = None, None
    if processes.is_first():
        try:
            lock = _take(Path(workdir))
        except OSError as error:
            problem = error
    if processes.any_of(problem is not None):
        raise problem or OSError(f"work directory {workdir}: the first process did not get its lock")
    try:
        yield
    finally:
        if lock is not None:
            (workdir / NAME).unlink(missing_ok=True)  # while it is ours: afterwards it could be another's
            os.close(lock)
            if is_new:
                with contextlib.suppress(OSError):  # not empty, as nearly always
                    os.rmdir(workdir)


def _take(workdir: Path) -> int | None:
    """The lock, as an open file; None where there are none."""
    path = workdir / NAME
    while True:
        try:
            opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise OSError(f"work directory {workdir} can't be written to: {error.strerror}") from None
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(opened)
            os.close(opened)
            if error.errno in _UNSUPPORTED:
                logging.warning("%s: its file system has no locks; nothing keeps another run out", workdir)
                return None
            raise OSError(
                f"work directory {workdir} is in use by {holder}; wait for it or end it (the lock ends with it, there "
                "is nothing to be removed), or choose another work directory"
            ) from None
        if _is_at(opened, path):
            with contextlib.suppress(OSError):  # a full disk: others are kept out, and not told by whom
                os.ftruncate(opened, 0)
                os.write(opened, _this_process())
            return opened
        os.close(opened)  # whoever had it has just removed it


def _is_at(opened: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(opened), os.stat(path))
    except FileNotFoundError:
        return False


def _this_process() -> bytes:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now}).encode()


def _holder(opened: int) -> str:
    """Who has the lock, as far as its file tells."""
    try:
        told = json.loads(os.pread(opened, 4096, 0))
        return f"process {told['pid']} on {told['host']}, since {told['since']}"
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # it is only just being written
        return "another process"
