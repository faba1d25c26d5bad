"""GGUF files of the llama architecture: a config, tensors and a tokenizer, as Hugging Face has them."""

from longrope_jax.interop.gguf.checkpoint import GgufTensors, open_gguf
from longrope_jax.interop.gguf.tokenizer import gguf_tokenizer

__all__ = ["GgufTensors", "gguf_tokenizer", "open_gguf"]
