"""Texts of TFDS datasets; those prepared as array_record need no TensorFlow."""

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from longrope_jax.errors import beginning, shortened

# Features that may hold a document's name, in order of preference.
_NAMES = ("path", "name", "title", "book_title", "url", "id")


class OpenDataset:
    """A prepared dataset: the documents of its splits, and how many there are."""

    def __init__(self, builder: tfds.core.DatasetBuilder, text_feature: str):
        """Raises ValueError if it can't be read, or the text feature is missing or ambiguous."""
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
        """Approximate bytes of a split; 0 if there is no such split."""
        return self._builder.info.splits[split].num_bytes if split in self.counts else 0

    def read(self, split: str, numbers: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        """(name, text) of the documents with these indices, which are ascending.

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
            for number in numbers:
                with self._name_dataset():
                    if split not in self._sources:
                        self._sources[split] = self._builder.as_data_source(split)
                    example = self._sources[split][number]
                yield number, example
        else:
            # Files one after the other: otherwise the order is not that of the indices.
            in_order = tfds.ReadConfig(interleave_cycle_length=1)
            stretch = f"{split}[{numbers[0]}:{numbers[-1] + 1}]"
            examples = tfds.as_numpy(self._builder.as_dataset(split=stretch, read_config=in_order))
            wanted = set(numbers)
            for number, example in enumerate(examples, numbers[0]):
                if number in wanted:
                    yield number, example

    @contextlib.contextmanager
    def _name_dataset(self) -> Iterator[None]:
        """Turns errors of a dataset's files into a ValueError that names it."""
        try:
            yield
        # Files that are missing or damaged, and names of files or features that do not fit.
        except (RuntimeError, ValueError, LookupError, OSError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self._builder.data_dir}: files of the dataset can't be read: {beginning(error)}"
            ) from None


def open_by_name(name: str, data_dir: str, text_feature: str) -> OpenDataset:
    """Opens a prepared dataset by its name.

    Args:
        data_dir: where it was prepared; "" is the default of TFDS.

    Raises:
        ValueError: it does not exist, or is not prepared; the message says how to prepare it.
    """
    where = f"in {data_dir}" if data_dir else f"in {tfds.core.constants.DATA_DIR}, the default of TFDS"
    try:
        builder = tfds.builder(name, data_dir=data_dir or None)
    except Exception as error:  # every way to find a dataset has its own error
        raise ValueError(f"tfds = {name!r}: not found {where}: {_reason(error)}") from None
    if not builder.info.splits:
        argument = f", data_dir={data_dir!r}" if data_dir else ""
        raise ValueError(
            f"tfds = {name!r} is not prepared {where}. Once, where there is room for it (pip install -r "
            f'requirements-tensorflow.txt, as most need it for this): python -c "import tensorflow_datasets as tfds; '
            f"tfds.builder('{name}'{argument}, file_format='array_record').download_and_prepare()\""
        )
    return OpenDataset(builder, text_feature)


def open_directory(directory: epath.PathLike, text_feature: str) -> OpenDataset:
    """Opens the dataset that was prepared in a directory; raises ValueError if it can't be read."""
    try:
        return OpenDataset(tfds.builder_from_directory(directory), text_feature)
    except Exception as error:  # see `open_by_name`
        raise ValueError(f"data folder {str(directory)!r}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return beginning(error) or type(error).__name__


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
    names = ", ".join(texts or strings)
    raise ValueError(f"text_feature must name the text feature, one of {names}" if names else "it has no text feature")
