import numpy as np
import pytest

from longrope_jax.data.corpus import DataSettings
from longrope_jax.data.sources import read_documents
from longrope_jax.data.tokenizer import ByteTokenizer


def test_every_file_is_a_document_of_one_split(tmp_path):
    texts = {f"{number}.txt": f"text number {number}\n" * (number + 1) for number in range(10)}
    (tmp_path / "texts").mkdir()
    for name, text in texts.items():
        (tmp_path / "texts" / name).write_text(text)
    settings = DataSettings(folder=str(tmp_path / "texts"), shares=(0.5, 0.2, 0.3, 0.0))
    documents = read_documents(settings, tmp_path / "data")
    assert {split: len(some) for split, some in documents.items()} == dict(train=5, search=2, evaluation=3, test=0)
    found = {document.name: document for some in documents.values() for document in some}
    assert set(found) == set(texts)
    for name, text in texts.items():
        assert np.array_equal(found[name].tokens, ByteTokenizer().encode(text))
        assert found[name].size == len(text)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a directory"):
        read_documents(DataSettings(folder=str(tmp_path / "nothing")), tmp_path / "data")
