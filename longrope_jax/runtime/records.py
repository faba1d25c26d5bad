"""A file of records, one JSON object a line, which a restarted process can bring back to what its checkpoint knows.

Of several processes that work together only process 0 writes, what the others would write is the same.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from etils import epath

from longrope_jax import files, json_files
from longrope_jax.files import is_remote
from longrope_jax.json_files import Kind
from longrope_jax.runtime import processes

Record = dict[str, Any]


def append(path: epath.Path, records: Iterable[Record]) -> None:
    """Adds records at the end of the file, which is made if need be.

    Raises:
        OSError: it can't be written to.
    """
    if processes.is_first():
        text = "".join(to_json(record) + "\n" for record in records)
        try:
            if is_remote(path):  # "a" would begin a new object there
                path.write_text((path.read_text() if path.exists() else "") + text)
            else:
                with path.open("a") as file:
                    file.write(text)
        except OSError as error:
            raise OSError(f"{path} can't be written to: {error.strerror or error}") from error


def read(path: epath.Path, fields: Mapping[str, Kind] | None = None) -> list[Record]:
    """All complete records; nothing if there is no file. A last line cut off by a kill is not one.

    Args:
        fields: that every record has beside the name of its stage, see `json_files.Kind`.

    Raises:
        OSError: a line is no such record; it is named.
    """
    if not path.exists():
        return []
    found = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is incomplete, or empty
        try:
            found.append(json_files.check(json.loads(line.decode()), {"stage": str, **(fields or {})}))
        except (ValueError, RecursionError) as error:
            raise OSError(
                f"{path} is damaged: line {number}: {error}; without that line the same command goes on"
            ) from None
    return found


def keep(path: epath.Path, wanted: Callable[[Record], bool], fields: Mapping[str, Kind] | None = None) -> None:
    """Forgets the other records: those that were written after the checkpoint a process goes on from.

    Raises OSError as `read` does.
    """
    if processes.is_first() and path.exists():
        write_whole(path, "".join(to_json(record) + "\n" for record in read(path, fields) if wanted(record)))


def of_stage(path: epath.Path, stage: str, fields: Mapping[str, Kind]) -> list[Record]:
    """The complete records of one stage, see `read`."""
    return [record for record in read(path, fields) if record["stage"] == stage]


def resume(path: epath.Path, stage: str, fields: Mapping[str, Kind]) -> list[Record]:
    """The same for a process that goes on with them: a last line that a kill cut off is removed from the file."""
    keep(path, lambda record: True, fields)
    return of_stage(path, stage, fields)


def to_json(content: Any, indent: int | None = None) -> str:
    """JSON that every reader accepts: it has no infinity and no nan, null says that there is no number."""
    return json.dumps(finite(content), indent=indent, allow_nan=False)


def finite(content: Any) -> Any:
    """The same content with None for numbers that are infinite or nan."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in flat(value, f"{prefix}.{key}".lstrip(".")).items()}


def write_whole(path: epath.Path, text: str) -> None:
    """Writes a file, from process 0, so that after a kill it has either its old content or all of the new.

    Raises:
        OSError: it can't be written, the disk may be full; it has its old content.
    """
    if processes.is_first():
        files.write_whole(path, text.encode())
