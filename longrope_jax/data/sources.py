"""Where text comes from: every source as splits of documents that can be read from any one on."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grain
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from longrope_jax.data import corpus
from longrope_jax.data.corpus import SHARES, SPLITS, DataSettings
from longrope_jax.data.tfds_text import OpenDataset, open_by_name, open_directory
from longrope_jax.data.tokenizer import ByteTokenizer, Tokenizer
from longrope_jax.files import as_utf8, modified_at, size_of

_AT_ONCE = 64  # records; files with groups of records are unpacked a group at a time
_OWN_SPLITS = {"train": "train", "search": "validation", "evaluation": "test"}


@dataclass(frozen=True, eq=False)
class Texts:
    """The documents of a split, in an order that is always the same.

    Attributes:
        numbers: of the documents, in what they are fetched from; ascending.
        size: bytes, roughly.
        fetch: numbers, one after the other -> (name, text) of each.
    """

    numbers: Sequence[int]
    size: int
    fetch: Callable[[Sequence[int]], Iterator[tuple[str, bytes]]]

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, start: int, stop: int) -> Iterator[tuple[str, bytes]]:
        """(name, text) of documents start..stop-1."""
        return self.fetch(self.numbers[start:stop])


def open_source(settings: DataSettings, data_dir: epath.PathLike) -> dict[str, Texts]:
    """The splits of a source; those of a dataset by name, others cut by `shares`.

    Folders of text files become a TFDS dataset in `data_dir`, where they are read from and found again; only one
    process may be the first to open one.

    Raises:
        ValueError: there is no such text, or it can't be read; one line.
    """
    if settings.tfds:
        return _of_dataset(open_by_name(settings.tfds, settings.tfds_dir, settings.text_feature), settings)
    if not settings.folder:
        return _of_dataset(open_built(corpus.stdlib_config(settings.shares), data_dir), settings, from_files=True)
    if is_built(settings, data_dir):
        return _of_dataset(open_built(_folder_config(settings), data_dir), settings, from_files=True)
    kind, files = _kind(settings.folder)
    if kind != "texts" and settings.suffix:
        raise ValueError(f"suffix = {settings.suffix!r} is for text files; {settings.folder} holds {kind}")
    if kind == "a TFDS dataset":
        return _of_dataset(open_directory(settings.folder, settings.text_feature), settings)
    if settings.text_feature:
        raise ValueError(f"text_feature = {settings.text_feature!r} is for TFDS; {settings.folder} holds {kind}")
    if kind == "array_record files":
        return _of_records(files, settings)
    return _of_dataset(open_built(_folder_config(settings), data_dir), settings, from_files=True)


def read_documents(
    settings: DataSettings, data_dir: epath.PathLike, tokenizer: Tokenizer | None = None
) -> dict[str, list[corpus.Document]]:
    """All documents of a source by split, tokenized and in memory, for notebooks; experiments keep tokens in files.

    Args:
        data_dir: where a folder of text files is kept as a dataset, see `open_source`.
        tokenizer: without it bytes.

    Raises:
        ValueError: there is no such text, or it can't be read; one line.
    """
    tokenizer = tokenizer or ByteTokenizer()
    return {
        split: [corpus.Document(name, tokenizer.encode(text), len(text)) for name, text in texts.read(0, len(texts))]
        for split, texts in open_source(settings, data_dir).items()
    }


def open_built(config: corpus.TextFolderConfig, data_dir: epath.PathLike) -> OpenDataset:
    """The dataset of a folder of text files."""
    return OpenDataset(corpus.build(config, data_dir), "text")


def is_built(settings: DataSettings, data_dir: epath.PathLike) -> bool:
    """Whether a folder of text files has become a dataset, so that it is not looked at any more."""
    version = built_folder(settings, data_dir) / str(corpus.TextFolder.VERSION)
    return (version / "dataset_info.json").exists()


def built_folder(settings: DataSettings, data_dir: epath.PathLike) -> epath.Path:
    """Where the dataset of a folder of text files is kept."""
    return epath.Path(data_dir) / "text_folder" / _folder_config(settings).name


def _folder_config(settings: DataSettings) -> corpus.TextFolderConfig:
    return corpus.folder_config(settings.folder, settings.suffix, settings.shares)


def folder_fingerprint(folder: str) -> str:
    """A digest of the names, sizes and dates of the files in a folder; what is in them is not looked at."""
    root = epath.Path(folder)
    if not folder or not root.is_dir():
        return ""
    files = []
    for directory, subdirectories, names in root.walk():
        subdirectories[:] = [name for name in subdirectories if not name.startswith(".")]
        for name in names:
            file = directory / name
            if file.is_file():  # a link to nowhere is none
                files.append([as_utf8(str(file.relative_to(root))), size_of(file), modified_at(file)])
    return hashlib.sha256(json.dumps(sorted(files)).encode()).hexdigest()


def _kind(folder: str) -> tuple[str, list[epath.Path]]:
    """What a folder holds, and its array_record files."""
    root = epath.Path(folder)
    if not root.is_dir():
        raise ValueError(f"data folder {folder!r} is not a directory")
    if (root / "features.json").is_file():
        return "a TFDS dataset", []
    files = sorted(path for path in root.iterdir() if ".array_record" in path.name and not path.name.startswith("."))
    return ("array_record files", files) if files else ("texts", [])


def _of_dataset(dataset: OpenDataset, settings: DataSettings, from_files: bool = False) -> dict[str, Texts]:
    counts = dataset.counts
    own = {split: split if from_files else _OWN_SPLITS[split] for split in SPLITS}
    if not from_files and len(counts) == 1:
        (only,) = counts
        names = [f"{only}/{number}" for number in range(counts[only])]
        return _cut(names, settings.shares, dataset.size(only), lambda numbers: dataset.read(only, numbers))
    if not from_files and settings.shares != SHARES:
        raise ValueError(f"shares = {settings.shares}: the dataset has splits of its own, {', '.join(counts)}")

    def fetch(name: str) -> Callable:
        return lambda numbers: dataset.read(name, numbers)

    return {split: Texts(range(counts.get(name, 0)), dataset.size(name), fetch(name)) for split, name in own.items()}


def _of_records(files: Sequence[epath.Path], settings: DataSettings) -> dict[str, Texts]:
    """Plain array_record files, each record a text."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # of a thousand files on an object store every one takes its time
        counts = list(pool.map(_count, files))
    names = [f"{file.name}/{i}" for file, count in zip(files, counts, strict=True) for i in range(count)]
    records = grain.sources.ArrayRecordDataSource(
        [f"{file}[0:{count}]" for file, count in zip(files, counts, strict=True)]
    )

    def read(numbers: list[int]) -> Sequence[bytes]:
        try:
            return records.__getitems__(numbers)
        except RuntimeError as error:  # they have hashes
            between = f"{files[0].parent}: of {names[numbers[0]]} to {names[numbers[-1]]}"
            raise ValueError(f"{between} one is damaged: {error}") from None

    if names:
        _check_text(read([0])[0], f"{files[0].parent / names[0]}")

    def fetch(numbers: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        for start in range(0, len(numbers), _AT_ONCE):
            some = list(numbers[start : start + _AT_ONCE])
            yield from zip((names[number] for number in some), read(some), strict=True)

    return _cut(names, settings.shares, sum(size_of(file) for file in files), fetch)


def _count(file: epath.Path) -> int:
    try:
        reader = ArrayRecordReader(str(file))
        count = reader.num_records()
        reader.close()
    except RuntimeError as error:
        raise ValueError(f"{file} can't be read as array_record: {error}") from None
    return count


def _check_text(record: bytes, name: str) -> None:
    try:
        record.decode()
    except UnicodeDecodeError:
        raise ValueError(
            f"{name}: the record is no text in UTF-8; of a TFDS dataset give the directory that has features.json"
        ) from None


def _cut(names: Sequence[str], shares: Sequence[float], size: int, fetch: Callable) -> dict[str, Texts]:
    """Documents to splits by a hash of their names, as files are."""
    number_of = {name: number for number, name in enumerate(names)}
    splits = corpus.split_by_file(names, shares)
    return {
        split: Texts(sorted(number_of[name] for name in members), size * len(members) // max(1, len(names)), fetch)
        for split, members in splits.items()
    }
