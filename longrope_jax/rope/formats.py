"""Files of factors: our JSON, which stores everything, and the CSV of the released search with lam and n_hat."""

import contextlib
import csv
import json
from typing import Any

import numpy as np
from etils import epath

from longrope_jax.errors import shortened
from longrope_jax.files import write_whole
from longrope_jax.json_files import is_number
from longrope_jax.rope.factors import FactorTable, RopeFactors

_FORMAT = "longrope_jax.factors"
_TABLE_FORMAT = "longrope_jax.factor_table"


def save_factors(path: epath.PathLike, factors: RopeFactors, **metadata: Any) -> None:
    """Writes unbatched factors to a .json or .csv file; reading them back gives the same float32 numbers.

    Args:
        path: local, or on any file system that etils knows (`gs://`).
        metadata: JSON-able; usually `method`, `model`, `original_length`, `target_length`, `scores`,
            `provenance`.

    Raises:
        ValueError: batched or invalid factors, an unknown suffix, or something that a CSV does not support.
    """
    path = epath.Path(path)
    factors.check()
    if np.ndim(factors.lam) != 1:
        raise ValueError(f"{path}: one file holds one set of factors, these have shape {np.shape(factors.lam)}")
    numbers = _to_content(factors)
    lam, n_hat, mscale = numbers.values()
    if path.suffix == ".json":
        content = {"format": _FORMAT, **numbers, "metadata": metadata}
        write_whole(path, _to_json(content))
    elif path.suffix == ".csv":
        if len(lam) % 2:
            raise ValueError(f"{path}: a CSV of {len(lam)} factors, an odd number, would look like one with n_hat")
        if metadata or mscale != 1:
            raise ValueError(f"{path}: a CSV has no place for metadata or an mscale of {mscale}; write a .json file")
        write_whole(path, "".join(f"{value!r}\n" for value in ([n_hat] if n_hat else []) + lam).encode())
    else:
        raise ValueError(f"{path}: factors are stored in .json or .csv files")


def load_factors(path: epath.PathLike, head_dim: int | None = None) -> RopeFactors:
    """Reads factors from our .json or from a .csv of the released search.

    A CSV has one factor per line, or, from older tools, one row of factors per layer (all rows must then be equal). If
    there is one number more than rotary pairs, the first is n_hat. Without `head_dim` an odd count means this, because
    no common model has an odd number of pairs. Factors that decrease somewhere only cause a warning.

    Raises:
        ValueError: names the file and what is wrong with it.
    """
    path = epath.Path(path)
    with _name_file(path):
        if path.suffix == ".json":
            factors = _from_content(_read_json(path))
        elif path.suffix == ".csv":
            factors = _from_numbers(_read_csv(path), head_dim)
        else:
            raise ValueError("factors are stored in .json or .csv files")
        return factors.check(head_dim, monotone="warn")


def save_table(path: epath.PathLike, table: FactorTable, **metadata: Any) -> None:
    """Writes a table of factors by sequence length to a .json file; `load_table` gives the same numbers.

    Raises:
        ValueError: another suffix.
    """
    path = epath.Path(path)
    if path.suffix != ".json":
        raise ValueError(f"{path}: a table of factors is stored in a .json file")
    factors = table.factors
    leaves = map(np.asarray, (table.boundaries, factors.lam, factors.n_hat, factors.mscale))
    entries = [
        {"boundary": int(boundary), **_to_content(RopeFactors(*entry))}
        for boundary, *entry in zip(*leaves, strict=True)
    ]
    content = {"format": _TABLE_FORMAT, "entries": entries, "metadata": metadata}
    write_whole(path, _to_json(content))


def load_table(path: epath.PathLike, head_dim: int | None = None) -> FactorTable:
    """Reads what `save_table` wrote.

    Raises:
        ValueError: names the file and what is wrong with it.
    """
    path = epath.Path(path)
    with _name_file(path):
        entries = _read_json(path, _TABLE_FORMAT).get("entries")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError("entries must be a list of objects")
        for entry in entries:
            if not is_number(entry.get("boundary")):
                raise ValueError(f"boundary = {shortened(entry.get('boundary'))} must be a number below 2^31")
        if len({entry["boundary"] for entry in entries}) < len(entries):
            raise ValueError("a boundary occurs twice")
        table = FactorTable.of({entry["boundary"]: _from_content(entry) for entry in entries})
        if head_dim is not None:
            table.factors.check(head_dim, monotone="warn")
        return table


def load_metadata(path: epath.PathLike) -> dict[str, Any]:
    """The metadata that `save_factors` wrote to a .json file; raises ValueError if it can't be read."""
    path = epath.Path(path)
    with _name_file(path):
        return _read_json(path).get("metadata", {})


@contextlib.contextmanager
def _name_file(path: epath.Path):
    """Turns errors in a file's content into a ValueError that names the file."""
    try:
        yield
    # ValueError includes JSON and Unicode errors; nesting too deep for the JSON reader is a RecursionError.
    except (ValueError, OverflowError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path}: {error}") from None


def _read_json(path: epath.Path, wanted: str = _FORMAT) -> dict[str, Any]:
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or content.get("format") != wanted:
        raise ValueError(f'not a factors file: it must be a JSON object with "format": "{wanted}"')
    return content


def _to_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def _to_content(factors: RopeFactors) -> dict[str, Any]:
    lam = [float(value) for value in np.asarray(factors.lam, np.float32)]
    return {"lam": lam, "n_hat": int(factors.n_hat), "mscale": float(factors.mscale)}


def _from_content(content: dict[str, Any]) -> RopeFactors:
    missing = {"lam", "n_hat", "mscale"} - content.keys()
    if missing:
        raise ValueError(f"{sorted(missing)} missing")
    lam, n_hat, mscale = content["lam"], content["n_hat"], content["mscale"]
    if not isinstance(lam, list) or not all(is_number(value) for value in lam):
        raise ValueError("lam must be a list of numbers below 2^31")
    if not is_number(n_hat):
        raise ValueError(f"n_hat = {shortened(n_hat)} must be a number below 2^31")
    if not is_number(mscale):
        raise ValueError(f"mscale = {shortened(mscale)} must be a number")
    return _factors(lam, n_hat, mscale)


def _read_csv(path: epath.Path) -> list[float]:
    rows = [row for row in csv.reader(path.read_text().splitlines()) if any(cell.strip() for cell in row)]
    numbers = [[_number(cell) for cell in row if cell.strip()] for row in rows]
    if not numbers:
        raise ValueError("the file is empty")
    if all(len(row) == 1 for row in numbers):
        return [row[0] for row in numbers]
    different = [line for line, row in enumerate(numbers) if row != numbers[0]]
    if different:
        raise ValueError(f"row {different[0]} differs from row 0; factors that differ by layer are not supported")
    return numbers[0]


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        raise ValueError(f"{shortened(cell)} is no number; a CSV of factors holds numbers only") from None


def _from_numbers(numbers: list[float], head_dim: int | None) -> RopeFactors:
    has_n_hat = len(numbers) == head_dim // 2 + 1 if head_dim is not None else len(numbers) % 2 == 1
    if not has_n_hat:
        return _factors(numbers, 0, 1.0)
    return _factors(numbers[1:], numbers[0], 1.0)


def _factors(lam: list[float], n_hat: float, mscale: float) -> RopeFactors:
    if not (abs(n_hat) < 2**31 and n_hat == int(n_hat)):
        raise ValueError(f"n_hat = {n_hat!r} is not a number of tokens")
    return RopeFactors(np.asarray(lam, np.float32), np.int32(n_hat), np.float32(mscale))
