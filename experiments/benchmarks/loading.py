"""Measures peak host memory while a checkpoint is loaded, against its parameters, by dtype, layout and devices.

python experiments/benchmarks/loading.py [model.gguf]

Every row is its own process, which this one watches through /proc (Linux). It counts anonymous memory, because the
system can drop pages of the memory-mapped checkpoint at any moment. The last column includes these pages.
"""

import argparse
import json
import os
import re
import select
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from timing import Ratio

from longrope_jax.interop import describe_pretrained
from longrope_jax.interop.architectures import checkpoint_tensors
from longrope_jax.interop.pretrained import read_params
from longrope_jax.model import LlamaConfig
from longrope_jax.runtime.mesh import Layout, MeshSettings

# With a head of its own: it is read last, when everything else is in memory already.
CONFIG = LlamaConfig.preset("smollm2_135m", tie_embeddings=False)
FILES = {"bfloat16": (False, ml_dtypes.bfloat16), "float32": (False, np.float32), "fused": (True, ml_dtypes.bfloat16)}
# Which of the files, the float that is kept, and over which devices.
ROWS = (
    ("bfloat16", "float32", "data:1"),
    ("bfloat16", "bfloat16", "data:1"),
    ("float32", "float32", "data:1"),
    ("fused", "float32", "data:1"),
    ("fused", "bfloat16", "data:1"),
    ("bfloat16", "float32", "fsdp:8"),
    ("bfloat16", "bfloat16", "fsdp:8"),
    ("fused", "float32", "fsdp:8"),
)
MIB = 2**20


def write_checkpoint(folder: Path, is_fused: bool, dtype: np.dtype) -> None:
    """A folder of the shape of `CONFIG`; with `is_fused`, in Phi-3's tensors."""
    config = {
        "architectures": ["Phi3ForCausalLM" if is_fused else "LlamaForCausalLM"],
        "vocab_size": CONFIG.vocab_size,
        "hidden_size": CONFIG.hidden_size,
        "intermediate_size": CONFIG.intermediate_size,
        "num_hidden_layers": CONFIG.num_layers,
        "num_attention_heads": CONFIG.num_heads,
        "num_key_value_heads": CONFIG.num_kv_heads,
        "max_position_embeddings": CONFIG.original_length,
        "rope_theta": CONFIG.rope_theta,
        "rms_norm_eps": CONFIG.norm_eps,
        "tie_word_embeddings": CONFIG.tie_embeddings,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {
        stored.tensor.format(layer): np.ones(stored.shape, dtype)
        for stored in checkpoint_tensors(CONFIG, is_fused).values()
        for layer in range(CONFIG.num_layers)
    }
    save_file(tensors, folder / "model.safetensors")


def load(path: str, param_dtype: str, axes: str) -> None:
    """What a watched process does: it says when it is ready, and what it keeps once it has read everything."""
    layout = Layout.of(MeshSettings(axes))
    config, _ = describe_pretrained(path, param_dtype=param_dtype)
    jax.block_until_ready(jax.numpy.zeros(1))
    print("ready", flush=True)
    input()
    params = jax.block_until_ready(read_params(path, config, layout.mesh))
    kept = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    print(kept, params["embed"]["embedding"].nbytes, flush=True)
    input()


def resident(process: int, *names: str) -> int:
    """Bytes of a process: the sum of some numbers of /proc/PID/status, such as RssAnon."""
    status = Path(f"/proc/{process}/status").read_text()
    return 1024 * sum(int(re.search(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE)[1]) for name in names)


def watch(path: Path, param_dtype: str, axes: str) -> tuple[int, int, int, int]:
    """Bytes that are kept and of the largest tensor, which is the embedding; and the peaks of anonymous and of all
    memory, above what there was before.
    """
    devices = int(axes.split(":")[1])
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, __file__, str(path), "--child", param_dtype, axes]
    with subprocess.Popen(
        command,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        process.stdout.readline()
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # VmHWM starts again
        before = peak = resident(process.pid, "RssAnon", "RssShmem")
        all_before = resident(process.pid, "VmRSS")
        print(file=process.stdin, flush=True)
        while not select.select([process.stdout], [], [], 0.001)[0]:
            peak = max(peak, resident(process.pid, "RssAnon", "RssShmem"))
        kept, largest = map(int, process.stdout.readline().split())
        high = resident(process.pid, "VmHWM")
        process.communicate("\n")
    return kept, largest, peak - before, high - all_before


def ratios() -> list[Ratio]:
    """A checkpoint in bfloat16 that is kept in float32."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bfloat16"
        write_checkpoint(path, *FILES["bfloat16"])
        kept, largest, peak, _ = watch(path, "float32", "data:1")
    return [Ratio("peak of host memory, SmolLM2-135M", peak / allowed(kept, largest), "of what is allowed", "lower")]


def allowed(kept: int, largest: int) -> float:
    """Bytes of host memory that reading may take at most."""
    return 1.1 * kept + largest


def main() -> None:
    """Prints one line a checkpoint, float and mesh."""
    parser = argparse.ArgumentParser()
    parser.add_argument("path", nargs="?", type=Path, help="a GGUF file, to be read as well")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        load(options.path, *options.child)
        return
    print("checkpoint  kept as   devices  parameters  largest   peak  allowed         with the file's pages  (MiB)")
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / name for name in FILES}
        for name, path in paths.items():
            write_checkpoint(path, *FILES[name])
        rows = [(paths[name], *rest) for name, *rest in ROWS]
        if options.path:
            rows += [(options.path, "float32", "data:1"), (options.path, "bfloat16", "fsdp:8")]
        for path, param_dtype, axes in rows:
            kept, largest, peak, high = watch(path, param_dtype, axes)
            bound = allowed(kept, largest)
            numbers = " ".join(f"{size / MIB:8.0f}" for size in (kept, largest, peak, bound))
            verdict = "inside" if peak <= bound else "OVER"
            print(f"{path.name[:11]:11} {param_dtype:9} {axes:7} {numbers}  {verdict} {high / MIB:20.0f}", flush=True)


if __name__ == "__main__":
    main()
