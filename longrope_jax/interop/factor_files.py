"""Reads and writes factors by length in every supported file format: ours, CSV, and configs of Hugging Face."""

import json
from typing import Any

from absl import logging
from etils import epath

from longrope_jax.errors import naming, shortened
from longrope_jax.files import write_whole
from longrope_jax.interop.architectures import Rotation, parse_rotation
from longrope_jax.interop.pretrained import read_config
from longrope_jax.json_files import SIZE, field, is_number, numbers, read_object
from longrope_jax.model import LlamaConfig
from longrope_jax.rope import (
    FactorTable,
    load_factors,
    load_metadata,
    load_table,
    save_factors,
    save_table,
    to_huggingface,
)
from longrope_jax.rope.huggingface import ORIGINAL, rope_parameters, rope_type
from longrope_jax.settings import Rule

KINDS = ("longrope_jax", "huggingface", "csv")
_FACTOR = Rule(
    lambda value: is_number(value) and value >= 1, "must be 1 or more, if there is no max_position_embeddings"
)


def read_factors(path: epath.PathLike, target_length: int | None = None, head_dim: int | None = None) -> Rotation:
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
    with naming(path):
        is_csv = path.suffix == ".csv"
        is_model = path.is_dir() or path.suffix == ".gguf"
        content = {} if is_csv else read_config(path) if is_model else read_object(path)
        is_single = is_csv or content.get("format") == "longrope_jax.factors"
        if target_length is not None and not is_single:
            raise ValueError(f"target_length = {target_length} is for a single set of factors; this file has its own")
        if is_single or "format" in content:
            loaded = _read_own(path, is_single, target_length, head_dim)
        elif "hidden_size" in content or "head_dim" in content:
            loaded = parse_rotation(content)
        else:
            loaded = _read_rope_parameters(content)
        loaded.table.factors.check(head_dim, monotone="warn")
        return loaded.check()


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


def write_factors(path: epath.PathLike, loaded: Rotation, kind: str, length: int | None = None) -> None:
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


def _read_own(path: epath.Path, is_single: bool, target_length: int | None, head_dim: int | None) -> Rotation:
    metadata = {} if path.suffix == ".csv" else load_metadata(path)
    model = metadata.get("model")
    known = (model if isinstance(model, dict) else {}) | metadata
    if not is_single:
        table = load_table(path, head_dim)
    elif target_length is None and "target_length" not in metadata:
        raise ValueError("the longest sequence for these factors is unknown. Give a target_length")
    else:
        boundary = field({"target_length": target_length}, "target_length", SIZE, metadata.get("target_length"))
        table = FactorTable.of({boundary: load_factors(path, head_dim)})
    return Rotation(table, known.get("rope_theta"), known.get("original_length"))


def _read_rope_parameters(content: dict[str, Any]) -> Rotation:
    """`rope_parameters` without a model, alone or beside the lengths of a config.json. Only type longrope can be read,
    because its lists of factors give the head dimension.
    """
    is_alone = not (content.get("rope_scaling") or content.get("rope_parameters"))
    config = {"rope_parameters": content} if is_alone else content
    rope = rope_parameters(config)
    if rope_type(rope) != "longrope":
        raise ValueError(
            f"rope_type = {shortened(rope_type(rope))} needs head dimension and lengths of the model; "
            "give its whole config.json"
        )
    original = field(rope, ORIGINAL, SIZE)
    longest = content.get("max_position_embeddings") or round(field(rope, "factor", _FACTOR) * original)
    head_dim = 2 * len(field(rope, "long_factor", numbers()))
    rotation = parse_rotation({**config, "head_dim": head_dim, "max_position_embeddings": longest})
    return rotation._replace(base=rope.get("rope_theta"))


def _rope_parameters(loaded: Rotation) -> dict[str, Any]:
    if loaded.original_length is None and len(loaded.table.boundaries) < 2:
        raise ValueError("the context that the model was pretrained for is unknown. Give an original_length")
    rope = to_huggingface(loaded.table, loaded.original_length or int(loaded.table.boundaries[0]))
    if loaded.base is not None:
        rope["rope_theta"] = loaded.base
    longest = int(loaded.table.boundaries[-1])
    return {"max_position_embeddings": longest, ORIGINAL: rope[ORIGINAL], "rope_parameters": rope}


def _write_csv(path: epath.Path, table: FactorTable, length: int | None) -> None:
    length = field({"length": length}, "length", SIZE, int(table.boundaries[-1]))
    save_factors(path, table.select(length))
    if len(table.boundaries) > 1:
        lengths = ", ".join(str(boundary) for boundary in table.boundaries)
        logging.warning("%s has only the factors for %d tokens, of those for %s", path, length, lengths)
