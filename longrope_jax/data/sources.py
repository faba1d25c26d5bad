"""Sources of text: folders and TFDS datasets as splits of documents, each readable by its index."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import grain
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from longrope_jax.data import corpus
from longrope_jax.data.corpus import SHARES, SPLITS, DataSettings
from longrope_jax.data.pairs import plant
from longrope_jax.data.tfds_text import OpenDataset, open_by_name, open_directory
from longrope_jax.data.tokenizer import ByteTokenizer, Tokenizer
from longrope_jax.files import modified_at, size_of

_BATCH = 64  # records to read together: a compressed group of records is decompressed as a whole
# The split of a TFDS dataset, and the places in it: validation is shared.
_TFDS_SPLITS = {
    "train": ("train", slice(None)),
    "search": ("validation", slice(0, None, 2)),
    "evaluation": ("validation", slice(1, None, 2)),
    "test": ("test", slice(None)),
}


@dataclass(frozen=True, eq=False)
class Texts:
    """The documents of a split, in a fixed order.

    Attributes:
        numbers: indices of the documents in their source, ascending.
        size: bytes, roughly.
        fetch: indices -> an iterator of (name, text).
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
    """The splits of a source: a dataset's own, or split by `shares`; with pairs planted in some of their documents.

    A folder of text files is first converted to a TFDS dataset in `data_dir`, and read from there later. Only one
    process may do the conversion.

    Raises:
        ValueError: the text does not exist or can't be read; one line.
    """
    splits = _open_splits(settings, data_dir)
    return {split: _planted(texts, settings) for split, texts in splits.items()} if settings.pair_share else splits


def _planted(texts: Texts, settings: DataSettings) -> Texts:
    """The documents, some of them with pairs."""

    def fetch(numbers):
        share, density, distances = settings.pair_share, settings.pair_density, settings.pair_distances
        return (plant(name, text, share, density, distances) for name, text in texts.fetch(numbers))

    return dataclasses.replace(texts, fetch=fetch)


def _open_splits(settings: DataSettings, data_dir: epath.PathLike) -> dict[str, Texts]:
    if settings.tfds:
        return _dataset_splits(open_by_name(settings.tfds, settings.tfds_dir, settings.text_feature), settings)
    is_read = settings.folder and not is_built(settings, data_dir)
    kind, files = _kind(settings.folder) if is_read else ("texts", [])
    if kind != "texts" and settings.suffix:
        raise ValueError(f"suffix = {settings.suffix!r} is for text files; {settings.folder} holds {kind}")
    if kind == "a TFDS dataset":
        return _dataset_splits(open_directory(settings.folder, settings.text_feature), settings)
    if settings.text_feature:
        raise ValueError(f"text_feature = {settings.text_feature!r} is for TFDS; {settings.folder} holds {kind}")
    if kind == "array_record files":
        return _record_splits(files, settings)
    dataset = OpenDataset(corpus.build(corpus.folder_config(settings), data_dir), "text")
    return {split: _texts(dataset, split) for split in SPLITS}


def read_documents(
    settings: DataSettings, data_dir: epath.PathLike, tokenizer: Tokenizer | None = None
) -> dict[str, list[corpus.Document]]:
    """All documents of a source by split, tokenized and in memory, for notebooks; experiments use token files.

    Args:
        data_dir: for the dataset made from a folder of text files, see `open_source`.
        tokenizer: None is bytes.

    Raises:
        ValueError: the text does not exist or can't be read; one line.
    """
    tokenizer = tokenizer or ByteTokenizer()
    return {
        split: [corpus.Document(name, tokenizer.encode(text), len(text)) for name, text in texts.read(0, len(texts))]
        for split, texts in open_source(settings, data_dir).items()
    }


def is_built(settings: DataSettings, data_dir: epath.PathLike) -> bool:
    """Whether a folder of text files was converted to a dataset, so that it is not read again."""
    version = built_folder(settings, data_dir) / str(corpus.TextFolder.VERSION)
    return (version / "dataset_info.json").exists()


def built_folder(settings: DataSettings, data_dir: epath.PathLike) -> epath.Path:
    """The directory of the dataset made from a folder of text files."""
    return epath.Path(data_dir) / "text_folder" / corpus.folder_config(settings).name


def folder_fingerprint(folder: str) -> str:
    """A digest of the names, sizes and dates of the files in a folder, without their contents; "" if there is none."""
    root = epath.Path(folder)
    if not folder or not root.is_dir():
        return ""
    files = [[path, size_of(file), modified_at(file)] for path, file in corpus.visible_files(root)]
    return hashlib.sha256(json.dumps(sorted(files)).encode()).hexdigest()


def _kind(folder: str) -> tuple[str, list[epath.Path]]:
    """What a folder contains, and its array_record files."""
    root = epath.Path(folder)
    if not root.is_dir():
        raise ValueError(f"data folder {folder!r} is not a directory")
    if (root / "features.json").is_file():
        return "a TFDS dataset", []
    files = sorted(path for path in root.iterdir() if ".array_record" in path.name and not path.name.startswith("."))
    return ("array_record files", files) if files else ("texts", [])


def _dataset_splits(dataset: OpenDataset, settings: DataSettings) -> dict[str, Texts]:
    """The splits of a TFDS dataset: its own, or its only one split by `shares`."""
    counts = dataset.counts
    if len(counts) == 1:
        (only,) = counts
        documents = [f"{only}/{number}" for number in range(counts[only])]
        return _split(documents, settings.shares, dataset.size(only), partial(dataset.read, only))
    if settings.shares != SHARES:
        raise ValueError(f"shares = {settings.shares}: the dataset has its own splits, {', '.join(counts)}")
    return {split: _texts(dataset, name, places) for split, (name, places) in _TFDS_SPLITS.items()}


def _texts(dataset: OpenDataset, split: str, places: slice = slice(None)) -> Texts:
    """The documents at some places of a dataset's split; none if there is no such split."""
    count = dataset.counts.get(split, 0)
    numbers = range(count)[places]
    return Texts(numbers, dataset.size(split) * len(numbers) // max(1, count), partial(dataset.read, split))


def _record_splits(files: Sequence[epath.Path], settings: DataSettings) -> dict[str, Texts]:
    """Array_record files; every record is a text."""
    with ThreadPoolExecutor(_BATCH) as pool:  # on an object store each file has a latency
        counts = dict(zip(files, pool.map(_count, files), strict=True))
    names = [f"{file.name}/{i}" for file, count in counts.items() for i in range(count)]
    records = grain.sources.ArrayRecordDataSource([f"{file}[0:{count}]" for file, count in counts.items()])

    def fetch(numbers: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        for start in range(0, len(numbers), _BATCH):
            some = list(numbers[start : start + _BATCH])
            try:
                texts = records.__getitems__(some)
            except RuntimeError as error:  # the hash of a record does not match
                between = f"{files[0].parent}: of {names[some[0]]} to {names[some[-1]]}"
                raise ValueError(f"{between} one is damaged: {error}") from None
            yield from zip((names[number] for number in some), texts, strict=True)

    for name, text in fetch([0] if names else []):
        try:
            text.decode()
        except UnicodeDecodeError:
            raise ValueError(
                f"{files[0].parent / name}: the record is no text in UTF-8; for a TFDS dataset, give the directory "
                "that has features.json"
            ) from None

    return _split(names, settings.shares, sum(size_of(file) for file in files), fetch)


def _count(file: epath.Path) -> int:
    try:
        reader = ArrayRecordReader(str(file))
        count = reader.num_records()
        reader.close()
    except RuntimeError as error:
        raise ValueError(f"{file} can't be read as array_record: {error}") from None
    return count


def _split(names: Sequence[str], shares: Sequence[float], size: int, fetch: Callable) -> dict[str, Texts]:
    """Splits documents by a hash of their names, like files."""
    number_of = {name: number for number, name in enumerate(names)}
    splits = corpus.split_by_file(names, shares)
    return {
        split: Texts(sorted(number_of[name] for name in members), size * len(members) // max(1, len(names)), fetch)
        for split, members in splits.items()
    }
