"""Files of JSON that may be damaged, or something else altogether: read, and checked as far as the reader relies on."""

import json
import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from etils import epath

from longrope_jax.errors import naming, shortened
from longrope_jax.settings import Rule

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


def numbers(count: int | None = None) -> Rule:
    """The rule that a JSON value is a list of numbers below 2^31, of so many of them if that is known."""

    def accepts(value: Any) -> bool:
        return isinstance(value, list) and (count is None or len(value) == count) and all(map(is_number, value))

    return Rule(accepts, f"must be a list of {'' if count is None else f'{count} '}numbers below 2^31")


def optional(rule: Rule) -> Rule:
    """The rule for a field that may be missing or null."""
    return Rule(lambda value: value is None or rule.accepts(value), rule.text)


SIZE = Rule(is_size, "must be a positive whole number")
POSITIVE = Rule(lambda value: is_number(value) and value > 0, "must be a positive number")


def problems(content: Mapping[str, Any], rules: Mapping[str, Rule]) -> list[str]:
    """What is wrong with the fields of an object, a message each. A missing field counts as null."""
    values = {name: content.get(name) for name in rules}
    return [f"{name} = {shortened(values[name])} {rule.text}" for name, rule in rules.items()
            if not rule.accepts(values[name])]  # fmt: skip


def field(content: Mapping[str, Any], name: str, rule: Rule, default: Any = None) -> Any:
    """A field of an object, the default where it is missing or null; raises ValueError if it breaks the rule."""
    value = content.get(name)
    value = default if value is None else value
    if wrong := problems({name: value}, {name: rule}):
        raise ValueError(wrong[0])
    return value


def read_object(path: epath.PathLike, fields: Mapping[str, Kind] | None = None) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        ValueError: names the file and what is wrong with it: no UTF-8, no JSON or too deeply nested, no object, or a
            field that is missing or something else.
        OSError: there is no such file.
    """
    path = epath.Path(path)
    with naming(path):
        return check(json.loads(path.read_text()), fields or {})


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


def to_json(content: Any, indent: int | None = None) -> str:
    """JSON that every reader accepts: null in place of infinity and nan."""
    return json.dumps(finite(content), indent=indent, allow_nan=False)


def finite(content: Any) -> Any:
    """The same content with None in place of infinity and nan."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
