"""The notebooks at a small setting, and what is committed of them."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import fast_compilation
import nbformat
import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SMALL = {
    "explore_factors": {"STEPS": 2, "DOCUMENTS": 1},
    "extend_a_model": {"STEPS": 2, "CANDIDATES": 4, "ITERATIONS": 1, "DOCUMENTS": 2, "LENGTHS": (128, 1024)},
    "needles_and_lengths": {"STEPS": 2, "DOCUMENTS": 2, "TRIES": 1, "LENGTHS": (128,), "DEPTHS": (0.5,)},
}
MOST_LINES = 5  # of a function that a notebook defines


@pytest.fixture(scope="module")
def execute():
    spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("text")


def run(path, output, **changes):
    line = [sys.executable, FOLDER / "execute.py", path, f"--output={output}", "--set"]
    line += [f"{name}={value}" for name, value in changes.items()]
    return subprocess.run(line, env=fast_compilation.environment(devices=1), capture_output=True, text=True)


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def pictures(path):
    return sum("image/png" in output.get("data", {}) for cell in code_cells(path) for output in cell.outputs)


def texts(cell):
    """Everything in a cell's outputs that is to be read."""
    for output in cell.outputs:
        yield output.get("text", "")
        yield from (part for kind, part in output.get("data", {}).items() if kind.startswith("text/"))


def test_every_notebook_has_a_small_setting():
    assert [path.stem for path in NOTEBOOKS] == sorted(SMALL)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_at_a_small_setting(path, workdir, tmp_path):
    done = run(path, tmp_path, WORKDIR=repr(str(workdir)), **SMALL[path.stem])
    assert not done.returncode, done.stderr[-3000:]
    assert pictures(tmp_path / path.name) >= 4


def test_a_cell_that_raises_fails_and_leaves_nothing(tmp_path):
    cells = [nbformat.v4.new_code_cell("NUMBER = 1", metadata={"tags": ["parameters"]})]
    cells.append(nbformat.v4.new_code_cell("assert NUMBER == 2, 'not two'"))
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "one.ipynb")
    done = run(tmp_path / "one.ipynb", tmp_path / "out")
    assert done.returncode and "not two" in done.stderr
    assert not (tmp_path / "out").exists()
    assert not run(tmp_path / "one.ipynb", tmp_path / "out", NUMBER=2).returncode
    assert code_cells(tmp_path / "out" / "one.ipynb")[0].source == "NUMBER = 2"


def test_a_parameter_that_is_not_there_is_refused(execute):
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    with pytest.raises(ValueError, match="STEP is set by 0 lines"):
        execute.set_parameters(notebook, {"STEP": "3"})


def test_normalising_keeps_what_was_said_and_drops_progress(execute):
    cell = nbformat.v4.new_code_cell("work()")
    bar = "\rpretrain: 10%|#   |\rpretrain: 100%|####|\n"
    said = [("stdout", "one\n"), ("stdout", "two\n"), ("stderr", bar), ("stderr", f"warning\n{bar}"), ("stderr", bar)]
    cell.outputs = [nbformat.v4.new_output("stream", name=name, text=text) for name, text in said]
    notebook = nbformat.v4.new_notebook(
        cells=[cell], metadata={"language_info": {"name": "python", "version": "3.9.1"}}
    )
    execute.normalise(notebook)
    assert [(o.name, o.text) for o in cell.outputs] == [("stdout", "one\ntwo\n"), ("stderr", "warning\n")]
    assert "version" not in notebook.metadata.language_info


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_is_whole_small_and_tells_of_no_machine(path):
    assert path.stat().st_size < 400_000
    assert pictures(path) >= 4
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert not [o for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"]
        for text in [cell.source, *texts(cell)]:
            assert not re.search(r"/(home|root|tmp|Users|work|usr|opt)/|0x[0-9a-f]{6}", text), text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_longer_than_a_few_lines_is_in_the_library(path):
    for cell in code_cells(path):
        source = "\n".join(line for line in cell.source.split("\n") if not line.startswith("%"))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                assert node.end_lineno - node.lineno < MOST_LINES, node.name
