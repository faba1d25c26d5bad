"""Files of records in JSON Lines, one object per line, which a restarted process can cut back to its checkpoint.

Only process 0 writes; the other processes would write the same.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from longrope_jax.files import is_remote
from longrope_jax.json_files import Kind, check, to_json
from longrope_jax.runtime import preemption, processes

Record = dict[str, Any]


def append(path: epath.Path, records: Iterable[Record]) -> None:
    """Appends records to the file, and makes it if needed.

    Raises:
        OSError: it can't be written to.
    """
    if processes.is_first():
        text = "".join(to_json(record) + "\n" for record in records)
        try:
            if is_remote(path):  # "a" would start a new object there
                path.write_text((path.read_text() if path.exists() else "") + text)
            else:
                with path.open("a") as file:
                    file.write(text)
        except OSError as error:
            raise OSError(f"{path} can't be written to: {error.strerror or error}") from error


def read(path: epath.Path, fields: Mapping[str, Kind] | None = None) -> list[Record]:
    """All complete records; none if there is no file. A last line that a kill has cut off is ignored.

    Args:
        fields: that every record has besides its stage, see `json_files.Kind`.

    Raises:
        OSError: names a line that is no such record.
    """
    if not path.exists():
        return []
    found = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is incomplete, or empty
        try:
            found.append(check(json.loads(line.decode()), {"stage": str, **(fields or {})}))
        except (ValueError, RecursionError) as error:
            raise OSError(
                f"{path} is damaged: line {number}: {error}; without that line the same command continues"
            ) from None
    return found


def keep(path: epath.Path, wanted: Callable[[Record], bool], fields: Mapping[str, Kind] | None = None) -> None:
    """Removes all other records: those written after the checkpoint that a process resumes from.

    Raises OSError as `read` does.
    """
    if processes.is_first() and path.exists():
        processes.write_text(path, "".join(to_json(record) + "\n" for record in read(path, fields) if wanted(record)))


def of_stage(path: epath.Path, stage: str, fields: Mapping[str, Kind]) -> list[Record]:
    """The complete records of one stage, see `read`."""
    return [record for record in read(path, fields) if record["stage"] == stage]


def resume(path: epath.Path, stage: str, fields: Mapping[str, Kind]) -> list[Record]:
    """The same for processes that will append: removes a last line that a kill has cut off."""
    try:
        keep(path, lambda record: True, fields)
    finally:  # or the other processes would wait for one that has found damage
        processes.wait_for_all(f"{stage}: {path.name}")
    return of_stage(path, stage, fields)


def make_missing(
    path: epath.Path,
    stage: str,
    fields: Mapping[str, Kind],
    wanted: Sequence[Record],
    make: Callable[..., Record],
    unit: str,
) -> list[Record]:
    """One record of a stage for each of the wanted keys, in order; those that the file lacks are made and appended.

    Args:
        wanted: the fields that are the key of a record.
        make: is called with a key's fields, and `stop_if_asked`, which it calls where it may stop; returns the others.
        unit: what one record is of, for the progress bar.

    Raises:
        preemption.Preempted: the process was asked to stop; finished records are kept.
    """
    done = {tuple(record[name] for name in wanted[0]): record for record in resume(path, stage, fields)}

    def stop_if_asked() -> None:
        if preemption.requested():
            raise preemption.Preempted(stage, f"{len(done)} of {len(wanted)} records are kept")

    with preemption.watch(), processes.progress_bar(wanted, desc=stage, unit=unit) as bar:
        for key in bar:
            bar.set_postfix(key)
            if tuple(key.values()) not in done:
                record = {"stage": stage, **key, **make(**key, stop_if_asked=stop_if_asked)}
                append(path, [record])
                done[tuple(key.values())] = record
    return [done[tuple(key.values())] for key in wanted]
