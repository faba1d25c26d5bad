"""A disk that fills up, wherever: one clear error, what was finished stays, and with room the same command goes on."""

import contextlib
import json
import resource

import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict
from timing_fields import SPEEDS

from longrope_jax import experiment
from longrope_jax.data import sources, token_files
from longrope_jax.data.corpus import DataSettings
from longrope_jax.data.sources import Texts
from longrope_jax.data.tokenizer import ByteTokenizer
from longrope_jax.evaluation.evaluate import EvaluationSettings, Method
from longrope_jax.experiment.stages import ExportSettings, TableSettings
from longrope_jax.interop.architectures import Rotation
from longrope_jax.interop.factor_files import write_factors
from longrope_jax.model import LlamaConfig
from longrope_jax.rope import FactorTable, linear, load_factors, save_factors, save_table
from longrope_jax.runtime import json_lines, processes
from longrope_jax.search.settings import EvolutionSettings, SearchSettings
from longrope_jax.settings import section
from longrope_jax.training.pretrain import PretrainSettings


@contextlib.contextmanager
def no_file_beyond(size):
    """As a full disk does, but for each file: what would make it larger is refused by the system."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


WRITERS = {
    "factors": lambda path: save_factors(path / "new.json", linear(256, 8.0)),
    "csv": lambda path: save_factors(path / "new.csv", linear(256, 8.0)),
    "table": lambda path: save_table(path / "new.json", FactorTable.of({8: linear(256, 8.0)})),
    "rope_parameters": lambda path: write_factors(
        path / "new.json", Rotation(FactorTable.of({8: linear(256, 8.0)}), 1e4, 8), "huggingface"
    ),
    "whole file": lambda path: processes.write_text(path / "new.json", "x" * 1000),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_file_that_does_not_fit_is_named_and_leaves_nothing(tmp_path, write):
    with no_file_beyond(100), pytest.raises(OSError, match=rf"^{tmp_path}/new\.\w+ can't be written: "):
        write(epath.Path(tmp_path))
    assert list(tmp_path.iterdir()) == []
    write(epath.Path(tmp_path))
    assert len(list(tmp_path.iterdir())) == 1


def test_what_was_there_before_stays(tmp_path):
    path = tmp_path / "factors.json"
    save_factors(path, linear(8, 2.0))
    with no_file_beyond(100), pytest.raises(OSError, match="can't be written"):
        save_factors(path, linear(256, 8.0))
    np.testing.assert_array_equal(load_factors(path).lam, np.full(4, 2))


def test_records_go_on_after_the_last_whole_one(tmp_path):
    path, some = epath.Path(tmp_path / "some.jsonl"), [{"stage": "s", "step": step, "x": "x" * 50} for step in range(9)]
    json_lines.append(path, some[:2])
    with no_file_beyond(path.stat().length + 100), pytest.raises(OSError, match=f"{path} can't be written to"):
        json_lines.append(path, some[2:])
    whole = len(json_lines.read(path))
    assert 2 <= whole < 5 and json_lines.read(path) == some[:whole]
    json_lines.keep(path, lambda record: True)
    json_lines.append(path, some[whole:])
    assert json_lines.read(path) == some


@pytest.mark.parametrize("room", [0, 100, 5000, 20_000])
def test_tokens_that_do_not_fit_are_made_again(tmp_path, capsys, room):  # what is printed is no file meanwhile
    texts = {f"{number}.txt": bytes(range(97, 123)) * 60 for number in range(20)}
    source = Texts(range(20), 20 * 26 * 60, lambda numbers: (list(texts.items())[number] for number in numbers))
    folder = epath.Path(tmp_path / "tokens")
    with (
        no_file_beyond(room),
        pytest.raises(OSError, match=f"{folder}/train-00000-of-00001.array_record can't be writ"),
    ):
        token_files.write_shards(folder, "train", source, ByteTokenizer())
    assert not token_files.is_finished(folder, "train")
    token_files.write_shards(folder, "train", source, ByteTokenizer())
    token_files.finish(folder, "train", source, ByteTokenizer(), {})
    for document in token_files.stored_documents(folder, "train"):
        assert ByteTokenizer().decode(document.tokens[:]).encode() == texts[document.name]


def test_a_dataset_that_does_not_fit_is_named_and_built_with_room(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("the quick brown fox " * 100)
    settings, data_dir = DataSettings(str(tmp_path)), tmp_path / "data"
    with no_file_beyond(300), pytest.raises(OSError, match=f"{data_dir}.* can't be written: "):
        sources.open_source(settings, data_dir)
    assert sum(map(len, sources.open_source(settings, data_dir).values())) == 4


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"Text {number}: " + "the quick brown fox and a dog. " * 8)
    sizes = dict(hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8)
    evolution = EvolutionSettings(population=4, mutations=2, crossovers=1, parents=2, iterations=2)
    stages = {
        "pretrain": PretrainSettings(steps=2, batch=2, checkpoint_every=1, log_every=1),
        "search": SearchSettings(target_length=32, documents=1, evolution=evolution),
        "evaluate": EvaluationSettings(
            lengths=(16, 32), documents=2, methods={"longrope": Method("search")}, controls=()
        ),
        "table": TableSettings((16, 32), ("original", "search")),
        "export": ExportSettings(factors="table", allow_dropping_start_tokens=True),
    }
    sections = {"model": LlamaConfig(vocab_size=258, original_length=16, **sizes), "data": DataSettings(str(folder))}
    return ConfigDict(dict(stages=tuple(stages), **{name: section(s) for name, s in (sections | stages).items()}))


def results(workdir):
    """Everything but what took how long."""
    found = {"report": json.loads((workdir / "report.json").read_text())["perplexity"]}
    for name in ("metrics", "search", "evaluation"):
        lines = [json.loads(line) for line in (workdir / f"{name}.jsonl").read_text().splitlines()]
        found[name] = [{key: value for key, value in line.items() if key not in SPEEDS} for line in lines]
    return found | {"weights": (workdir / "export" / "model.safetensors").read_bytes()}


@pytest.mark.slow
def test_a_run_stops_wherever_the_disk_is_full_and_goes_on_with_room(config, tmp_path, capsys):
    experiment.run(config, tmp_path / "undisturbed")
    workdir, messages = tmp_path / "run", []
    for room in (0, 300, 2000, 5000, 9000, 14_000, 20_000, 28_000, 40_000):
        with no_file_beyond(room), contextlib.suppress(OSError):
            try:
                experiment.run(config, workdir)
            except OSError as error:
                messages.append(str(error))
                raise
    assert len(messages) >= 5
    assert all("\n" not in line and str(tmp_path) in line for line in messages), messages
    experiment.run(config, workdir)
    assert results(workdir) == results(tmp_path / "undisturbed")
