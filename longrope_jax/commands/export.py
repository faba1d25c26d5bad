"""Command line: exports models for Hugging Face, and converts files of factors.

python -m longrope_jax.commands.export export --model=PATH --factors=FILE --output=FOLDER
python -m longrope_jax.commands.export factors SOURCE DESTINATION

`export` writes a pretrained model (a folder or a GGUF file) with other factors as a folder; the stage `export` does it
for a model of an experiment. `factors` converts a file of factors.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from absl import logging
from etils import epath

from longrope_jax.data.corpus import Document
from longrope_jax.data.tokenizer import SubwordTokenizer
from longrope_jax.evaluation.factor_switching import changed_lengths, cost_windows, replacement_cost
from longrope_jax.interop.architectures import ARCHITECTURES
from longrope_jax.interop.export import check_architecture, export_checkpoint, fit_to_format
from longrope_jax.interop.factor_files import KINDS, factors_for, read_factors, write_factors
from longrope_jax.interop.pretrained import describe_pretrained, load_tokenizer, read_params, stored_dtype
from longrope_jax.model import Llama
from longrope_jax.model.config import FLOAT_TYPES
from longrope_jax.report.model_card import Card, cost_table, model_card
from longrope_jax.rope.huggingface import DROPPABLE
from longrope_jax.runtime.mesh import Layout, MeshSettings


def main(arguments: Sequence[str]) -> None:
    """Runs a command; an error that the user can fix is one line and exit status 2."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def export(options: argparse.Namespace) -> None:
    """Writes a model with other factors as a Hugging Face folder.

    Raises:
        ValueError: the model or the factors can't be loaded, do not fit, or the format does not support them.
        OSError: the folder can't be written.
    """
    output = _new_folder(options.output)
    layout = Layout.of(MeshSettings(axes=options.mesh))
    dtype = options.dtype or stored_dtype(options.model)
    config, model_factors = describe_pretrained(options.model, param_dtype=dtype)
    check_architecture(options.architecture, config)
    if options.target_length and not options.factors:
        raise ValueError(f"target_length = {options.target_length} is for a single set of factors: give --factors")
    found = factors_for(options.factors, config, options.target_length) if options.factors else model_factors
    exported, dropped = fit_to_format(found, config.original_length, _allowed(options))
    tokenizer = _tokenizer(options.model)
    documents = _documents(options.text, tokenizer)
    if dropped and changed_lengths(found, exported) and not documents:
        raise ValueError("the cost of what is dropped has to be measured: give --text, two files or more")
    windows = cost_windows(found, exported, documents, options.cost_lengths or (), options.cost_documents)

    params = read_params(options.model, config, layout.mesh)
    with layout.active():
        bos = None if tokenizer is None else tokenizer.window_bos
        costs = replacement_cost(Llama(config), layout, params, found, exported, windows, bos)
        if costs:
            print(cost_table(costs))
        if dropped:
            logging.warning("dropped %s; %s", "; ".join(dropped.values()), "; ".join(map(str, costs)) or "no cost")
        source = {"model": {"path": options.model}, "factors": {"path": options.factors or options.model}}
        card = Card(
            title=output.name,
            config=config,
            form=f"{options.architecture}, {dtype}",
            factors=found,
            exported=exported,
            dropped=dropped,
            costs=costs,
            text=", ".join(epath.Path(path).name for path in options.text),
            steps=source,
        )
        export_checkpoint(
            output, config, params, exported, tokenizer, model_card(card), architecture=options.architecture
        )
    print(output)


def factors(options: argparse.Namespace) -> None:
    """Converts a file of factors.

    Raises:
        ValueError: the source can't be read, or the destination's format does not support its factors.
        OSError: the destination can't be written.
    """
    kind = options.to or ("csv" if options.destination.endswith(".csv") else "longrope_jax")
    found = read_factors(options.source, options.target_length, options.head_dim)
    given = {"original_length": options.original_length, "base": options.rope_theta}
    found = found._replace(**{name: value for name, value in given.items() if value is not None}).check()
    if kind == "huggingface":
        original = found.original_length or int(found.table.boundaries[0])
        table, dropped = fit_to_format(found.table, original, _allowed(options))
        found = found._replace(table=table)
        if dropped:
            logging.warning("dropped %s; only the command export measures the cost", "; ".join(dropped.values()))
    write_factors(options.destination, found, kind, options.length)
    print(options.destination)


def _allowed(options: argparse.Namespace) -> list[str]:
    return [kind for kind in DROPPABLE if getattr(options, f"allow_dropping_{kind}")]


def _new_folder(path: str) -> epath.Path:
    """The folder to write; raises ValueError or OSError if that is not possible, before anything slow starts."""
    folder = epath.Path(path)
    if not path or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise ValueError(f"output = {path!r} must be a new folder")
    if not folder.absolute().parent.is_dir():
        raise ValueError(f"output = {path!r}: its parent directory does not exist")
    existed = folder.exists()
    folder.mkdir(exist_ok=True)
    if not existed:
        folder.rmdir()
    return folder


def _tokenizer(path: str) -> SubwordTokenizer | None:
    try:
        return load_tokenizer(path)
    except ValueError as error:
        logging.warning("%s: the exported folder has none either", error)
        return None


def _documents(paths: Sequence[str], tokenizer: SubwordTokenizer | None) -> list[Document]:
    if not paths:
        return []
    if tokenizer is None:
        raise ValueError("--text needs a tokenizer, which the model does not have")
    files = dict.fromkeys(epath.Path(path).resolve() for path in paths)
    texts = {str(file): file.read_bytes() for file in files}
    return [Document(name, tokenizer.encode(text), len(text)) for name, text in texts.items()]


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; see --help", file=sys.stderr)
        sys.exit(2)


def _positive(text: str) -> int:
    if not re.fullmatch(r"[0-9]+", text) or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive whole number")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("longrope_jax.commands.export", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    exporter = commands.add_parser(
        "export", allow_abbrev=False, help="a pretrained model with other factors, as a Hugging Face folder"
    )
    exporter.set_defaults(command=export)
    exporter.add_argument("--model", required=True, help="a Hugging Face folder or a .gguf file")
    exporter.add_argument("--factors", help="any file that the command factors reads; by default the model's factors")
    exporter.add_argument("--output", required=True, help="the new folder")
    exporter.add_argument("--architecture", choices=ARCHITECTURES, default=ARCHITECTURES[0])
    exporter.add_argument("--dtype", choices=FLOAT_TYPES, help="of the tensors; by default an exact one")
    exporter.add_argument("--mesh", default="data:1", help="devices, as in config.mesh.axes")
    exporter.add_argument("--text", nargs="+", default=[], help="files on which the cost of dropping is measured")
    exporter.add_argument("--cost_lengths", type=_positive, nargs="+", help="in tokens; by default all that change")
    exporter.add_argument("--cost_documents", type=_positive, default=8, help="number of windows of each length")
    converter = commands.add_parser("factors", allow_abbrev=False, help="convert a file of factors")
    converter.set_defaults(command=factors)
    converter.add_argument("source", help="our .json, a .csv, a config.json or its folder, a .gguf file")
    converter.add_argument("destination", help="a .json or .csv file")
    converter.add_argument("--to", choices=KINDS, help="by default csv for .csv, else longrope_jax")
    converter.add_argument("--head_dim", type=_positive, help="of the model; tells a CSV with n_hat from one without")
    converter.add_argument(
        "--original_length",
        type=_positive,
        help="context before any extension, tokens; instead of the source's",
    )
    converter.add_argument("--rope_theta", type=float, help="instead of the source's")
    converter.add_argument("--length", type=_positive, help="csv: the sequence length whose set is written, tokens")
    for command in (exporter, converter):
        command.add_argument("--target_length", type=_positive, help="longest sequence for a single set of factors")
        for kind in DROPPABLE:
            what = kind.replace("_", " ")
            command.add_argument(
                f"--allow_dropping_{kind}", action="store_true", help=f"drop {what}, which the format does not support"
            )
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
