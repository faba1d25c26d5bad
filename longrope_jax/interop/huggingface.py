"""The command line for what is handed on to Hugging Face's world.

python -m longrope_jax.interop.huggingface export --model=PATH --factors=FILE --output=FOLDER
python -m longrope_jax.interop.huggingface factors SOURCE DESTINATION

`export` writes a pretrained model (a folder or a GGUF file) with other factors as a folder; the stage of that name
does it for a model that an experiment has made. `factors` turns one kind of file with factors into another.
"""

import argparse
import sys
from collections.abc import Sequence

from absl import logging
from etils import epath

from longrope_jax.data.corpus import Document
from longrope_jax.data.subwords import SubwordTokenizer
from longrope_jax.data.windows import fixed_windows
from longrope_jax.evaluation.substitution import changed_lengths, substitution_cost
from longrope_jax.interop.architectures import ARCHITECTURES
from longrope_jax.interop.export import check_architecture, export_checkpoint, fit_to_format
from longrope_jax.interop.factor_files import KINDS, factors_for, read_factors, write_factors
from longrope_jax.interop.model_card import Card, cost_table, model_card
from longrope_jax.interop.pretrained import describe_pretrained, load_tokenizer, read_params, stored_dtype
from longrope_jax.model import Llama
from longrope_jax.model.config import FLOAT_TYPES
from longrope_jax.rope import FactorTable
from longrope_jax.runtime import processes
from longrope_jax.runtime.mesh import Layout, MeshSettings

DROPPED = ("start_tokens", "lengths", "temperatures")


def main(arguments: Sequence[str]) -> None:
    """Runs a command; what the user can mend is one line and exit status 2."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def export(options: argparse.Namespace) -> None:
    """Writes a model with other factors as a Hugging Face folder.

    Raises:
        ValueError: the model or the factors can't be loaded, don't fit, or can't be carried whole.
        OSError: the folder can't be written.
    """
    output = epath.Path(options.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output = {options.output!r} is there and not empty")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"output = {options.output!r} lies in no directory that is there")
    dtype = options.dtype or stored_dtype(options.model)
    config, own = describe_pretrained(options.model, param_dtype=dtype)
    check_architecture(options.architecture, config)
    found = factors_for(options.factors, config, options.target_length) if options.factors else own
    exported, dropped = fit_to_format(found, config.original_length, _allowed(options))
    tokenizer = _tokenizer(options.model)
    documents = _documents(options.text, tokenizer)
    lengths = _cost_lengths(options, found, exported, documents)

    layout = Layout.of(MeshSettings(axes=options.mesh))
    params = read_params(options.model, config, layout.mesh)
    with layout.active():
        costs = substitution_cost(
            Llama(config), layout, params, found, exported, documents, lengths, options.cost_documents
        )
        if dropped and processes.is_first():
            logging.warning("dropped %s", "; ".join(dropped.values()))
        source = {"model": {"path": options.model}, "factors": {"path": options.factors or options.model}}
        card = Card(
            title=output.name,
            config=config,
            found=found,
            carried=exported,
            dropped=dropped,
            costs=costs,
            text=", ".join(epath.Path(path).name for path in options.text),
            steps=source,
        )
        export_checkpoint(
            output, config, params, exported, tokenizer, model_card(card), architecture=options.architecture
        )
    if processes.is_first():
        print(f"{cost_table(costs) if costs else ''}{output}")


def factors(options: argparse.Namespace) -> None:
    """Turns a file of factors into another kind of file.

    Raises:
        ValueError: the source can't be read, or its factors have no place in the destination.
        OSError: the destination can't be written.
    """
    kind = options.to or ("csv" if options.destination.endswith(".csv") else "longrope_jax")
    found = read_factors(options.source, options.target_length, options.head_dim)
    found = found._replace(
        original_length=options.original_length or found.original_length, base=options.rope_theta or found.base
    )
    if kind == "huggingface":
        table, dropped = fit_to_format(found.table, found.original_length or _shortest(found.table), _allowed(options))
        found = found._replace(table=table)
        if dropped:
            logging.warning("dropped %s; what it costs is measured by export only", "; ".join(dropped.values()))
    write_factors(options.destination, found, kind, options.length)
    print(options.destination)


def _allowed(options: argparse.Namespace) -> list[str]:
    return [kind for kind in DROPPED if getattr(options, f"allow_dropping_{kind}")]


def _shortest(table: FactorTable) -> int:
    return int(table.boundaries[0])


def _tokenizer(path: str) -> SubwordTokenizer | None:
    try:
        return load_tokenizer(path)
    except ValueError as error:
        logging.warning("%s: the exported folder has none either", error)
        return None


def _documents(paths: Sequence[str], tokenizer: SubwordTokenizer | None) -> list[Document]:
    if paths and tokenizer is None:
        raise ValueError("text can't be measured on: the model has no tokenizer")
    texts = {path: epath.Path(path).read_bytes() for path in paths}
    return [Document(path, tokenizer.encode(text), len(text)) for path, text in texts.items()]


def _cost_lengths(
    options: argparse.Namespace, found: FactorTable, exported: FactorTable, documents: list[Document]
) -> tuple[int, ...]:
    """Where to measure; raises ValueError if the text does not suffice."""
    changed = changed_lengths(found, exported)
    if not changed:
        return ()
    lengths = tuple(options.cost_lengths or changed)
    if not documents:
        raise ValueError(
            f"what is dropped has to be measured, at {max(lengths)} tokens: give --text, two files or more"
        )
    try:
        fixed_windows(documents, max(lengths), options.cost_documents, seed=0)
    except ValueError as error:
        raise ValueError(f"text: {error}; give longer ones, or shorter --cost_lengths") from None
    return lengths


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("longrope_jax.interop.huggingface", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    exporter = commands.add_parser("export", help="a pretrained model with other factors, as a Hugging Face folder")
    exporter.set_defaults(command=export)
    exporter.add_argument("--model", required=True, help="a Hugging Face folder or a .gguf file")
    exporter.add_argument("--factors", help="any file that the command factors reads; by default the model's own")
    exporter.add_argument("--output", required=True, help="the folder to be made")
    exporter.add_argument("--architecture", choices=ARCHITECTURES, default=ARCHITECTURES[0])
    exporter.add_argument("--dtype", choices=FLOAT_TYPES, help="of the tensors; by default one that loses nothing")
    exporter.add_argument("--mesh", default="data:1", help="devices, as in config.mesh.axes")
    exporter.add_argument(
        "--text", nargs="+", default=[], help="files on which the cost of what is dropped is measured"
    )
    exporter.add_argument("--cost_lengths", type=int, nargs="+", help="where, tokens; by default wherever it changes")
    exporter.add_argument("--cost_documents", type=int, default=8, help="on how many windows of each length")
    converter = commands.add_parser("factors", help="factors from one kind of file to another")
    converter.set_defaults(command=factors)
    converter.add_argument("source", help="our .json, a .csv, a config.json or its folder, a .gguf file")
    converter.add_argument("destination", help="a .json or .csv file")
    converter.add_argument("--to", choices=KINDS, help="by default csv for .csv, else longrope_jax")
    converter.add_argument("--head_dim", type=int, help="of the model; tells a CSV with n_hat from one without")
    converter.add_argument(
        "--original_length", type=int, help="context before any extension, where the source has none"
    )
    converter.add_argument("--rope_theta", type=float, help="where the source has none")
    converter.add_argument("--length", type=int, help="csv: the set for a sequence of so many tokens")
    for command in (exporter, converter):
        command.add_argument("--target_length", type=int, help="up to how many tokens one set of factors is good")
        for kind in DROPPED:
            what = kind.replace("_", " ")
            command.add_argument(
                f"--allow_dropping_{kind}", action="store_true", help=f"{what} have no place in the format"
            )
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
