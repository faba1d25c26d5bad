"""Tiny models of the llama architecture in GGUF files, written as llama.cpp's converter writes them."""

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 4, 2, 16, 64, 96, 2, 96

METADATA = {
    "general.architecture": "llama",
    "llama.block_count": LAYERS,
    "llama.context_length": 128,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": INTERMEDIATE,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": HEAD_DIM,
    "llama.rope.freq_base": 5000.0,
    "llama.vocab_size": VOCABULARY,
}

SHAPES = {
    "attn_norm": (HIDDEN,),
    "attn_q": (HEADS * HEAD_DIM, HIDDEN),
    "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_output": (HIDDEN, HEADS * HEAD_DIM),
    "ffn_norm": (HIDDEN,),
    "ffn_gate": (INTERMEDIATE, HIDDEN),
    "ffn_up": (INTERMEDIATE, HIDDEN),
    "ffn_down": (HIDDEN, INTERMEDIATE),
}

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def make_weights(seed=0, tied=False):
    """Hugging Face name -> float32 weight, with the rows as Hugging Face has them."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    weights = {"model.embed_tokens.weight": draw(VOCABULARY, HIDDEN), "model.norm.weight": 1 + draw(HIDDEN) / 10}
    if not tied:
        weights["lm_head.weight"] = draw(VOCABULARY, HIDDEN) / 8
    for layer in range(LAYERS):
        for name, shape in SHAPES.items():
            weight = 1 + draw(*shape) / 10 if len(shape) == 1 else draw(*shape) / 8
            weights[f"model.layers.{layer}.{NAMES[name]}.weight"] = weight
    return weights


def to_llama_cpp(weights):
    """The same by llama.cpp's names, with the rows of queries and keys where its converter puts them."""
    own = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    own |= {f"model.layers.{i}.{theirs}": f"blk.{i}.{ours}" for i in range(LAYERS) for ours, theirs in NAMES.items()}
    converted = {f"{own[name.removesuffix('.weight')]}.weight": weight for name, weight in weights.items()}
    for layer in range(LAYERS):
        for name, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS)):
            key = f"blk.{layer}.{name}.weight"
            converted[key] = rotate_neighbours(converted[key], heads)
    return converted


def rotate_neighbours(weight, heads):
    """Row by row: pair i of a head is rows i and i + D/2 with Hugging Face, 2 i and 2 i + 1 with llama.cpp."""
    moved = np.empty_like(weight)
    size = len(weight) // heads
    for head in range(heads):
        for half in range(2):
            for pair in range(size // 2):
                moved[head * size + 2 * pair + half] = weight[head * size + half * (size // 2) + pair]
    return moved


def write(path, metadata=METADATA, tensors=None, types=None, endian=gguf.GGUFEndian.LITTLE):
    """A GGUF file: tensors by llama.cpp's names; types by name, else `types` for every matrix, else as they are."""
    writer = gguf.GGUFWriter(path, metadata.get("general.architecture", ""), endianess=endian)
    for key, value in metadata.items():
        if key != "general.architecture":
            add(writer, key, value)
    for name, weight in (tensors or {}).items():
        kind = types.get(name) if isinstance(types, dict) else types if np.ndim(weight) == 2 else None
        if kind is None:
            writer.add_tensor(name, weight)
        else:
            writer.add_tensor(name, gguf.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(path, weights, types=Type.F32, **metadata):
    """A whole model; metadata by key, dots written as double underscores, None takes a key away."""
    changed = METADATA | {key.replace("__", "."): value for key, value in metadata.items()}
    changed = {key: value for key, value in changed.items() if value is not None}
    return write(path, changed, to_llama_cpp(weights), types)


def add(writer, key, value):
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
