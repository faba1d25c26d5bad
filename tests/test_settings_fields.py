"""Every field of every settings class, set to bad values: refused in one line that names it, or a sensible value."""

import dataclasses
import importlib
import math
import pkgutil
import typing

import pytest
from ml_collections import ConfigDict

import longrope_jax
from longrope_jax.model import LlamaConfig
from longrope_jax.settings import Settings, parse
from longrope_jax.training.pretrain import PretrainSettings

BAD_VALUES = [
    None, True, "", "no such name", "x" * 5000, -1, 0, -(10**30), 10**30, 2**63, 1.5, -0.5, math.nan, math.inf,
    -math.inf, [], ["x", 1], (math.nan,), (-1, 2**70), {}, {"a": {}}, object(),
]  # fmt: skip
REQUIRED = {
    "FinetuneSettings": dict(steps=4, batch=2, length=64, factors="yarn"),
    "PretrainSettings": dict(steps=4, batch=2),
    "LoopSettings": dict(steps=4, batch=2),
    "SearchSettings": dict(target_length=64),
    "SeedSettings": dict(factors="a.json"),
    "EvaluationSettings": dict(lengths=(16, 32)),
    "RetrievalSettings": dict(lengths=(16, 32)),
    "Method": dict(factors="yarn"),
    "LoadSettings": dict(path="model"),
    "TableSettings": dict(lengths=(16,), factors=("yarn",)),
    "LlamaConfig": dataclasses.asdict(LlamaConfig.preset("tiny")),
}


def all_settings() -> list[type[Settings]]:
    for module in pkgutil.walk_packages(longrope_jax.__path__, "longrope_jax."):
        if not module.name.endswith(".harness_model"):  # it needs the lm-evaluation-harness
            importlib.import_module(module.name)
    found, classes = [], [Settings]
    while classes:
        classes += (subclasses := classes.pop().__subclasses__())
        found += subclasses
    return sorted(found, key=lambda cls: cls.__name__)


def numbers_in(value):
    if isinstance(value, Settings):
        value = dataclasses.asdict(value)
    if isinstance(value, dict | tuple | list):
        return [x for item in (value.values() if isinstance(value, dict) else value) for x in numbers_in(item)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.parametrize("cls", all_settings(), ids=lambda cls: cls.__name__)
def test_every_field_refuses_bad_values_by_name(cls):
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        for value in BAD_VALUES:
            fields = REQUIRED.get(cls.__name__, {}) | {field.name: value}
            try:
                settings = parse(cls, ConfigDict(fields), "part")
            except ValueError as error:
                message = str(error)
                assert "\n" not in message and len(message) < 1200
                assert message.startswith("config.part") and field.name in message, (field.name, value, message)
                continue
            accepted = getattr(settings, field.name)
            assert all(abs(number) < 2**31 or isinstance(number, float) for number in numbers_in(accepted))
            assert all(map(math.isfinite, numbers_in(accepted)))
            origin = typing.get_origin(hints[field.name]) or hints[field.name]
            assert isinstance(accepted, origin)


def test_fields_are_checked_where_settings_are_made_in_python():
    with pytest.raises(ValueError, match="^steps = '5' must be int$"):
        PretrainSettings(steps="5", batch=2)
    with pytest.raises(ValueError, match="^seed = 10+ must fit in 32 bits"):
        PretrainSettings(steps=5, batch=2, seed=10**30)
