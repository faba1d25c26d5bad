"""Models of others: checkpoints and tokenizers in and out."""

from longrope_jax.interop.pretrained import Pretrained, describe_pretrained, load_pretrained, load_tokenizer

__all__ = ["Pretrained", "describe_pretrained", "load_pretrained", "load_tokenizer"]
