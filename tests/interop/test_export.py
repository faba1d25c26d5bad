"""Exported folders: what is read back is what was there, bit for bit; nothing is lost in silence."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from interop.test_pretrained import CONFIG, MODEL, assert_same, to_huggingface, write
from safetensors import safe_open

import longrope_jax as lr
from longrope_jax.data.tokenizer import ByteTokenizer, SubwordTokenizer
from longrope_jax.interop import export, load_tokenizer
from longrope_jax.interop.architectures import ARCHITECTURES
from longrope_jax.interop.export import UnsupportedByFormat, export_checkpoint, fit_to_format, huggingface_config
from longrope_jax.model.sharding import make_mesh, tree_shardings
from longrope_jax.rope import RopeFactors
from longrope_jax.runtime.mesh import Layout, MeshSettings
from longrope_jax.training.step import init_params

SHORT = RopeFactors(np.array([1, 1, 1.25, 1.5], np.float32), np.int32(0), np.float32(1.125))
LONG = RopeFactors(np.array([1, 2.5, 6, 8.1], np.float32), np.int32(0), np.float32(1.125))
TABLE = lr.FactorTable.of({64: SHORT, 512: LONG})
WIDE = lr.LlamaConfig(24, 32, 20, 3, 4, 2, 8, 64)  # heads as wide as the model, as Phi-3 wants it


def random_params(config, dtype=np.float32):
    rng = np.random.default_rng(0)
    made = init_params(lr.Llama(config), 0)
    return jax.tree.map(lambda leaf: np.asarray(rng.normal(size=leaf.shape), dtype), made)


def assert_same_table(found, wanted):
    np.testing.assert_array_equal(found.boundaries, wanted.boundaries)
    for name in ("lam", "n_hat", "mscale"):
        np.testing.assert_array_equal(getattr(found.factors, name), getattr(wanted.factors, name))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "tied", "shard_bytes"), [("float32", False, 2000), ("bfloat16", True, 2**30)])
def test_what_is_exported_is_read_back_bit_for_bit(tmp_path, architecture, dtype, tied, shard_bytes):
    config = lr.LlamaConfig(24, 32, 20, 3, 4, 2, 8, 64, tie_embeddings=tied, param_dtype=dtype)
    params = random_params(config, np.dtype(dtype))
    export_checkpoint(
        tmp_path / "a", config, params, TABLE, None, "card", architecture=architecture, shard_bytes=shard_bytes
    )
    found = lr.load_pretrained(tmp_path / "a", param_dtype=dtype)
    assert found.config == config
    assert_same(found.params, params)
    assert_same_table(found.factors, TABLE)
    # And once more from there: the files are the same to the byte.
    export_checkpoint(
        tmp_path / "b",
        found.config,
        found.params,
        found.factors,
        None,
        "card",
        architecture=architecture,
        shard_bytes=shard_bytes,
    )
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    files = sorted((tmp_path / "a").glob("*.safetensors"))
    if shard_bytes == 2000:
        index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
        assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 3
        assert set(index["weight_map"].values()) == {file.name for file in files}
        sizes = [sum(t.nbytes for t in tensors_in(file).values()) for file in files]
        assert index["metadata"]["total_size"] == sum(sizes)
        assert all(size <= 2000 or len(tensors_in(file)) == 1 for file, size in zip(files, sizes, strict=True))
    else:
        assert [file.name for file in files] == ["model.safetensors"]


def tensors_in(file):
    with safe_open(file, framework="numpy") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def test_the_tensors_are_those_that_another_writer_makes(tmp_path):
    params = random_params(WIDE)
    for architecture in ("LlamaForCausalLM", "Phi3ForCausalLM"):
        export_checkpoint(tmp_path / architecture, WIDE, params, TABLE, None, "", architecture=architecture)
        found = tensors_in(tmp_path / architecture / "model.safetensors")
        wanted = to_huggingface(params, fused=architecture == "Phi3ForCausalLM")
        assert found.keys() == wanted.keys()
        for name in wanted:
            np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


def test_parameters_on_a_mesh_are_fetched_from_their_devices(tmp_path):
    params = random_params(WIDE)
    layout = Layout.of(MeshSettings("fsdp:2,tensor:2"))
    placed = jax.device_put(params, tree_shardings(make_mesh(fsdp=2, tensor=2), params))
    with layout.active():
        export_checkpoint(tmp_path / "cut", WIDE, placed, TABLE, None, "")
    export_checkpoint(tmp_path / "whole", WIDE, params, TABLE, None, "")
    cut, whole = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("cut", "whole"))
    assert cut == whole


def test_a_smaller_type_on_demand(tmp_path):
    params = random_params(WIDE)
    export_checkpoint(tmp_path / "a", WIDE, params, TABLE, None, "", dtype="bfloat16")
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), params)
    assert_same(lr.load_pretrained(tmp_path / "a").params, rounded)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_folder_appears_when_it_is_whole_and_an_interrupted_one_is_begun_again(tmp_path, monkeypatch):
    params, real, calls = random_params(WIDE), export.save, []

    def breaks_off(arrays, metadata):
        calls.append(arrays)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(arrays, metadata)

    monkeypatch.setattr(export, "save", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(tmp_path / "a", WIDE, params, TABLE, None, "", shard_bytes=2000)
    assert not (tmp_path / "a").exists() and (tmp_path / "a.partial").exists()
    monkeypatch.setattr(export, "save", real)
    export_checkpoint(tmp_path / "a", WIDE, params, TABLE, None, "")
    assert not (tmp_path / "a.partial").exists()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert_same(lr.load_pretrained(tmp_path / "a").params, params)


def test_the_config_says_everything_twice_for_older_readers():
    content = huggingface_config(WIDE, TABLE, "LlamaForCausalLM", "float32", ByteTokenizer())
    rope = content["rope_parameters"]
    assert rope["rope_type"] == "longrope" and rope["rope_theta"] == content["rope_theta"] == 10000.0
    np.testing.assert_array_equal(np.float32(rope["short_factor"]), SHORT.lam)
    np.testing.assert_array_equal(np.float32(rope["long_factor"]), LONG.lam)
    assert (rope["factor"], rope["attention_factor"]) == (8.0, 1.125)
    assert rope["original_max_position_embeddings"] == content["original_max_position_embeddings"] == 64
    assert content["max_position_embeddings"] == 512
    assert {**content["rope_scaling"], "rope_theta": 10000.0} == rope
    assert (content["bos_token_id"], content["eos_token_id"]) == (256, 257)


def test_an_architecture_that_can_t_be_this_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"num_heads \* head_dim = 32 and hidden_size = 16"):
        export_checkpoint(tmp_path / "a", MODEL, {}, TABLE, None, "", architecture="Phi3ForCausalLM")
    with pytest.raises(ValueError, match="architecture = 'GPT2' must be one of LlamaForCausalLM"):
        export_checkpoint(tmp_path / "a", MODEL, {}, TABLE, None, "", architecture="GPT2")
    assert not list(tmp_path.iterdir())


def test_nothing_is_dropped_unless_it_is_allowed():
    middle = LONG.replace(lam=np.float32([1, 2, 3, 4]))
    table = lr.FactorTable.of({64: SHORT, 256: middle, 512: LONG.replace(n_hat=np.int32(8), mscale=np.float32(1.5))})
    with pytest.raises(
        UnsupportedByFormat, match=r"n_hat = 0, 0, 8.*64, 256, 512.*mscale = 1.125, 1.125, 1.5"
    ) as caught:
        fit_to_format(table, 64, ())
    for kind in ("start_tokens", "lengths", "temperatures"):
        assert f"allow_dropping_{kind}" in str(caught.value)
    with pytest.raises(UnsupportedByFormat, match="allow_dropping_lengths$"):
        fit_to_format(table, 64, ("start_tokens", "temperatures"))
    fitted, dropped = fit_to_format(table, 64, ("start_tokens", "lengths", "temperatures"))
    assert list(dropped) == ["start_tokens", "lengths", "temperatures"]
    changed = {64: SHORT.replace(mscale=np.float32(1.5)), 512: LONG.replace(mscale=np.float32(1.5))}
    assert_same_table(fitted, lr.FactorTable.of(changed))
    assert_same_table(fit_to_format(TABLE, 64, ())[0], TABLE)
    with pytest.raises(ValueError, match="end at 512 tokens, below the original length, 1024"):
        fit_to_format(TABLE, 1024, ())


def test_boundaries_at_which_nothing_changes_are_none():
    table = lr.FactorTable.of({32: SHORT, 64: SHORT, 256: LONG, 512: LONG})
    fitted, dropped = fit_to_format(table, 64, ())
    assert_same_table(fitted, TABLE)
    assert dropped == {}


def test_only_a_model_s_folder_is_replaced(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="exists and is no model's folder"):
        export_checkpoint(tmp_path / "a", WIDE, random_params(WIDE), TABLE, None, "")
    assert (tmp_path / "a" / "thesis.tex").read_text() == "years of work"


def test_a_disk_that_is_full_leaves_nothing(tmp_path, monkeypatch):
    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save", no_space)
    with pytest.raises(OSError, match="a can't be written: No space left on device"):
        export_checkpoint(tmp_path / "a", WIDE, random_params(WIDE), TABLE, None, "")
    assert not list(tmp_path.iterdir())


def test_start_tokens_that_change_nothing_are_not_in_the_way():
    """Position 0 turns by no angle, and without a rescaling start tokens are like all others."""
    one = lr.FactorTable.of({64: SHORT.replace(lam=np.ones(4, np.float32), n_hat=np.int32(16)), 512: LONG})
    assert fit_to_format(one, 64, ())[1] == {}
    single = lr.FactorTable.of({64: SHORT, 512: LONG.replace(n_hat=np.int32(1))})
    assert fit_to_format(single, 64, ())[1] == {}


TEXTS = ["", "plain text", "naïve 日本語 🙂\r\n\t\x00\x7f", "<s> </s>", " two  spaces "]


def test_bytes_have_a_tokenizer_that_others_read(tmp_path):
    config = lr.LlamaConfig.preset("tiny", num_layers=1)
    table = lr.FactorTable.of({128: lr.rope.unscaled(32)})
    export_checkpoint(tmp_path / "a", config, random_params(config), table, ByteTokenizer(), "")
    found, ours = load_tokenizer(tmp_path / "a"), ByteTokenizer()
    assert (found.vocab_size, found.bos, found.eos, found.stops) == (258, 256, 257, (257,))
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "a" / "tokenizer.json"))
    for text in TEXTS:
        np.testing.assert_array_equal(found.encode(text), ours.encode(text))
        assert found.decode(ours.encode(text)) == text
        if "<" not in text:  # others take what looks like a special token for one
            np.testing.assert_array_equal(plain.encode(text).ids, ours.encode(text, eos=False))
    generation = json.loads((tmp_path / "a" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 256, "eos_token_id": [257]}


def test_a_tokenizer_s_files_go_on(tmp_path):
    vocab = {"a": 0, "b": 1, "<s>": 2, "</s>": 3}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    made.add_special_tokens(["<s>", "</s>"])
    source = write(
        tmp_path / "source", {**CONFIG, "bos_token_id": 2, "eos_token_id": 3}, to_huggingface(random_params(MODEL))
    )
    made.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": "{{ x }}"}))
    config, params, tokenizer, _ = lr.load_pretrained(source)
    assert isinstance(tokenizer, SubwordTokenizer)
    export_checkpoint(tmp_path / "a", config, params, TABLE, tokenizer, "")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (source / name).read_bytes()
    again = load_tokenizer(tmp_path / "a")
    # But where texts would be cut at the old context.
    named = {"bos_token": "<s>", "model_max_length": 64}
    (source / "tokenizer_config.json").write_text(json.dumps(named))
    export_checkpoint(tmp_path / "b", config, params, TABLE, load_tokenizer(source), "")
    assert json.loads((tmp_path / "b" / "tokenizer_config.json").read_text()) == {**named, "model_max_length": 512}
    assert (again.bos, again.eos, again.stops) == (tokenizer.bos, tokenizer.eos, tokenizer.stops) == (2, 3, (3,))
