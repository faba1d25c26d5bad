"""From a model of somebody else to a longer one: load, search, judge, retrieve, and write text with it."""

import json
import shutil
from pathlib import Path

import command_line
import jax
import numpy as np
import pytest
import reference
import tokenizers
from interop.test_pretrained import CONFIG, to_huggingface, write
from ml_collections import ConfigDict
from tokenizers import decoders, pre_tokenizers

import longrope_jax as lr
from longrope_jax import experiment
from longrope_jax.commands import generate
from longrope_jax.data.corpus import DataSettings
from longrope_jax.evaluation.evaluate import EvaluationSettings, Method
from longrope_jax.evaluation.retrieval import RetrievalSettings
from longrope_jax.experiment.stages import LoadSettings, TableSettings
from longrope_jax.model.config import PRESETS
from longrope_jax.model.decode import Sampling, complete
from longrope_jax.runtime.mesh import MeshSettings
from longrope_jax.search.settings import EvolutionSettings, SearchSettings
from longrope_jax.settings import section
from longrope_jax.training.step import init_params

L, TARGET = 64, 512
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model that reads bytes, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    config = {**CONFIG, "vocab_size": len(vocab), "bos_token_id": 0, "eos_token_id": 1}
    model = lr.LlamaConfig(len(vocab), 16, 20, 3, 4, 2, 8, L)
    write(folder, config, to_huggingface(jax.tree.map(np.asarray, init_params(lr.Llama(model), 0))))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for k in range(24):
        (folder / f"{k}.txt").write_text(f"Text {k}: " + "the quick brown fox, and a lazy dog. " * 30)
    return folder


@pytest.fixture(scope="module")
def config(checkpoint, text):
    methods = {"unscaled": Method("unscaled"), "as_loaded": Method("table"), "longrope": Method("search")}
    sections = dict(
        load=LoadSettings(path=str(checkpoint)),
        search=SearchSettings(
            target_length=TARGET,
            documents=1,
            evolution=EvolutionSettings(population=6, mutations=2, crossovers=2, parents=3, iterations=1),
        ),
        table=TableSettings(lengths=(L, TARGET), factors=("load", "search")),
        evaluate=EvaluationSettings(lengths=(L, TARGET), documents=2, methods=methods),
        retrieval=RetrievalSettings(
            lengths=(TARGET,), methods={"longrope": Method("table")}, tries=2, prompts_at_once=2
        ),
        data=DataSettings(folder=str(text)),
    )
    stages = tuple(name for name in sections if name != "data")
    return ConfigDict(dict(stages=stages, **{name: section(settings) for name, settings in sections.items()}))


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("workdir")
    experiment.run(config, path)
    return path


def test_a_loaded_model_goes_through_all_stages(workdir, checkpoint):
    content = json.loads((workdir / "report.json").read_text())
    assert set(content["perplexity"][str(TARGET)]) == {"unscaled", "as_loaded", "longrope"}
    entry = content["retrieval"]["retrieval"]["accuracy"]["longrope"][str(TARGET)]
    assert entry["tries"] == 2 and 0 <= entry["hits"] <= 2
    report = (workdir / "report.md").read_text()
    assert "## Retrieval: retrieval, passkey" in report and (workdir / "figures" / "retrieval.png").exists()
    # The table's short entry is what the model came with, so at L nothing has changed.
    assert content["perplexity"][str(L)]["as_loaded"] == content["perplexity"][str(L)]["unscaled"]
    summary = json.loads((workdir / "stages" / "load.json").read_text())
    assert summary["files"] == {"model.safetensors": (checkpoint / "model.safetensors").stat().st_size}


def test_it_is_not_done_twice(config, workdir):
    before = (workdir / "retrieval.jsonl").read_text(), (workdir / "search.jsonl").read_text()
    experiment.run(config, workdir)
    assert before == ((workdir / "retrieval.jsonl").read_text(), (workdir / "search.jsonl").read_text())


def test_windows_begin_with_bos_where_the_config_or_the_tokenizer_says_so(config, checkpoint, workdir, tmp_path):
    changed = ConfigDict(config.to_dict())
    changed.stages, changed.load.bos, changed.search.held_out_documents = ("load", "search", "evaluate"), "windows", 2
    changed.evaluate.methods = {"unscaled": {"factors": "unscaled", "model": ""}}
    for name in ("table", "retrieval"):
        del changed[name]
    experiment.run(changed, tmp_path / "asked")
    settings = experiment.parse_experiment(changed).stages
    texts = experiment.prepare(changed, tmp_path / "asked")[1].documents["data"]
    model, params, tokenizer, _ = lr.load_pretrained(checkpoint)
    assert tokenizer.window_bos is None  # and so it was not by itself
    records = [json.loads(line) for line in (tmp_path / "asked" / "evaluation.jsonl").read_text().splitlines()]
    windows = lr.fixed_windows(texts["evaluation"], settings["evaluate"].window(TARGET), 2, seed=0).tokens
    for record, length in zip(records, (L, TARGET), strict=True):
        cut = [row[start : start + length + 1] for row in windows for start in range(0, TARGET, length)]
        inputs = np.array([[0, *piece[1:-1]] for piece in cut])
        logits = lr.Llama(model).apply({"params": params}, inputs, lr.rope.unscaled(8))
        nll = reference.token_nll(logits, np.array([piece[1:] for piece in cut]))
        np.testing.assert_allclose(record["nll_sums"], nll.reshape(2, -1).sum(1), rtol=1e-5)
        assert record["counts"] == [TARGET, TARGET]
    lines = ((path / "search.jsonl").read_text().splitlines() for path in (tmp_path / "asked", workdir))
    with_bos, without = ([json.loads(line)["nll"] for line in found] for found in lines)
    assert not np.isclose(with_bos[:3], without[:3]).any()  # the seeds
    # A tokenizer may say so itself, and the config may refuse.
    adding = Path(changed_checkpoint(checkpoint, tmp_path / "adding"))
    names = json.loads((adding / "tokenizer_config.json").read_text())
    (adding / "tokenizer_config.json").write_text(json.dumps(names | {"add_bos_token": True}))
    changed.load.path = str(adding)
    for bos, wanted in {"auto": 0, "documents": None}.items():
        changed.load.bos = bos
        assert experiment.prepare(changed, tmp_path / "other")[1].tokenizer.window_bos == wanted


def test_a_tokenizer_without_the_bos_that_is_asked_for_is_reported_before_any_work(config, checkpoint, tmp_path):
    other = Path(changed_checkpoint(checkpoint, tmp_path / "other"))
    (other / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": "</s>"}))
    changed = ConfigDict(config.to_dict())
    changed.load.path, changed.load.bos = str(other), "windows"
    with pytest.raises(ValueError, match="^config.load: bos = 'windows' needs a tokenizer with a BOS token; that of"):
        experiment.prepare(changed, tmp_path / "run")
    assert not (tmp_path / "run" / "tokens").exists()


def test_the_model_is_the_checkpoint_s_not_the_config_s(config):
    with_model = ConfigDict(config.to_dict() | {"model": section(lr.LlamaConfig.preset("tiny"))})
    with pytest.raises(ValueError, match="config.model: the model is the one that config.load.path holds"):
        experiment.parse_experiment(with_model)


@pytest.mark.parametrize(
    ("path", "message"), [("/nowhere", "config.load: .*does not exist"), ("", "config.load: path = '' is empty")]
)
def test_a_bad_path_is_reported_before_any_work(config, path, message):
    changed = ConfigDict(config.to_dict())
    changed.load.path = path
    with pytest.raises(ValueError, match=message):
        experiment.parse_experiment(changed)


# --- an architecture by its name --------------------------------------------------------------------------------------

SIZES = dict(hidden_size=16, intermediate_size=20, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8)


@pytest.fixture
def preset(monkeypatch, checkpoint):
    """The name of one that is the checkpoint's."""
    vocab_size = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    monkeypatch.setitem(PRESETS, "small", dict(SIZES, vocab_size=vocab_size, original_length=L))
    return "small"


def changed_checkpoint(checkpoint, folder, **changes):
    """The same files with another config.json."""
    shutil.copytree(checkpoint, folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))
    return str(folder)


def test_a_preset_is_known_before_there_are_files(preset):
    settings = LoadSettings(path="/nowhere", preset=preset, dtype="bfloat16", attention="dense")
    config = settings.config
    assert (config.num_layers, config.original_length, config.dtype, config.attention) == (3, L, "bfloat16", "dense")
    (boundary,) = settings.factors.boundaries
    assert boundary == L and np.all(settings.factors.factors.lam == 1)
    with pytest.raises(ValueError, match="/nowhere.*does not exist"):
        settings.check_preset()
    with pytest.raises(ValueError, match="preset = 'smal' must be one of tiny, .*, ''"):
        LoadSettings(path="/nowhere", preset="smal")


def test_files_of_the_preset_are_accepted_and_others_named(preset, checkpoint, tmp_path):
    LoadSettings(path=str(checkpoint), preset=preset, param_dtype="bfloat16").check_preset()
    other = changed_checkpoint(checkpoint, tmp_path / "other", rope_theta=5000.0, num_hidden_layers=2)
    with pytest.raises(ValueError) as caught:
        LoadSettings(path=other, preset=preset).check_preset()
    assert str(caught.value) == (
        f"path = {other!r} does not hold preset = 'small': num_layers = 2 there, 3 here, rope_theta = 5000.0 there, "
        "10000.0 here"
    )
    LoadSettings(path=other).check_preset()  # without one, the files say what they are


def test_files_may_claim_a_longer_context_but_not_a_shorter_or_an_extended_one(preset, checkpoint, tmp_path):
    """Mistral 7B says 32k, which it reads through a window of 4k."""
    longer = changed_checkpoint(
        checkpoint, tmp_path / "longer", architectures=["MistralForCausalLM"], max_position_embeddings=4 * L,
        sliding_window=L,
    )  # fmt: skip
    settings = LoadSettings(path=longer, preset=preset)
    settings.check_preset()
    assert settings.config.original_length == settings.factors.boundaries[-1] == L
    shorter = changed_checkpoint(checkpoint, tmp_path / "shorter", max_position_embeddings=L // 2)
    with pytest.raises(ValueError, match="small': original_length = 32 there, 64 here$"):
        LoadSettings(path=shorter, preset=preset).check_preset()
    for name, scaling in (
        ("linear", {"rope_type": "linear", "factor": 4.0}),
        ("longrope", {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 1.5, 2.0, 4.0],
                      "original_max_position_embeddings": L, "factor": 4.0}),
    ):  # fmt: skip
        extended = changed_checkpoint(
            checkpoint, tmp_path / name, max_position_embeddings=4 * L, rope_scaling=scaling,
            original_max_position_embeddings=L,
        )  # fmt: skip
        with pytest.raises(ValueError, match="small': .*a context that is extended already$"):
            LoadSettings(path=extended, preset=preset).check_preset()


def test_a_stage_with_a_preset_does_what_it_does_without(preset, config, checkpoint, workdir, tmp_path):
    short = ConfigDict(config.to_dict())
    for name in ("table", "evaluate", "retrieval"):
        del short[name]
    short.stages, short.load.preset = ("load", "search"), preset
    experiment.run(short, tmp_path / "run")
    summaries = [json.loads((path / "stages" / "load.json").read_text()) for path in (tmp_path / "run", workdir)]
    assert summaries[0]["parameters"] == summaries[1]["parameters"] > 0
    found, wanted = ((path / "search.jsonl").read_text() for path in (tmp_path / "run", workdir))
    assert found == wanted
    experiment.run(short, tmp_path / "run")  # finished before
    other = changed_checkpoint(checkpoint, tmp_path / "other", rms_norm_eps=1e-6)
    short.load.path = other
    with pytest.raises(ValueError, match="^config.load: path = .*/other' does not hold preset = 'small': norm_eps"):
        experiment.prepare(short, tmp_path / "anew")


def written(writer, *prompts):
    return generate.write(writer, prompts, 12, sampling=Sampling(), seed=0, switch="ahead")


@pytest.fixture
def prompts(tmp_path):
    texts = {"a.txt": "The quick brown", "b.txt": "A lazy dog. " * 20}
    for name, content in texts.items():
        (tmp_path / name).write_text(content)
    return [str(tmp_path / name) for name in texts]


def test_text_is_written_from_a_path_and_from_a_work_directory(config, checkpoint, workdir, prompts, capsys):
    loaded = generate.from_path(str(checkpoint), "", MeshSettings())
    reopened = generate.from_experiment(config, workdir, "table", "")
    short = prompts[:1]
    (from_path,) = written(loaded, *short)
    assert capsys.readouterr().out == from_path + "\n"
    # 28 tokens are below L, where both have the factors that the model came with.
    assert written(reopened, *short) == [from_path]
    both = written(reopened, *prompts)
    assert both[0] == from_path
    tokens = loaded.tokenizer.encode(Path(prompts[1]).read_text(), eos=False)
    (wanted,) = complete(reopened.model, reopened.params, reopened.table, [tokens], 12, stops=loaded.tokenizer.stops)
    assert both[1] == loaded.tokenizer.decode(wanted)
    assert f"==> {prompts[1]} <==\n{both[1]}" in capsys.readouterr().out


def test_what_can_t_be_written_is_reported(config, checkpoint, workdir, prompts):
    loaded = generate.from_path(str(checkpoint), "", MeshSettings())
    with pytest.raises(ValueError, match="241 tokens and max_new_tokens = 12 make 253; .* ends at 64"):
        written(loaded, prompts[1])
    with pytest.raises(ValueError, match="prompt_file = '/nowhere' can't be read"):
        written(loaded, "/nowhere")
    with pytest.raises(ValueError, match="factors = 'other' is no finished stage .* those are load, search"):
        generate.from_experiment(config, workdir, "other", "")


def test_a_stage_that_has_lost_its_files_is_named(config, workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "copied")
    (tmp_path / "copied" / "factors" / "table.json").unlink()
    with pytest.raises(ValueError, match="table lost its results: .*table.json is missing"):
        generate.from_experiment(config, tmp_path / "copied", "table", "")


def test_pieces_are_whole_characters(checkpoint):
    tokenizer = generate.from_path(str(checkpoint), "", MeshSettings()).tokenizer
    tokens = tokenizer.encode("aé€", bos=False, eos=False)
    assert list(generate._pieces(tokens, tokenizer)) == ["a", "é", "€", ""]


def test_the_command_line_writes_and_explains(checkpoint, prompts):
    found = command_line.run(
        "--mode=generate", f"--pretrained={checkpoint}", f"--prompt_file={prompts[0]}", "--max_new_tokens=5"
    )
    assert found.returncode == 0 and found.stdout.endswith("\n") and len(found.stdout) > 1
    missing = command_line.run("--mode=generate", f"--pretrained={checkpoint}")
    assert missing.returncode == 2 and missing.stderr.strip().endswith("--mode=generate needs --prompt_file")
