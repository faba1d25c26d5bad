"""Manifests: size and SHA-256 of every file of a directory, by which a damaged one is told from a sound one."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from longrope_jax.messages import beginning, shortened
from longrope_jax.runtime import storage

Manifest = dict[str, list[int | str]]

_CHUNK = 1 << 20  # bytes


def describe(directory: epath.Path) -> Manifest:
    """`describe_file` of every file below the directory, by its path relative to the directory."""
    files = sorted(storage.files_below(directory))
    with ThreadPoolExecutor() as pool:  # hashing and reading let go of the interpreter's lock
        entries = list(pool.map(describe_file, files))
    return {str(file.relative_to(directory)): entry for file, entry in zip(files, entries, strict=True)}


def describe_file(file: epath.Path) -> list[int | str]:
    """[size in bytes, SHA-256 in hex]."""
    size, digest = 0, hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(_CHUNK):  # hashlib.file_digest needs readinto, which object stores' files lack
            size += len(chunk)
            digest.update(chunk)
    return [size, digest.hexdigest()]


def difference(expected: Manifest, found: Manifest) -> str | None:
    """The first thing wrong with the files found, None if they are those expected."""
    for name in sorted({*expected, *found}):
        if name not in found:
            return f"{beginning(name)} is missing"
        if name not in expected:
            return f"{beginning(name)} is not in the manifest"
        if found[name] != expected[name]:
            return (
                f"{beginning(name)} has size and SHA-256 {found[name]}, the manifest says {shortened(expected[name])}"
            )
    return None
