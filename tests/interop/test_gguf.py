import struct

import gguf
import numpy as np
import pytest
import tiny_gguf as tiny
from gguf import GGMLQuantizationType as Type

from longrope_jax.interop import describe_pretrained
from longrope_jax.interop.gguf import checkpoint, open_gguf

WEIGHTS = tiny.make_weights()
QUERY, KEY = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def plain(folder):
    """Untied, grouped-query heads, float32."""
    return tiny.write_model(folder / "plain.gguf", WEIGHTS)


def test_config_is_that_of_hugging_face(plain):
    config, _ = open_gguf(plain)
    assert config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default", "factor": 1.0},
    }


def test_every_tensor_is_back_under_its_name_and_in_its_order(plain):
    _, source = open_gguf(plain)
    assert source.shapes() == {name: (weight.shape, np.dtype(np.float32)) for name, weight in WEIGHTS.items()}
    for name, weight in WEIGHTS.items():
        np.testing.assert_array_equal(source.read(name), weight, err_msg=name)


def test_without_an_output_head_the_embedding_is_it(folder):
    weights = tiny.make_weights(tied=True)
    config, source = open_gguf(tiny.write_model(folder / "tied.gguf", weights))
    assert config["tie_word_embeddings"] is True
    assert source.shapes().keys() == weights.keys()


QUANTIZED = [Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0]


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_quantised_tensors_are_what_the_package_makes_of_them(folder, kind):
    _, source = open_gguf(tiny.write_model(folder / f"{kind.name}.gguf", WEIGHTS, kind))
    for name, weight in WEIGHTS.items():
        # Rows are quantised one by one, so it makes no difference that the converter had moved them.
        wanted = weight if weight.ndim == 1 else gguf.dequantize(gguf.quantize(weight, kind), kind)
        read = source.read(name)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, wanted, err_msg=name)
        assert np.abs(read - weight).max() <= 0.1 * np.abs(weight).max(), name


@pytest.mark.parametrize("kind", [Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K], ids=lambda kind: kind.name)
def test_k_quants_are_what_the_package_makes_of_them(folder, kind):
    """The package can't make them, but any bytes are some numbers."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 60, (tiny.HEADS * tiny.HEAD_DIM, 2 * size), np.uint8)
    path = folder / f"{kind.name}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in tiny.METADATA.items():
        if key != "general.architecture":
            tiny.add(writer, key, value)
    writer.add_tensor("token_embd.weight", WEIGHTS["model.embed_tokens.weight"])
    writer.add_tensor("blk.0.attn_q.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _, source = open_gguf(path)
    read = source.read("model.layers.0.self_attn.q_proj.weight")
    assert read.shape == (tiny.HEADS * tiny.HEAD_DIM, 2 * block)
    assert np.isfinite(read).all() and read.any()
    np.testing.assert_array_equal(tiny.rotate_neighbours(read, tiny.HEADS), gguf.dequantize(raw, kind))


SLICES = [
    (slice(None), slice(None)),
    (slice(0, 8), slice(None)),
    (slice(24, 32), slice(None)),
    (slice(None), slice(32, 64)),
    (slice(5, 19), slice(7, 9)),
    (slice(8, 8), slice(None)),
]


@pytest.mark.parametrize("slices", SLICES, ids=str)
@pytest.mark.parametrize("name", [QUERY, KEY, "model.layers.0.mlp.down_proj.weight", "lm_head.weight"])
def test_a_part_of_a_tensor_is_that_part(folder, name, slices):
    path = folder / "parts.gguf"
    if not path.exists():
        tiny.write_model(path, WEIGHTS, Type.Q8_0)
    _, source = open_gguf(path)
    part = source.read(name, slices)
    np.testing.assert_array_equal(part, source.read(name)[slices])


def test_a_part_of_a_vector(plain):
    _, source = open_gguf(plain)
    np.testing.assert_array_equal(source.read("model.norm.weight", (slice(3, 9),)), WEIGHTS["model.norm.weight"][3:9])


def test_a_part_costs_only_its_rows(plain, monkeypatch):
    sizes = []
    _, source = open_gguf(plain)
    monkeypatch.setattr(checkpoint, "dequantize", lambda rows, kind: sizes.append(len(rows)) or rows.view(np.float32))
    source.read(QUERY, (slice(8, 16), slice(None)))
    assert sum(sizes) == 8


def test_tensors_that_no_llama_has_keep_their_name(folder):
    tensors = tiny.to_llama_cpp(WEIGHTS) | {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}
    tensors["blk.0.attn_q.bias"] = np.ones(64, np.float32)
    _, source = open_gguf(tiny.write(folder / "more.gguf", tensors=tensors))
    assert source.shapes().keys() - WEIGHTS.keys() == {
        "blk.0.attn_sinks.weight",
        "model.layers.0.self_attn.q_proj.bias",
    }


# rope


def open_rope(path, tensors=None, **metadata):
    metadata = tiny.METADATA | {f"llama.rope.{key}": value for key, value in metadata.items()}
    tensors = {"token_embd.weight": WEIGHTS["model.embed_tokens.weight"]} | (tensors or {})
    config, source = open_gguf(tiny.write(path, metadata, tensors))
    assert source.shapes().keys() == {"model.embed_tokens.weight"}  # factors are no weights
    return config["rope_parameters"]


FACTORS = (1 + np.arange(8) / 4).astype(np.float32)


def test_linear_scaling(tmp_path):
    rope = open_rope(tmp_path / "a.gguf", **{"scaling.type": "linear", "scaling.factor": 4.0})
    assert rope == {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
    assert open_rope(tmp_path / "b.gguf", **{"scale_linear": 4.0}) == rope  # as files of 2023 put it
    assert open_rope(tmp_path / "c.gguf", **{"scaling.factor": 4.0}) == rope


@pytest.mark.parametrize("metadata", [{"scaling.type": "none"}, {"scaling.factor": 0.0}, {"scaling.type": "linear"}])
def test_no_scaling(tmp_path, metadata):
    kind = metadata.get("scaling.type", "none").replace("none", "default")
    assert open_rope(tmp_path / "a.gguf", **metadata) == {"rope_type": kind, "rope_theta": 5000.0, "factor": 1.0}


def test_the_base_is_10000_where_none_is_given(folder):
    config, _ = open_gguf(tiny.write_model(folder / "base.gguf", WEIGHTS, llama__rope__freq_base=None))
    assert config["rope_parameters"]["rope_theta"] == 10000.0


def test_yarn(tmp_path):
    metadata = {
        "scaling.type": "yarn",
        "scaling.factor": 8.0,
        "scaling.original_context_length": 16,
        "scaling.yarn_beta_fast": 64.0,
    }
    rope = open_rope(tmp_path / "a.gguf", **metadata)
    assert rope.pop("attention_factor") == pytest.approx(0.1 * np.log(8) + 1)
    assert rope == {
        "rope_type": "yarn",
        "rope_theta": 5000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 64.0,
        "beta_slow": None,
    }


def test_factors_of_llama_3_divide_frequencies_at_every_length(tmp_path):
    rope = open_rope(tmp_path / "a.gguf", {"rope_freqs.weight": FACTORS})
    assert rope == {
        "rope_type": "longrope",
        "rope_theta": 5000.0,
        "short_factor": FACTORS.tolist(),
        "long_factor": FACTORS.tolist(),
        "original_max_position_embeddings": 128,
        "factor": 1.0,
        "attention_factor": 1.0,
    }


def test_longrope(tmp_path):
    tensors = {"rope_factors_short.weight": FACTORS, "rope_factors_long.weight": 2 * FACTORS}
    metadata = {
        "scaling.type": "longrope",
        "scaling.original_context_length": 32,
        "scaling.attn_factor": 1.25,
    }
    rope = open_rope(tmp_path / "a.gguf", tensors, **metadata)
    assert rope == {
        "rope_type": "longrope",
        "rope_theta": 5000.0,
        "short_factor": FACTORS.tolist(),
        "long_factor": (2 * FACTORS).tolist(),
        "original_max_position_embeddings": 32,
        "factor": 1.0,
        "attention_factor": 1.25,
    }


BAD_ROPE = {
    "rope_type = 'ntk' is not supported": ({}, {"scaling.type": "ntk"}),
    "original_max_position_embeddings = None": ({}, {"scaling.type": "longrope"}),
    "short_factor = None must be a list": ({"rope_factors_long.weight": FACTORS}, {}),
    "on top of the factors": ({"rope_freqs.weight": FACTORS}, {"scaling.type": "linear", "scaling.factor": 2.0}),
    "yarn_ext_factor = 0.5": ({}, {"scaling.type": "yarn", "scaling.yarn_ext_factor": 0.5}),
    "attn_factor = 1.5": ({}, {"scaling.attn_factor": 1.5}),
    "scaling.factor = -2.0": ({}, {"scaling.factor": -2.0}),
    "dimension_count = 8 must be 16": ({}, {"dimension_count": 8}),
    "must be a list of 8 numbers": ({"rope_freqs.weight": FACTORS[:4]}, {}),
}


@pytest.mark.parametrize("message", BAD_ROPE)
def test_a_rotary_embedding_that_is_not_supported(tmp_path, message):
    tensors, metadata = BAD_ROPE[message]
    with pytest.raises(ValueError, match=message):
        open_rope(tmp_path / "a.gguf", tensors, **metadata)


# bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general__architecture": "qwen2"}, "general.architecture = 'qwen2' is not supported"),
        ({"llama__expert_count": 8}, "is not supported: experts"),
        ({"llama__block_count": None}, "num_hidden_layers = None must be"),
        ({"llama__block_count": 0}, "num_hidden_layers = 0 must be"),
        ({"llama__embedding_length": "many"}, "hidden_size = 'many' must be"),
        ({"llama__attention__head_count_kv": [1, 2]}, r"num_key_value_heads = \[1, 2\] must be a positive whole"),
        ({"llama__attention__layer_norm_rms_epsilon": None}, "rms_norm_eps = None must be"),
        ({"llama__attention__layer_norm_rms_epsilon": float("nan")}, "rms_norm_eps = nan must be"),
        ({"llama__attention__value_length": 8}, "value_length = 8 must be 16"),
        ({"llama__attention__causal": False}, "llama.attention.causal"),
        ({"split__count": 3}, "split.count = 3 parts of a model"),
        ({"general__alignment": 0}, "general.alignment"),
    ],
)
def test_a_model_that_is_not_supported(tmp_path, changes, message):
    path = tiny.write_model(tmp_path / "a.gguf", WEIGHTS, **changes)
    with pytest.raises(ValueError, match=message) as error:
        describe_pretrained(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_a_number_a_layer_is_one_where_all_are_the_same(folder):
    path = tiny.write_model(folder / "layers.gguf", WEIGHTS, llama__attention__head_count_kv=[2, 2])
    assert open_gguf(path)[0]["num_key_value_heads"] == 2


def test_types_that_cannot_be_dequantised_are_all_named(tmp_path):
    tensors = tiny.to_llama_cpp(WEIGHTS)
    for name in ("output.weight", "blk.0.ffn_up.weight"):
        tensors[name] = tensors[name].astype(np.float64)
    path = tiny.write(tmp_path / "a.gguf", tensors=tensors)
    with pytest.raises(ValueError, match="of type F64, which .*: output.weight, blk.0.ffn_up.weight$"):
        open_gguf(path)


def test_only_an_embedding_makes_a_model(tmp_path):
    path = tiny.write(tmp_path / "a.gguf", tensors={"output_norm.weight": np.ones(64, np.float32)})
    with pytest.raises(ValueError, match="'token_embd.weight' is missing"):
        open_gguf(path)


def test_big_endian_files_are_refused(tmp_path):
    path = tiny.write(tmp_path / "a.gguf", tensors=tiny.to_llama_cpp(WEIGHTS), endian=gguf.GGUFEndian.BIG)
    with pytest.raises(ValueError, match="big-endian"):
        open_gguf(path)


@pytest.mark.parametrize("content", [b"GGU", b"PK\x03\x04 and so on", b"\x80\x04pickle"], ids=repr)
def test_a_file_that_is_no_gguf(tmp_path, content):
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.gguf: not a GGUF file"):
        open_gguf(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        open_gguf(tmp_path / "a.gguf")


def header(version=3, tensors=0, pairs=0):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs)


def text(value):
    return struct.pack("<Q", len(value)) + value


def a_list(kind, count, key=b"key"):
    return text(key) + struct.pack("<IIQ", gguf.GGUFValueType.ARRAY, kind, count)


A_TENSOR = text(b"w") + struct.pack("<IQ", 1, 1 << 40) + struct.pack("<IQ", Type.F32, 0)
DAMAGED = {
    "version": (header(version=1), "version 1"),
    "count of pairs": (header(pairs=1 << 60), "cut off or damaged"),
    "count of tensors": (header(tensors=1 << 60), "cut off or damaged"),
    "length of a key": (header(pairs=1) + struct.pack("<Q", (1 << 64) - 1), "cut off or damaged"),
    "type of a value": (header(pairs=1) + text(b"key") + struct.pack("<I", 99), "99 .*is no type"),
    "length of a list": (header(pairs=1) + a_list(gguf.GGUFValueType.UINT8, 1 << 62), "damaged: a list of"),
    "length of numbers": (header(pairs=1) + a_list(gguf.GGUFValueType.UINT8, 1 << 20), "cut off or damaged"),
    "list of lists": (header(pairs=1) + a_list(9, 1) + struct.pack("<IQ", 9, 1) * 5000, "too deep"),
    "no UTF-8": (header(pairs=1) + text(b"\xff\xfe"), "utf-8"),
    "key twice": (header(pairs=2) + (text(b"k") + struct.pack("<IB", 0, 1)) * 2, "the key 'k' occurs twice"),
    "tensor twice": (header(tensors=2) + A_TENSOR * 2, "the tensor 'w' occurs twice"),
    "axes": (header(tensors=1) + text(b"w") + struct.pack("<I", 1 << 30), "has 1073741824 axes"),
    "beyond the end": (header(tensors=1) + A_TENSOR, "tensor 'w' ends at byte"),
    "type of a tensor": (
        header(tensors=1) + text(b"w") + struct.pack("<IQIQ", 1, 8, 999, 0),
        "999 is not a valid GGMLQuantizationType",
    ),
    "no size": (header(tensors=1) + text(b"w") + struct.pack("<IQQIQ", 2, 0, 1 << 60, Type.F32, 0), "'w' has shape"),
    "half a block": (
        header(tensors=1) + text(b"w") + struct.pack("<IQIQ", 1, 33, Type.Q8_0, 0),
        "no multiple of the 32",
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_header(tmp_path, what):
    content, message = DAMAGED[what]
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        open_gguf(path)
    assert "\n" not in str(error.value)


def test_a_file_cut_anywhere_is_an_error(plain, tmp_path):
    content = plain.read_bytes()
    path = tmp_path / "a.gguf"
    for size in [*range(0, 1200, 7), len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="a.gguf: "):
            open_gguf(path)


def test_a_flipped_byte_is_at_worst_a_clear_error(plain, tmp_path):
    content = bytearray(plain.read_bytes())
    path = tmp_path / "a.gguf"
    rng = np.random.default_rng(0)
    errors = 0
    for place in rng.integers(4, 2500, 300):
        original, content[place] = content[place], rng.integers(256)
        path.write_bytes(content)
        content[place] = original
        try:
            open_gguf(path)
        except ValueError as error:
            errors += 1
            assert str(error).startswith(f"{path}: ")
    assert errors > 50
