"""Work directories in object stores (gs://...), which are no file systems: nothing can be appended to, and what is
written appears as a whole or not at all.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator

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
        local = epath.Path(local)
        for name in whole:
            (local / name).parent.mkdir(parents=True, exist_ok=True)
            (local / name).write_bytes((directory / name).read_bytes())
        yield local
        new = sorted({str(file.relative_to(local)) for file in files_below(local)} - set(whole))
        for name in new:
            (directory / name).write_bytes((local / name).read_bytes())
        if new:
            listed.write_text(json.dumps(whole + new))


def files_below(directory: epath.Path) -> Iterator[epath.Path]:
    """Every file, however deep."""
    for path in directory.iterdir():  # epath has no recursive glob, for the sake of object stores
        if path.is_dir():
            yield from files_below(path)
        else:
            yield path


def copy_tree(source: epath.Path, target: epath.Path) -> None:
    """Copies every file below a local directory to the same place below `target`, which is made if need be."""
    for file in files_below(source):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.read_bytes())


def move(source: epath.Path, target: epath.Path) -> None:
    """A file or directory to a place that is free. In an object store file by file: a kill leaves parts in both."""
    if not is_object_store(source):
        target.parent.mkdir(exist_ok=True)
        source.rename(target)
    elif source.is_dir():
        for file in list(files_below(source)):
            file.copy(target / file.relative_to(source))
        source.rmtree()
    else:
        source.copy(target)
        source.unlink()
