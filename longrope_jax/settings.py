"""Typed settings <-> the sections of an ml_collections config.

A config is written as settings (`config.search = section(SearchSettings(...))`), so every field can be given on the
command line; it is read back as settings, which refuse what makes no sense before anything starts.
"""

import dataclasses
import difflib
import typing
from typing import Any, ClassVar, Protocol, TypeVar

from ml_collections import ConfigDict

from longrope_jax.errors import beginning, shortened


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


T = TypeVar("T", bound=_Dataclass)


def section(settings: Any) -> ConfigDict:
    """A dataclass as a config section with all of its fields."""
    return ConfigDict(dataclasses.asdict(settings))


def parse(cls: type[T], section: ConfigDict, name: str) -> T:
    """A config section as the dataclass it stands for.

    Raises:
        ValueError: an unknown or missing field, a value of the wrong type or one that the dataclass refuses; named in
            full.
    """
    if not isinstance(section, ConfigDict):
        raise ValueError(f"config.{name} = {shortened(section)} must be a section with the fields of {cls.__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in section:
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(fields)}"
            raise ValueError(f"config.{name}.{beginning(key)} is not a field of {cls.__name__}; {hint}")
    hints = typing.get_type_hints(cls)
    for key, field in fields.items():
        is_required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if is_required and key not in section:
            raise ValueError(f"config.{name}.{key} is missing")
    values = {key: _value(hints[key], section[key], f"{name}.{key}") for key in section}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"config.{name}: {beginning(error)}") from None


def _value(hint: Any, value: Any, name: str) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return parse(hint, value, name)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and isinstance(value, tuple | list):
        return tuple(_value(arguments[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, ConfigDict):
        return {key: _value(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"config.{name} = {shortened(value)} is beyond every number of 64 bits") from None
    expected = origin or hint
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise ValueError(f"config.{name} = {shortened(value)} must be {expected.__name__}")
    return value
