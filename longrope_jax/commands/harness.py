"""Benchmarks of a pretrained model with the lm-evaluation-harness.

    python -m longrope_jax.commands.harness --model=PATH --tasks=arc_challenge --output=FILE

PATH is a Hugging Face folder or a GGUF file. Tasks are those of the lm-evaluation-harness, or YAML files in
`--include_path`; `--factors` is a file with factors to use in the place of those that the model came with. Needs
requirements-harness.txt.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from etils import epath

from longrope_jax.interop.factor_files import factors_for
from longrope_jax.interop.pretrained import describe_pretrained, load_tokenizer, read_params
from longrope_jax.model import Llama
from longrope_jax.model.config import FLOAT_TYPES
from longrope_jax.runtime import processes
from longrope_jax.runtime.mesh import Layout, MeshSettings


def main(arguments: Sequence[str]) -> None:
    """Runs the benchmarks, prints the harness's table and writes its results; what the user can mend is one line."""
    options = _parser().parse_args(arguments)
    try:
        results, table = run(options)
        processes.write_json(epath.Path(options.output), results)
        if processes.is_first():
            print(table)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def run(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """See `evaluation.harness_model.benchmark`; everything that can be wrong is looked at before the weights are read.

    Raises:
        ValueError, OSError, ImportError: the harness is missing, there is no such task, or the model or the factors
            can't be loaded.
    """
    from longrope_jax.evaluation.harness_model import HarnessModel, benchmark, find_tasks  # an optional extra

    if not epath.Path(options.output).parent.is_dir():
        raise ValueError(f"output = {options.output!r}: its parent directory does not exist")
    layout = Layout.of(MeshSettings(axes=options.mesh))
    config, table = describe_pretrained(options.model, dtype=options.dtype)
    if options.factors:
        table = factors_for(options.factors, config)
    names = [name for name in options.tasks.split(",") if name]
    tasks = find_tasks(names, options.include_path)
    tokenizer = load_tokenizer(options.model)
    if options.bos and tokenizer.bos is None:
        raise ValueError(f"--bos needs a tokenizer with a BOS token; that of {options.model!r} has none")
    params = read_params(options.model, config, layout.mesh)
    model = HarnessModel(Llama(config), params, tokenizer, table, layout, options.tokens_at_once, options.bos)
    results, text = benchmark(model, names, tasks, options.num_fewshot, options.limit)
    return {**results, "model": options.model, "factors": options.factors}, text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("longrope_jax.commands.harness", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a Hugging Face folder or a .gguf file")
    parser.add_argument("--factors", help="a table of factors by length, or a config.json; instead of the model's own")
    parser.add_argument("--tasks", required=True, help="names, with commas between them")
    parser.add_argument("--output", required=True, help="where the results go, .json")
    parser.add_argument("--num_fewshot", type=int, help="examples in the prompt; a task's own number if left out")
    parser.add_argument("--limit", type=int, help="only so many documents of every task")
    parser.add_argument("--include_path", help="a folder with tasks of one's own")
    parser.add_argument("--mesh", default="data:1", help="devices, as in config.mesh.axes")
    parser.add_argument("--dtype", default="float32", choices=FLOAT_TYPES, help="of activations and matrix products")
    parser.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="whether a text begins with the BOS token; by default as the tokenizer says",
    )
    parser.add_argument("--tokens_at_once", type=int, default=8192, help="tokens of one forward pass")
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
