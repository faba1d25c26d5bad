"""Texts of TFDS datasets, without TensorFlow where they were prepared as array_record."""

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from longrope_jax.errors import beginning, shortened

# Where a document's name may be, the best first; a link or a number will do.
_NAMES = ("path", "name", "title", "book_title", "url", "id")


class OpenDataset:
    """A prepared dataset: how many documents its splits have, and their texts."""

    def __init__(self, builder: tfds.core.DatasetBuilder, text_feature: str):
        """Raises ValueError where it can't be read, or holds no text that is clearly meant."""
        self._builder = builder
        self._text = _text_feature(builder.info.features, text_feature)
        self._name = next((name for name in _NAMES if name in builder.info.features), None)
        self._is_array_record = builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD
        if not self._is_array_record and importlib.util.find_spec("tensorflow") is None:
            raise ValueError(
                f"{builder.info.full_name} was prepared as {builder.info.file_format.value}, which TensorFlow reads: "
                "pip install -r requirements-tensorflow.txt; or prepare it again with file_format='array_record'"
            )
        self.counts = {name: split.num_examples for name, split in builder.info.splits.items()}
        self._sources: dict[str, Any] = {}

    def size(self, split: str) -> int:
        """Bytes of a split, about; 0 if there is none."""
        return self._builder.info.splits[split].num_bytes if split in self.counts else 0

    def read(self, split: str, numbers: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        """(name, text) of these documents; `numbers` ascend.

        Raises:
            ValueError: the dataset is damaged.
        """
        for number, example in self._examples(split, numbers):
            name = example[self._name] if self._name else b""
            name = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
            name = name or f"{split}/{number}"
            text = example[self._text]
            if not isinstance(text, str | bytes):
                raise ValueError(f"{self._builder.data_dir}: {shortened(name)} has no text: {shortened(text)}")
            yield name, text.encode() if isinstance(text, str) else text

    def _examples(self, split: str, numbers: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        if not len(numbers):
            return
        if self._is_array_record:
            if split not in self._sources:
                with self._naming():
                    self._sources[split] = self._builder.as_data_source(split)
            for number in numbers:
                with self._naming():
                    example = self._sources[split][number]
                yield number, example
        else:
            # One file at a time: only so the order is that of the numbers.
            in_order = tfds.ReadConfig(interleave_cycle_length=1)
            stretch = f"{split}[{numbers[0]}:{numbers[-1] + 1}]"
            examples = tfds.as_numpy(self._builder.as_dataset(split=stretch, read_config=in_order))
            wanted = set(numbers)
            for number, example in enumerate(examples, numbers[0]):
                if number in wanted:
                    yield number, example

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        """What is wrong with the files of a dataset becomes a ValueError that names it."""
        try:
            yield
        # Files that are not there or damaged (with hashes), and names of files or features that fit nothing.
        except (RuntimeError, ValueError, LookupError, OSError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self._builder.data_dir}: files of the dataset can't be read: {beginning(error)}"
            ) from None


def open_by_name(name: str, data_dir: str, text_feature: str) -> OpenDataset:
    """A dataset that TFDS knows, or that was prepared in `data_dir`.

    Raises:
        ValueError: there is none, or it is not prepared; with how to do that.
    """
    where = f"in {data_dir}" if data_dir else f"in {tfds.core.constants.DATA_DIR}, the default of TFDS"
    try:
        builder = tfds.builder(name, data_dir=data_dir or None)
    except Exception as error:  # each of its ways to find a dataset fails in its own way
        told = beginning(error) or type(error).__name__
        raise ValueError(f"tfds = {name!r}: not found {where}: {told}") from None
    if not builder.info.splits:
        argument = f", data_dir={data_dir!r}" if data_dir else ""
        raise ValueError(
            f"tfds = {name!r} is not prepared {where}. Once, where there is room for it (pip install -r "
            f'requirements-tensorflow.txt, as most need it for this): python -c "import tensorflow_datasets as tfds; '
            f"tfds.builder('{name}'{argument}, file_format='array_record').download_and_prepare()\""
        )
    return OpenDataset(builder, text_feature)


def open_directory(directory: epath.PathLike, text_feature: str) -> OpenDataset:
    """The dataset that was prepared in a directory; raises ValueError where it can't be read."""
    try:
        builder = tfds.builder_from_directory(directory)
    except Exception as error:
        told = beginning(error) or type(error).__name__
        raise ValueError(f"data folder {str(directory)!r}: {told}") from None
    try:
        return OpenDataset(builder, text_feature)
    except ValueError as error:
        raise ValueError(f"data folder {str(directory)!r}: {beginning(error)}") from None


def _text_feature(features: tfds.features.FeaturesDict, wanted: str) -> str:
    if not isinstance(features, tfds.features.FeaturesDict):
        raise ValueError("its examples have no features with names")
    texts = [name for name, feature in sorted(features.items()) if isinstance(feature, tfds.features.Text)]
    scalars = [name for name, feature in sorted(features.items()) if feature.shape == ()]
    strings = [name for name in scalars if np.dtype(features[name].np_dtype).kind == "O"]
    if wanted:
        if wanted not in strings:
            raise ValueError(f"text_feature = {wanted!r} is no text of the dataset; those are {', '.join(strings)}")
        return wanted
    if len(texts) == 1:
        return texts[0]
    if "text" in texts:
        return "text"
    told = ", ".join(texts or strings)
    raise ValueError(f"text_feature must say which feature is the text: {told}" if told else "it holds no text at all")
