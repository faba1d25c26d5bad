import jax
import numpy as np
import pytest

from longrope_jax.data.corpus import Document
from longrope_jax.data.tokenizer import ByteTokenizer
from longrope_jax.model import Llama, LlamaConfig
from longrope_jax.runtime.mesh import Layout, MeshSettings
from longrope_jax.training.pretrain import PretrainSettings, train_from_scratch
from longrope_jax.training.step import OptimizerSettings, init_params

SIZES = dict(
    vocab_size=258, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8
)
TEXT = "the same again, and again " * 60
DOCUMENTS = [Document("text", ByteTokenizer().encode(TEXT), len(TEXT))]
SETTINGS = PretrainSettings(steps=12, batch=4, log_every=4, optimizer=OptimizerSettings(3e-2, warmup_steps=2))
MODEL = Llama(LlamaConfig(**SIZES, original_length=16))


def test_it_learns_from_fresh_parameters_and_tells_how_it_went():
    params, metrics = train_from_scratch(MODEL, DOCUMENTS, SETTINGS)
    assert [record["step"] for record in metrics] == [4, 8, 12]
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.5
    fresh = init_params(MODEL, SETTINGS.seed)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, fresh)


def test_the_same_settings_give_the_same_parameters():
    first, again = (train_from_scratch(MODEL, DOCUMENTS, SETTINGS).params for _ in range(2))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, again))


def test_settings_that_do_not_go_with_text_or_devices_are_refused():
    with pytest.raises(ValueError, match="fewer than a batch of 4"):
        train_from_scratch(MODEL, [DOCUMENTS[0]._replace(tokens=DOCUMENTS[0].tokens[:40])], SETTINGS)
    with pytest.raises(ValueError, match="batch / accumulate = 4 sequences can't be split"):
        train_from_scratch(MODEL, DOCUMENTS, SETTINGS, layout=Layout.of(MeshSettings("data:8")))
