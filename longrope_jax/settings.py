"""Typed settings: what a field may be is said once, where the field is declared, and checked on construction.

A config is written as settings (`config.search = section(SearchSettings(...))`), so every field can be given on the
command line. It is read back as settings, which refuse bad values before anything starts.
"""

import dataclasses
import difflib
import numbers
import sys
import typing
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from ml_collections import ConfigDict

from longrope_jax.errors import beginning, shortened

_LARGEST_INTEGER = 2**31 - 1


@dataclass(frozen=True)
class Rule:
    """What a value must fulfil besides its type.

    Attributes:
        accepts: value -> whether it is allowed.
        text: completes the message "field = value ...".
    """

    accepts: Callable[[Any], bool]
    text: str


def one_of(names: Collection[str], *others: str) -> Rule:
    """The rule that a value is one of some names."""
    text = ", ".join(name or repr(name) for name in (*names, *others))
    return Rule(lambda value: value in names or value in others, f"must be one of {text}")


PositiveInt = Annotated[int, Rule(lambda value: value > 0, "must be positive")]
NonNegativeInt = Annotated[int, Rule(lambda value: value >= 0, "must not be negative")]
PositiveFloat = Annotated[float, Rule(lambda value: value > 0, "must be positive")]
NonNegativeFloat = Annotated[float, Rule(lambda value: value >= 0, "must not be negative")]
Fraction = Annotated[float, Rule(lambda value: 0 <= value <= 1, "must lie in [0, 1]")]
Probability = Annotated[float, Rule(lambda value: 0 < value <= 1, "must lie in (0, 1]")]
Seed = NonNegativeInt
DocumentCount = Annotated[int, Rule(lambda n: n >= 2, "must be at least 2: intervals are over documents")]
DistinctLengths = Annotated[
    tuple[int, ...],
    Rule(
        lambda values: values and min(values) > 0 and len(set(values)) == len(values),
        "must be different positive numbers of tokens",
    ),
]


@dataclass(frozen=True)
class Settings:
    """The base of all settings: a frozen dataclass that checks its fields by their annotations.

    Every value must have the annotated type and fulfil the annotated rules. Numbers must be finite, integers must fit
    in 32 bits. Integers given for floats become floats, lists become tuples.

    Raises:
        ValueError: names the field, its value and what would be right.
    """

    def __post_init__(self):
        for name, hint in typing.get_type_hints(type(self), include_extras=True).items():
            object.__setattr__(self, name, _checked(hint, getattr(self, name), name))


T = TypeVar("T", bound=Settings)


def section(settings: Settings) -> ConfigDict:
    """Settings as a config section with all of their fields."""
    return ConfigDict(dataclasses.asdict(settings))


def parse(cls: type[T], section: ConfigDict, name: str) -> T:
    """A config section as the settings it stands for.

    Raises:
        ValueError: an unknown or missing field, a value of the wrong type, or one that the settings refuse. The message
            has the full name of the field.
    """
    if not isinstance(section, ConfigDict):
        raise ValueError(f"config.{name} = {shortened(section)} must be a section with the fields of {cls.__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in section:
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(fields)}"
            raise ValueError(f"config.{name}.{beginning(key)} is not a field of {cls.__name__}; {hint}")
    for key, field in fields.items():
        is_required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if is_required and key not in section:
            raise ValueError(f"config.{name}.{key} is missing")
    hints = typing.get_type_hints(cls, include_extras=True)
    values = {key: _typed(hints[key], section[key], f"config.{name}.{key}") for key in section}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"config.{name}: {beginning(error)}") from None


def _checked(hint: Any, value: Any, name: str) -> Any:
    """The value with its annotated type, if it also fulfils the annotated rules."""
    value = _typed(hint, value, name)
    for rule in getattr(hint, "__metadata__", ()):
        if not rule.accepts(value):
            raise ValueError(f"{name} = {shortened(value)} {rule.text}")
    return value


def _typed(hint: Any, value: Any, name: str) -> Any:
    """The value with its annotated type; raises ValueError where it has another one."""
    if hasattr(hint, "__metadata__"):
        hint = hint.__origin__
    if isinstance(hint, type) and issubclass(hint, Settings):
        return value if isinstance(value, hint) else parse(hint, value, name.removeprefix("config."))
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and isinstance(value, tuple | list):
        return tuple(_typed(arguments[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict | ConfigDict):
        return {str(key): _typed(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    expected = origin or hint
    kinds = {int: numbers.Integral, float: numbers.Real}.get(expected, expected)
    if not isinstance(value, kinds) or (isinstance(value, bool) and expected is not bool):
        raise ValueError(f"{name} = {shortened(value)} must be {expected.__name__}")
    if expected is int and abs(value) > _LARGEST_INTEGER:
        raise ValueError(f"{name} = {shortened(value)} must fit in 32 bits: at most {_LARGEST_INTEGER}")
    if expected is float and not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name} = {shortened(value)} must be finite")
    return expected(value) if expected in (int, float) else value
