"""Which text an experiment reads: the section `config.data`, and others named `config.data_NAME`."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

SPLITS = {"train": 0.7, "search": 0.1, "evaluation": 0.2}
"""Share of the documents in every split, where nothing else is said. Factors are searched on documents that training
never saw, and judged on others again.
"""
SHARES = tuple(SPLITS.values())


@dataclass(frozen=True)
class DataSettings:
    """Which text, one of three: a folder, a TFDS dataset, or with neither the embedded corpus, the standard library's
    sources. Folders may be on any file system that etils knows (`gs://`).

    Attributes:
        folder: of text files, a document each; of array_record files whose records are texts in UTF-8, a document
            each; or the directory of a prepared TFDS dataset, the one that has features.json.
        suffix: ending that the name of a text file must have; "" takes every text file of the folder.
        tfds: a TFDS dataset by its name, "pg19", with its config and version where it has such, "wiki40b/en:1.3.0".
            Its splits train, validation and test are those for training, search and evaluation.
        tfds_dir: the data_dir that it was prepared in; "" is the default of TFDS.
        text_feature: which feature of a TFDS dataset is the text; "" finds it where there is only one, or one "text".
        shares: of the documents that go to training, search and evaluation, where the source has no such splits.
    """

    folder: str = ""
    suffix: str = ""
    tfds: str = ""
    tfds_dir: str = ""
    text_feature: str = ""
    shares: tuple[float, ...] = SHARES

    def __post_init__(self):
        if self.suffix and not self.folder:
            raise ValueError(f"suffix = {self.suffix!r} needs a folder; the embedded corpus has its own")
        if self.folder and self.tfds:
            raise ValueError(f"folder = {self.folder!r} and tfds = {self.tfds!r} are two sources; give a section each")
        if self.tfds_dir and not self.tfds:
            raise ValueError(f"tfds_dir = {self.tfds_dir!r} needs tfds, the name of a dataset")
        if self.text_feature and not (self.tfds or self.folder):
            raise ValueError(f"text_feature = {self.text_feature!r} needs tfds or a folder with a TFDS dataset")
        if len(self.shares) != len(SPLITS) or not all(0 <= share <= 1 for share in self.shares):
            raise ValueError(f"shares = {self.shares} must be three numbers from 0 to 1, for {', '.join(SPLITS)}")
        if not math.isclose(sum(self.shares), 1, abs_tol=1e-6):
            raise ValueError(f"shares = {self.shares} must add up to 1, not {sum(self.shares):g}")

    def to_record(self) -> dict[str, Any]:
        """The fields that are not at their default, as JSON holds them: a field more does not make old text another."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        told = {name: value for name, value in given.items() if value != defaults[name]}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}
