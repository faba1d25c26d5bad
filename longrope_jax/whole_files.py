"""Files that are there as a whole or not at all, whatever happens while they are written."""

import contextlib
import os

from etils import epath


def write_whole(path: epath.PathLike, content: bytes) -> None:
    """Writes a file so that at any time it has either its old content, if there was any, or all of the new.

    Raises:
        OSError: names the file that can't be written.
    """
    path = epath.Path(path)
    # An object of a store is there as a whole or not at all, and can't be renamed in one step.
    is_remote = "://" in os.fspath(path)
    partial = path if is_remote else path.parent / f".{path.name}.partial"
    try:
        partial.write_bytes(content)
        if not is_remote:
            partial.replace(path)
    except OSError as error:
        if not is_remote:
            with contextlib.suppress(OSError):  # on a full disk it is in the way of others
                os.unlink(partial)
        raise OSError(f"{path} can't be written: {error.strerror or error}") from error
