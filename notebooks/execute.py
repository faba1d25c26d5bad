"""Runs notebooks and keeps what they show, in a form that changes only where the results do.

    python notebooks/execute.py notebooks/*.ipynb
    python notebooks/execute.py notebooks/extend_a_model.ipynb --set STEPS=1300 DOCUMENTS=64 --output=runs/longer

The first, which `make notebooks` is, refreshes them in place. `--set` changes lines of the cell that is tagged
"parameters".
"""

import argparse
import base64
import io
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

_SECONDS = 1800  # that a cell may take
_COLORS = 64  # of a picture: a third of the size, and to the eye the same
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: Path, changes: Mapping[str, str]) -> nbformat.NotebookNode:
    """The notebook with the outputs of a fresh kernel, which works in the notebook's folder.

    Args:
        changes: parameter -> what stands right of its equals sign.

    Raises:
        ValueError: there is no such parameter.
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    notebook = nbformat.read(path, as_version=4)
    set_parameters(notebook, changes)
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=_SECONDS, kernel_name="python3", record_timing=False, resources=where).execute()
    return notebook


def set_parameters(notebook: nbformat.NotebookNode, changes: Mapping[str, str]) -> None:
    """Changes lines `NAME = value  # comment` of the cell that is tagged "parameters"."""
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    for name, value in changes.items():
        changed = 0
        for cell in cells:
            # A function, as a value may have backslashes.
            cell.source, count = re.subn(
                rf"^{name} = .*$", lambda _, new=f"{name} = {value}": new, cell.source, flags=re.M
            )
            changed += count
        if changed != 1:
            raise ValueError(f"{name} is set by {changed} lines of the cell of parameters, not by one")


def normalise(notebook: nbformat.NotebookNode) -> None:
    """Drops what differs between runs of the same results, and makes pictures small."""
    notebook.metadata = nbformat.from_dict(_METADATA)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in map(_normal, _merged(cell.outputs)) if output is not None]


def _merged(outputs: Sequence[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Stretches of one stream as one output: how a kernel cuts them is chance."""
    merged: list[nbformat.NotebookNode] = []
    for output in outputs:
        if merged and output.output_type == "stream" and merged[-1].get("name") == output.name:
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


def _normal(output: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    if output.output_type == "stream":
        # A progress bar goes back to the beginning of its line; only what it leaves there in the end is a line.
        lines = [line for line in output.text.split("\n") if "\r" not in line and "\x1b[" not in line]
        output.text = "\n".join(lines).strip("\n") + "\n"
        return output if output.text.strip() else None
    if "image/png" in output.get("data", {}):
        output.data["image/png"] = _small(output.data["image/png"])
        output.metadata.pop("image/png", None)
    return output


def _small(png: str) -> str:
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(_COLORS, dither=Image.Dither.NONE)
    written = io.BytesIO()
    image.save(written, "png", optimize=True)
    return base64.b64encode(written.getvalue()).decode()


def main() -> None:
    """Executes what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, help="a folder for the executed notebooks; without it they are replaced")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other parameters")
    options = parser.parse_args()
    changes = dict(change.split("=", 1) for change in options.set)
    for path in options.notebooks:
        began = time.monotonic()
        notebook = execute(path, changes)
        normalise(notebook)
        target = (options.output or path.parent) / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, target)
        print(f"{target}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
