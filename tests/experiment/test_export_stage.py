"""The stage `export` and its command line: what they write, refuse, measure and tell."""

import json

import numpy as np
import pytest
from interop.test_export import assert_same_table
from interop.test_pretrained import assert_same
from ml_collections import ConfigDict

import longrope_jax as lr
from longrope_jax import experiment
from longrope_jax.commands import export
from longrope_jax.data.corpus import DataSettings
from longrope_jax.data.tokenizer import ByteTokenizer
from longrope_jax.evaluation.evaluate import EvaluationSettings, Method
from longrope_jax.experiment.stages import ExportSettings, LoadSettings, TableSettings
from longrope_jax.experiment.stages.export import EXPORT
from longrope_jax.interop.export import UnsupportedByFormat, export_checkpoint
from longrope_jax.rope import load_table, save_table
from longrope_jax.runtime.mesh import MeshSettings
from longrope_jax.search.settings import SearchSettings
from longrope_jax.settings import section
from longrope_jax.training.pretrain import PretrainSettings
from longrope_jax.training.step import init_params

MODEL = lr.LlamaConfig(258, 16, 20, 2, 4, 2, 8, 32)
L, TARGET = 32, 128


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "model"
    table = lr.FactorTable.of({L: lr.rope.unscaled(8)})
    export_checkpoint(folder, MODEL, init_params(lr.Llama(MODEL), 0), table, ByteTokenizer(), "")
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for k in range(24):
        (folder / f"{k}.txt").write_text(f"Text {k}: " + "the quick brown fox, and a lazy dog. " * 12)
    return folder


def config_of(checkpoint, text, table, **export):
    methods = {"unscaled": Method("unscaled"), "longrope": Method("table")}
    sections = dict(
        load=LoadSettings(path=str(checkpoint)),
        table=table,
        evaluate=EvaluationSettings(lengths=(L, TARGET), documents=2, methods=methods),
        export=ExportSettings(**{"factors": "table", "cost_documents": 2, **export}),
        data=DataSettings(folder=str(text)),
    )
    stages = tuple(name for name in sections if name != "data")
    return ConfigDict(dict(stages=stages, **{name: section(settings) for name, settings in sections.items()}))


def test_an_experiment_ends_with_a_folder_that_holds_its_model_and_factors(checkpoint, text, tmp_path):
    config = config_of(checkpoint, text, TableSettings(lengths=(L, TARGET), factors=("load", "linear")))
    experiment.run(config, tmp_path)
    found = lr.load_pretrained(tmp_path / "export")
    assert found.config == MODEL and found.tokenizer.bos == 256
    assert_same(found.params, lr.load_pretrained(checkpoint).params)
    assert_same_table(found.factors, load_table(tmp_path / "factors" / "table.json"))
    card = (tmp_path / "export" / "README.md").read_text()
    assert "# 32 to 128 tokens" in card and "Nothing was dropped: the factors above" in card
    assert "* **load**: path = model" in card and "* **table**: lengths = [32, 128]" in card
    perplexity = json.loads((tmp_path / "report.json").read_text())["perplexity"]
    assert f"{perplexity['128']['longrope']['ppl']:.2f}" in card and "longrope (this model)" in card
    assert "## Export: export" in (tmp_path / "report.md").read_text()
    # Finished, it is not made again; gone, it is.
    (tmp_path / "export" / "README.md").write_text("touched")
    experiment.run(config, tmp_path)
    assert (tmp_path / "export" / "README.md").read_text() == "touched"
    (tmp_path / "export" / "model.safetensors").unlink()
    experiment.run(config, tmp_path)
    assert (tmp_path / "export" / "README.md").read_text() == card


def test_what_was_found_stops_the_export_until_it_may_be_dropped_and_then_its_cost_is_reported(
    checkpoint, text, tmp_path, caplog
):
    table = TableSettings(lengths=(L, TARGET), factors=("load", "linear"))
    before = config_of(checkpoint, text, table)
    before.stages = ("load", "table", "evaluate")
    del before["export"]
    experiment.run(before, tmp_path)
    # As if a search had found start tokens.
    path = tmp_path / "factors" / "table.json"
    found = load_table(path)
    save_table(path, lr.FactorTable.of({L: found.select(L), TARGET: found.select(TARGET).replace(n_hat=np.int32(8))}))
    with pytest.raises(UnsupportedByFormat, match=r"start tokens \(n_hat = 0, 8\).*allow_dropping_start_tokens"):
        experiment.run(config_of(checkpoint, text, table), tmp_path)
    experiment.run(config_of(checkpoint, text, table, allow_dropping_start_tokens=True), tmp_path)
    assert_same_table(lr.load_pretrained(tmp_path / "export").factors, found)
    (cost,) = json.loads((tmp_path / "report.json").read_text())["exports"]["export"]["costs"]
    assert cost["length"] == TARGET and cost["found"]["ppl"] != cost["others"]["ppl"]
    perplexity = f"{cost['found']['ppl']:.4f}"
    card, report = ((tmp_path / name).read_text() for name in ("export/README.md", "report.md"))
    assert perplexity in card and "Dropped, as allowed: start tokens (n_hat = 0, 8)" in card
    assert perplexity in report and "before anything was dropped" in card
    assert f"dropped start tokens (n_hat = 0, 8); perplexity {perplexity} becomes" in caplog.text


def test_what_stops_an_export_can_be_mended_in_the_same_work_directory(checkpoint, text, tmp_path):
    table = TableSettings(lengths=(L, 2 * L, 2048), factors=("load", "linear", "linear"))
    config = config_of(checkpoint, text, table, allow_dropping_lengths=True, cost_documents=40)
    del config["evaluate"]
    config.stages = ("load", "table", "export")
    config.table.lengths = (L, 1024, 2048)
    with pytest.raises(UnsupportedByFormat, match="none of .* documents has the 1025 tokens .* shorter cost_lengths"):
        experiment.run(config, tmp_path)
    config.export.cost_lengths = (128,)
    experiment.run(config, tmp_path)
    (cost,) = json.loads((tmp_path / "report.json").read_text())["exports"]["export"]["costs"]
    assert cost["length"] == 128


def test_without_factors_all_that_the_model_came_with_goes_on(checkpoint, text, tmp_path):
    table = lr.FactorTable.of({L: lr.rope.unscaled(8), TARGET: lr.rope.linear(8, 4.0)})
    export_checkpoint(tmp_path / "model", MODEL, init_params(lr.Llama(MODEL), 0), table, ByteTokenizer(), "")
    config = config_of(tmp_path / "model", text, TableSettings(lengths=(L,), factors=("load",)), factors="")
    config.stages = ("load", "export")
    for name in ("table", "evaluate"):
        del config[name]
    config.mesh = section(MeshSettings(axes="fsdp:2,tensor:2"))
    experiment.run(config, tmp_path / "run")
    found = lr.load_pretrained(tmp_path / "run" / "export")
    assert_same_table(found.factors, table)
    assert_same(found.params, lr.load_pretrained(tmp_path / "model").params)


def test_more_than_two_lengths_are_refused_at_once_and_measured_where_they_are_lost(checkpoint, text, tmp_path):
    table = TableSettings(lengths=(L, 2 * L, TARGET), factors=("load", "linear", "linear"))
    with pytest.raises(ValueError, match="config.export: factors = 'table' has the lengths 32, 64, 128"):
        experiment.parse_experiment(config_of(checkpoint, text, table))
    experiment.run(config_of(checkpoint, text, table, allow_dropping_lengths=True, dtype="bfloat16"), tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())["exports"]["export"]
    assert [cost["length"] for cost in content["costs"]] == [2 * L] and content["lengths"] == [L, TARGET]
    assert lr.interop.describe_pretrained(tmp_path / "export")[1].boundaries.tolist() == [L, TARGET]


BEFORE = {
    "pretrain": PretrainSettings(steps=1, batch=1),
    "search": SearchSettings(target_length=TARGET),
    "table": TableSettings(lengths=(L, TARGET), factors=("original", "search")),
    "short": TableSettings(lengths=(L // 2,), factors=("original",)),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factors": "yarn"}, "factors = 'yarn' must be a stage; a table stage makes one of a method"),
        ({"factors": "nothing"}, "factors = 'nothing' is neither a search"),
        ({"model": "search"}, "model = 'search' is no stage before"),
        ({"factors": "short"}, "factors = 'short' end at 16 tokens, below the original length, 32"),
        ({"architecture": "Phi3ForCausalLM"}, "needs num_heads"),
        ({"cost_lengths": (4 * TARGET,)}, r"cost_lengths = \(512,\) goes beyond 128, where table ends"),
        ({"cost_lengths": (0,)}, r"cost_lengths = \(0,\) must be positive"),
        ({"cost_documents": 1}, "cost_documents = 1 must be at least 2"),
        ({"dtype": "float16"}, "dtype = 'float16' must be one of float32, bfloat16, ''"),
    ],
)
def test_bad_settings_are_reported_before_anything_starts(changes, message):
    with pytest.raises(ValueError, match=message):
        EXPORT.check(ExportSettings(**{"factors": "table", **changes}), MODEL, BEFORE)


def test_a_search_that_may_find_start_tokens_is_warned_of(caplog):
    EXPORT.check(ExportSettings(factors="table", allow_dropping_start_tokens=True), MODEL, BEFORE)
    without = {**BEFORE, "search": SearchSettings(target_length=TARGET, n_hat=(0,))}
    EXPORT.check(ExportSettings(factors="table"), MODEL, without)
    assert not caplog.text
    EXPORT.check(ExportSettings(factors="search"), MODEL, BEFORE)
    assert "search may find start tokens" in caplog.text


def run(checkpoint, output, *arguments):
    export.main(["export", f"--model={checkpoint}", f"--output={output}", *map(str, arguments)])


@pytest.fixture
def factors(tmp_path):
    table = lr.FactorTable.of({L: lr.rope.unscaled(8), TARGET: lr.rope.linear(8, 4.0).replace(n_hat=np.int32(8))})
    save_table(tmp_path / "table.json", table)
    return f"--factors={tmp_path / 'table.json'}"


def test_the_command_line_exports_a_model_with_other_factors(checkpoint, text, factors, tmp_path, capsys):
    texts = [text / "1.txt", text / "2.txt"]
    run(checkpoint, tmp_path / "new", factors, "--allow_dropping_start_tokens", "--cost_documents=2", "--text", *texts)
    shown = capsys.readouterr().out
    assert shown.startswith("| tokens | perplexity, original |") and shown.strip().endswith(str(tmp_path / "new"))
    found = lr.load_pretrained(tmp_path / "new")
    assert_same(found.params, lr.load_pretrained(checkpoint).params)
    np.testing.assert_array_equal(found.factors.select(TARGET).lam, 4)
    card = (tmp_path / "new" / "README.md").read_text()
    assert "on 1.txt, 2.txt" in card and "* **factors**: path = table.json" in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "allow_dropping_start_tokens"),
        (["--allow_dropping_start_tokens"], "has to be measured: give --text"),
        (["--allow_dropping_start_tokens", "--text", "/nowhere.txt"], "/nowhere.txt"),
        (["--allow_dropping_start_tokens", "--cost_lengths", "4096", "--text", "1.txt"], "tokens from 1 to 128"),
        (["--allow_dropping_start_tokens", "--cost_lengths", "0", "--text", "1.txt"], "'0' must be a positive"),
        (["--allow_dropping_start_tokens", "--cost_documents=-1"], "'-1' must be a positive"),
        (["--allow_dropping_start_tokens", "--text", "1.txt", "./1.txt"], "intervals need two documents"),
        (["--target_length=64"], "this file has its own"),
        (["--arch=Phi3ForCausalLM"], "unrecognized arguments: --arch"),
        (["--architecture=Phi3ForCausalLM"], "needs num_heads"),
        (["--factors=/nowhere"], "'/nowhere' do not exist"),
        (["--output=/nowhere/new"], "its parent directory does not exist"),
        (["--output={full}"], "must be a new folder"),
        (["--output="], "output = '' must be a new folder"),
    ],
)
def test_what_can_t_be_exported_is_one_line_and_leaves_nothing(
    checkpoint, text, factors, tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.chdir(text)
    arguments = [argument.format(full=checkpoint) for argument in arguments]
    with pytest.raises(SystemExit) as stopped:
        run(checkpoint, tmp_path / "new", factors, *arguments)
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and message in error and error.count("\n") == 0
    assert not (tmp_path / "new").exists()
