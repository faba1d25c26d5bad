"""Work directories in object stores (gs://...), which are no file systems: nothing can be appended to, and what is
written appears as a whole or not at all.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec.config
from etils import epath


def is_object_store(path: epath.PathLike) -> bool:
    """Whether a path is in one."""
    return "://" in os.fspath(path)


def see_what_others_write() -> None:
    """Without it a process goes on believing its first look at a directory, whatever others have written since.

    Call it before anything else touches an object store.
    """
    for protocol in ("gcs", "s3", "az"):
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)


_COMPLETE = "complete.json"


@contextlib.contextmanager
def on_local_disk(directory: epath.Path) -> Iterator[epath.Path]:
    """A directory for libraries that know no object stores: itself where it is none, else a temporary copy.

    Files that are new in the copy are in the store afterwards. An upload that was cut short counts for nothing: a list
    of the files that are whole is written last.
    """
    if not is_object_store(directory):
        yield directory
        return
    listed = directory / _COMPLETE
    whole = json.loads(listed.read_text()) if listed.exists() else []
    with tempfile.TemporaryDirectory() as local:
        local = Path(local)
        for name in whole:
            (local / name).parent.mkdir(parents=True, exist_ok=True)
            (local / name).write_bytes((directory / name).read_bytes())
        yield epath.Path(local)
        new = sorted({path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()} - set(whole))
        for name in new:
            (directory / name).write_bytes((local / name).read_bytes())
        if new:
            listed.write_text(json.dumps(whole + new))


def copy_tree(source: Path, target: epath.Path) -> None:
    """Copies every file below a local directory to the same place below `target`, which is made if need be."""
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        place = target / file.relative_to(source).as_posix()
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.read_bytes())
