"""Reads and writes factors by length in every supported file format: ours, CSV, and configs of Hugging Face."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from absl import logging
from etils import epath

from longrope_jax.errors import shortened
from longrope_jax.files import write_whole
from longrope_jax.interop.architectures import parse_rotation
from longrope_jax.interop.pretrained import read_config
from longrope_jax.json_files import is_number, is_size
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
_ORIGINAL = "original_max_position_embeddings"


class LoadedFactors(NamedTuple):
    """The content of a file of factors.

    Attributes:
        table: factors by length.
        base: rope_theta of their model; None if unknown.
        original_length: the context of their model before any extension, tokens; None if unknown.
    """

    table: FactorTable
    base: float | None
    original_length: int | None

    def check(self) -> "LoadedFactors":
        """Returns self; raises ValueError if a number is out of range."""
        if self.base is not None and not (is_number(self.base, 1e30) and self.base > 1):
            raise ValueError(f"rope_theta = {shortened(self.base)} must be a number above 1")
        if self.original_length is not None and not is_size(self.original_length):
            raise ValueError(f"original_length = {shortened(self.original_length)} must be a positive number of tokens")
        return self


def read_factors(path: epath.PathLike, target_length: int | None = None, head_dim: int | None = None) -> LoadedFactors:
    """Reads factors from:

    * our .json, a table or one set, or a .csv of the released search;
    * a config.json, its folder, or a GGUF file;
    * `rope_parameters` of type longrope alone, or with the lengths that `write_factors` adds (.json).

    Args:
        target_length: the longest sequence for a single set of factors, tokens; by default what the file says.
        head_dim: of their model, if known; it tells a CSV with n_hat from one without.

    Raises:
        ValueError: names the file and what is wrong with it.
    """
    path = epath.Path(path)
    if not path.exists():
        raise ValueError(f"factors = {str(path)!r} do not exist")
    try:
        content = _read_content(path)
        if content is None or str(content.get("format", "")).startswith("longrope_jax."):
            loaded = _read_own(path, content or {}, target_length, head_dim)
        elif target_length is not None:
            raise ValueError(f"target_length = {target_length} is for a single set of factors; this file has its own")
        elif "hidden_size" in content or "head_dim" in content:
            rotation = parse_rotation(content)
            loaded = LoadedFactors(rotation.table, rotation.base, rotation.original_length)
        else:
            loaded = _read_rope_parameters(content)
        loaded.table.factors.check(head_dim, monotone="warn")
        return loaded.check()
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(str(path)) else f"{path}: {message}") from None


def factors_for(path: epath.PathLike, config: LlamaConfig, target_length: int | None = None) -> FactorTable:
    """The factors in a file, for a model; warns if they were made for another original length.

    Raises:
        ValueError: see `read_factors`; or they are for another head dimension or rope_theta.
    """
    loaded = read_factors(path, target_length, config.head_dim)
    if loaded.base is not None and loaded.base != config.rope_theta:
        raise ValueError(f"{path}: factors for rope_theta = {loaded.base:g}; the model has {config.rope_theta:g}")
    if loaded.original_length not in (None, config.original_length):
        logging.warning(
            "%s: factors for a model of %d tokens; this one was pretrained for %d", path, loaded.original_length,
            config.original_length,
        )  # fmt: skip
    return loaded.table


def write_factors(path: epath.PathLike, loaded: LoadedFactors, kind: str, length: int | None = None) -> None:
    """Writes factors to a new file.

    Args:
        kind: one of `KINDS`: "longrope_jax" is a table; "huggingface" an object with `rope_parameters` and the lengths
            that config.json needs with it; "csv" one set.
        length: for a CSV, the sequence length whose set is written, tokens; None is the longest.

    Raises:
        ValueError: says what the kind of file does not support, or what must be known for it.
    """
    path = epath.Path(path)
    if kind not in KINDS:
        raise ValueError(f"kind = {kind!r} must be one of {', '.join(KINDS)}")
    suffix = ".csv" if kind == "csv" else ".json"
    if path.suffix != suffix:
        raise ValueError(f"{path}: factors of the kind {kind} are stored in a {suffix} file")
    if path.exists():
        raise ValueError(f"{path} exists; choose a new name")
    if length is not None and kind != "csv":
        raise ValueError(f"length = {length} chooses one set for a CSV; {kind} takes all")
    if kind == "longrope_jax":
        metadata = {"original_length": loaded.original_length, "rope_theta": loaded.base}
        save_table(path, loaded.table, **{name: value for name, value in metadata.items() if value is not None})
    elif kind == "csv":
        _write_csv(path, loaded.table, length)
    else:
        write_whole(path, (json.dumps(_rope_parameters(loaded), indent=2, allow_nan=False) + "\n").encode())


def _read_content(path: epath.Path) -> dict[str, Any] | None:
    """The JSON object in a file, or a model's config; None for a CSV."""
    if path.suffix == ".csv":
        return None
    if path.is_dir() or path.suffix == ".gguf":
        return read_config(path)
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"neither a .csv nor JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError("must hold an object")
    return content


def _read_own(
    path: epath.Path, content: dict[str, Any], target_length: int | None, head_dim: int | None
) -> LoadedFactors:
    metadata = _mapping(content.get("metadata"))
    model = _mapping(metadata.get("model"))
    base = metadata.get("rope_theta", model.get("rope_theta"))
    original = metadata.get("original_length", model.get("original_length"))
    if "entries" in content:
        if target_length is not None:
            raise ValueError(f"target_length = {target_length} is for a single set of factors; this is a table")
        return LoadedFactors(load_table(path, head_dim), base, original)
    boundary = metadata.get("target_length") if target_length is None else target_length
    if boundary is None:
        raise ValueError("the longest sequence for these factors is unknown. Give a target_length")
    if not is_size(boundary):
        raise ValueError(f"target_length = {shortened(boundary)} must be a positive number of tokens")
    return LoadedFactors(FactorTable.of({boundary: load_factors(path, head_dim)}), base, original)


def _read_rope_parameters(content: Mapping[str, Any]) -> LoadedFactors:
    """`rope_parameters` without a model, alone or beside the lengths of a config.json. Only type longrope can be read,
    because its lists of factors give the head dimension.
    """
    rope = content.get("rope_scaling") or content.get("rope_parameters") or content
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_parameters = {shortened(rope)} must be an object")
    if rope_type(rope) != "longrope":
        raise ValueError(
            f"rope_type = {shortened(rope_type(rope))} needs head dimension and lengths of the model; "
            "give its whole config.json"
        )
    original = content.get(_ORIGINAL, rope.get(_ORIGINAL))
    if not is_size(original):
        raise ValueError(f"{_ORIGINAL} = {shortened(original)} must be a positive number of tokens")
    longest, factor = content.get("max_position_embeddings"), rope.get("factor")
    if longest is None:
        if not is_number(factor) or factor < 1:
            raise ValueError(f"factor = {shortened(factor)} must be 1 or more, if there is no max_position_embeddings")
        longest = round(factor * original)
    if not is_size(longest) or longest < original:
        raise ValueError(
            f"max_position_embeddings = {shortened(longest)} must be a number of tokens, {original} or more"
        )
    lam = rope.get("long_factor")
    if not isinstance(lam, list):
        raise ValueError(f"long_factor = {shortened(lam)} must be a list of numbers, half of the head dimension")
    base = rope.get("rope_theta", content.get("rope_theta"))
    table = from_huggingface({**rope, _ORIGINAL: original}, 2 * len(lam), 10000.0, longest)
    return LoadedFactors(table, base, original)


def _rope_parameters(loaded: LoadedFactors) -> dict[str, Any]:
    if loaded.original_length is None and len(loaded.table.boundaries) < 2:
        raise ValueError("the context that the model was pretrained for is unknown. Give an original_length")
    rope = to_huggingface(loaded.table, loaded.original_length or int(loaded.table.boundaries[0]))
    if loaded.base is not None:
        rope = {**rope, "rope_theta": loaded.base}
    return {
        "max_position_embeddings": int(loaded.table.boundaries[-1]),
        _ORIGINAL: rope[_ORIGINAL],
        "rope_parameters": rope,
    }


def _write_csv(path: epath.Path, table: FactorTable, length: int | None) -> None:
    length = int(table.boundaries[-1]) if length is None else length
    if not is_size(length):
        raise ValueError(f"length = {length!r} must be a positive number of tokens")
    save_factors(path, table.select(length))
    if len(table.boundaries) > 1:
        lengths = ", ".join(str(boundary) for boundary in table.boundaries)
        logging.warning("%s has only the factors for %d tokens, of those for %s", path, length, lengths)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
