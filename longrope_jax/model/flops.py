"""FLOPs of a model, counted from its sizes, for MFU and step-time estimates.

The compiler's own count does not work for that: it counts the body of a loop once, and layers, the ring and the blocks
of attention are loops. A multiplication and an addition are two operations.
"""

from typing import NamedTuple

from longrope_jax.model.config import LlamaConfig

FORWARD, TRAINING = 1, 3  # a backward pass has two products for each of the forward pass


class Flops(NamedTuple):
    """Floating-point operations of matrix products.

    Attributes:
        matrices: products with parameters, linear in the number of tokens.
        attention: products of queries with keys and of weights with values, quadratic: T (T + 1) / 2 causal pairs per
            sequence.
    """

    matrices: float
    attention: float

    @property
    def total(self) -> float:
        """Both."""
        return self.matrices + self.attention

    def __mul__(self, factor: float) -> "Flops":  # type: ignore[override]  # a tuple's would repeat the numbers
        return Flops(self.matrices * factor, self.attention * factor)


def matrix_parameters(config: LlamaConfig) -> int:
    """Number of parameters in matrix products: all but norms and the embedding lookup; the output head counts, tied or
    not.
    """
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    layer = config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)
    return config.num_layers * layer + config.hidden_size * config.vocab_size


def count_flops(config: LlamaConfig, sequences: int, length: int, passes: int = FORWARD) -> Flops:
    """FLOPs of `sequences` sequences of `length` tokens, each attending to all before it.

    Args:
        passes: FORWARD, or TRAINING for forward and backward: what the model needs ("model FLOPs", PaLM, arXiv
            2204.02311, appendix B), without recomputation by rematerialisation.
    """
    tokens, pairs = sequences * length, sequences * length * (length + 1) / 2
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * pairs
    return Flops(2.0 * matrix_parameters(config) * tokens, float(attention)) * passes
