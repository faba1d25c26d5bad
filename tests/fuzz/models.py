"""Models as they come: files of factors, checkpoints and tokenizers, made small and valid, and read as a user would."""

import contextlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tiny_gguf
from data.test_subwords import make_tokenizer
from etils import epath
from interop.test_export import LONG, SHORT, TABLE
from interop.test_gguf_tokenizer import byte_level, train
from interop.test_pretrained import CONFIG, MODEL, to_huggingface, write

import longrope_jax as lr
from longrope_jax import rope
from longrope_jax.data.tokenizer import SubwordTokenizer
from longrope_jax.interop import load_tokenizer
from longrope_jax.interop.export import tokenizer_files
from longrope_jax.interop.factor_files import read_factors
from longrope_jax.interop.gguf import gguf_tokenizer
from longrope_jax.interop.pretrained import describe_pretrained, read_params, stored_dtype
from longrope_jax.interop.tensors import FolderTensors
from longrope_jax.rope.huggingface import to_huggingface as to_rope_parameters
from longrope_jax.training.step import init_params

TEXT = "Some words, and ünï 日本語.\n"


# --- factors ----------------------------------------------------------------------------------------------------------


def make_factors(folder: Path) -> list[str]:
    metadata = {"target_length": 512, "original_length": 64, "model": {"rope_theta": 1e4}, "scores": {"512": 3.5}}
    rope.save_factors(folder / "set.json", LONG.replace(n_hat=np.int32(4)), **metadata)
    return ["set.json"]


def read_set(folder: Path, name: str) -> None:
    rope.load_metadata(folder / name)
    factors = rope.load_factors(folder / name)
    rope.FactorTable.of({512: factors}).select(100)
    rope.load_factors(folder / name, 2 * len(factors.lam))


def make_csv(folder: Path) -> list[str]:
    rope.save_factors(folder / "column.csv", SHORT.replace(mscale=np.float32(1), n_hat=np.int32(8)))
    (folder / "rows.csv").write_text("1.0,1.25,2.5,4.0\n" * 3)
    return ["column.csv", "rows.csv"]


def read_csv(folder: Path, name: str) -> None:
    rope.load_factors(folder / name)
    read_factors(folder / name, 512, 8)


def make_table(folder: Path) -> list[str]:
    rope.save_table(folder / "table.json", TABLE, original_length=64, rope_theta=1e4)
    return ["table.json"]


def read_table(folder: Path, name: str) -> None:
    rope.load_table(folder / name).select(64)


def make_any_factors(folder: Path) -> list[str]:
    parameters = to_rope_parameters(TABLE, 64)
    contents = {
        "rope.json": parameters,
        "beside.json": {"max_position_embeddings": 512, "rope_theta": 1e4, "rope_scaling": parameters},
        "config.json": {**CONFIG, "max_position_embeddings": 512, "rope_parameters": parameters},
        "yarn.json": {**CONFIG, "rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5,
                                                 "original_max_position_embeddings": 16}},
        "llama3.json": {**CONFIG, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                                   "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    return [*contents, *make_factors(folder), *make_table(folder)]


def read_any_factors(folder: Path, name: str) -> None:
    found = read_factors(folder / name)
    found.table.select(int(found.table.boundaries[-1]))


# --- models -----------------------------------------------------------------------------------------------------------


def random_weights(model: lr.LlamaConfig) -> dict[str, np.ndarray]:
    """Tensors of a checkpoint; no model is compiled for them."""
    like, rng = jax.eval_shape(partial(init_params, lr.Llama(model), 0)), np.random.default_rng(0)
    return to_huggingface(jax.tree.map(lambda leaf: np.asarray(rng.normal(size=leaf.shape), leaf.dtype), like))


def _make_model(folder: Path, files: int = 1, **changes: Any) -> None:
    write(folder, {**CONFIG, **changes}, random_weights(MODEL), files)


def make_config(folder: Path) -> list[str]:
    _make_model(folder, rope_scaling=to_rope_parameters(TABLE, 64), max_position_embeddings=512)
    return ["config.json"]


def read_model(folder: Path, name: str) -> None:
    config, table = describe_pretrained(folder)
    table.select(1)
    read_params(folder, config)


def make_tensors(folder: Path) -> list[str]:
    _make_model(folder)
    return ["model.safetensors"]


def make_index(folder: Path) -> list[str]:
    _make_model(folder, files=3)
    return ["model.safetensors.index.json"]


def read_tensors(folder: Path, name: str) -> None:
    stored_dtype(folder)
    source = FolderTensors(epath.Path(folder))
    for tensor in source.shapes():
        source.read(tensor)
    elsewhere = [file for file in source._files.values() if Path(file).resolve().parent != folder.resolve()]
    assert not elsewhere, f"reads {elsewhere}"
    with contextlib.suppress(ValueError):  # tensors of another model, told so
        read_params(folder, MODEL)


def make_gguf(folder: Path) -> list[str]:
    kinds = {"f32.gguf": tiny_gguf.Type.F32, "q8.gguf": tiny_gguf.Type.Q8_0}
    for name, kind in kinds.items():
        scaling = {"llama__rope__scaling__type": "yarn", "llama__rope__scaling__factor": 4.0}
        tiny_gguf.write_model(folder / name, tiny_gguf.make_weights(), kind, **scaling)
    factors = {
        f"rope_factors_{name}.weight": np.linspace(1, top, 8, dtype=np.float32)
        for name, top in (("short", 2), ("long", 9))
    }
    tensors = tiny_gguf.to_llama_cpp(tiny_gguf.make_weights()) | factors
    tiny_gguf.write(folder / "longrope.gguf", {**tiny_gguf.METADATA, "llama.rope.scaling.type": "longrope"}, tensors)
    return [*kinds, "longrope.gguf"]


def read_gguf(folder: Path, name: str) -> None:
    config, table = describe_pretrained(folder / name)
    table.select(1)
    read_params(folder / name, config)


def make_gguf_tokenizer(folder: Path) -> list[str]:
    metadata = byte_level(train("smollm"), "smollm")
    tiny_gguf.write(folder / "bpe.gguf", metadata)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁ab"]
    kinds = [2, 3, 3, *[6] * 256, 1, 1, 1, 1, 1]
    tiny_gguf.write(
        folder / "pieces.gguf",
        {
            "general.architecture": "llama",
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": pieces,
            "tokenizer.ggml.scores": [-float(index) for index in range(len(pieces))],
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
        },
    )
    return ["bpe.gguf", "pieces.gguf"]


def read_gguf_tokenizer(folder: Path, name: str) -> None:
    _use(gguf_tokenizer(folder / name))


def _use(tokenizer: SubwordTokenizer) -> None:
    tokenizer.decode(tokenizer.encode(TEXT))
    tokenizer_files(tokenizer, 2**20)
    assert tokenizer.fingerprint


def make_tokenizer_files(folder: Path) -> list[str]:
    make_tokenizer().save(str(folder / "tokenizer.json"))
    contents = {
        "tokenizer_config.json": {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "model_max_length": 4096},
        "special_tokens_map.json": {"bos_token": "<bos>"},
        "generation_config.json": {"eos_token_id": [1, 2], "bos_token_id": 0},
        "config.json": {"eos_token_id": 1},
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    return ["tokenizer.json", "tokenizer.json", *contents]


def read_tokenizer(folder: Path, name: str) -> None:
    _use(load_tokenizer(folder))
