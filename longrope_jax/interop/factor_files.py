"""Factors by length from and to whatever files they are kept in: ours, CSV, and configs of Hugging Face."""

import json
from typing import Any, NamedTuple

from etils import epath

from longrope_jax.interop.architectures import parse_rotation
from longrope_jax.interop.pretrained import read_config
from longrope_jax.model import LlamaConfig
from longrope_jax.rope import (
    FactorTable,
    from_huggingface,
    load_factors,
    load_table,
    save_factors,
    save_table,
    to_huggingface,
)
from longrope_jax.rope.huggingface import rope_type

KINDS = ("longrope_jax", "huggingface", "csv")


class Found(NamedTuple):
    """Factors by length, and what a file tells of the model that they are for: rope_theta and the context before any
    extension (tokens), None where it does not.
    """

    table: FactorTable
    base: float | None
    original_length: int | None


def read_factors(path: epath.PathLike, target_length: int | None = None, head_dim: int | None = None) -> Found:
    """Reads factors from:

    * a table of ours, or one set of ours (.json), or the released search's .csv;
    * a config.json, the folder that holds one, or a GGUF file;
    * `rope_parameters` of type longrope by themselves, or what `write_factors` makes of them (.json).

    Args:
        target_length: up to how many tokens a single set of factors is good; by default what its file says.
        head_dim: of the model they are for, where it is known; tells a CSV with n_hat from one without.

    Raises:
        ValueError: names the file and what is wrong with it.
    """
    path = epath.Path(path)
    if not path.exists():
        raise ValueError(f"factors = {str(path)!r} do not exist")
    content = _content(path)
    if content is None or str(content.get("format", "")).startswith("longrope_jax."):
        return _ours(path, content or {}, target_length, head_dim)
    try:
        if "hidden_size" in content or "head_dim" in content:
            rotation = parse_rotation(content)
            found = Found(rotation.table, rotation.base, rotation.original_length)
        else:
            found = _snippet(content.get("rope_parameters") or content.get("rope_scaling") or content)
        found.table.factors.check(head_dim, monotone="warn")
        return found
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def factors_for(path: epath.PathLike, config: LlamaConfig, target_length: int | None = None) -> FactorTable:
    """The factors in a file, for a model.

    Raises:
        ValueError: see `read_factors`; or they are for another head dimension or rope_theta.
    """
    found = read_factors(path, target_length, config.head_dim)
    if found.base is not None and found.base != config.rope_theta:
        raise ValueError(f"{path}: factors for rope_theta = {found.base:g}; the model has {config.rope_theta:g}")
    return found.table


def write_factors(path: epath.PathLike, found: Found, kind: str, length: int | None = None) -> None:
    """Writes factors as one of `KINDS`.

    Args:
        kind: "huggingface" is an object with `rope_parameters` and the lengths that go with it, to be put into a
            config.json; "csv" is one set.
        length: for a CSV, which set: that of a sequence of so many tokens; the longest by default.

    Raises:
        ValueError: says what the kind of file can't carry, or what has to be known for it.
    """
    path = epath.Path(path)
    table = found.table
    if kind == "longrope_jax":
        told = {"original_length": found.original_length, "rope_theta": found.base}
        save_table(path, table, **{name: value for name, value in told.items() if value is not None})
    elif kind == "csv":
        save_factors(path, table.select(length or int(table.boundaries[-1])))
    elif kind == "huggingface":
        path.write_text(json.dumps(_for_config(found), indent=2, allow_nan=False) + "\n")
    else:
        raise ValueError(f"kind = {kind!r} must be one of {', '.join(KINDS)}")


def _content(path: epath.Path) -> dict[str, Any] | None:
    """The JSON object that a file is, or a model's config; None for a CSV."""
    if path.suffix == ".csv":
        return None
    if path.is_dir() or path.suffix == ".gguf":
        return read_config(path)
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold an object")
    return content


def _ours(path: epath.Path, content: dict[str, Any], target_length: int | None, head_dim: int | None) -> Found:
    metadata = content.get("metadata", {})
    metadata = metadata if isinstance(metadata, dict) else {}
    model = metadata.get("model") if isinstance(metadata.get("model"), dict) else {}
    base = metadata.get("rope_theta", model.get("rope_theta"))
    original = metadata.get("original_length", model.get("original_length"))
    if "entries" in content:
        return Found(load_table(path, head_dim), base, original)
    factors = load_factors(path, head_dim)
    boundary = target_length or metadata.get("target_length")
    if not isinstance(boundary, int):
        raise ValueError(f"{path}: up to how many tokens are these factors good? Give a target_length")
    return Found(FactorTable.of({boundary: factors}), base, original)


def _snippet(rope: dict[str, Any]) -> Found:
    """`rope_parameters` without a model; only factors in full say how many pairs a head has."""
    if rope_type(rope) != "longrope":
        raise ValueError(
            f"rope_type = {rope_type(rope)!r} needs head dimension and lengths of the model; give its whole config.json"
        )
    lam, factor, original = (rope.get(n) for n in ("long_factor", "factor", "original_max_position_embeddings"))
    numbers = all(isinstance(value, int | float) and 0 < value < 2**31 for value in (factor, original))
    if not isinstance(lam, list) or not numbers:
        raise ValueError("long_factor, factor and original_max_position_embeddings are needed, or a whole config.json")
    base = rope.get("rope_theta")
    table = from_huggingface(rope, 2 * len(lam), base or 10000.0, round(factor * original))
    return Found(table, base, int(original))


def _for_config(found: Found) -> dict[str, Any]:
    if found.original_length is None and len(found.table.boundaries) < 2:
        raise ValueError("what context was the model pretrained for? Give an original_length")
    rope = to_huggingface(found.table, found.original_length or int(found.table.boundaries[0]))
    if found.base is not None:
        rope = {**rope, "rope_theta": found.base}
    return {
        "max_position_embeddings": int(found.table.boundaries[-1]),
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
        "rope_parameters": rope,
    }
