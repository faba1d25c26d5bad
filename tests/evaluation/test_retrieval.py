import json
import re

import jax
import numpy as np
import pytest

from longrope_jax import rope
from longrope_jax.data.corpus import Document
from longrope_jax.data.needles import max_answer_tokens
from longrope_jax.data.tokenizer import ByteTokenizer
from longrope_jax.evaluation import retrieval
from longrope_jax.evaluation.evaluate import EvaluatedMethod, Method
from longrope_jax.evaluation.retrieval import RetrievalSettings, accuracy, is_found, make_prompts, run_retrieval
from longrope_jax.model import Llama, LlamaConfig
from longrope_jax.model.decode import complete
from longrope_jax.report import plots
from longrope_jax.rope import FactorTable
from longrope_jax.runtime import json_lines, preemption
from longrope_jax.runtime.mesh import Layout, MeshSettings

TOKENIZER = ByteTokenizer()
TEXT = "".join(f"This is sentence number {i}, and it is followed by others. " for i in range(100))
DOCUMENTS = [Document("text", TOKENIZER.encode(TEXT), len(TEXT))]
METHODS = {"good": Method("linear"), "short-sighted": Method("unscaled")}
SETTINGS = RetrievalSettings(lengths=(500, 700), methods=METHODS, tries=5, prompts_at_once=2)
FACTORS = {"good": rope.linear(8, 4.0), "short-sighted": rope.unscaled(8)}
EVALUATED = {
    name: EvaluatedMethod(lambda name=name: {"name": name}, lambda length, name=name: FACTORS[name]) for name in METHODS
}
SIGHT = 300  # tokens that the short-sighted one looks back


@pytest.fixture
def calls(monkeypatch):
    """In the place of a model: two readers, one of which does not look back far."""
    made = []

    def answer(model, params, table, prompts, max_new_tokens, stops, chunk):
        assert chunk == RetrievalSettings.tokens_at_once
        made.append((params, table, prompts, max_new_tokens, stops))
        texts = [TOKENIZER.decode(prompt[-SIGHT if params["name"] == "short-sighted" else 0 :]) for prompt in prompts]
        found = [re.search(r"(?:key|number of \w+) is (\d+)\.", text) for text in texts]
        said = [f" {match[1]}, isn't it? 77" if match else " 123" for match in found]
        return [TOKENIZER.encode(text, bos=False, eos=False) for text in said]

    monkeypatch.setattr(retrieval, "complete", answer)
    return made


def run(workdir, settings=SETTINGS, evaluated=EVALUATED, model=None, layout=None):
    return run_retrieval(model, layout or Layout(), evaluated, settings, TOKENIZER, DOCUMENTS, workdir, "retrieval")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (" 12345", True),
        ("12345. The grass is 9", True),
        (": **12345**", True),
        (" 123456", False),
        (" 1234", False),
        (" 9, no, 12345", False),
        (" twelve", False),
        ("", False),
    ],
)
def test_the_first_number_counts(text, found):
    assert is_found(text, "12345") == found


def test_records_say_who_found_what(calls, tmp_path):
    made = run(tmp_path)
    assert [(r["method"], r["length"], r["depth"]) for r in made] == [
        (name, length, None) for name in METHODS for length in (500, 700)
    ]
    room = max_answer_tokens("passkey", TOKENIZER)
    for record in made:
        assert record["tries"] == len(record["texts"]) == len(set(record["answers"])) == 5
        seen = [record["method"] == "good" or record["length"] - room - start <= SIGHT for start in record["starts"]]
        # Where it looks into the middle of the needle is left out.
        clear = [abs(record["length"] - room - start - SIGHT) > 60 for start in record["starts"]]
        hits = [text.startswith(f" {answer},") for text, answer in zip(record["texts"], record["answers"], strict=True)]
        assert [h for h, c in zip(hits, clear, strict=True) if c] == [s for s, c in zip(seen, clear, strict=True) if c]
        assert record["hits"] == sum(hits)
    assert [r["hits"] for r in made[:2]] == [5, 5]
    assert sum(r["hits"] for r in made[2:]) < 10
    assert made == [json.loads(line) for line in (tmp_path / "retrieval.jsonl").read_text().splitlines()]


def test_prompts_and_answers_together_have_the_length(calls, tmp_path):
    run(tmp_path)
    for _, table, prompts, new, stops in calls:
        length = int(table.boundaries[-1])
        assert stops == TOKENIZER.stops
        assert len(table.boundaries) == 1
        assert len(prompts) == 2  # the last batch is filled up
        assert {len(prompt) + new for prompt in prompts} == {length}
    assert [int(table.boundaries[0]) for _, table, *_ in calls] == 2 * ([500] * 3 + [700] * 3)
    by_method = {params["name"]: table.factors.lam[0] for params, table, *_ in calls}
    np.testing.assert_array_equal(by_method["good"], FACTORS["good"].lam)
    np.testing.assert_array_equal(by_method["short-sighted"], FACTORS["short-sighted"].lam)


def test_methods_get_the_same_prompts_and_other_seeds_others(calls, tmp_path):
    good, other = run(tmp_path)[1::2]
    assert (good["answers"], good["starts"]) == (other["answers"], other["starts"])
    (tmp_path / "b").mkdir()
    again = run(tmp_path / "b", RetrievalSettings(lengths=(700,), methods=METHODS, tries=5, seed=1))[0]
    assert not set(again["answers"]) & set(good["answers"])


def test_a_grid_of_needles(calls, tmp_path):
    settings = RetrievalSettings(
        lengths=(600, 900), task="needle", depths=(0.0, 0.5, 1.0), methods=METHODS, tries=2, prompts_at_once=4
    )
    made = run(tmp_path, settings)
    assert len(made) == 2 * 2 * 3
    found = {(r["method"], r["length"], r["depth"]): r["hits"] for r in made}
    assert all(found["good", length, depth] == 2 for length in (600, 900) for depth in (0.0, 0.5, 1.0))
    assert all(found["short-sighted", length, 1.0] == 2 for length in (600, 900))
    assert all(found["short-sighted", length, 0.0] == 0 for length in (600, 900))
    assert all(abs(depth - r["depth"]) < 0.1 for r in made for depth in r["depths"])


def test_a_needle_at_drawn_depths(calls, tmp_path):
    [record] = run(
        tmp_path, RetrievalSettings(lengths=(900,), task="needle", methods={"good": METHODS["good"]}, tries=6)
    )
    assert record["depth"] is None
    assert len(set(record["depths"])) > 3


def test_finished_records_are_not_made_again(calls, tmp_path):
    whole = run(tmp_path)
    path = tmp_path / "retrieval.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    other = json.dumps({**json.loads(lines[0]), "stage": "another"}) + "\n"
    path.write_text(other + lines[0] + lines[2] + lines[1][:50])
    calls.clear()
    again = run(tmp_path)
    assert len(calls) == 6  # two cells of three batches
    assert [{**r, "seconds": 0} for r in again] == [{**r, "seconds": 0} for r in whole]
    assert len(json_lines.read(path)) == 5


def test_a_run_that_is_asked_to_stop_keeps_what_it_has(calls, tmp_path, monkeypatch):
    asked = iter([False] * 4 + [True] * 9)
    monkeypatch.setattr(preemption, "requested", lambda: next(asked))
    with pytest.raises(preemption.Preempted, match="1 of 4 records are kept"):
        run(tmp_path)
    assert len(json_lines.read(tmp_path / "retrieval.jsonl")) == 1


def test_with_a_model_on_a_mesh(tmp_path):
    model = Llama(
        LlamaConfig(
            vocab_size=258, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=1, num_kv_heads=1,
            head_dim=8, original_length=64,
        )
    )  # fmt: skip
    factors = FACTORS["good"]
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((2, 4), np.int32), factors)["params"]
    settings = RetrievalSettings(lengths=(300,), methods={"good": Method("linear")}, tries=3, prompts_at_once=2)
    method = EvaluatedMethod(lambda: params, lambda length: factors)
    [record] = run(tmp_path, settings, {"good": method}, model, Layout.of(MeshSettings("data:2")))
    prompts = [prompt.tokens for prompt in make_prompts(settings, TOKENIZER, DOCUMENTS, 300, None)]
    new = 300 - len(prompts[0])
    expected = complete(model, params, FactorTable.of({300: factors}), prompts[:2], new, stops=TOKENIZER.stops)
    assert record["texts"][:2] == [TOKENIZER.decode(tokens) for tokens in expected]
    assert record["hits"] == 0


def test_accuracy_has_wilsons_interval():
    share, (low, high) = accuracy(9, 10)
    assert share == 0.9
    z, n = 1.959964, 10  # Wilson (1927)
    middle, half = (0.9 + z**2 / 2 / n) / (1 + z**2 / n), z * np.sqrt(0.09 / n + z**2 / 4 / n**2) / (1 + z**2 / n)
    np.testing.assert_allclose((low, high), (middle - half, middle + half), rtol=1e-6)
    assert accuracy(0, 10)[1][0] == 0
    assert accuracy(0, 10)[1][1] > 0.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": ()}, "lengths = "),
        ({"lengths": (0,)}, "lengths = "),
        ({"lengths": (8, 8)}, "lengths = "),
        ({"task": "haystack"}, "task = 'haystack' must be one of passkey, needle, needle_cloze"),
        ({"depths": (0.5, 1.5)}, "depths = "),
        ({"depths": (0.5, 0.5)}, "depths = "),
        ({"methods": {}}, "methods is empty"),
        ({"tries": 0}, "tries = 0"),
        ({"prompts_at_once": 0}, "prompts_at_once = 0"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        RetrievalSettings(**{"lengths": (100,), **changes})


def test_lengths_that_no_prompt_or_no_document_has():
    with pytest.raises(
        ValueError, match=r"lengths: of 100 tokens 16 are for the answer, but length = 84 tokens is too"
    ):
        make_prompts(SETTINGS, TOKENIZER, DOCUMENTS, 100, None)
    needles = RetrievalSettings(lengths=(10_000,), task="needle")
    with pytest.raises(ValueError, match="lengths: of 10000 tokens 18 are for the answer, but none of 1 documents"):
        make_prompts(needles, TOKENIZER, DOCUMENTS, 10_000, None)


def test_heat_map_shows_every_cell():
    grid = np.array([[1.0, 0.5, 0.0], [0.2, 0.3, 0.4]])
    figure = plots.retrieval_heatmap({"yarn": grid, "longrope": grid[::-1]}, [512, 1024, 2048], [0.0, 1.0])
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in panels] == ["LongRoPE (searched)", "YaRN"]
    assert [text.get_text() for text in panels[1].texts] == ["100", "50", "0", "20", "30", "40"]
    assert [text.get_text() for text in panels[1].get_xticklabels()] == ["512", "1,024", "2,048"]
    assert [text.get_text() for text in panels[1].get_yticklabels()] == ["0%", "100%"]


def test_lines_have_intervals():
    figure = plots.retrieval_by_length({"yarn": {512: (1.0, 0.7, 1.0), 1024: (0.5, 0.2, 0.8)}}, 512)
    [axes] = figure.axes
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [1.0, 0.5])
    [intervals] = axes.collections
    np.testing.assert_allclose([segment[:, 1] for segment in intervals.get_segments()], [[0.7, 1.0], [0.2, 0.8]])
