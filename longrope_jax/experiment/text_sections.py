"""The text of an experiment: its sections in the config, and their tokens, which are made once and read from files."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from longrope_jax import json_files
from longrope_jax.data import sources, token_files
from longrope_jax.data.corpus import DataSettings, Document
from longrope_jax.data.token_files import stored_documents
from longrope_jax.data.tokenizer import ByteTokenizer, Tokenizer
from longrope_jax.errors import naming, shortened
from longrope_jax.experiment.context import started_file
from longrope_jax.runtime import processes
from longrope_jax.settings import parse

Reads = dict[str, tuple[str, tuple[str, ...]]]
"""Stage -> the text section it names, and the splits of that section it reads (possibly none)."""


def is_text_section(name: str) -> bool:
    """Whether the name of a config section is that of a text section."""
    return name == "data" or (name.startswith("data_") and len(name) > len("data_"))


def parse_sections(config: ConfigDict, reads: Reads) -> dict[str, DataSettings]:
    """The sections of text, by name.

    Raises:
        ValueError: a section is missing, unused, invalid, or equal to another one.
    """
    there = [name for name in config if is_text_section(name)]
    for stage, (section, splits) in reads.items():
        if not is_text_section(section):
            raise ValueError(f"config.{stage}.data = {shortened(section)} must be 'data' or begin with 'data_'")
        if splits and section not in there:
            known = f"; there are {', '.join(there)}" if there else ""
            raise ValueError(f"config.{section} is missing, the text that config.{stage}.data names{known}")
    named = {section for section, _ in reads.values()}
    for section in there:
        if section not in named:
            named_by = ", ".join(f"{stage}.data = {shortened(section)}" for stage, (section, _) in reads.items())
            raise ValueError(f"config.{section} is read by no stage{': ' if named_by else ''}{named_by}")
    sections = {section: parse(DataSettings, config[section], section) for section in there}
    for section, settings in sections.items():
        first = next(name for name in sections if sections[name] == settings)
        if first != section:
            raise ValueError(f"config.{section} is the same text as config.{first}; let stages name one of them")
    return sections


def read(
    sections: dict[str, DataSettings], reads: Reads, tokenizer: Tokenizer, workdir: epath.Path
) -> dict[str, dict[str, Sequence[Document]]]:
    """The documents that the stages read, by section and split. Missing tokens are made now.

    All processes must call it with the same work directory.

    Raises:
        ValueError: the text does not exist, or a split that a stage reads is empty; one line.
    """
    needed: dict[str, dict[str, list[str]]] = {}
    for stage, (section, splits) in reads.items():
        for split in splits:
            needed.setdefault(section, {}).setdefault(split, []).append(stage)
    for section in needed:
        if (share := sections[section].pair_share) and not isinstance(tokenizer, ByteTokenizer):
            raise ValueError(
                f"config.{section}.pair_share = {share} is for models that read bytes; this one reads subwords"
            )
    documents: dict[str, dict[str, Sequence[Document]]] = {}
    for section, stages in needed.items():
        settings = sections[section]
        folder = _folder(settings, section, tokenizer, workdir)
        has_started = any(started_file(workdir, stage).exists() for names in stages.values() for stage in names)
        if not processes.any_of(has_started):
            _remove_if_changed(settings, folder, workdir)
        with naming(f"config.{section}"):
            _tokenize(settings, folder, stages, tokenizer, workdir)
        documents[section] = {split: stored_documents(folder, split) for split in stages}
    return documents


def _folder(settings: DataSettings, section: str, tokenizer: Tokenizer, workdir: epath.Path) -> epath.Path:
    """The folder with the tokens of a source; its name depends on the source and the tokenizer."""
    key = json.dumps([settings.to_record(), tokenizer.fingerprint], sort_keys=True)
    return workdir / "tokens" / f"{section}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def _remove_if_changed(settings: DataSettings, folder: epath.Path, workdir: epath.Path) -> None:
    """Removes outdated tokens. A source may change until the first stage that reads it has started."""
    note = folder / "source.json"
    if processes.is_first():
        found = {"source": settings.to_record(), "listing": sources.folder_fingerprint(settings.folder)}
        is_there = not settings.folder or epath.Path(settings.folder).is_dir()
        if is_there and note.exists() and _noted(folder) != found:
            built = sources.built_folder(settings, workdir / "data")
            for stale in (built, folder):
                if stale.exists():
                    stale.rmtree()
        if not note.exists():
            note.parent.mkdir(parents=True, exist_ok=True)
            processes.write_json(note, found)
    processes.wait_for_all(f"source of {folder.name}")


def _noted(folder: epath.Path) -> dict[str, Any]:
    """Which source, and which files of it, the tokens in a folder are made of."""
    return json_files.read_object(folder / "source.json", {"source": dict, "listing": str})


def _refuse_changed_files(settings: DataSettings, folder: epath.Path, workdir: epath.Path) -> None:
    """Refuses a folder that changed after a stage started: all splits must come from the same files."""
    if sources.is_built(settings, workdir / "data") or not (folder / "source.json").exists():
        return
    if _noted(folder)["listing"] != sources.folder_fingerprint(settings.folder):
        raise ValueError(
            f"the files of {settings.folder} are not those that a stage started with; changed text needs a "
            "section of its own"
        )


def _tokenize(
    settings: DataSettings, folder: epath.Path, stages: dict[str, list[str]], tokenizer: Tokenizer, workdir: epath.Path
) -> None:
    unfinished = [split for split in stages if processes.any_of(not token_files.is_finished(folder, split))]
    if not unfinished:
        return
    splits: dict[str, Any] = {}
    if processes.is_first():  # which makes what has to be made
        splits = sources.open_source(settings, workdir / "data")
    processes.wait_for_all(f"data of {folder.name}")
    splits = splits or sources.open_source(settings, workdir / "data")
    _refuse_changed_files(settings, folder, workdir)
    for split, names in stages.items():
        if not len(splits[split]):
            raise ValueError(
                f"no document is for {split}, which {' and '.join(names)} would read; shares = {settings.shares} "
                "counts where a source has no splits of its own"
            )
    for split in unfinished:
        token_files.write_shards(folder, split, splits[split], tokenizer, processes.share())
        processes.wait_for_all(f"{split} of {folder.name}")
        if processes.is_first():
            token_files.finish(folder, split, splits[split], tokenizer, {"source": settings.to_record()})
        processes.wait_for_all(f"{split} of {folder.name} is finished")
