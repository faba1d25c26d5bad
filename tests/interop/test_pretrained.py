"""Hugging Face folders: every number arrives where it belongs, and what is wrong is told before any is read."""

import json
import warnings

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import longrope_jax as lr
from longrope_jax.interop import describe_pretrained, load_tokenizer, pretrained
from longrope_jax.interop.pretrained import read_params, stored_dtype
from longrope_jax.interop.tensors import FolderTensors
from longrope_jax.model.sharding import make_mesh
from longrope_jax.training.step import init_params

CONFIG = dict(
    architectures=["LlamaForCausalLM"],
    vocab_size=24,
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    hidden_act="silu",
    tie_word_embeddings=False,
    rope_theta=10000.0,
)
MODEL = lr.LlamaConfig(
    vocab_size=24,
    hidden_size=16,
    intermediate_size=20,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    original_length=64,
)


def to_huggingface(params, fused=False):
    """Our parameters under Hugging Face's names, in its layout; written apart from the code that reads them."""
    layers, tensors = jax.tree.map(np.asarray, params["layers"]), {}
    tensors["model.embed_tokens.weight"] = np.asarray(params["embed"]["embedding"])
    tensors["model.norm.weight"] = np.asarray(params["final_norm"]["scale"])
    if "lm_head" in params:
        tensors["lm_head.weight"] = np.asarray(params["lm_head"]).T
    for n in range(len(layers["mlp_norm"]["scale"])):
        weight = {name: leaf["kernel"][n].T for part in ("attention", "mlp") for name, leaf in layers[part].items()}
        prefix = f"model.layers.{n}."
        if fused:
            tensors[prefix + "self_attn.qkv_proj.weight"] = np.concatenate(
                [weight["query"], weight["key"], weight["value"]]
            )
            tensors[prefix + "mlp.gate_up_proj.weight"] = np.concatenate([weight["gate"], weight["up"]])
        else:
            for name, ours in (("q", "query"), ("k", "key"), ("v", "value")):
                tensors[prefix + f"self_attn.{name}_proj.weight"] = weight[ours]
            tensors[prefix + "mlp.gate_proj.weight"] = weight["gate"]
            tensors[prefix + "mlp.up_proj.weight"] = weight["up"]
        tensors[prefix + "self_attn.o_proj.weight"] = weight["output"]
        tensors[prefix + "mlp.down_proj.weight"] = weight["down"]
        tensors[prefix + "input_layernorm.weight"] = layers["attention_norm"]["scale"][n]
        tensors[prefix + "post_attention_layernorm.weight"] = layers["mlp_norm"]["scale"][n]
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def write(folder, config, tensors, files=1):
    """A checkpoint folder; with several files they get an index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    index = {}
    for k in range(files):
        index |= {name: f"model-{k}.safetensors" for name in names[k::files]}
        save_file({name: tensors[name] for name in names[k::files]}, folder / f"model-{k}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.fixture(scope="module")
def params():
    """With norms that are not all ones, so that none can be mistaken for another."""
    made = init_params(lr.Llama(MODEL), 0)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: np.asarray(rng.normal(size=leaf.shape), np.float32), made)


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (where, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=jax.tree_util.keystr(where))


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM"])
@pytest.mark.parametrize("files", [1, 3])
def test_every_number_arrives_where_it_belongs(params, tmp_path, architecture, files):
    tensors = to_huggingface(params, fused=architecture.startswith("Phi3"))
    write(tmp_path / "model", {**CONFIG, "architectures": [architecture]}, tensors, files)
    config, found, tokenizer, table = lr.load_pretrained(tmp_path / "model")
    assert config == MODEL and tokenizer is None
    assert_same(found, params)
    np.testing.assert_array_equal(table.boundaries, [64])
    np.testing.assert_array_equal(table.select(64).lam, np.ones(4))


@pytest.mark.parametrize("is_fused", [False, True])
def test_parameters_are_cut_over_the_mesh_as_they_are_read(params, tmp_path, is_fused):
    architecture = "Phi3ForCausalLM" if is_fused else "LlamaForCausalLM"
    write(tmp_path / "model", {**CONFIG, "architectures": [architecture]}, to_huggingface(params, is_fused))
    found = lr.load_pretrained(tmp_path / "model", mesh=make_mesh(fsdp=2, tensor=2)).params
    assert_same(found, params)
    assert found["layers"]["mlp"]["up"]["kernel"].addressable_shards[0].data.shape == (3, 8, 10)
    assert found["lm_head"].addressable_shards[0].data.shape == (8, 12)


def test_a_mesh_that_does_not_fit_is_refused(params, tmp_path):
    write(tmp_path / "model", CONFIG, to_huggingface(params))
    with pytest.raises(ValueError, match="num_kv_heads = 2 is not a multiple of tensor = 4"):
        lr.load_pretrained(tmp_path / "model", mesh=make_mesh(tensor=4))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_is_cast_without_loss(params, tmp_path, dtype):
    halved = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    write(tmp_path / "model", CONFIG, to_huggingface(halved))
    assert_same(lr.load_pretrained(tmp_path / "model").params, jax.tree.map(lambda x: x.astype(np.float32), halved))


def test_parameters_can_be_kept_in_bfloat16(params, tmp_path):
    write(tmp_path / "model", CONFIG, to_huggingface(params))
    config, found, *_ = lr.load_pretrained(tmp_path / "model", param_dtype="bfloat16", dtype="bfloat16")
    assert config.param_dtype == "bfloat16"
    assert_same(found, jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), params))


def test_tied_embeddings_need_no_head_and_old_buffers_are_passed_over(params, tmp_path):
    tied = {name: leaf for name, leaf in params.items() if name != "lm_head"}
    tensors = to_huggingface(tied)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    write(tmp_path / "model", {**CONFIG, "tie_word_embeddings": True}, tensors)
    config, found, *_ = lr.load_pretrained(tmp_path / "model")
    assert config.tie_embeddings
    assert_same(found, tied)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_head_beside_a_tied_embedding_has_to_be_the_same(params, tmp_path, dtype):
    tied = {name: leaf.astype(dtype) for name, leaf in to_huggingface(params).items()}
    tied["lm_head.weight"] = tied["model.embed_tokens.weight"].copy()
    write(tmp_path / "model", {**CONFIG, "tie_word_embeddings": True}, tied)
    assert "lm_head" not in lr.load_pretrained(tmp_path / "model").params
    tied["lm_head.weight"][-1, -1] += 1
    write(tmp_path / "model", {**CONFIG, "tie_word_embeddings": True}, tied)
    with pytest.raises(ValueError, match="lm_head.weight differs from .* but tie_word_embeddings = True"):
        lr.load_pretrained(tmp_path / "model")
    tied["lm_head.weight"] = tied["lm_head.weight"][:-1]
    write(tmp_path / "model", {**CONFIG, "tie_word_embeddings": True}, tied)
    with pytest.raises(ValueError, match="lm_head.weight differs"):
        lr.load_pretrained(tmp_path / "model")


@pytest.mark.parametrize("is_fused", [False, True])
def test_a_tensor_that_is_read_a_few_rows_at_a_time_arrives_whole(params, tmp_path, monkeypatch, is_fused):
    """Five rows, or fewer of wider ones: the last block is smaller than the others."""
    architecture = "Phi3ForCausalLM" if is_fused else "LlamaForCausalLM"
    write(tmp_path / "model", {**CONFIG, "architectures": [architecture]}, to_huggingface(params, is_fused))
    monkeypatch.setattr(pretrained, "_BATCH", 5 * 16)
    read, sizes = FolderTensors.read, []

    def watched(source, name, slices):
        sizes.append(read(source, name, slices).size)
        return read(source, name, slices)

    monkeypatch.setattr(FolderTensors, "read", watched)
    assert_same(lr.load_pretrained(tmp_path / "model").params, params)
    assert_same(lr.load_pretrained(tmp_path / "model", mesh=make_mesh(fsdp=2, tensor=2)).params, params)
    assert max(sizes) == 5 * 16


FLOATS = [
    (np.float32, np.float32, "float32"),
    (np.float16, np.float16, "float32"),
    (ml_dtypes.bfloat16, ml_dtypes.bfloat16, "bfloat16"),
    (ml_dtypes.bfloat16, np.float32, "float32"),
]


@pytest.mark.parametrize(("matrices", "norms", "wanted"), FLOATS)
def test_the_dtype_that_keeps_every_number(params, tmp_path, matrices, norms, wanted):
    stored = {name: leaf.astype(norms if leaf.ndim == 1 else matrices) for name, leaf in to_huggingface(params).items()}
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}
    write(tmp_path / "model", CONFIG, stored | buffer)
    assert stored_dtype(tmp_path / "model") == wanted
    kept = to_huggingface(lr.load_pretrained(tmp_path / "model", param_dtype=wanted).params)
    for name, leaf in stored.items():
        np.testing.assert_array_equal(kept[name].astype(np.float32), leaf.astype(np.float32))


def test_what_is_wrong_with_a_config_is_reported_with_its_path(tmp_path):
    write(tmp_path / "model", {**CONFIG, "vocab_size": "24"}, {"x": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match="model: vocab_size = '24' must be a positive whole number"):
        describe_pretrained(tmp_path / "model")


@pytest.mark.parametrize(("content", "message"), [("[1]", "must hold a JSON object"), ("{", "Expecting")])
def test_a_config_that_is_no_object_is_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"config.json.* {message}"):
        describe_pretrained(tmp_path)


def test_all_that_is_wrong_with_tensors_is_reported_at_once(params, tmp_path):
    tensors = to_huggingface(params)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    tensors["model.norm.weight"] = np.zeros(17, np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int8)
    write(tmp_path / "model", CONFIG, tensors)
    with pytest.raises(ValueError) as error:
        lr.load_pretrained(tmp_path / "model")
    for message in (
        "1 missing tensors: model.layers.1.mlp.up_proj.weight",
        "1 unexpected tensors: model.layers.0.self_attn.q_proj.bias",
        "model.norm.weight has shape (17,), not (16,)",
        "lm_head.weight has dtype I8",
    ):
        assert message in str(error.value)


def test_more_layers_than_could_be_there_are_refused_at_once(params, tmp_path):
    write(tmp_path / "model", {**CONFIG, "num_hidden_layers": 2**31 - 1}, to_huggingface(params))
    with pytest.raises(ValueError, match="2147483647 layers are more than the 30 tensors"):
        lr.load_pretrained(tmp_path / "model")


def test_pickled_weights_are_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        lr.load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"weight_map": {"model.norm.weight": "../secret.safetensors"}}',
            "may only name .safetensors files of its folder",
        ),
        ('{"weight_map": {"model.norm.weight": "gone.safetensors"}}', "lacks gone.safetensors"),
        (
            '{"weight_map": {"model.norm.weight": "model.bin"}}',
            "may only name .safetensors files .*model.bin",
        ),
        ('{"weight_map": {"other": "model.safetensors"}}', "not in the files it names"),
        ('{"weight_map": 3}', "not an index"),
        ("{", "not an index"),
        ("[" * 100_000, "not an index"),
        ('{"weight_map": {"model.norm.weight": ["model.safetensors"]}}', "not an index"),
    ],
)
def test_an_index_that_lies_is_refused(params, tmp_path, content, message):
    write(tmp_path / "model", CONFIG, to_huggingface(params))
    (tmp_path / "model" / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        lr.load_pretrained(tmp_path / "model")


def test_a_tensor_in_two_files_is_refused_where_no_index_says_which_one_is_meant(params, tmp_path):
    tensors = to_huggingface(params)
    write(tmp_path / "model", CONFIG, tensors)
    save_file({"model.norm.weight": np.zeros(16, np.float32)}, tmp_path / "model" / "other.safetensors")
    with pytest.raises(ValueError, match="model.norm.weight is in model.safetensors and in other.safetensors"):
        lr.load_pretrained(tmp_path / "model")
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(lr.load_pretrained(tmp_path / "model").params, params)


def test_a_damaged_file_is_refused(params, tmp_path):
    path = write(tmp_path / "model", CONFIG, to_huggingface(params)) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="no sound safetensors file"):
        lr.load_pretrained(tmp_path / "model")


@pytest.mark.parametrize("name", ["nowhere", "nowhere.gguf"])
def test_a_path_to_nowhere_is_reported(tmp_path, name):
    with pytest.raises(ValueError, match="does not exist"):
        lr.load_pretrained(tmp_path / name)
    with pytest.raises(ValueError):
        load_tokenizer(tmp_path / name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Phi3ForCausalLM"])
@pytest.mark.parametrize("tied", [False, True])
def test_shapes_and_dtypes_are_those_of_a_new_model(params, tmp_path, architecture, tied, dtype):
    made = {name: leaf for name, leaf in params.items() if name != "lm_head" or not tied}
    content = {**CONFIG, "architectures": [architecture], "tie_word_embeddings": tied}
    write(tmp_path / "model", content, to_huggingface(made, fused=architecture.startswith("Phi3")))
    config, found, *_ = lr.load_pretrained(tmp_path / "model", param_dtype=dtype)
    like = jax.eval_shape(lambda: init_params(lr.Llama(config), 0))
    about = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert about(found) == about(like)


@pytest.mark.parametrize("name", ["architectures", "hidden_size", "rms_norm_eps", "hidden_act", "rope_theta"])
def test_a_long_value_is_reported_by_its_beginning(params, tmp_path, name):
    write(tmp_path / "model", {**CONFIG, name: [2**64] * 2000}, to_huggingface(params))
    with pytest.raises(ValueError, match=name) as caught:
        lr.load_pretrained(tmp_path / "model")
    assert len(str(caught.value)) < 1000


def test_the_stack_of_layers_is_filled_in_place(params, tmp_path):
    """A copy of a stack for every layer would cost twice its memory."""
    write(tmp_path / "model", CONFIG, to_huggingface(params))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as: some donated buffers were not usable
        assert_same(read_params(tmp_path / "model", MODEL), params)


def test_a_folder_in_an_object_store_is_copied_here_once(params, tmp_path, bucket, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write(tmp_path / "model", CONFIG, to_huggingface(params), files=2)
    for file in (tmp_path / "model").iterdir():
        (bucket / "model" / file.name).write_bytes(file.read_bytes())
    copies = []
    for _ in range(2):
        config, found, _, _ = lr.load_pretrained(bucket / "model")
        assert config == MODEL
        assert_same(found, params)
        copies.append({file.name: file.stat().st_mtime_ns for file in (tmp_path / "cache/longrope_jax").iterdir()})
    assert copies[0] == copies[1] and len(copies[0]) == 2
