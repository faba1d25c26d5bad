"""Work directories in object stores (gs://...), which are no file systems: nothing can be appended to, and what is
written appears as a whole or not at all.
"""

from collections.abc import Iterator

import fsspec.config
from etils import epath

from longrope_jax.data.files import is_remote


def see_what_others_write() -> None:
    """Without it a process goes on believing its first look at a directory, whatever others have written since.

    Call it before anything else touches an object store.
    """
    for protocol in ("gcs", "s3", "az"):
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)


def make(directory: epath.Path) -> None:
    """Makes a work directory, if it is not there; raises OSError where that can't be done."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"work directory {directory} can't be made: {error}") from None


def files_below(directory: epath.Path) -> Iterator[epath.Path]:
    """Every file, however deep."""
    for path in directory.iterdir():  # epath has no recursive glob, for the sake of object stores
        if path.is_dir():
            yield from files_below(path)
        else:
            yield path


def move(source: epath.Path, target: epath.Path) -> None:
    """A file or directory to a place that is free. In an object store file by file: a kill leaves parts in both."""
    if not is_remote(source):
        target.parent.mkdir(exist_ok=True)
        source.rename(target)
    elif source.is_dir():
        for file in list(files_below(source)):
            file.copy(target / file.relative_to(source))
        source.rmtree()
    else:
        source.copy(target)
        source.unlink()
