import jax
import numpy as np
import pytest

from longrope_jax import rope
from longrope_jax.data.corpus import Document
from longrope_jax.data.tokenizer import ByteTokenizer
from longrope_jax.data.windows import fixed_windows
from longrope_jax.evaluation.perplexity import nll_by_length, token_nll
from longrope_jax.evaluation.retrieval import RetrievalSettings, find_numbers
from longrope_jax.model import Llama, LlamaConfig
from longrope_jax.report.retrieval import summarize_retrieval
from longrope_jax.rope import FactorTable
from longrope_jax.runtime.mesh import Layout

SIZES = dict(vocab_size=258, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8)
L = 16
SHORT, LONG = rope.unscaled(8), rope.linear(8, 4.0)
TABLE = FactorTable.of({L: SHORT, 4 * L: LONG})
TEXTS = [f"{name} has a text of its own. " * 8 for name in ("One", "Another")]
DOCUMENTS = [Document(text[:7], ByteTokenizer().encode(text), len(text)) for text in TEXTS]


@pytest.fixture(scope="module")
def reader():
    model = Llama(LlamaConfig(**SIZES, original_length=L))
    return model, jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8), np.int32), SHORT)["params"]


@pytest.mark.parametrize("bos", [None, ByteTokenizer.bos])
def test_every_length_scores_the_same_tokens_with_the_factors_that_a_method_has_for_it(reader, bos):
    windows = fixed_windows(DOCUMENTS, 4 * L, 4, seed=0)
    nll = nll_by_length(*reader, {"table": TABLE, "long": LONG}, windows, (L, 4 * L), bos=bos)
    assert {length: list(row) for length, row in nll.items()} == {L: ["table", "long"], 4 * L: ["table", "long"]}
    model, params = reader
    for length, name, factors in ((L, "table", SHORT), (4 * L, "table", LONG), (L, "long", LONG)):
        tokens = token_nll(model, Layout(), params, factors, windows.tokens, length, bos=bos)
        by_file = [tokens[np.array(windows.names) == file].sum() for file in sorted(set(windows.names))]
        np.testing.assert_allclose(nll[length][name].sums, by_file, rtol=1e-5)
        assert nll[length][name].counts.sum() == tokens.size
    assert not np.allclose(nll[L]["table"].sums, nll[L]["long"].sums, rtol=1e-4)


def test_a_length_beyond_a_table_is_refused(reader):
    windows = fixed_windows(DOCUMENTS, 5 * L, 2, seed=0)
    with pytest.raises(ValueError, match="beyond this table's last boundary"):
        nll_by_length(*reader, {"table": TABLE}, windows, (5 * L,))


def test_numbers_are_looked_for_by_every_method_in_the_same_prompts(reader):
    asked = RetrievalSettings(lengths=(96, 112), task="needle_cloze", depths=(0.0, 1.0), tries=2, prompts_at_once=2)
    methods = {"table": FactorTable.of({96: SHORT, 112: LONG}), "long": LONG}
    settings, made = find_numbers(*reader, methods, DOCUMENTS, asked)
    assert {(r["method"], r["length"], r["depth"]) for r in made} == {
        (name, length, depth) for name in methods for length in (96, 112) for depth in (0.0, 1.0)
    }
    at = {(r["method"], r["length"], r["depth"]): r for r in made}
    assert at["table", 96, 0.0]["answers"] == at["long", 96, 0.0]["answers"]
    assert at["table", 112, 1.0]["texts"] == at["long", 112, 1.0]["texts"]  # the table has the same factors there
    assert summarize_retrieval(settings, made)["accuracy"]["long"]["112"]["tries"] == 4
