"""Makes tests/golden: tiny random models as Transformers saves them, and the logits that it computes on PyTorch.

    .venv-parity/bin/python tests/parity/make_golden_logits.py

The files there are from transformers 5.23.0 and torch 2.13.0 for CPUs, which make the same again byte by byte. Other
versions may draw other weights, which is no harm: their logits are made with them.
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from test_architectures import MODELS, SIZES

GOLDEN = Path(__file__).parent.parent / "golden"
LENGTHS = (64, 65, 512, 2048)  # below and above where factors change: 64 tokens, and 512 of YaRN's ramp
POSITIONS = 6


def make(name: str) -> None:
    """The folder of a model: config.json, model.safetensors, and golden.npz with the tokens and, by length, some
    positions and their logits in float32.
    """
    kind, rest = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **rest)
    # Half the bytes; the logits are computed in float32 with the numbers that are in the file.
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().bfloat16()
    (GOLDEN / name).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for file in ("config.json", "model.safetensors"):
            shutil.copyfile(Path(folder) / file, GOLDEN / name / file)
        model = type(model).from_pretrained(folder, dtype=torch.float32).eval()
    tokens = np.random.default_rng(0).integers(3, SIZES["vocab_size"], max(LENGTHS))
    arrays = {"tokens": tokens.astype(np.uint8)}
    for length in LENGTHS:
        positions = np.linspace(0, length - 1, POSITIONS).astype(np.int32)
        with torch.inference_mode():
            logits = model(torch.as_tensor(tokens[None, :length])).logits[0].numpy()
        arrays |= {f"positions_{length}": positions, f"logits_{length}": logits[positions]}
        print(f"{name} at {length}: logits from {logits.min():.2f} to {logits.max():.2f}")
    np.savez_compressed(GOLDEN / name / "golden.npz", **arrays)


if __name__ == "__main__":
    for name in MODELS:
        make(name)
