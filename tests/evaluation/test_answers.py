"""How well the values of planted pairs are predicted: records of an evaluation, and their table in the report."""

import numpy as np
from tiny_experiment import SIZES

from longrope_jax.data.corpus import Document
from longrope_jax.data.pairs import find_answers, plant
from longrope_jax.data.windows import fixed_windows
from longrope_jax.evaluation.evaluate import EvaluatedMethod, EvaluationSettings, Method, run_evaluation
from longrope_jax.evaluation.perplexity import token_nll
from longrope_jax.model import Llama, LlamaConfig
from longrope_jax.report.perplexity import evaluation_section, summarize_evaluation
from longrope_jax.rope import unscaled
from longrope_jax.runtime.mesh import Layout
from longrope_jax.training.step import init_params

L, LONG = 64, 512


def test_answers_are_recorded_one_by_one_and_reported_by_distance(tmp_path):
    texts = [plant(name, b"some text\n" * 200, 1.0, 0.5, (20, 400)) for name in "abc"] + [("plain", b"text\n" * 200)]
    documents = [Document(name, np.frombuffer(text, np.uint8), len(text)) for name, text in texts]
    model, layout = Llama(LlamaConfig(vocab_size=258, original_length=L, **SIZES)), Layout()
    params, factors = init_params(model, 0), unscaled(SIZES["head_dim"])
    settings = EvaluationSettings((L, LONG), methods={"longrope": Method("longrope")}, controls=(), documents=4)
    method = {"longrope": EvaluatedMethod(lambda: params, lambda length: factors)}
    records = run_evaluation(model, layout, method, settings, documents, tmp_path, "evaluate")

    windows = fixed_windows(documents, settings.window(LONG), 4, settings.seed)
    found = find_answers(windows.names, windows.tokens[:, : LONG + 1])
    assert len(found.rows) > 8 and {windows.names[row] for row in found.rows} == {name for name, _ in texts[:3]}
    for record in records:
        window = settings.window(record["length"])
        nll = token_nll(model, layout, params, factors, windows.tokens[:, : max(LONG, window) + 1], window)
        wanted = [nll[row, start - 1 : start + 6].mean() for row, start, _ in zip(*found, strict=True)]
        np.testing.assert_allclose(record["answers"]["nll"], wanted, rtol=1e-6)
        assert record["answers"]["distances"] == found.distances.tolist()
        assert record["answers"]["documents"] == found.rows.tolist()

    summary = summarize_evaluation(settings, records, L)
    near, far = summary["answers"]["longrope"].values()
    is_near = found.distances <= L
    assert near["answers"] == is_near.sum() and far["answers"] == (~is_near).sum() and near["documents"] <= 3
    nll = np.array(records[-1]["answers"]["nll"])
    np.testing.assert_allclose([near["nll"], far["nll"]], [nll[is_near].mean(), nll[~is_near].mean()])
    section = evaluation_section("evaluate", summary, settings, records, model.config)
    text = " ".join("\n".join(map(str, section)).split())
    counts = [f"({part['answers']} in {part['documents']} documents)" for part in (near, far)]
    assert f"up to 64 bytes {counts[0]} | up to 512 bytes {counts[1]}" in text
    assert "has 1.90 at best" in text
    assert f"| LongRoPE (searched) | {near['nll']:.2f} | {far['nll']:.2f} |" in text

    records[-1]["answers"]["nll"][int(np.argmax(is_near))] = None
    summary = summarize_evaluation(settings, records, L)
    assert summary["answers"]["longrope"]["64"]["nll"] is None
    assert "| inf" in "\n".join(map(str, evaluation_section("evaluate", summary, settings, records, model.config)))
