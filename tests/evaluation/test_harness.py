"""The model class in the lm-evaluation-harness itself, offline, on the tasks of tests/harness."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="the harness is an optional extra (requirements-harness.txt)")

from lm_eval.api.instance import Instance

from longrope_jax import rope
from longrope_jax.commands import harness
from longrope_jax.data.tokenizer import ByteTokenizer
from longrope_jax.evaluation import harness_model
from longrope_jax.evaluation.harness_model import HarnessModel, benchmark
from longrope_jax.model import Llama, LlamaConfig
from longrope_jax.model.decode import complete
from longrope_jax.rope import FactorTable

ROOT = Path(__file__).parents[2]
TASKS = str(ROOT / "tests" / "harness")
TOKENIZER = ByteTokenizer()
MODEL = Llama(
    LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8,
        original_length=16, attention="dense",
    )
)  # fmt: skip
TABLE = FactorTable.of({16: rope.unscaled(8), 64: rope.linear(8, 4.0)})


find_tasks = functools.cache(lambda names, folder: harness_model.find_tasks(names.split(","), folder))  # seconds


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    """The tasks name their data from there, and nothing is to be fetched."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@functools.cache
def make_params():
    params = jax.jit(MODEL.init)(jax.random.key(0), np.zeros((1, 4), np.int32), TABLE.select(4))["params"]
    return jax.tree.map(lambda leaf: 3 * leaf, params)


def make_model(table=TABLE):
    return HarnessModel(MODEL, make_params(), TOKENIZER, table, tokens_at_once=256, bos=True)


def request(kind, *args):
    return Instance(kind, {}, args, 0)


@jax.jit
def all_log_probabilities(params, tokens, factors):
    return jax.nn.log_softmax(MODEL.apply({"params": params}, tokens, factors)[0])


def direct(tokens, scored):
    """Of the last `scored` tokens by the whole model; with the factors of what it reads."""
    inputs = [tokens[0], *tokens[1:-1][-63:]]  # a long one keeps its first token, BOS
    padded = np.array([inputs + [0] * (64 - len(inputs))])
    log_probabilities = np.asarray(all_log_probabilities(make_params(), padded, TABLE.select(len(inputs))))
    places = np.arange(len(inputs) - scored, len(inputs))
    best = log_probabilities[places].argmax(-1).tolist() == tokens[-scored:]
    return log_probabilities[places, tokens[-scored:]].sum(), best


def test_likelihoods():
    texts = [("a question?", " an answer"), ("", "no context"), ("x" * 80, " far too long"), ("space ", "s")]
    found = make_model().loglikelihood([request("loglikelihood", *pair) for pair in texts], disable_tqdm=True)
    for (context, continuation), result in zip(texts, found, strict=True):
        # A space at the end of the context belongs to the continuation.
        scored = len(continuation) + len(context) - len(context.rstrip())
        expected, best = direct([256, *(context + continuation).encode()], scored)
        np.testing.assert_allclose(result[0], expected, rtol=1e-5)
        assert result[1] == best


def tokenizer_with(**fields):
    tokenizer = ByteTokenizer()
    vars(tokenizer).update(fields)
    return tokenizer


@pytest.mark.parametrize(("window_bos", "bos", "first"), [(None, None, []), (256, None, [256]), (256, False, [])])
def test_a_text_begins_with_bos_as_the_tokenizer_says_or_as_asked(window_bos, bos, first):
    model = HarnessModel(MODEL, make_params(), tokenizer_with(window_bos=window_bos), TABLE, bos=bos)
    [(found, _)] = model.loglikelihood([request("loglikelihood", "a question?", " an answer")], disable_tqdm=True)
    np.testing.assert_allclose(found, direct([*first, *b"a question? an answer"], 10)[0], rtol=1e-5)


def test_no_bos_that_is_asked_for_is_an_error():
    with pytest.raises(ValueError, match="^bos = True needs a tokenizer with a BOS token$"):
        HarnessModel(MODEL, make_params(), tokenizer_with(bos=None), TABLE, bos=True)


def test_whole_texts_in_windows():
    text = "".join(chr(97 + i % 26) for i in range(150))
    tokens = [256, *text.encode()]
    # Every window reads BOS first: for 64 tokens, for 64 more, and for the last 22 after all that fit.
    expected = direct(tokens[:65], 64)[0] + direct([256, *tokens[65:129]], 64)[0] + direct([256, *tokens[87:]], 22)[0]
    found = make_model().loglikelihood_rolling(
        [request("loglikelihood_rolling", text), request("loglikelihood_rolling", "short")], disable_tqdm=True
    )
    np.testing.assert_allclose(found, [expected, direct([256, *b"short"], 5)[0]], rtol=1e-5)


def test_generation_stops_at_strings_and_keeps_the_end_of_a_long_prompt():
    prompts = ["a prompt", "another prompt, and a longer one", "y" * 100]

    def generate(**options):
        requests = [request("generate_until", prompt, {"max_gen_toks": 12, **options}) for prompt in prompts]
        return make_model().generate_until(requests, disable_tqdm=True)

    encoded = [np.array([256, *prompt.encode()[-51:]]) for prompt in prompts]
    whole = [TOKENIZER.decode(new) for new in complete(MODEL, make_params(), TABLE, encoded, 12, stops=TOKENIZER.stops)]
    assert generate(until=[]) == whole
    stop = whole[0][3]
    assert generate(until=[stop, "never"]) == [text.split(stop)[0] for text in whole]
    drawn = generate(until=[], do_sample=True, temperature=1.5)
    assert drawn == generate(until=[], do_sample=True, temperature=1.5) != whole


def test_factors_are_by_length():
    text = [request("loglikelihood", "more than sixteen bytes of words", "b")]
    same = FactorTable.of({16: rope.linear(8, 4.0), 64: rope.linear(8, 4.0)})
    short = [request("loglikelihood", "some words", "b")]
    assert make_model().loglikelihood(text, True) == make_model(same).loglikelihood(text, True)
    assert make_model().loglikelihood(short, True) != make_model(same).loglikelihood(short, True)


def test_tasks_of_all_three_kinds():
    names = ["local_choices", "local_prose", "local_counting"]
    results, table = benchmark(make_model(), names, find_tasks("local_choices", TASKS), few_shot=0)
    made = results["results"]
    lines = [json.loads(line) for line in (ROOT / "tests/harness/prose.jsonl").read_text().splitlines()]
    nll = -sum(make_model().loglikelihood_rolling([request("", line["text"]) for line in lines], True))
    size = sum(len(line["text"].encode()) for line in lines)
    np.testing.assert_allclose(made["local_prose"]["byte_perplexity,none"], np.exp(nll / size), rtol=1e-5)
    assert 0 <= made["local_choices"]["acc,none"] <= 1
    assert made["local_counting"]["exact_match,none"] == 0
    assert all(name in table for name in names)
    json.dumps(results, allow_nan=True)


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs the command line on the model above, whatever tasks there are."""
    monkeypatch.setattr(harness, "describe_pretrained", lambda path, **changes: (MODEL.config, TABLE))
    monkeypatch.setattr(harness, "load_tokenizer", lambda path: TOKENIZER)
    monkeypatch.setattr(harness, "read_params", lambda path, config, mesh: make_params())
    found = find_tasks("local_choices", TASKS)
    monkeypatch.setattr(harness_model, "TaskManager", lambda include_path: found)
    output = tmp_path / "results.json"

    def run(**options):
        options = {"model": "a model", "tasks": "local_choices", "include_path": TASKS, "output": output} | options
        harness.main([f"--{name}" if value is None else f"--{name}={value}" for name, value in options.items()])
        return json.loads(output.read_text())

    return run


def test_the_command_line(command, capsys):
    results = command(num_fewshot=1, limit=2)
    assert results["n-shot"] == {"local_choices": 1}
    assert results["n-samples"]["local_choices"]["effective"] == 2
    assert results["model"] == "a model"
    assert "local_choices" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": "local_choices,nonsense"}, "tasks = 'local_choices,nonsense': the harness has no nonsense"),
        ({"include_path": "nowhere"}, "include_path = 'nowhere' is not a directory"),
        ({"output": "nowhere/results.json"}, "output = 'nowhere/results.json': its parent directory does not exist"),
        ({"factors": "nowhere.json"}, "nowhere.json"),
        ({"mesh": "rows:2"}, "axes = 'rows:2'"),
    ],
)
def test_bad_options_are_one_line_before_the_model_is_read(command, options, message, monkeypatch, capsys):
    monkeypatch.setattr(harness, "read_params", None)
    with pytest.raises(SystemExit, match="2"):
        command(**options)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_bos_without_such_a_token_is_refused_before_the_model_is_read(command, monkeypatch, capsys):
    monkeypatch.setattr(harness, "read_params", None)
    monkeypatch.setattr(harness, "load_tokenizer", lambda path: tokenizer_with(bos=None))
    with pytest.raises(SystemExit, match="2"):
        command(bos=None)
    assert "error: --bos needs a tokenizer with a BOS token; that of 'a model' has none" in capsys.readouterr().err


def test_a_prompt_needs_room():
    with pytest.raises(ValueError, match="max_gen_toks = 64 leaves no room for a prompt in 64 tokens"):
        make_model().generate_until([request("generate_until", "x", {"until": [], "max_gen_toks": 64})], True)
