"""Programs compiled ahead of time: are they those that stages run, and what is reported of them?"""

import dataclasses
import json
import re
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import command_line
import jax
import pytest
from ml_collections import ConfigDict

from longrope_jax import experiment
from longrope_jax.commands import compile
from longrope_jax.commands.compile import compile_experiment
from longrope_jax.data.corpus import DataSettings
from longrope_jax.evaluation import perplexity
from longrope_jax.evaluation.evaluate import EvaluationSettings, Method
from longrope_jax.evaluation.retrieval import RetrievalSettings
from longrope_jax.experiment import kind_of
from longrope_jax.experiment.stages import STAGES, ExportSettings, LoadSettings, TableSettings
from longrope_jax.model import LlamaConfig, decode
from longrope_jax.model.sharding import make_mesh
from longrope_jax.runtime import ahead_of_time as runtime
from longrope_jax.runtime.ahead_of_time import describe_slice
from longrope_jax.runtime.estimate import Chip
from longrope_jax.runtime.mesh import Layout, MeshSettings
from longrope_jax.search import gradient, objective
from longrope_jax.search.objective import TermSettings
from longrope_jax.search.settings import EvolutionSettings, GradientSettings, SearchSettings
from longrope_jax.settings import section
from longrope_jax.training import loop
from longrope_jax.training.finetune import FinetuneSettings
from longrope_jax.training.pretrain import PretrainSettings

LENGTH, TARGET = 32, 512
CHIP = Chip("made_up", "Made Up", 1e9, 2**30, 1e9, 1e8, 3)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """All kinds of stages, and those with more than one kind of program in both."""
    folder = tmp_path_factory.mktemp("texts")
    for k in range(20):
        (folder / f"{k}.txt").write_text(f"Text {k}: " + "the quick brown fox, and a lazy dog. " * 40)
    evolution = EvolutionSettings(population=4, mutations=1, crossovers=1, parents=2, iterations=1)
    tuning = dict(batch=4, steps=2, factors="search", checkpoint_every=2)
    sections = dict(
        pretrain=PretrainSettings(steps=3, batch=4, accumulate=2),
        search=SearchSettings(target_length=TARGET, documents=3, evolution=evolution),
        search_wide=SearchSettings(
            target_length=256, documents=4, documents_at_once=2, candidates_at_once=2, evolution=evolution
        ),
        search_hybrid=SearchSettings(
            target_length=128,
            documents=4,
            objective={"far": TermSettings(), "near": TermSettings(length=64, documents=2)},
            method="hybrid",
            mscale=(0.9, 1.2),
            evolution=evolution,
            gradient=GradientSettings(steps=3, starts=2),
            held_out_documents=2,
        ),
        finetune=FinetuneSettings(
            length=TARGET, long_share=0.5, evaluate_every=1, held_out_documents=3, remat="dots_saveable", **tuning
        ),
        finetune_whole=FinetuneSettings(length=256, evaluate_every=0, remat="attention_saveable", **tuning),
        table=TableSettings(lengths=(LENGTH, TARGET), factors=("original", "search")),
        evaluate=EvaluationSettings(
            lengths=(64, TARGET),
            documents=3,
            stride=32,
            tokens_at_once=256,
            methods={"longrope": Method("table"), "yarn": Method("yarn", "pretrain")},
            controls=("yarn",),
        ),
        retrieval=RetrievalSettings(
            lengths=(TARGET,), methods={"longrope": Method("table")}, tries=3, prompts_at_once=3, tokens_at_once=128
        ),
        retrieval_at_once=RetrievalSettings(
            lengths=(400,), methods={"longrope": Method("table")}, tries=1, tokens_at_once=1000
        ),
        export=ExportSettings(factors="table", cost_lengths=()),
    )
    basis = dict(
        model=LlamaConfig(
            258, 16, 16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, original_length=LENGTH
        ),
        data=DataSettings(folder=str(folder)),
        mesh=MeshSettings("fsdp:2,seq:2"),
    )  # fmt: skip
    made = {name: section(settings) for name, settings in (basis | sections).items()}
    return ConfigDict(dict(stages=tuple(sections), **made))


@pytest.fixture(scope="module")
def ran(config, tmp_path_factory):
    """What was called while the experiment ran, as the text that is given to the compiler, by function."""
    texts, known = defaultdict(set), set()

    def describe(leaf):
        return (leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) if hasattr(leaf, "shape") else leaf

    class Recorder:
        def __init__(self, name, function):
            self.name, self.function = name, function

        def __call__(self, *arguments):
            leaves, structure = jax.tree.flatten(arguments)
            signature = (self.name, structure, *map(describe, leaves))
            if signature not in known:  # lowering traces the function anew
                known.add(signature)
                with jax.transfer_guard("allow"):
                    texts[self.name].add(self.function.lower(*arguments).as_text())
            return self.function(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (loop, "train_step"), (objective, "rows_nll"), (gradient, "step"),
            (perplexity, "window_nll"), (decode, "advance"),
        ):  # fmt: skip
            patch.setattr(module, name, Recorder(name, getattr(module, name)))
        experiment.run(config, tmp_path_factory.mktemp("ran"))
    return texts


def test_they_are_the_programs_that_stages_run(config, ran):
    """Word for word, arguments' shapes, types and places on the mesh among them."""
    checked = experiment.parse_experiment(config)
    layout = Layout.of(checked.mesh)
    lowered = defaultdict(set)
    for stage, settings in checked.stages.items():
        for program in STAGES[kind_of(stage)].programs(settings, checked.model, layout):
            with layout.active():
                text = program.lower().as_text()
            lowered[re.search(r"module @jit_(\w+)", text)[1]].add(text)
    assert {name: len(texts) for name, texts in ran.items()} == {
        "train_step": 3, "rows_nll": 4, "step": 2, "window_nll": 4, "advance": 4
    }  # fmt: skip
    assert lowered.keys() == ran.keys()
    for name in ran:
        assert lowered[name] == ran[name], f"{name} is called with other arguments than it is compiled for"


# --- the report -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def to_compile(config):
    """The same with a stage whose programs are those of another one, and data that nobody has."""
    config = ConfigDict(config.to_dict())
    config.stages = (*config.stages, "evaluate_again")
    config.evaluate_again = config.evaluate.copy_and_resolve_references()
    config.data.folder = "/nowhere"
    return config


@pytest.fixture
def slice_of_cpus(monkeypatch):
    """Devices of this machine in the place of those of a slice; the chip can be chosen. Counts compilations."""

    def take(chip=CHIP, stop_after=None):
        compiled = []

        def compile_lowered(*arguments):
            if len(compiled) == stop_after:
                raise KeyboardInterrupt
            compiled.append(arguments)
            return runtime.compile_lowered(*arguments)

        monkeypatch.setattr(compile, "describe_slice", lambda topology, mesh: (Layout(make_mesh(fsdp=2, seq=2)), chip))
        monkeypatch.setattr(compile, "compile_lowered", compile_lowered)
        return compiled

    return take


PROGRAMS = [
    ("pretrain", "step at 32", 3),
    ("search", "score of candidates at 576", 3 * 3),  # six candidates on three documents, two rows at a time
    ("search_wide", "score of candidates at 288", 3 * 2),
    # Population 0, an iteration, and two ends with each of ten numbers of start tokens: two at once.
    ("search_hybrid", "score of candidates at 144", 13 * 4),
    ("search_hybrid", "step of gradient refinement at 144", 3 * 4 // 6),  # of both candidates at once
    ("search_hybrid", "score of candidates at 72", 13 * 2),
    ("search_hybrid", "step of gradient refinement at 72", 3 * 2 // 6),
    ("search_hybrid", "held-out documents", 4),
    ("finetune", "step at 512", 2),
    ("finetune", "held-out evaluation", 2),
    ("finetune_whole", "step at 256", 2),
    # Two methods; of the short length 15 windows for each of three documents, four at a time.
    ("evaluate", "windows of 64", 2 * -(-15 * 3 // 4)),
    ("evaluate", "windows of 528", 2 * 2),
    ("retrieval", "prefill of the last 128 of 512 tokens", 4),
    ("retrieval", "decoding a token after 512", 8),
    ("retrieval_at_once", "prefill of the last 400 of 400 tokens", 1),
    ("retrieval_at_once", "decoding a token after 400", 8),
    ("evaluate_again", "windows of 64", 2 * -(-15 * 3 // 4)),
    ("evaluate_again", "windows of 528", 2 * 2),
]


def without_seconds(report):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in report["programs"]]


def test_every_program_of_every_stage_is_reported_and_the_same_one_compiled_once(
    to_compile, slice_of_cpus, tmp_path, capsys
):
    """And a call that was interrupted goes on."""
    with pytest.raises(KeyboardInterrupt):
        slice_of_cpus(stop_after=5)
        compile_experiment(to_compile, "made_up:2x2", tmp_path)
    assert len(json.loads((tmp_path / "compile_report.json").read_text())["programs"]) == 5
    rest = slice_of_cpus()
    report = compile_experiment(to_compile, "made_up:2x2", tmp_path)
    assert len(rest) == len(PROGRAMS) - 2 - 5
    assert [(row["stage"], row["program"], row["calls"]) for row in report["programs"]] == PROGRAMS
    for row in report["programs"]:
        assert row["fits"] and 0 < row["arguments"] < row["peak"] < CHIP.hbm_bytes and row["temporaries"] > 0
        assert row["estimate"]["total"] >= row["estimate"]["bound"] > 0 and "suggestion" not in row
        assert 0 < row["estimate"]["attention_share"] < 1
    of_stage = {(row["stage"], row["program"]): row for row in report["programs"]}
    assert of_stage["search", "score of candidates at 576"]["collectives"]["ring"]["count"] > 0
    assert of_stage["pretrain", "step at 32"]["tokens"] == 4 * 32
    for a, b in zip(without_seconds(report)[11:13], without_seconds(report)[-2:], strict=True):
        assert a | {"stage": "evaluate_again"} == b
    content = json.loads((tmp_path / "compile_report.json").read_text())
    assert content.pop("known").keys() and content == json.loads(json.dumps(report))
    assert report["mesh"] == {"fsdp": 2, "seq": 2} and report["devices"] == 4
    text = (tmp_path / "compile_report.md").read_text()
    assert text in capsys.readouterr().out and "**no**" not in text and "what to turn" not in text
    assert re.match("# made_up:2x2.* 4 devices as fsdp:2, seq:2\n", text)
    for stage, program, _ in PROGRAMS:
        assert len(re.findall(rf"^\| {stage} +\| {program} +\|", text, re.MULTILINE)) >= 3  # memory, time, traffic
    again = slice_of_cpus()
    assert without_seconds(compile_experiment(to_compile, "made_up:2x2", tmp_path)) == without_seconds(report)
    assert not again


def shortened(config, *stages):
    config = ConfigDict(config.to_dict())
    for name in set(config.stages) - set(stages):
        del config[name]
    config.stages = stages
    return config


def test_what_does_not_fit_is_reported_with_what_to_turn(to_compile, slice_of_cpus, tmp_path):
    config = shortened(to_compile, "pretrain", "search", "finetune", "table", "evaluate")
    config.evaluate.tokens_at_once = 4096
    slice_of_cpus(Chip("small", "Small", 1e9, 2**19, 1e9, 1e8, 3))
    report = compile_experiment(config, "small:2x2", tmp_path)
    of_stage = {row["stage"]: row for row in report["programs"] if not row["fits"]}
    tune = of_stage["finetune"]["suggestion"]
    assert set(of_stage) >= {"finetune", "evaluate"} and all("estimate" not in row for row in of_stage.values())
    assert all(row["peak"] > 2**19 for row in of_stage.values())
    assert all(row["peak"] <= 2**19 and "estimate" in row for row in report["programs"] if row["fits"])
    assert "a smaller tokens_at_once than 4096" in of_stage["evaluate"]["suggestion"]
    assert tune.endswith("a slice with more chips, over which tokens, parameters and optimizer are sharded")
    text = (tmp_path / "compile_report.md").read_text()
    assert (
        "What does not fit, and what to change:" in text
        and "**no**" in text
        and of_stage["evaluate"]["suggestion"] in text
    )


def test_the_optimizer_counts_while_held_out_documents_are_evaluated(to_compile, slice_of_cpus, tmp_path):
    """Two moments of every parameter, float32, cut over four devices; and the counter of steps."""
    config = shortened(to_compile, "pretrain", "search", "finetune")
    config.finetune.optimizer.learning_rate = 1e-4
    slice_of_cpus()
    rows = {row["program"]: row for row in compile_experiment(config, "made_up:2x2", tmp_path)["programs"]}
    row = rows["held-out evaluation"]
    beside = row["peak"] - row["arguments"] - row["temporaries"]
    config_of_model = experiment.parse_experiment(config).model
    matrices = 2 * (4 * 16 * 16 + 3 * 16 * 16) + 2 * 258 * 16
    norms = (2 * config_of_model.num_layers + 1) * 16
    results = 4 * TARGET * 4  # log-likelihoods of three windows and one to fill up, on every device
    assert 0 <= beside - 2 * 4 * (matrices // 4 + norms) - results < 100


def test_a_model_that_only_its_preset_tells_is_compiled_without_its_files(to_compile, slice_of_cpus, tmp_path):
    config = shortened(to_compile, "search")
    with config.unlocked():
        del config["model"]
        config.load = section(LoadSettings(path="/nowhere", preset="tiny"))
        config.stages = ("load", "search")
    slice_of_cpus()
    (row,) = compile_experiment(config, "made_up:2x2", tmp_path)["programs"]
    assert (row["stage"], row["tokens"]) == ("search", 2 * TARGET * 9 // 8)
    config.stages = ("load",)
    del config["search"], config["data"]
    with pytest.raises(ValueError, match=r"^config.stages = \('load',\): none of them runs a program$"):
        compile_experiment(config, "made_up:2x2", tmp_path / "nothing")


def test_what_the_run_would_refuse_is_refused_here(to_compile, slice_of_cpus, tmp_path):
    slice_of_cpus()
    for field, value, message in (
        (("pretrain", "batch"), 6, "^config.pretrain: batch / accumulate = 3 sequences can't be split"),
        (
            ("search_wide", "target_length"),
            258,
            "^config.search_wide: target_length and margin = 290 can't be split over seq:2",
        ),
        (("model", "hidden_size"), 18, "^config.mesh: .*hidden_size = 18 is not a multiple of fsdp = 2 . seq = 2"),
        (("evaluate", "lengths"), (64,), "^config.evaluate: lengths = .* must end at|^config.evaluate: methods"),
    ):
        config = ConfigDict(to_compile.to_dict())
        config[field[0]][field[1]] = value
        if field[0] == "evaluate":
            config.evaluate.methods.longrope.factors = "serach"
        with pytest.raises(ValueError, match=message) as caught:
            compile_experiment(config, "made_up:2x2", tmp_path / "run")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("topology", ["v9x:2x2", "v5p", "v5p:", "v5p:4", "v5p:4xx4", "h100:8x1", ""])
def test_a_slice_of_no_known_name_or_shape(topology):
    with pytest.raises(ValueError, match="^topology = .* must be one of v4, v5e, v5p, v6e, tpu7x and a shape, such as"):
        describe_slice(topology, MeshSettings())


def test_a_slice_that_cannot_be_described_is_reported_with_what_to_install():
    """There are none of this shape; without libtpu, none at all."""
    with pytest.raises(ValueError, match="^topology = 'v5p:4x4' can't be described .*requirements-tpu.txt") as caught:
        describe_slice("v5p:4x4", MeshSettings())
    assert "\n" not in str(caught.value)


def test_a_mesh_has_to_fill_the_slice(monkeypatch):
    devices = SimpleNamespace(devices=jax.devices())
    monkeypatch.setattr(runtime.topologies, "get_topology_desc", lambda *_, **__: devices)
    layout, chip = describe_slice("v5e:2x4", MeshSettings("fsdp:2,seq:-1", "contiguous"))
    assert layout.shape == {"data": 1, "fsdp": 2, "seq": 4, "tensor": 1} and layout.sequence_order == "contiguous"
    assert chip.name == "v5e"
    for axes, message in (
        ("seq:16", "needs 16 devices, there are 8"),
        ("seq:3,data:-1", "8 devices can't be split by 3"),
        ("seq:2", "^config.mesh: axes = 'seq:2' leaves some of 8 devices without work"),
    ):
        with pytest.raises(ValueError, match=message):
            describe_slice("v5e:2x4", MeshSettings(axes))


class Refused:
    """In the place of a lowered program."""

    def __init__(self, message):
        self.message = message

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


TOO_LARGE = {
    "temporaries": (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. Exceeded by 1.75G.",
        35 * 2**29,
    ),
    "arguments": (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Total arguments (512.5M) exceeds available HBM (256M).",
        1025 * 2**19,
    ),
}


@pytest.mark.parametrize(("message", "needed"), TOO_LARGE.values(), ids=TOO_LARGE)
def test_a_program_for_which_the_compiler_finds_no_room_is_a_result(message, needed):
    found = runtime.compile_lowered(Refused(message), CHIP, 0.0).with_additional(2**20, CHIP)
    assert not found.fits and found.peak == needed + 2**20 and found.arguments is None
    assert runtime.Compiled.from_json(json.loads(json.dumps(dataclasses.asdict(found)))) == found


def test_other_complaints_of_the_compiler_are_errors():
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        runtime.compile_lowered(Refused("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem."), CHIP, 0.0)


def test_what_is_held_besides_can_leave_no_room():
    found = runtime.Compiled(1.0, True, 600, 500, 50)
    small = Chip("small", "Small", 1.0, 1000, 1.0)
    assert found.with_additional(400, small) == runtime.Compiled(1.0, True, 1000, 500, 50)
    assert found.with_additional(401, small) == runtime.Compiled(1.0, False, 1001, 500, 50)


COMMANDS = {
    "no topology": ([], "--mode=compile needs --topology"),
    "no such slice": (["--topology=v9x:2x2"], "topology = 'v9x:2x2' must be one of"),
}


@pytest.mark.parametrize(("flags", "message"), COMMANDS.values(), ids=COMMANDS)
def test_the_command_line_says_so_in_one_line(tmp_path, flags, message):
    config = Path(__file__).parents[2] / "experiments" / "quickstart.py"
    done = command_line.run("--mode=compile", f"--config={config}", f"--workdir={tmp_path}", *flags)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1
