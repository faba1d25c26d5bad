"""GGUF files, read by us and by Transformers."""

import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_gguf as tiny
from gguf import GGMLQuantizationType as Type

from longrope_jax.interop import load_pretrained
from longrope_jax.interop.gguf import gguf_tokenizer, open_gguf
from longrope_jax.model import Llama
from longrope_jax.model.decode import complete

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

TEXTS = {
    "english": "Call me Ishmael. Some years ago--never mind how long, don't ask DON'T.",
    "code": "def f(x):\n    return x**y  # why\n\n\n\tif  a:\n",
    "unicode": "naïve 日本語 Ωμέγα e\N{COMBINING ACUTE ACCENT} \u00a0\u2003x\u200b",
    "emoji": "🙂👩‍👩‍👧",
    "spaces": " " * 37 + "x" + "\t\t\n \n",
    "crlf": "a\r\nb.\r\n\r\nc",
}
DIGITS = {"digits": "3.14159 10,000,000 ½ ² 2024", "code with digits": "x[0] = 1e-5 # 12345"}
PROSE = (
    "The sea was calm that morning, and the harbour lay so still that the masts stood upon their own reflections. An "
    "old man sat on the quay, mending a net, and every now and then he looked up at the hills, as if he was waiting "
    "for somebody. The people of the town said that he had once been a captain, and that he had sailed further south "
    "than any of them could imagine; but he never spoke of it himself."
)


def read_by_transformers(path):
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )


def logits_of_transformers(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(tokens, np.int64))[None]).logits[0].numpy()


def our_logits(pretrained, tokens):
    config, params, _, factors = pretrained
    rope = factors.select(len(tokens))
    return np.asarray(Llama(config).apply({"params": params}, jnp.asarray(tokens, jnp.int32)[None], rope)[0])


def assert_same_tensors(path, model):
    _, source = open_gguf(path)
    theirs = model.state_dict()
    assert theirs.keys() - source.shapes().keys() <= {"lm_head.weight"}
    for name in source.shapes():
        np.testing.assert_array_equal(source.read(name), theirs[name].numpy(), err_msg=name)


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_tiny_model(tmp_path, kind, tied):
    path = tiny.write_model(tmp_path / "model.gguf", tiny.make_weights(tied=tied), kind)
    model = read_by_transformers(path)
    assert_same_tensors(path, model)
    tokens = np.random.default_rng(0).integers(0, tiny.VOCABULARY, 100)
    theirs = logits_of_transformers(model, tokens)
    assert theirs.std() > 0.5  # else agreeing would mean little
    np.testing.assert_allclose(our_logits(load_pretrained(path), tokens), theirs, atol=1e-4)


def test_the_writer_of_these_tests_permutes_as_transformers_expects(tmp_path):
    """So that writing and reading can't be wrong in the same way."""
    weights = tiny.make_weights()
    path = tiny.write_model(tmp_path / "model.gguf", weights)
    loaded = read_by_transformers(path).state_dict()
    for name, weight in weights.items():
        np.testing.assert_array_equal(loaded[name].numpy(), weight, err_msg=name)
    moved = tiny.to_llama_cpp(weights)["blk.0.attn_k.weight"]
    assert not np.array_equal(moved, weights["model.layers.0.self_attn.k_proj.weight"])


# a real file


@pytest.fixture(scope="module")
def path():
    if not os.environ.get("LONGROPE_GGUF"):
        pytest.skip("LONGROPE_GGUF names no GGUF file")
    return Path(os.environ["LONGROPE_GGUF"])


@pytest.fixture(scope="module")
def model(path):
    return read_by_transformers(path)


def test_real_tensors(path, model):
    assert_same_tensors(path, model)


def test_real_tokens(path, tmp_path):
    """Transformers does not read how a file cuts digits, so its own reading is compared without; that of our export is
    compared on everything.
    """
    tokenizer = gguf_tokenizer(path)
    for name, content in tokenizer.files.items():
        (tmp_path / name).write_bytes(content)
    own = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path)
    special = {"special": f"a{exported.eos_token}b{exported.bos_token}"}
    for name, text in (TEXTS | special | {"prose": PROSE}).items():
        wanted = own(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert tokenizer.encode(text, bos=False, eos=False).tolist() == wanted, name
    for name, text in (TEXTS | DIGITS | special).items():
        wanted = exported(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert tokenizer.encode(text, bos=False, eos=False).tolist() == wanted, name
        assert tokenizer.decode(wanted) == text, name
    assert (exported.bos_token_id, exported.eos_token_id) == (tokenizer.bos, tokenizer.eos)
    assert exported.chat_template == own.chat_template


def test_real_logits_and_a_greedy_continuation(path, model):
    pretrained = load_pretrained(path)
    config, params, tokenizer, factors = pretrained
    tokens = tokenizer.encode(PROSE, bos=False, eos=False).astype(np.int32)
    theirs = logits_of_transformers(model, tokens)
    ours = our_logits(pretrained, tokens)
    nll = [_nll(logits, tokens) for logits in (ours, theirs)]
    assert abs(nll[0] - nll[1]) < 1e-4, nll
    assert 1 < nll[1] < 5, nll
    prompt = tokens[:20]
    (continuation,) = complete(Llama(config), params, factors, [prompt], 24)
    wanted = model.generate(
        torch.from_numpy(prompt.astype(np.int64))[None], max_new_tokens=24, do_sample=False, eos_token_id=None
    )[0, len(prompt) :].tolist()
    assert continuation.tolist() == wanted, (tokenizer.decode(continuation), tokenizer.decode(wanted))


def _nll(logits, tokens):
    logits = logits[:-1].astype(np.float64)
    picked = np.take_along_axis(logits, tokens[1:, None], 1)[:, 0]
    return float((np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1) - picked).mean())
