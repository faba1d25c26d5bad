"""Our logits against Transformers' on PyTorch, for a tiny random model of every architecture and kind of rotation."""

import numpy as np
import pytest

import longrope_jax as lr

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    initializer_range=0.1,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500000.0,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.5, 30.0, 64.0],
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 512, "rope_theta": 10000.0}
MODELS = {
    "llama2": ("Llama", dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0})),
    "llama3": ("Llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "llama_linear": ("Llama", dict(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})),
    "llama_yarn": ("Llama", dict(rope_parameters=YARN)),
    "llama_longrope": ("Llama", dict(rope_parameters={**LONGROPE, "factor": 128.0, "attention_factor": 1.25})),
    "mistral": ("Mistral", dict(sliding_window=None, rope_parameters={"rope_type": "default", "rope_theta": 1e4})),
    "phi3": ("Phi3", dict(rope_parameters=LONGROPE, original_max_position_embeddings=64)),
}


@pytest.fixture(scope="module", params=MODELS)
def both(request, tmp_path_factory):
    """(Transformers' model, ours)"""
    kind, rest = MODELS[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **rest)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    folder = tmp_path_factory.mktemp("models") / request.param
    theirs.save_pretrained(folder)
    return theirs, lr.load_pretrained(folder)


@pytest.mark.parametrize("length", [64, 65, 1024, 8192])
def test_logits_agree_below_and_above_the_switch(both, length):
    theirs, ours = both
    tokens = np.random.default_rng(length).integers(3, SIZES["vocab_size"], (1, length))
    with torch.inference_mode():
        wanted = theirs(torch.as_tensor(tokens)).logits.numpy()
    model = lr.Llama(ours.config)
    found = np.asarray(model.apply({"params": ours.params}, tokens, ours.factors.select(length)))
    worst = np.abs(found - wanted).max()
    print(f"{length} tokens: {worst:.2e} of {np.abs(wanted).max():.2f}")
    assert worst < 1e-4
