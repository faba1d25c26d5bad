"""What an experiment refuses before any work, in one line."""

import subprocess
import sys

import command_line
import pytest
from tiny_experiment import ROOT, change, forbid_work

from longrope_jax import experiment

REFUSED = {
    "unknown field": ("search.taget_length", 64, "config.search.taget_length.*did you mean target_length"),
    "unknown section": ("serach", {}, "config.serach"),
    "unknown stage": ("stages", ("pretrain", "polish"), "polish.*pretrain, search, finetune, table, evaluate"),
    "stage twice": ("stages", ("pretrain", "search", "search"), "twice"),
    "no model first": ("stages", ("search", "evaluate"), "can't come first"),
    "wrong type": ("pretrain.steps", "many", "config.pretrain.steps = 'many' must be int"),
    "no room for factors": ("search.upper_bound", 0.2, "config.search: need 1 <= low < high for lam, not .*0.8"),
    "below the original": ("search.target_length", 8, "target_length = 8 must not be below.*original_length = 16"),
    "unknown model": ("search.model", "finetune", "config.search: model = 'finetune' is no stage .* are pretrain"),
    "batch too large": ("pretrain.batch", 10_000, "config.pretrain: .*fewer than a batch of 10000"),
    "share above 1": ("pretrain.needle_share", 1.5, r"config.pretrain: needle_share = 1.5 must lie in \[0, 1\]"),
    "no room for needles": (
        "pretrain.needle_share",
        0.5,
        "config.pretrain: length = 16 tokens is too short for needles",
    ),
    "small vocabulary": ("model.vocab_size", 100, "vocab_size = 100 is below"),
    "unknown factors": (
        "evaluate.methods.yarn.factors",
        "yern",
        "config.evaluate: methods.yarn.factors = 'yern' is neither",
    ),
    "endless factors": (
        "evaluate.methods.yarn.factors",
        "yern" * 1000,
        "config.evaluate: methods.yarn.factors = 'yernyern",
    ),
    "unknown model of a method": (
        "evaluate.methods.yarn.model",
        "search",
        "config.evaluate: methods.yarn.model = 'search' is",
    ),
    "control that is no method": ("evaluate.controls", ("original",), "config.evaluate: controls = .* must be methods"),
    "no methods": ("evaluate.methods", {}, "config.evaluate: methods is empty"),
    "mesh without devices": ("mesh", {"axes": "data:16"}, "config.mesh: axes = 'data:16' needs 16 devices"),
    "batch not for the mesh": ("mesh", {"axes": "data:8"}, "config.pretrain: batch / accumulate = 4 sequences can't"),
    "model not for the mesh": ("mesh", {"axes": "tensor:2"}, "config.mesh: .*num_heads = 1 is not a multiple"),
    "profile of no stage": (
        "profile",
        {"steps": (1, 3), "stage": "serach"},
        "config.profile: stage = 'serach' must be",
    ),
    "profile of one step": ("profile", {"steps": (3,)}, r"config.profile: steps = \(3,\) must be \(first, one after"),
    "odd head": ("model.head_dim", 7, "config.model: head_dim = 7"),
    "missing folder": ("data.folder", "/nonexistent", "'/nonexistent' is not a directory"),
}


@pytest.mark.parametrize(("path", "value", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_configs_are_refused_in_one_line_before_any_work(config, tmp_path, monkeypatch, path, value, message):
    forbid_work(monkeypatch)
    with pytest.raises(ValueError, match=message) as caught:
        experiment.run(change(config, path, value), tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 2000
    assert not (tmp_path / "config.json").exists()  # the mended config may use the directory


def test_lengths_beyond_all_documents_are_refused_before_any_work(config, tmp_path):
    config = change(change(config, "search.target_length", 100_000), "evaluate.lengths", (16, 100_000))
    with pytest.raises(
        ValueError, match="config.search: objective.perplexity: none of .* documents has the 112501 tokens"
    ):
        experiment.prepare(config, tmp_path)


def test_a_split_without_documents_is_refused_before_any_work(config, folder, tmp_path, monkeypatch):
    forbid_work(monkeypatch)
    with pytest.raises(ValueError, match=r"^config.data: no document is for search, which search would read; shares"):
        experiment.run(change(config, "data.shares", (0.5, 0.0, 0.5, 0.0)), tmp_path)


REFERENCES = {
    "model": ("finetune_a.model", "finetune_b", "finetune_a: model = 'finetune_b' is no stage before .* are pretrain"),
    "model that comes later": ("search_4x.model", "finetune_a", "search_4x: model = 'finetune_a' is no stage before"),
    "model of a table": ("table.model", "search_4x", "table: model = 'search_4x' is no stage .* pretrain, finetune_a"),
    "factors": (
        "finetune_a.factors",
        "search_8x",
        "finetune_a: factors = .search_8x. is neither a search, table or load",
    ),
    "factors too short": ("finetune_a.length", 128, "finetune_a: length = 128 is beyond 64, up to which search_4x"),
    "table beyond": ("table.factors", ("search_1x", "search_4x", "search_4x"), "table: .*search_4x is good up to 64"),
    "table of unknown": ("table.factors", ("yern", "yarn", "yarn"), "table: factors = 'yern' is neither"),
    "method beyond its table": ("evaluate.lengths", (16, 256), "evaluate: lengths = .* must end at 128, where methods"),
    "method factors": (
        "evaluate.methods.second.factors",
        "finetune_a",
        "evaluate: methods.second.factors = 'finetune_a' is ne",
    ),
    "method model": ("evaluate.methods.second.model", "table", "evaluate: methods.second.model = 'table' is no stage"),
    "control": ("evaluate.controls", ("unscaled",), "evaluate: controls = .'unscaled',. must be methods"),
    "length below L": ("finetune_a.length", 8, "finetune_a: length = 8 is below the original length, 16"),
}


@pytest.mark.parametrize(("path", "value", "message"), REFERENCES.values(), ids=REFERENCES)
def test_references_between_stages_are_checked(progressive_config, path, value, message):
    with pytest.raises(ValueError, match=f"^config.{message}") as caught:
        experiment.parse_experiment(change(progressive_config, path, value))
    assert "\n" not in str(caught.value)


def run_quickstart(workdir, *overrides):
    return command_line.run(f"--config={ROOT / 'experiments' / 'quickstart.py'}", f"--workdir={workdir}", *overrides)


BAD_COMMANDS = {
    "unknown flag of the config": ["--config.search.taget_length=2048"],
    "bad value": ["--config.search.target_length=100"],
    "missing folder": ["--config.data.folder=/nonexistent"],
}


@pytest.mark.parametrize("overrides", BAD_COMMANDS.values(), ids=BAD_COMMANDS)
def test_the_command_line_answers_bad_input_with_one_line(tmp_path, overrides):
    done = run_quickstart(tmp_path / "run", *overrides)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_an_unwritable_work_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = run_quickstart(tmp_path / "file" / "run")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and "file/run" in done.stderr


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def get_config():\n    return 1 / 0\n", "line 2: ZeroDivisionError: division by zero"),
        ("def get_config():\n    return [\n", "line 2: SyntaxError: '[' was never closed"),
        (
            "import longrope_jax as lr\n\ndef get_config():\n    return lr.TableSettings((2, 1), ())\n",
            "line 4: ValueError: lengths = (2, 1) must be rising numbers of tokens",
        ),
    ],
    ids=["in code", "of syntax", "of settings"],
)
def test_an_error_in_a_config_file_is_one_line_with_its_place(tmp_path, source, message):
    file = tmp_path / "mine.py"
    file.write_text(source)
    done = command_line.run(f"--config={file}", f"--workdir={tmp_path / 'run'}")
    assert (done.returncode, done.stderr) == (2, f"error: {file}, {message}\n")


@pytest.mark.parametrize("start", [("-m", "longrope_jax.main"), ("-c", "from longrope_jax.main import cli; cli()")])
def test_help_is_no_error(start):
    """Of the module, and of the console command."""
    done = subprocess.run([sys.executable, *start, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "--max_new_tokens" in done.stdout and not done.stderr
