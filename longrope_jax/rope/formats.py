"""Files of factors: our JSON, which stores everything, and the CSV of the released search with lam and n_hat."""

import contextlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from longrope_jax.errors import naming, shortened
from longrope_jax.files import write_whole
from longrope_jax.json_files import SIZE, Kind, check, field, is_number, numbers, read_object
from longrope_jax.rope.factors import FactorTable, RopeFactors
from longrope_jax.settings import Rule

_FORMAT = "longrope_jax.factors"
_TABLE_FORMAT = "longrope_jax.factor_table"
_RULES = {
    "lam": numbers(),
    "n_hat": Rule(lambda value: is_number(value) and value % 1 == 0, "must be a whole number of tokens below 2^31"),
    "mscale": Rule(is_number, "must be a number"),
}


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
    content = _to_content(factors)
    lam, n_hat, mscale = content.values()
    if path.suffix == ".json":
        write_whole(path, _to_json({"format": _FORMAT, **content, "metadata": metadata}))
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

    A CSV has one factor per line, or one row of factors per layer (all rows must then be equal), with commas or, as in
    the release, blanks between the numbers. If there is one number more than rotary pairs, the first is n_hat. Without
    `head_dim` an odd count means this, because no common model has an odd number of pairs. Factors that decrease
    somewhere only cause a warning.

    Raises:
        ValueError: names the file and what is wrong with it.
    """
    path = epath.Path(path)
    with naming(path):
        if path.suffix == ".json":
            content = _read_json(path, _FORMAT)
        elif path.suffix == ".csv":
            content = _from_csv(path.read_text(), head_dim)
        else:
            raise ValueError("factors are stored in .json or .csv files")
        return _from_content(content).check(head_dim, monotone="warn")


def save_table(path: epath.PathLike, table: FactorTable, **metadata: Any) -> None:
    """Writes a table of factors by sequence length to a .json file; `load_table` gives the same numbers.

    Raises:
        ValueError: another suffix.
    """
    path = epath.Path(path)
    if path.suffix != ".json":
        raise ValueError(f"{path}: a table of factors is stored in a .json file")
    entries = [
        {"boundary": int(boundary), **_to_content(jax.tree.map(lambda leaf, row=row: leaf[row], table.factors))}
        for row, boundary in enumerate(table.boundaries)
    ]
    write_whole(path, _to_json({"format": _TABLE_FORMAT, "entries": entries, "metadata": metadata}))


def load_table(path: epath.PathLike, head_dim: int | None = None) -> FactorTable:
    """Reads what `save_table` wrote.

    Raises:
        ValueError: names the file and what is wrong with it.
    """
    with naming(path):
        entries = _read_json(path, _TABLE_FORMAT, entries=[dict])["entries"]
        factors = {field(entry, "boundary", SIZE): _from_content(entry) for entry in entries}
        if len(factors) < len(entries):
            raise ValueError("a boundary occurs twice")
        table = FactorTable.of(factors)
        table.factors.check(head_dim, monotone="warn")
        return table


def load_metadata(path: epath.PathLike) -> dict[str, Any]:
    """The metadata that `save_factors` or `save_table` wrote to a .json file.

    Raises:
        ValueError: names the file and what is wrong with it.
    """
    return _read_json(path, _FORMAT, _TABLE_FORMAT)["metadata"]


def _read_json(path: epath.PathLike, *formats: str, **fields: Kind) -> dict[str, Any]:
    """A file of one of the formats; without metadata it has an empty object of them."""
    content = {"metadata": {}} | read_object(path)
    with naming(path):
        if content.get("format") not in formats:
            raise ValueError(f'not a factors file: it must be a JSON object with "format": "{formats[0]}"')
        return check(content, {"metadata": dict, **fields})


def _to_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def _to_content(factors: RopeFactors) -> dict[str, Any]:
    lam = [float(value) for value in np.asarray(factors.lam, np.float32)]
    return {"lam": lam, "n_hat": int(factors.n_hat), "mscale": float(factors.mscale)}


def _from_content(content: Mapping[str, Any]) -> RopeFactors:
    lam, n_hat, mscale = (field(content, name, rule) for name, rule in _RULES.items())
    return RopeFactors(np.asarray(lam, np.float32), np.int32(n_hat), np.float32(mscale))


def _from_csv(text: str, head_dim: int | None) -> dict[str, Any]:
    """What a JSON file of the same factors has."""
    lines = (line.replace(",", " ").split() for line in text.splitlines())
    rows = [[_number(cell) for cell in line] for line in lines if line]
    if not rows:
        raise ValueError("the file is empty")
    if all(len(row) == 1 for row in rows):
        rows = [[row[0] for row in rows]]
    for index, row in enumerate(rows):
        if row != rows[0]:
            raise ValueError(f"row {index} differs from row 0; factors that differ by layer are not supported")
    has_n_hat = len(rows[0]) % 2 == 1 if head_dim is None else len(rows[0]) == head_dim // 2 + 1
    n_hat, *lam = rows[0] if has_n_hat else [0, *rows[0]]
    return {"lam": lam, "n_hat": n_hat, "mscale": 1.0}


def _number(cell: str) -> float:
    with contextlib.suppress(ValueError):
        if is_number(value := float(cell)):
            return value
    raise ValueError(f"{shortened(cell)} is no number below 2^31; a CSV of factors holds numbers only")
