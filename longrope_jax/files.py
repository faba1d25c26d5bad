"""Files that are there as a whole or not at all, whatever happens while they are written."""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec.config
from etils import epath


def write_whole(path: epath.PathLike, content: bytes) -> None:
    """Writes a file so that at any time it has either its old content, if there was any, or all of the new.

    Raises:
        OSError: names the file that can't be written.
    """
    path = epath.Path(path)
    try:
        if is_remote(path):  # an object of a store is there as a whole or not at all, and can't be renamed in one step
            path.write_bytes(content)
        else:
            with new_file(path) as partial:
                Path(partial).write_bytes(content)
    except OSError as error:
        raise OSError(f"{path} can't be written: {error.strerror or error}") from error


_CHUNK = 1 << 24  # bytes


def is_remote(path: epath.PathLike) -> bool:
    """Whether it is the address of an object store rather than a path."""
    return "://" in os.fspath(path)


def size_of(file: epath.Path) -> int:
    """Bytes of a file. `epath.Path.stat` would ask for its owner's name too, which not every machine knows."""
    return file.stat().length if is_remote(file) else os.stat(file).st_size


def as_utf8(path: str) -> str:
    """A path that the operating system gave, as UTF-8 whatever the locale; invalid bytes become backslash escapes."""
    return os.fsencode(path).decode(errors="backslashreplace")


def modified_at(file: epath.Path) -> float:
    """When a file was last written to, in whole seconds since 1970 (where an object store tells)."""
    return file.stat().mtime if is_remote(file) else int(os.stat(file).st_mtime)


@contextlib.contextmanager
def new_file(target: epath.Path) -> Iterator[str]:
    """Gives a local path to write to; what is there in the end becomes the target, whole or not at all.

    A kill leaves a partial file, which the next try overwrites.
    """
    if not is_remote(target):
        partial = _partial(target)
        try:
            yield os.fspath(partial)
            partial.replace(target)
        except OSError:  # on a full disk it is in the way of others
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise
        return
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / target.name
        yield str(local)
        copy(epath.Path(local), target)


def local_copy(file: epath.Path, size: int, sha256: str) -> str:
    """A local path of the same content; a remote file is copied once to the cache, `$XDG_CACHE_HOME/longrope_jax`.

    Args:
        size: bytes that the file must have.
        sha256: of its content, in hex; it names the copy, as other content may come to the same address.

    Raises:
        OSError: it is gone, has another size, or what was copied is something else.
    """
    if is_remote(file):
        return os.fspath(_cached(file, sha256, size, sha256))
    _check_size(file, size)
    return os.fspath(file)


def cached_copy(file: epath.Path) -> epath.Path:
    """A local file of the same content; a remote one is copied once to the cache, and again where it has changed.

    Raises:
        OSError: it is gone, or the copy has another size.
    """
    if not is_remote(file):
        return file
    found = file.stat()  # of an object store
    return _cached(file, hashlib.sha256(f"{file} {found.length} {found.mtime}".encode()).hexdigest(), found.length)


def _cached(file: epath.Path, key: str, size: int, sha256: str | None = None) -> epath.Path:
    """The copy of a remote file in the cache, made and checked if it is not there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "longrope_jax"
    local = epath.Path(cache / f"{key[:16]}-{file.name}")
    if not local.exists() or size_of(local) != size:
        cache.mkdir(parents=True, exist_ok=True)
        _check_size(file, size)
        copy(file, local, f".{os.getpid()}")  # processes of one machine may copy the same file at the same time
        _check_size(local, size)
        if sha256 and digest(os.fspath(local)) != sha256:
            local.unlink()
            raise OSError(f"{file} is not what was written there: it is damaged")
    return local


def digest(path: str) -> str:
    """SHA-256 of a local file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy(source: epath.Path, target: epath.Path, tag: str = "") -> None:
    """Copies a file from one file system to another; the target is there whole or not at all. Of several who may copy
    the same at the same time, each has a tag of its own.
    """
    partial = _partial(target, tag)
    with source.open("rb") as read, partial.open("wb") as written:
        shutil.copyfileobj(read, written, _CHUNK)
    partial.replace(target)


def copy_tree(source: epath.Path, target: epath.Path, last: str = "") -> None:
    """Copies a local directory; files of the name `last`, if they say that all is there, come at the end."""
    for file in sorted(files_below(source), key=lambda file: (file.name == last, file)):
        goal = target / file.relative_to(source)
        goal.parent.mkdir(parents=True, exist_ok=True)
        copy(file, goal)


def _partial(target: epath.Path, tag: str = "") -> epath.Path:
    return target.parent / f".{target.name}{tag}.partial"


def _check_size(file: epath.Path, size: int) -> None:
    if not file.exists():
        raise OSError(f"{file} is gone")
    found = size_of(file)
    if found != size:
        raise OSError(f"{file} has {found} bytes instead of {size}: it is damaged")


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
