"""Files of JSON that may be damaged, or something else altogether: read, and checked as far as the reader relies on."""

import json
from collections.abc import Mapping
from typing import Any, TypeGuard

from etils import epath

from longrope_jax.errors import shortened

Kind = Any
"""What a value has to be: a type; `[kind]`, a list of them; `{name: kind}`, an object with these fields at least;
`{str: kind}`, an object of any fields. `float` is any number, or null, which stands for one that is not finite.
"""


def is_number(value: Any, limit: float = 2**31) -> TypeGuard[int | float]:
    """Whether a JSON value is a number whose magnitude is below the limit; true and false are no numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < limit


def is_size(value: Any) -> TypeGuard[int]:
    """Whether a JSON value is a positive whole number below 2^31, such as a number of tokens."""
    return isinstance(value, int) and is_number(value) and value > 0


def read_object(path: epath.PathLike, fields: Mapping[str, Kind] | None = None) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        ValueError: names the file and what is wrong with it: no UTF-8, no JSON or too deeply nested, no object, or a
            field that is missing or something else.
        OSError: there is no such file.
    """
    path = epath.Path(path)
    try:
        return check(json.loads(path.read_text()), fields or {})
    except (ValueError, RecursionError) as error:  # ValueError: of Unicode and JSON too
        raise ValueError(f"{path}: {error}") from None


def check(content: Any, fields: Mapping[str, Kind]) -> dict[str, Any]:
    """Returns an object that has these fields; raises ValueError for any other."""
    if not isinstance(content, dict):
        raise ValueError(f"must hold a JSON object, not {shortened(content)}")
    for name, kind in fields.items():
        if name not in content:
            raise ValueError(f"{name!r} is missing")
        if not fits(content[name], kind):
            raise ValueError(f"{name} = {shortened(content[name])} must be {_named(kind)}")
    return content


def fits(value: Any, kind: Kind) -> bool:
    """Whether a value is what it has to be."""
    if isinstance(kind, list):
        return isinstance(value, list) and all(fits(item, kind[0]) for item in value)
    if not isinstance(kind, dict):
        numbers = (int, float, type(None)) if kind is float else kind
        return isinstance(value, numbers) and not isinstance(value, bool)
    if not isinstance(value, dict):
        return False
    if str in kind:
        return all(fits(item, kind[str]) for item in value.values())
    return all(name in value and fits(value[name], wanted) for name, wanted in kind.items())


def _named(kind: Kind) -> str:
    if isinstance(kind, list):
        return f"a list, of {_named(kind[0])} each"
    if isinstance(kind, dict):
        return "an object" if str not in kind else f"an object, of {_named(kind[str])} each"
    return {int: "a whole number", float: "a number", str: "text", list: "a list", dict: "an object"}[kind]
