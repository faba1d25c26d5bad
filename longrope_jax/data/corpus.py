"""Documents: a TFDS builder for a folder of text files, whose splits are read without TensorFlow.

The embedded corpus is one of its configurations: the source files of Python's standard library, real text with long
documents that exists on every machine.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import math
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath
from jaxtyping import UInt
from tqdm import tqdm

from longrope_jax.errors import beginning
from longrope_jax.files import as_utf8, copy_tree, is_remote, size_of
from longrope_jax.settings import Fraction, Rule, Settings

SPLITS = {"train": 0.7, "search": 0.1, "evaluation": 0.1, "test": 0.1}
"""The default share of the documents in every split; no document is in two. Evaluation is for development. Only results
that are published read test, and nothing is chosen by them.
"""
SHARES = tuple(SPLITS.values())


@dataclass(frozen=True)
class DataSettings(Settings):
    """The source of text: a folder, a TFDS dataset, or, without both, the embedded corpus (Python's standard library).

    Attributes:
        folder: a local or remote (`gs://`) folder of text files, one document per file; or of array_record files whose
            records are texts in UTF-8, one document per record; or of a prepared TFDS dataset (with features.json).
        suffix: only text files whose names end with it are read; "" reads all text files.
        tfds: the name of a TFDS dataset, "pg19", with config and version if it has them, "wiki40b/en:1.3.0". Its splits
            train and test are ours too; of validation, every other document is for search, the rest for evaluation.
        tfds_dir: the data_dir in which it was prepared; "" is the default of TFDS.
        text_feature: the feature of a TFDS dataset that is the text; "" finds the only text, or the one named "text".
        shares: of the documents for train, search, evaluation and test, if the source has no such splits.
        pair_share: share of the documents in which key-value pairs are planted, see `data.pairs`: text whose far
            tokens matter. Only for models that read bytes.
        pair_density: share of the bytes of such a document that are pairs, at most; see `data.pairs.plant`.
        pair_distances: the smallest and the largest number of bytes after which a pair comes back.
    """

    folder: str = ""
    suffix: str = ""
    tfds: str = ""
    tfds_dir: str = ""
    text_feature: str = ""
    shares: tuple[float, ...] = SHARES
    pair_share: Fraction = 0.0
    pair_density: Annotated[float, Rule(lambda share: 0 < share <= 0.9, "must lie between 0 and 0.9")] = 0.4
    pair_distances: tuple[int, ...] = (32, 8192)

    def __post_init__(self):
        super().__post_init__()
        if len(self.pair_distances) != 2 or not 1 <= self.pair_distances[0] <= self.pair_distances[1]:
            raise ValueError(f"pair_distances = {self.pair_distances} must be two numbers of bytes, the smaller first")
        if self.suffix and not self.folder:
            raise ValueError(f"suffix = {self.suffix!r} needs a folder; the embedded corpus has its own")
        if self.folder and self.tfds:
            raise ValueError(f"folder = {self.folder!r} and tfds = {self.tfds!r} are two sources; give a section each")
        if self.tfds_dir and not self.tfds:
            raise ValueError(f"tfds_dir = {self.tfds_dir!r} needs tfds, the name of a dataset")
        if self.text_feature and not (self.tfds or self.folder):
            raise ValueError(f"text_feature = {self.text_feature!r} needs tfds or a folder with a TFDS dataset")
        if len(self.shares) != len(SPLITS) or not all(0 <= share <= 1 for share in self.shares):
            raise ValueError(f"shares = {self.shares} must be four numbers from 0 to 1, for {', '.join(SPLITS)}")
        if not math.isclose(sum(self.shares), 1, abs_tol=1e-6):
            raise ValueError(f"shares = {self.shares} must add up to 1, not {sum(self.shares):g}")

    def to_record(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as JSON, so that a new field leaves fingerprints as they are."""
        values = {field.name: (getattr(self, field.name), field.default) for field in dataclasses.fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, (value, default) in values.items()
            if value != default
        }


class Document(NamedTuple):
    """A tokenized document.

    Attributes:
        name: for a file, its path within the folder.
        tokens: BOS first, EOS last, where the tokenizer has them; an array, or a `data.token_files.StoredTokens`, which
            reads slices from a file.
        size: bytes of text.
    """

    name: str
    tokens: UInt[np.ndarray, "tokens"]
    size: int


@dataclasses.dataclass(eq=False)
class TextFolderConfig(tfds.core.BuilderConfig):
    """The files that are documents.

    Attributes:
        folder: local or remote.
        suffix: only files whose names end with it are read; "" reads all files.
        excluded: names of directories to skip; hidden ones are always skipped.
        shares: of the files in the splits.
    """

    folder: str = ""
    suffix: str = ""
    excluded: tuple[str, ...] = ("__pycache__",)
    shares: tuple[float, ...] = SHARES


def folder_config(settings: DataSettings) -> TextFolderConfig:
    """The files of a user's folder or, if the settings name none, of the embedded corpus.

    The embedded corpus has about 600 files and 11 MB: the standard library of the running Python, without its tests.
    In the data directory, the name of a dataset has a digest of folder, suffix and shares.
    """
    folder, suffix, shares = settings.folder, settings.suffix, settings.shares
    unusual = [] if shares == SHARES else [str(share) for share in shares]
    if folder:
        name, description = f"folder-{_digest(folder, suffix, *unusual)}", f"text files of {folder}"
        return TextFolderConfig(name=name, description=description, folder=folder, suffix=suffix, shares=shares)
    return TextFolderConfig(
        name=f"stdlib-{_digest(*unusual)}" if unusual else "stdlib",
        description="source files of the Python standard library",
        folder=sysconfig.get_path("stdlib"),
        suffix=".py",
        # `encodings` has a hundred near copies of one table, which would be in both training and evaluation.
        excluded=("__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"),
        shares=shares,
    )


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


class TextFolder(tfds.core.GeneratorBasedBuilder):
    """Text files as documents, split by file. With `file_format="array_record"` it needs no TensorFlow.

    Files are sorted by a hash of their path and split by the shares. So a split does not depend on dates or contents
    of files, hardly on the other files, and is never empty if it has a share. The metadata record every file's split.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"path": tfds.features.Text(), "text": tfds.features.Text()})
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.builder_config.description,
            features=features,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager):
        texts = find_texts(self.builder_config)
        splits = split_by_file(sorted(texts), self.builder_config.shares)
        self.info.metadata["folder"] = self.builder_config.folder
        self.info.metadata["files"] = splits
        return {split: self._generate_examples(paths, texts) for split, paths in splits.items() if paths}

    def _generate_examples(self, paths, texts) -> Iterator[tuple[str, dict]]:
        for path in tqdm(paths, desc="building data", unit="file", dynamic_ncols=True):
            yield path, {"path": path, "text": texts[path].read_bytes()}


def find_texts(config: TextFolderConfig) -> dict[str, epath.Path]:
    """Path within the folder -> file, of every text file of the config.

    A file with a NUL byte in its first 8 KiB is binary and skipped.

    Raises:
        ValueError: the folder is missing, or has fewer text files than splits with a share.
    """
    folder = epath.Path(config.folder)
    if not folder.is_dir():
        raise ValueError(f"data folder {config.folder!r} is not a directory")
    texts, binary = {}, 0
    for path, file in visible_files(folder, config.excluded):
        if file.name.startswith(".") or not file.name.endswith(config.suffix) or size_of(file) == 0:
            continue
        with file.open("rb") as opened:
            if b"\0" in opened.read(8192):
                binary += 1
            else:
                texts[path] = file
    wanted = [split for split, share in zip(SPLITS, config.shares, strict=True) if share]
    if len(texts) < len(wanted):
        which = f" ending in {config.suffix!r}" if config.suffix else ""
        also = f" and {binary} binary ones" if binary else ""
        raise ValueError(
            f"data folder {config.folder!r} holds {len(texts)} text files{which}{also}; "
            f"the splits {', '.join(wanted)} need one each at least"
        )
    if binary:
        logging.warning("%s: skipped %d binary files", config.folder, binary)
    return texts


def visible_files(folder: epath.Path, excluded: Sequence[str] = ()) -> Iterator[tuple[str, epath.Path]]:
    """(Path within the folder, file) of all files, except those in hidden directories and in excluded ones."""
    for directory, subdirectories, names in folder.walk():
        subdirectories[:] = [d for d in subdirectories if d not in excluded and not d.startswith(".")]
        for file in (directory / name for name in names):
            if file.is_file():  # False for a broken link
                yield as_utf8(str(file.relative_to(folder))), file


def split_by_file(paths: Sequence[str], shares: Sequence[float] = SHARES) -> dict[str, list[str]]:
    """Assigns every path to one split, by a hash. Each split with a share gets a file if there are enough."""
    order = sorted(paths, key=lambda path: hashlib.sha256(path.encode()).digest())
    counts = {
        name: max(1, round(share * len(order))) if share else 0 for name, share in zip(SPLITS, shares, strict=True)
    }
    rest = next(name for name, count in counts.items() if count)  # takes the rounding error
    counts[rest] = max(0, len(order) - sum(count for name, count in counts.items() if name != rest))
    remaining = iter(order)
    splits = {name: list(itertools.islice(remaining, counts[name])) for name in [*list(SPLITS)[1:], "train"]}
    return {name: splits[name] for name in SPLITS}


def build(config: TextFolderConfig, data_dir: epath.PathLike) -> TextFolder:
    """Builds the dataset in `data_dir`, or opens it if it exists (then the folder is not read again).

    Raises:
        OSError: it can't be written.
        ValueError: see `find_texts`.
    """
    tfds.disable_progress_bar()  # `_generate_examples` has its own
    builder = _builder(config, data_dir)
    if is_remote(data_dir) and not builder.is_prepared():
        with tempfile.TemporaryDirectory() as folder:
            built = build(config, folder)
            copy_tree(epath.Path(built.data_dir), epath.Path(builder.data_dir), last="dataset_info.json")
        builder = _builder(config, data_dir)
    with writing(builder.data_dir), contextlib.redirect_stdout(None):
        builder.download_and_prepare()
    return builder


@contextlib.contextmanager
def writing(path: epath.PathLike) -> Iterator[None]:
    """Turns errors of array_record's writer, such as a full disk, into an OSError that names the path."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"{path} can't be written: {beginning(error)}") from None


def _builder(config: TextFolderConfig, data_dir: epath.PathLike) -> TextFolder:
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # TFDS warns of configs that the builder does not list
    try:
        return TextFolder(config=config, data_dir=str(data_dir), file_format="array_record")
    finally:
        logging.set_verbosity(verbosity)


def too_short(documents: Sequence[Document], needed: str) -> ValueError:
    """The error that no document is as long as needed: "none of 3 documents has the 65 tokens of ..."."""
    longest = max((len(document.tokens) for document in documents), default=0)
    return ValueError(f"none of {len(documents)} {needed}; the longest has {longest}")


def tokens_per_byte(documents: Sequence[Document]) -> float:
    """Tokens per byte of text, over all documents."""
    return sum(len(d.tokens) for d in documents) / sum(d.size for d in documents)
