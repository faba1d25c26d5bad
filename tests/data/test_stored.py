"""Documents in files against the same documents in memory."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from etils import epath

from longrope_jax.data import token_files
from longrope_jax.data.batches import finetuning_batches, pretraining_batches
from longrope_jax.data.corpus import Document, tokens_per_byte
from longrope_jax.data.needles import needle
from longrope_jax.data.sequences import cut, segments
from longrope_jax.data.sources import Texts
from longrope_jax.data.token_files import stored_documents
from longrope_jax.data.tokenizer import ByteTokenizer
from longrope_jax.data.windows import fixed_windows

RECORD = 64
LENGTHS = (0, 1, 61, 62, 63, 126, 127, 300, 1000, 500, 64, 700)  # of texts; their documents have two tokens more
TOKENIZER = ByteTokenizer()


def make_texts(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    words = [b"some ", b"words ", b"and a stop. ", b"\n"]
    made = [b"".join(rng.choice(words, size)) for size in lengths]
    return {f"file {i}.txt": text[:size] for i, (text, size) in enumerate(zip(made, lengths, strict=True))}


def as_texts(texts, size=None):
    """A split of a source with these texts."""
    items = list(texts.items())
    size = sum(map(len, texts.values())) if size is None else size
    return Texts(range(len(items)), size, lambda numbers: (items[number] for number in numbers))


def store(folder, texts, tokenizer=TOKENIZER, split="train", size=None):
    token_files.write_shards(folder, split, as_texts(texts, size), tokenizer)
    token_files.finish(folder, split, as_texts(texts, size), tokenizer, {})
    return stored_documents(folder, split)


@pytest.fixture(autouse=True)
def small_records(monkeypatch):
    monkeypatch.setattr(token_files, "RECORD", RECORD)


@pytest.fixture(params=[1, 3], ids=["one shard", "three shards"])
def both(request, tmp_path, monkeypatch):
    """(in files, in memory)"""
    texts = make_texts()
    monkeypatch.setattr(token_files, "_SHARD_BYTES", -(-sum(map(len, texts.values())) // request.param))
    held = [Document(name, TOKENIZER.encode(text), len(text)) for name, text in texts.items()]
    found = store(epath.Path(tmp_path), texts)
    assert len(list(tmp_path.glob("*.array_record"))) == request.param
    return found, held


def forbid_reading(monkeypatch):
    monkeypatch.setattr(token_files.Shard, "records", lambda *_: pytest.fail("tokens were read"))


def test_documents_are_those_in_memory(both):
    found, held = both
    assert len(found) == len(held)
    for mine, other in zip(found, held, strict=True):
        assert (mine.name, mine.size, len(mine.tokens)) == (other.name, other.size, len(other.tokens))
        assert mine.tokens.dtype == other.tokens.dtype
        np.testing.assert_array_equal(np.asarray(mine.tokens), other.tokens)
    assert found[-1].name == held[-1].name and [d.name for d in found[2:5]] == [d.name for d in held[2:5]]
    with pytest.raises(IndexError):
        found[len(held)]


def test_slices_are_those_of_an_array(both):
    for mine, other in zip(*both, strict=True):
        size = len(other.tokens)
        places = sorted({0, 1, RECORD - 1, RECORD, RECORD + 1, size // 2, size - 1, size, size + 5} | {-1, -RECORD})
        for start in places:
            for stop in places:
                part = mine.tokens[start:stop]
                assert part.dtype == np.uint16
                np.testing.assert_array_equal(part, other.tokens[start:stop])
        np.testing.assert_array_equal(mine.tokens[::3], other.tokens[::3])
        np.testing.assert_array_equal(mine.tokens[::-1], other.tokens[::-1])
        assert mine.tokens[-1] == other.tokens[-1] and mine.tokens[size - 1] == other.tokens[size - 1]
        assert np.asarray(mine.tokens, np.int64).dtype == np.int64
        for outside in (size, -size - 1):
            with pytest.raises(IndexError):
                mine.tokens[outside]


def test_a_slice_reads_only_the_records_that_it_touches(both, monkeypatch):
    found, held = both
    read, records = [], token_files.Shard.records

    def noting(shard, first, stop):
        read.append(stop - first)
        return records(shard, first, stop)

    monkeypatch.setattr(token_files.Shard, "records", noting)
    longest = found[8].tokens
    for part, count in [((0, 1), 1), ((63, 65), 2), ((128, 192), 1), ((130, 400), 5), ((990, 1002), 1)]:
        np.testing.assert_array_equal(longest[slice(*part)], held[8].tokens[slice(*part)])
        assert read.pop() == count
    assert longest[5:5].size == 0 and not read


def test_batches_are_those_of_documents_in_memory(both):
    makers = [
        lambda documents: pretraining_batches(documents, length=16, batch=4, seed=1),
        *(
            lambda documents, packed=packed, share=share: finetuning_batches(
                documents, 128, 32, 2, 3, bos=256, eos=257, packed=packed, long_share=share
            )
            for packed, share in [(False, 1.0), (True, 1.0), (True, 0.5)]
        ),
    ]
    for make in makers:
        mine, other = map(make, both)
        for _ in range(20):
            jax.tree.map(np.testing.assert_array_equal, next(mine), next(other))


def test_windows_and_needles_are_those_of_documents_in_memory(both):
    for length, count in [(16, 30), (100, 8), (900, 1)]:
        mine, other = (fixed_windows(documents, length, count, seed=length) for documents in both)
        np.testing.assert_array_equal(mine.tokens, other.tokens)
        assert (mine.names, mine.starts) == (other.names, other.starts)
    for seed, length in enumerate([300, 500, 650, 900, 1190]):
        mine, other = (needle(length, 0.4, TOKENIZER, np.random.default_rng(seed), documents) for documents in both)
        np.testing.assert_array_equal(mine.tokens, other.tokens)
    messages = []
    for documents in both:
        with pytest.raises(ValueError, match="the longest has 1000") as caught:
            needle(5000, 0.4, TOKENIZER, np.random.default_rng(0), documents)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_plans_are_made_without_reading_a_token(both, monkeypatch):
    found, held = both
    forbid_reading(monkeypatch)
    for plan in (cut, segments):
        jax.tree.map(np.testing.assert_array_equal, plan(found, 32), plan(held, 32))
    assert tokens_per_byte(found) == tokens_per_byte(held)
    # Iterators are made with their whole plan; the first batch would read.
    monkeypatch.setattr("grain.DatasetIterator.__next__", lambda *_: pytest.fail("a batch was made"))
    pretraining_batches(found, length=16, batch=4, seed=1)
    finetuning_batches(found, 128, 32, 2, 3, bos=256, eos=257, packed=True, long_share=0.5)
    with pytest.raises(ValueError, match="the longest has 1002"):
        fixed_windows(found, 2000, 3, seed=0)


def test_only_the_chosen_windows_and_documents_are_read(both, monkeypatch):
    found, held = both
    read, records = [], token_files.Shard.records
    monkeypatch.setattr(
        token_files.Shard, "records", lambda shard, *span: read.append(span[1] - span[0]) or records(shard, *span)
    )
    fixed_windows(found, 30, 2, seed=0)
    assert len(read) == 2 and max(read) <= 2
    read.clear()
    needle(400, 0.5, TOKENIZER, np.random.default_rng(0), found)
    assert sum(read) < sum(-(-len(document.tokens) // RECORD) for document in held) / 2


def test_large_vocabularies_take_four_bytes(tmp_path):
    class Wide:
        vocab_size, bos, eos, stops, fingerprint = 1 << 17, 70_000, None, (), "wide"

        def encode(self, text):
            return np.array([self.bos, *(100_000 + byte for byte in text)], np.uint32)

    documents = store(epath.Path(tmp_path), {"a": b"text", "b": b"more text"}, Wide())
    assert documents[0].tokens.dtype == np.uint32
    assert documents[1].tokens[:3].tolist() == [70_000, 100_000 + ord("m"), 100_000 + ord("o")]


def test_documents_of_one_name_are_distinguished(tmp_path):
    texts = Texts(range(3), 30, lambda numbers: (("Poems", b"text %d" % number) for number in numbers))
    folder = epath.Path(tmp_path)
    token_files.write_shards(folder, "train", texts, TOKENIZER)
    token_files.finish(folder, "train", texts, TOKENIZER, {})
    assert [document.name for document in stored_documents(folder, "train")] == ["Poems", "Poems (2)", "Poems (3)"]


def test_threads_share_a_shard(both):
    found, held = both
    places = [(i % len(held), start) for i in range(200) for start in (0, 7)]
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda place: found[place[0]].tokens[place[1] :], places))
    for (i, start), part in zip(places, parts, strict=True):
        np.testing.assert_array_equal(part, held[i].tokens[start:])


@pytest.mark.parametrize("damage", ["cut off", "gone", "flipped"])
def test_a_damaged_shard_is_named(tmp_path, damage):
    documents = store(epath.Path(tmp_path), make_texts())
    (shard,) = tmp_path.glob("*.array_record")
    if damage == "gone":
        shard.unlink()
    elif damage == "flipped":
        content = bytearray(shard.read_bytes())
        content[content.index(TOKENIZER.encode(b"words", bos=False, eos=False).tobytes())] ^= 1
        shard.write_bytes(content)
    else:
        shard.write_bytes(shard.read_bytes()[:-1])
    message = r"is gone|has \d+ bytes instead of \d+: it is damaged|is damaged; without .* the same command makes"
    with pytest.raises(OSError, match=rf"^{re.escape(str(shard))} ({message})"):
        for document in documents:
            document.tokens[:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(dtype="O"), "dtype = 'O' must be one of"),
        (lambda index: index.update(record=0), "record = 0 must be a positive number"),
        (lambda index: index["shards"][0].update(file="../train.array_record"), "must be the name of an array_record"),
        (lambda index: index["shards"][0]["names"].pop(), "must be equally many"),
        (lambda index: index["shards"][0].update(bytes=-1), "must be numbers from 0 on"),
        (lambda index: index["shards"][0].pop("sha256"), "shards = .* must be a list, of an object"),
        (lambda index: index.update(shards=3), "shards = 3 must be a list"),
    ],
)
def test_a_damaged_index_is_named(tmp_path, change, message):
    store(epath.Path(tmp_path), make_texts())
    index = json.loads((tmp_path / "train.json").read_text())
    change(index)
    (tmp_path / "train.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path / 'train.json'))}.*{message}"):
        stored_documents(epath.Path(tmp_path), "train")


def test_an_index_that_promises_more_than_there_is_does_not_give_less(tmp_path):
    store(epath.Path(tmp_path), make_texts((100,)))
    index = json.loads((tmp_path / "train.json").read_text())
    for more in (1, 1000):
        changed = json.loads(json.dumps(index))
        changed["shards"][0]["tokens"][0] += more
        (tmp_path / "train.json").write_text(json.dumps(changed))
        (document,) = stored_documents(epath.Path(tmp_path), "train")
        with pytest.raises(OSError, match="is damaged; without"):
            document.tokens[:]


def test_an_index_tells_what_is_in_the_files(tmp_path):
    texts = make_texts()
    store(epath.Path(tmp_path), texts)
    index = json.loads((tmp_path / "train.json").read_text())
    sizes = sum(map(len, texts.values()))
    assert index["documents"] == len(texts) and index["text_bytes"] == sizes
    assert index["tokens"] == sizes + 2 * len(texts) and index["tokenizer"] == "bytes" and index["dtype"] == "<u2"
