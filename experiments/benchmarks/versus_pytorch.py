"""Compares the speed of scoring a candidate with Transformers on PyTorch (SDPA attention, same weights).

make versus_pytorch
python experiments/benchmarks/versus_pytorch.py [TOKENS ...]

The shape of SmolLM2-135M, float32, all cores, alternating. For Transformers the loss runs over chunks of the sequence.
Its own loss would hold the logits of all tokens at once (1.6 GB at 8,192) and would be slower.
"""

import sys
import tempfile
from functools import partial

import jax
import numpy as np
import torch
import transformers
from timing import Ratio, median_seconds

import longrope_jax as lr
from longrope_jax.search.objective import rows_nll

LENGTHS = (2048, 8192)
PIECE = 256  # tokens whose logits PyTorch holds at a time: the fastest of 128 to 2,048 here
ROUNDS = 5


def peer() -> transformers.LlamaForCausalLM:
    """SmolLM2-135M with random weights."""
    shape = lr.LlamaConfig.preset("smollm2_135m")
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=shape.original_length,
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@torch.inference_mode()
def nll_of_peer(model: transformers.LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Nats per token of i64[T + 1]."""
    hidden = model.model(tokens[None, :-1], use_cache=False).last_hidden_state[0]
    pieces = zip(hidden.split(PIECE), tokens[1:].split(PIECE), strict=True)
    losses = [torch.nn.functional.cross_entropy(model.lm_head(h), t, reduction="sum") for h, t in pieces]
    return float(sum(losses)) / (len(tokens) - 1)


class Pair:
    """Both implementations with the same weights."""

    def __init__(self):
        self.torch_model = peer()
        with tempfile.TemporaryDirectory() as folder:
            self.torch_model.save_pretrained(folder)
            config, self.params, _, table = lr.load_pretrained(folder)
        self.model, self.factors = lr.Llama(config), lr.rope.stack([table.select(1)])

    def measure(self, length: int, rounds: int) -> tuple[dict[str, float], float]:
        """Seconds of either for a document of so many tokens, and how far apart their NLL is (nats per token)."""
        tokens = np.random.default_rng(0).integers(0, self.model.config.vocab_size, length + 1)
        rows = [part.astype(np.int32)[None] for part in (tokens[:-1], tokens[1:], np.arange(length))]
        mean = np.full((1, length), 1 / length, np.float32)
        competitors = {
            "PyTorch": partial(nll_of_peer, self.torch_model, torch.from_numpy(tokens)),
            "ours": partial(rows_nll, self.model, self.params, self.factors, mean, *rows),
        }
        apart = abs(competitors["PyTorch"]() - float(competitors["ours"]()[0]))
        return median_seconds(competitors, rounds), apart


def ratios() -> list[Ratio]:
    """At 2,048 tokens."""
    seconds, _ = Pair().measure(2048, 3)
    return [
        Ratio("a candidate's score, 2,048 tokens", seconds["PyTorch"] / seconds["ours"], "of PyTorch's speed", "higher")
    ]


def main(lengths: tuple[int, ...]) -> None:
    """Prints one line a length."""
    pair = Pair()
    versions = f"PyTorch {torch.__version__}, Transformers {transformers.__version__}, JAX {jax.__version__}"
    print(f"Tokens a second, median of {ROUNDS}; {versions}, {torch.get_num_threads()} threads.")
    print("  tokens   PyTorch   ours   ratio   NLL apart")
    for length in lengths:
        seconds, apart = pair.measure(length, ROUNDS)
        theirs, ours = length / seconds["PyTorch"], length / seconds["ours"]
        print(f"{length:8d} {theirs:9.0f} {ours:6.0f} {ours / theirs:7.2f} {apart:11.1e}")


if __name__ == "__main__":
    main(tuple(map(int, sys.argv[1:])) or LENGTHS)
