"""Requirement files hold names and versions, and those for later Pythons name the same packages."""

import re
from pathlib import Path

import pytest

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
