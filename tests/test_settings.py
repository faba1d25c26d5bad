import dataclasses
import re

import pytest
from ml_collections import ConfigDict

from longrope_jax.evaluation.evaluate import EvaluationSettings, Method, published_methods
from longrope_jax.experiment.stages import ExportSettings, TableSettings
from longrope_jax.model import LlamaConfig
from longrope_jax.runtime.mesh import MeshSettings
from longrope_jax.search.objective import TermSettings
from longrope_jax.search.settings import EvolutionSettings, GradientSettings, SearchSettings, SeedSettings
from longrope_jax.settings import parse, section
from longrope_jax.training.finetune import FinetuneSettings
from longrope_jax.training.pretrain import PretrainSettings
from longrope_jax.training.step import OptimizerSettings

SETTINGS = {
    "model": LlamaConfig.preset("tiny"),
    "changed model": LlamaConfig.preset(
        "smollm2_135m", dtype="bfloat16", attention="dense", remat="nothing_saveable", norm_eps=1e-6
    ),
    "pretrain": PretrainSettings(steps=5, batch=2),
    "changed pretrain": PretrainSettings(
        steps=5, batch=2, seed=7, optimizer=OptimizerSettings(learning_rate=1e-4, warmup_steps=0, beta2=0.5)
    ),
    "search": SearchSettings(target_length=1024),
    "changed search": SearchSettings(target_length=64, upper_bound=2.0, evolution=EvolutionSettings(iterations=3)),
    "mixed search": SearchSettings(
        target_length=64,
        objective={"far": TermSettings(share=2.0), "needle": TermSettings("needle", length=32, documents=3)},
        method="hybrid",
        racing=0.99,
        ramps=8,
        published=("yarn",),
        seeds={"mine": SeedSettings("mine.csv", target_length=32)},
        mscale=(0.9, 1.3),
        gradient=GradientSettings(rounds=3, remat="dots_saveable"),
        held_out_documents=2,
    ),
    # A config has its fields in alphabetical order, and so the methods.
    "evaluate": EvaluationSettings(lengths=(64, 128), methods=dict(sorted(published_methods().items()))),
    "changed evaluate": EvaluationSettings(
        lengths=(8,),
        stride=3,
        methods={"a": Method("yarn", "finetune"), "b": Method("unscaled")},
        controls=("b", "a"),
        compared=(("a", "b"), ("b", "a")),
    ),
    "finetune": FinetuneSettings(steps=5, batch=2, length=512, factors="search"),
    "changed finetune": FinetuneSettings(
        steps=5,
        batch=4,
        accumulate=2,
        length=512,
        factors="yarn",
        model="pretrain",
        packed=True,
        long_share=0.25,
        evaluate_every=0,
        remat="none",
        optimizer=OptimizerSettings(schedule="linear"),
    ),
    "table": TableSettings(lengths=(128, 512), factors=("original", "search"), model="finetune"),
    "mesh": MeshSettings("data:2,seq:-1", "contiguous"),
}


def changed(settings, **fields):
    """The section of some settings with some fields as a config might have them; "a__b" is the field b of a."""
    content = dataclasses.asdict(settings)
    for name, value in fields.items():
        *outer, name = name.split("__")
        inner = content
        for key in outer:
            inner = inner[key]
        inner[name] = value
    return ConfigDict(content)


def assert_refuses(cls, config, name, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        parse(cls, config, name)


PRETRAIN, EVALUATE = SETTINGS["pretrain"], SETTINGS["evaluate"]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_settings_come_back_from_their_section(settings):
    parsed = parse(type(settings), section(settings), "some")
    assert parsed == settings
    assert repr(parsed) == repr(settings)  # 1 == 1.0 == True, but not here


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_section_has_every_field_and_can_be_changed_in_place(settings):
    config = section(settings)
    assert list(config) == sorted(field.name for field in dataclasses.fields(settings))
    for name in ("seed", "head_dim"):
        if name in config:
            config[name] = 14
            assert parse(type(settings), config, "some") == dataclasses.replace(settings, **{name: 14})


def test_nested_fields_can_be_changed_in_place():
    config = section(PRETRAIN)
    config.optimizer.learning_rate = 0.25
    assert parse(PretrainSettings, config, "pretrain").optimizer == OptimizerSettings(learning_rate=0.25)


def test_fields_with_defaults_may_be_left_out():
    assert parse(PretrainSettings, ConfigDict({"steps": 5, "batch": 2}), "pretrain") == PRETRAIN
    config = ConfigDict({"steps": 5, "batch": 2, "optimizer": {"beta1": 0.5}})
    assert parse(PretrainSettings, config, "pretrain").optimizer == OptimizerSettings(beta1=0.5)


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"step": 3}, "config.pretrain.step is not a field of PretrainSettings; did you mean steps?"),
        (
            {"check_every": 3},
            "config.pretrain.check_every is not a field of PretrainSettings; did you mean checkpoint_",
        ),
        (
            {"optimizer__learning_rte": 0.1},
            "config.pretrain.optimizer.learning_rte is not a field of OptimizerSettings; did you mean learning_rate?",
        ),
    ],
)
def test_an_unknown_field_names_the_closest(fields, message):
    assert_refuses(PretrainSettings, changed(PRETRAIN, **fields), "pretrain", message)


def test_a_long_value_is_reported_by_its_beginning():
    with pytest.raises(ValueError, match="config.mesh.axes = ") as caught:
        parse(MeshSettings, ConfigDict({"axes": (2**53,) * 2000}), "mesh")
    assert len(str(caught.value)) < 500


def test_what_settings_say_of_a_long_value_is_reported_by_its_beginning():
    with pytest.raises(ValueError, match=r"config.export: cost_lengths = \(-1, -1") as caught:
        parse(ExportSettings, ConfigDict({"factors": "table", "cost_lengths": (-1,) * 2000}), "export")
    assert len(str(caught.value)) < 2000


def test_a_number_beyond_all_floats_is_refused():
    with pytest.raises(ValueError, match="config.pretrain.optimizer.learning_rate = 1000.* must be finite"):
        parse(PretrainSettings, changed(PRETRAIN, optimizer__learning_rate=10**400), "pretrain")


def test_an_unknown_field_that_is_close_to_none_names_all():
    assert_refuses(
        PretrainSettings,
        changed(PRETRAIN, xyz=1),
        "pretrain",
        "config.pretrain.xyz is not a field of PretrainSettings; "
        "known are steps, batch, accumulate, seed, checkpoint_every, log_every, optimizer",
    )


@pytest.mark.parametrize("missing", ["steps", "batch"])
def test_a_missing_field_is_named(missing):
    config = section(PRETRAIN)
    del config[missing]
    assert_refuses(PretrainSettings, config, "pretrain", f"config.pretrain.{missing} is missing")


# --- types ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": "5"}, "config.pretrain.steps = '5' must be int"),
        ({"steps": True}, "config.pretrain.steps = True must be int"),
        ({"steps": 5.0}, "config.pretrain.steps = 5.0 must be int"),
        ({"steps": None}, "config.pretrain.steps = None must be int"),
        ({"optimizer__warmup_steps": "1"}, "config.pretrain.optimizer.warmup_steps = '1' must be int"),
        ({"optimizer__learning_rate": "0.1"}, "config.pretrain.optimizer.learning_rate = '0.1' must be float"),
        ({"optimizer__learning_rate": True}, "config.pretrain.optimizer.learning_rate = True must be float"),
        ({"optimizer__learning_rate": None}, "config.pretrain.optimizer.learning_rate = None must be float"),
        ({"optimizer": 3}, "config.pretrain.optimizer = 3 must be a section with the fields of OptimizerSettings"),
        ({"optimizer": None}, "config.pretrain.optimizer = None must be a section with the fields of OptimizerS"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_in_full(fields, message):
    assert_refuses(PretrainSettings, changed(PRETRAIN, **fields), "pretrain", message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lengths": 128}, "config.evaluate.lengths = 128 must be tuple"),
        ({"controls": "yarn"}, "config.evaluate.controls = 'yarn' must be tuple"),
        ({"lengths": (64, "128")}, "config.evaluate.lengths[1] = '128' must be int"),
        ({"lengths": (True, 128)}, "config.evaluate.lengths[0] = True must be int"),
        ({"controls": ("yarn", 3)}, "config.evaluate.controls[1] = 3 must be str"),
    ],
)
def test_tuples_are_checked_item_by_item(fields, message):
    assert_refuses(EvaluationSettings, changed(EVALUATE, **fields), "evaluate", message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": 32}, "config.model.dtype = 32 must be str"),
        ({"tie_embeddings": 1}, "config.model.tie_embeddings = 1 must be bool"),
        ({"tie_embeddings": "no"}, "config.model.tie_embeddings = 'no' must be bool"),
    ],
)
def test_strings_and_booleans_are_checked(fields, message):
    assert_refuses(LlamaConfig, changed(SETTINGS["model"], **fields), "model", message)


@pytest.mark.parametrize("value", [None, 3, "section", {"steps": 5, "batch": 2}])
def test_a_section_must_be_a_section(value):
    message = f"config.pretrain = {value!r} must be a section with the fields of PretrainSettings"
    assert_refuses(PretrainSettings, value, "pretrain", message)


def test_an_int_will_do_for_a_float_and_becomes_one():
    parsed = parse(PretrainSettings, changed(PRETRAIN, optimizer__clip_norm=2), "pretrain")
    assert (parsed.optimizer.clip_norm, type(parsed.optimizer.clip_norm)) == (2.0, float)


def test_a_list_will_do_for_a_tuple_and_becomes_one():
    parsed = parse(EvaluationSettings, changed(EVALUATE, lengths=[8, 16], controls=[]), "evaluate")
    assert (parsed.lengths, parsed.controls) == ((8, 16), ())


# --- sections within sections, by name -----------------------------------------------------------------------------


def test_methods_come_back_as_methods_and_can_be_changed_and_added_in_place():
    config = section(EVALUATE)
    config.methods.yarn.model = "finetune"
    config.methods.other = {"factors": "search"}
    expected = {**published_methods(), "yarn": Method("yarn", "finetune"), "other": Method("search")}
    assert parse(EvaluationSettings, config, "evaluate").methods == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"methods": 3}, "config.evaluate.methods = 3 must be dict"),
        ({"methods": {"a": "yarn"}}, "config.evaluate.methods.a = 'yarn' must be a section with the fields of Method"),
        (
            {"methods": {"a": {"factor": "yarn"}}},
            "config.evaluate.methods.a.factor is not a field of Method; did you mean fac",
        ),
        ({"methods": {"a": {"model": "pretrain"}}}, "config.evaluate.methods.a.factors is missing"),
        ({"methods": {"a": {"factors": 3}}}, "config.evaluate.methods.a.factors = 3 must be str"),
        ({"methods": {}, "controls": ()}, "config.evaluate: methods is empty"),
        (
            {"controls": ("original",)},
            "config.evaluate: controls = ('original',) must be methods; those are dynamic_ntk, l",
        ),
        (
            {"compared": (("yarn", "pi"),)},
            "config.evaluate: compared: ('yarn', 'pi') must be a pair of methods; those",
        ),
        ({"compared": (("yarn",),)}, "config.evaluate: compared: ('yarn',) must be a pair of methods; those are"),
    ],
)
def test_methods_are_checked_one_by_one(fields, message):
    assert_refuses(EvaluationSettings, changed(EVALUATE, **fields), "evaluate", message)


# --- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "fields", "message"),
    [
        ("model", {"head_dim": 7}, "config.model: head_dim = 7 must be even"),
        ("model", {"attention": "sparse"}, "config.model: attention = 'sparse' must be one of auto, dense, blockwise"),
        ("pretrain", {"steps": 0}, "config.pretrain: steps = 0 must be positive"),
        ("pretrain", {"optimizer__beta1": 1.0}, "config.pretrain.optimizer: beta1 = 1.0 must lie in [0, 1)"),
        ("search", {"evolution__parents": 0}, "config.search.evolution: parents = 0 must be positive"),
        ("search", {"documents": 0}, "config.search: documents = 0 must be positive"),
        ("search", {"method": "annealing"}, "config.search: method = 'annealing' must be one of evolution, gradient"),
        ("search", {"space": "all"}, "config.search: space = 'all' must be one of paper, critical_dimension"),
        ("search", {"racing": 0.5}, "config.search: racing = 0.5 must be a confidence between 0.5 and 1, or 0"),
        ("search", {"racing": 1.0}, "config.search: racing = 1.0 must be a confidence between 0.5 and 1, or 0"),
        (
            "search",
            {"racing": 0.9, "method": "cma_es"},
            "config.search: racing = 0.9 is not for method = 'cma_es'",
        ),
        ("search", {"seeds": {"yarn": {"factors": "a"}}}, "config.search: seeds.yarn: another seed has that name alr"),
        ("search", {"ramps": -1}, "config.search: ramps = -1 must not be negative"),
        ("search", {"published": ("pi",)}, "config.search: published = ('pi',): 'pi' is none of linear, ntk, yarn"),
        ("search", {"published": ()}, "config.search: published and seeds are empty; there is nothing to start from"),
        ("search", {"mscale": (1.0,)}, "config.search: mscale = (1.0,) must be two bounds"),
        ("search", {"held_out_documents": -1}, "config.search: held_out_documents = -1 must not be negative"),
        ("search", {"objective": {"a": {"kind": "bleu"}}}, "config.search.objective.a: kind = 'bleu' must be one of"),
        ("search", {"objective": {"a": {"share": 0.0}}}, "config.search.objective.a: share = 0.0 must be positive"),
        ("search", {"objective": {"a": {"length": -1}}}, "config.search.objective.a: length = -1 must not be negat"),
        ("search", {"objective": {"a": {"documents": -1}}}, "config.search.objective.a: documents = -1 must not be"),
        ("search", {"objective": {"a": {"kinds": "b"}}}, "config.search.objective.a.kinds is not a field of TermSe"),
        ("search", {"seeds": {"a": {}}}, "config.search.seeds.a.factors is missing"),
        ("search", {"seeds": {"a": {"factors": ""}}}, "config.search.seeds.a: factors = '' is empty"),
        (
            "search",
            {"seeds": {"a": {"factors": "b", "target_length": -1}}},
            "config.search.seeds.a: target_length = -1 must not be negative",
        ),
        ("search", {"gradient__rounds": 0}, "config.search.gradient: rounds = 0 must be positive"),
        ("search", {"gradient__starts": 0}, "config.search.gradient: starts = 0 must be positive"),
        ("search", {"gradient__steps": 0}, "config.search.gradient: steps = 0 must be positive"),
        ("search", {"gradient__learning_rate": 0.0}, "config.search.gradient: learning_rate = 0.0 must be positive"),
        ("search", {"gradient__cost": 0.0}, "config.search.gradient: cost = 0.0 must be positive"),
        ("search", {"gradient__remat": "all"}, "config.search.gradient: remat = 'all' must be one of none, nothing"),
        ("search", {"cma_es__population": 1}, "config.search.cma_es: population = 1 must be at least 2"),
        ("search", {"cma_es__iterations": 0}, "config.search.cma_es: iterations = 0 must be positive"),
        ("search", {"evolution__population": 0}, "config.search.evolution: population = 0 must be positive"),
        ("search", {"evolution__crossover": "none"}, "config.search.evolution: crossover = 'none' must be one of uni"),
        ("evaluate", {"lengths": (8, 8)}, "config.evaluate: lengths = (8, 8) must be different"),
        ("pretrain", {"accumulate": 3}, "config.pretrain: batch = 2 can't be cut into accumulate = 3 equal parts"),
        ("pretrain", {"optimizer__schedule": "step"}, "config.pretrain.optimizer: schedule = 'step' must be one of"),
        ("search", {"documents_at_once": 0}, "config.search: documents_at_once = 0 must be positive"),
        ("finetune", {"length": 0}, "config.finetune: length = 0 must be positive"),
        ("finetune", {"long_share": 1.5}, "config.finetune: long_share = 1.5 must lie in [0, 1]"),
        ("finetune", {"evaluate_every": -1}, "config.finetune: evaluate_every = -1 must not be negative"),
        ("finetune", {"held_out_documents": 0}, "config.finetune: held_out_documents = 0 must be positive"),
        ("finetune", {"remat": "all"}, "config.finetune: remat = 'all' must be one of none, nothing_saveable"),
        ("table", {"lengths": (512, 128)}, "config.table: lengths = (512, 128) must be rising"),
        ("table", {"factors": ("yarn",)}, "config.table: factors = ('yarn',) must name one source for each"),
        ("mesh", {"axes": "rows:2"}, "config.mesh: axes = 'rows:2': 'rows:2' is not an axis and its size"),
        ("mesh", {"sequence_order": "random"}, "config.mesh: sequence_order = 'random' must be one of zigzag"),
        ("evaluate", {"documents": 1}, "config.evaluate: documents = 1 must be at least 2"),
    ],
)
def test_values_that_settings_refuse_name_the_section(key, fields, message):
    settings = SETTINGS[key]
    assert_refuses(type(settings), changed(settings, **fields), key, message)


def test_the_released_search_is_that_of_the_released_code():
    settings = SearchSettings.released(131072, 4096, documents=3)
    assert settings.published == ("yarn",) and settings.n_hat == (0,) and settings.documents == 3
    assert settings.upper_bound * 32 == pytest.approx(33) and settings.mscale[0] == pytest.approx(1.1902, abs=1e-4)
    assert settings.terms["perplexity"].window(131072) == 131072
    space = settings.search_space(LlamaConfig.preset("llama2_7b"))
    assert space.high == pytest.approx(33) and space.mscale[0] == space.mscale[1]
