"""Folders that we export, read by Transformers: the same logits, the same greedy tokens, the same tokenizer."""

import numpy as np
import pytest
from interop.test_export import TABLE, TEXTS, WIDE, random_params

import longrope_jax as lr
from longrope_jax.data.tokenizer import ByteTokenizer
from longrope_jax.interop.architectures import ARCHITECTURES
from longrope_jax.interop.export import export_checkpoint
from longrope_jax.model.decode import complete

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity


@pytest.fixture(scope="module", params=ARCHITECTURES)
def exported(request, tmp_path_factory):
    """(Transformers' model, our parameters), both from random numbers that make logits of some units."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    params = {**random_params(WIDE)}
    params["layers"] = scaled(params["layers"], 0.3)
    export_checkpoint(folder, WIDE, params, TABLE, None, "", architecture=request.param, shard_bytes=10_000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(theirs).__name__ == request.param
    return theirs, params


def scaled(tree, scale):
    return {k: scaled(v, scale) if isinstance(v, dict) else v if k == "scale" else v * scale for k, v in tree.items()}


@pytest.mark.parametrize("length", [1, 64, 65, 512])
def test_logits_agree_below_and_above_the_switch(exported, length):
    theirs, params = exported
    tokens = np.random.default_rng(length).integers(0, WIDE.vocab_size, (1, length))
    with torch.inference_mode():
        wanted = theirs(torch.as_tensor(tokens)).logits.numpy()
    found = np.asarray(lr.Llama(WIDE).apply({"params": params}, tokens, TABLE.select(length)))
    print(f"{length} tokens: {np.abs(found - wanted).max():.2e} of {np.abs(wanted).max():.2f}")
    assert np.abs(found - wanted).max() < 1e-4 < 1 < np.abs(wanted).max()


@pytest.mark.parametrize("length", [20, 100])
def test_greedy_tokens_agree_on_both_sides_of_the_switch(exported, length):
    theirs, params = exported
    prompt = np.random.default_rng(length).integers(0, WIDE.vocab_size, length).astype(np.int32)
    tokens = torch.as_tensor(prompt, dtype=torch.int64)[None]
    with torch.inference_mode():
        wanted = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=24, do_sample=False)
    (found,) = complete(lr.Llama(WIDE), params, TABLE, [prompt], 24)
    assert list(found) == wanted[0, length:].tolist()


def test_greedy_tokens_across_the_switch_agree_where_the_cache_is_read_again(exported):
    """Transformers keeps the keys of its cache as they were rotated, but for Phi-3's class; ours are made anew."""
    theirs, params = exported
    prompt = np.random.default_rng(3).integers(0, WIDE.vocab_size, 55).astype(np.int32)
    tokens = torch.as_tensor(prompt, dtype=torch.int64)[None]
    options = dict(attention_mask=torch.ones_like(tokens), max_new_tokens=24, do_sample=False)
    with torch.inference_mode():
        exact = theirs.generate(tokens, use_cache=False, **options)[0, 55:].tolist()
        cached = theirs.generate(tokens, **options)[0, 55:].tolist()
    (found,) = complete(lr.Llama(WIDE), params, TABLE, [prompt], 24, switch="running")
    assert list(found) == exact
    assert (cached == exact) == (type(theirs).__name__ == "Phi3ForCausalLM")


def test_the_tokenizer_of_bytes(tmp_path):
    config = lr.LlamaConfig.preset("tiny", num_layers=1)
    table = lr.FactorTable.of({128: lr.rope.unscaled(32)})
    export_checkpoint(tmp_path / "a", config, random_params(config), table, ByteTokenizer(), "")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "a"), ByteTokenizer()
    for text in (text for text in TEXTS if "<" not in text):
        assert theirs(text)["input_ids"] == ours.encode(text, eos=False).tolist()
        assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (256, 257)
