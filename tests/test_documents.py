"""README and docs: the files, targets and modules that they name exist, and their code runs."""

import re
import subprocess
import sys
from pathlib import Path

import fast_compilation
import pytest

import longrope_jax
import longrope_jax.rope

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    + [path for path in (ROOT / "docs").rglob("*.md") if "generated" not in path.parts]  # by Sphinx, or not yet
    + [ROOT / "experiments/cloud_tpu/README.md"]
)
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "longrope_jax").rglob("*.py")
}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Paths that a run creates or a reader chooses.
EXTERNAL = re.compile(
    r"^(runs|path|to|DIR|WORKDIR|export|stages|data|tokens|checkpoints|profile|factors|figures|tensorboard|refinements|"
    r"compilation_cache|docs/_build|docs/api/generated|roles)/|^~|^/|[<>*{]|://|^\.venv"
)
FILE = re.compile(r"^[\w.-]+(/[\w.-]+)*/?$")


def prose(path: Path) -> str:
    """The text without code blocks."""
    return re.sub(r"^(    |\t).*$", "", FENCED.sub("", path.read_text()), flags=re.MULTILINE)


def code(path: Path) -> str:
    """Only the code blocks."""
    text = path.read_text()
    return "\n".join([block for _, block in FENCED.findall(text)] + re.findall(r"^    .*$", text, re.MULTILINE))


def anchors(path: Path) -> set[str]:
    """Anchors of the headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def is_there(name: str, document: Path) -> bool:
    """Whether a path exists, relative to the root, the document, or the package."""
    return any((base / name).exists() for base in (ROOT, document.parent, ROOT / "longrope_jax"))


@pytest.fixture(params=DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def document(request):
    return request.param


def test_links_lead_somewhere(document):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if "://" in link or link.startswith("mailto:"):
            continue
        file, _, anchor = link.partition("#")
        target = (document.parent / file).resolve() if file else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_the_figures_of_the_readme_are_those_of_the_results():
    """Each line of "What to expect" links to its page, which has every number of the line."""
    section = (ROOT / "README.md").read_text().split("## What to expect\n")[1].split("\n## ")[0]
    lines = section.split("\n* ")[1:]
    assert len(lines) >= 5
    for line in lines:
        (page,) = re.findall(r"\]\((docs/results/\w+\.md)\)", line)
        text = (ROOT / page).read_text()
        figures = re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\w-])", re.sub(r"\]\([^)]*\)", "", line))
        missing = [figure for figure in figures if not re.search(rf"(?<![\d.]){re.escape(figure)}(?!\.?\d)", text)]
        assert not missing, line


def test_files_that_are_named_exist(document):
    named = [name for name in re.findall(r"(?<![`}])`([^`\n]+)`", prose(document)) if FILE.match(name)]
    paths = [name for name in named if re.search(r"/|\.(py|md|toml|txt|sh|yaml|cff|ipynb)$", name)]
    paths += re.findall(r"(?<![\w/.])((?:experiments|tests|docs|notebooks)/[\w./-]+\.\w+)", code(document))
    paths += re.findall(r"\b(requirements[\w-]*\.txt)", document.read_text())
    missing = {name for name in paths if not EXTERNAL.search(name) and not is_there(name, document)}
    made = {"report.md", "report.json", "compile_report.md", "README.md", "run.log"}
    assert not missing - made


def test_targets_of_make_that_are_named_exist(document):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = document.read_text()
    named = set(re.findall(r"`make ([\w-]+)", text)) | set(re.findall(r"^    make ([\w-]+)", text, re.MULTILINE))
    assert named <= targets


def test_modules_that_are_named_exist(document):
    run = set(re.findall(r"python -m (longrope_jax[\w.]*)", document.read_text()))
    imported = set(re.findall(r"^from (longrope_jax[\w.]*) import", code(document), re.MULTILINE))
    assert run | imported <= MODULES


def test_references_are_spelled_out(document):
    """Sphinx checks only references that start with the package's name."""
    assert all(name.startswith("longrope_jax") for name in re.findall(r"\{py:\w+\}`([^`]+)`", document.read_text()))


def test_short_names_are_in_the_api():
    """The names of the package and of rope, which people import from."""
    index = (ROOT / "docs/api/index.md").read_text()
    assert not {name for name in longrope_jax.__all__ if f"| `lr.{name}` |" not in index}
    assert not {name for name in longrope_jax.rope.__all__ if not re.search(rf"`longrope_jax(\.\w+)*\.{name}`", index)}


def test_every_short_name_is_there():
    assert all(hasattr(longrope_jax, name) for name in longrope_jax.__all__)


def test_configs_and_notebooks_need_one_import():
    """`search_comparison.py`, `needle_tiny.py` and `skipped_positions.py` are scripts too, which look inside."""
    configs = [path for path in (ROOT / "experiments").glob("*.py") if "def get_config" in path.read_text()]
    texts = {path.name: path.read_text() for path in [*configs, *(ROOT / "notebooks").glob("*.ipynb")]}
    deeper = {name for name, text in texts.items() if re.search(r"from longrope_jax|import longrope_jax\.", text)}
    assert len(texts) > 10 and deeper <= {"search_comparison.py", "needle_tiny.py", "skipped_positions.py"}


def test_configs_that_are_named_are_configs():
    from longrope_jax.experiment import parse_experiment

    text = "".join(path.read_text() for path in DOCUMENTS)
    configs = set(re.findall(r"--config=(experiments/\w+\.py)", text)) | set(
        re.findall(r"^\| `(experiments/\w+\.py)`", text, re.MULTILINE)
    )
    assert len(configs) >= 6
    for config in configs:
        scope = {"__name__": config}
        exec(compile((ROOT / config).read_text(), config, "exec"), scope)
        parse_experiment(scope["get_config"]())


@pytest.mark.parametrize(
    ("page", "blocks", "made"),
    [("docs/extending.md", None, ("found.json", "work_directory/report.md")), ("README.md", 1, ("factors.json",))],
)
def test_code_runs(page, blocks, made, tmp_path):
    """All blocks of the page, or only the first ones, because the others need a reader's files."""
    found = [block for language, block in FENCED.findall((ROOT / page).read_text()) if language == "python"]
    (tmp_path / "page.py").write_text("\n".join(found[:blocks]))
    environment = fast_compilation.environment(devices=1) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all((tmp_path / name).exists() for name in made)
