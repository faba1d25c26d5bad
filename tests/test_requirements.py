"""Requirement files hold names and versions, and those for later Pythons name the same packages."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import longrope_jax

ROOT = Path(__file__).parent.parent
FILES = sorted(path.name for path in ROOT.glob("requirements*.txt"))


def lines(name):
    return [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("name", FILES)
def test_every_requirement_is_pinned(name):
    for line in lines(name):
        assert re.fullmatch(r"-r requirements[a-z-]*\.txt|[\w-]+(\[[\w,-]+\])?==[\w.]+", line), line


def test_later_pythons_get_the_same_packages():
    names = [
        {line.split("==")[0] for line in lines(name) if "==" in line}
        for name in ("requirements.txt", "requirements-newest.txt")
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize("name", FILES)
def test_pins_lie_in_the_ranges_of_the_package(name):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = [Requirement(line) for group in project["optional-dependencies"].values() for line in group]
    ranges = {requirement.name: requirement for requirement in [*ranges, *map(Requirement, project["dependencies"])]}
    pins = [Requirement(line) for line in lines(name) if "==" in line]
    for pin in pins:
        (version,) = (specifier.version for specifier in pin.specifier)
        assert pin.name not in ranges or ranges[pin.name].specifier.contains(version), pin
    if name in ("requirements.txt", "requirements-newest.txt"):
        assert {Requirement(line).name for line in project["dependencies"]} == {pin.name for pin in pins}


def test_the_citation_has_the_version():
    assert f"version: {longrope_jax.__version__}" in (ROOT / "CITATION.cff").read_text()
