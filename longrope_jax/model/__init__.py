"""A functional LLaMA whose rope factors are an argument."""

from longrope_jax.model.config import LlamaConfig
from longrope_jax.model.llama import Llama

__all__ = ["Llama", "LlamaConfig"]
