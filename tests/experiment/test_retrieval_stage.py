import json
from types import SimpleNamespace

import pytest

from longrope_jax.data.corpus import Document
from longrope_jax.data.tokenizer import ByteTokenizer
from longrope_jax.evaluation.evaluate import Method
from longrope_jax.evaluation.retrieval import RetrievalSettings
from longrope_jax.experiment.stages.evaluation import RETRIEVAL
from longrope_jax.experiment.stages.settings import TableSettings
from longrope_jax.model import LlamaConfig
from longrope_jax.search.settings import SearchSettings
from longrope_jax.training.pretrain import PretrainSettings

CONFIG = LlamaConfig.preset("tiny")
BEFORE = {
    "pretrain": PretrainSettings(steps=1, batch=1),
    "search": SearchSettings(target_length=1024),
    "table": TableSettings(lengths=(128, 2048), factors=("original", "yarn")),
}


def make_settings(**changes):
    methods = {"longrope": Method("search"), "table": Method("table", "pretrain"), "dynamic": Method("dynamic_ntk")}
    return RetrievalSettings(**{"lengths": (512, 1024), "methods": methods, **changes})


def make_carried(**fields):
    tokenizer = ByteTokenizer()
    text = "x" * 1000
    return SimpleNamespace(
        tokenizer=tokenizer,
        documents={"data": {"evaluation": [Document("text", tokenizer.encode(text), len(text))]}},
        retrievals={},
        **fields,
    )


def test_methods_may_be_searches_tables_and_methods():
    settings = make_settings()
    RETRIEVAL.check(settings, CONFIG, BEFORE)
    assert RETRIEVAL.inputs(settings, BEFORE) == ["pretrain", "search", "table"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lengths": (512, 1025)},
            "lengths = .* goes beyond 1024, up to which methods.longrope.factors = 'search' is good",
        ),
        ({"methods": {"a": Method("yarn", "finetune")}}, "methods.a.model = 'finetune' is no stage before"),
        ({"methods": {"a": Method("yarns")}}, "methods.a.factors = 'yarns'"),
    ],
)
def test_what_does_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        RETRIEVAL.check(make_settings(**changes), CONFIG, BEFORE)


def test_every_length_is_tried_on_the_data():
    RETRIEVAL.check_data(make_settings(), make_carried())
    RETRIEVAL.check_data(make_settings(task="needle"), make_carried())
    with pytest.raises(ValueError, match="of 50 tokens"):
        RETRIEVAL.check_data(make_settings(lengths=(50, 1024)), make_carried())
    with pytest.raises(ValueError, match="none of 1 documents has the .* length = .*; the longest has 1000"):
        RETRIEVAL.check_data(make_settings(task="needle", lengths=(512, 2048)), make_carried())


def test_records_are_handed_on_if_they_are_all_there(tmp_path):
    settings, carried = make_settings(), make_carried(workdir=tmp_path)
    cell = {"method": "yarn", "length": 64, "depth": 0.5, "hits": 1, "tries": 2, "seconds": 1.5}
    record = json.dumps({"stage": "retrieval", **cell}) + "\n"
    path = tmp_path / "retrieval.jsonl"
    path.write_text(5 * record + json.dumps({"stage": "another", **cell}) + "\n")
    with pytest.raises(LookupError, match="retrieval.jsonl has lost records"):
        RETRIEVAL.load(settings, carried, "retrieval", {})
    path.write_text(6 * record)
    RETRIEVAL.load(settings, carried, "retrieval", {})
    assert carried.retrievals == {"retrieval": (settings, [{"stage": "retrieval", **cell}] * 6)}
