"""One run at a time in a work directory.

Not the package `filelock`: its lock file stays after a release, it does not record the holder, and where a file system
has no `flock` it falls back to a marker file, which would block the restart of a killed run.
"""

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
    """Locks a work directory for one run, and makes the directory if needed. Reading needs no lock.

    The lock is the kernel's (`flock`) on the file `.lock`. It ends with its process, also after `kill -9`; a file that
    a killed process leaves blocks nobody. All processes of one run call this; the first one holds the lock.

    Object stores have no such lock, so nothing keeps two runs apart there. Some file systems have none either; a
    warning says so.

    Raises:
        OSError: the directory can't be made or written to, or another run holds the lock; says which process, and what
            to do.
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
            lock = _try_lock(Path(workdir))
        except OSError as error:
            problem = error
    if processes.any_of(problem is not None):
        raise problem or OSError(f"work directory {workdir}: the first process did not get its lock")
    try:
        yield
    finally:
        if lock is not None:
            (workdir / NAME).unlink(missing_ok=True)  # before the release: afterwards it could be another run's
            os.close(lock)
            if is_new:
                with contextlib.suppress(OSError):  # usually not empty
                    os.rmdir(workdir)


def _try_lock(workdir: Path) -> int | None:
    """The file descriptor that holds the lock; None on a file system without locks."""
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
                logging.warning("%s: its file system has no locks; a second run would not be stopped", workdir)
                return None
            raise OSError(
                f"work directory {workdir} is in use by {holder}; wait for it or stop it (its lock ends with it, no "
                "file has to be removed), or choose another work directory"
            ) from None
        if _is_at(opened, path):
            now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
            record = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
            with contextlib.suppress(OSError):  # a full disk: the lock works, without the holder's name
                os.ftruncate(opened, 0)
                os.write(opened, json.dumps(record).encode())
            return opened
        os.close(opened)  # its previous holder has just removed the file


def _is_at(opened: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(opened), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(opened: int) -> str:
    """The process that holds the lock, in words."""
    try:
        holder = json.loads(os.pread(opened, 4096, 0))
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # the file may be half written
        return "another process"
