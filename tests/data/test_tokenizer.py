import numpy as np
import pytest

from longrope_jax.data.tokenizer import ByteTokenizer

TEXTS = {
    "empty": b"",
    "ascii": b"def f():\r\n\treturn 1\n",
    "utf-8": "naïve 日本語 🙂".encode(),
    "latin-1": "déjà vu".encode("latin-1"),
    "every byte": bytes(range(256)),
    "random bytes": np.random.default_rng(0).bytes(1000),
}


@pytest.mark.parametrize("data", TEXTS.values(), ids=TEXTS)
def test_tokens_between_the_markers_are_the_bytes(data):
    tokens = ByteTokenizer().encode(data)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [256, *data, 257]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_markers_are_optional(bos, eos):
    tokens = ByteTokenizer().encode(b"xy", bos=bos, eos=eos)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [256] * bos + [*b"xy"] + [257] * eos


def test_nothing_at_all_is_an_empty_array():
    tokens = ByteTokenizer().encode(b"", bos=False, eos=False)
    assert tokens.shape == (0,)
    assert tokens.dtype == np.uint16


def test_every_token_is_in_the_vocabulary_and_the_markers_are_no_bytes():
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(bytes(range(256)))
    assert sorted(tokens) == list(range(tokenizer.vocab_size))
    assert (tokens[0], tokens[-1]) == (tokenizer.bos, tokenizer.eos)


def test_a_str_is_its_utf8_bytes():
    text = "naïve 日本語 🙂"
    np.testing.assert_array_equal(ByteTokenizer().encode(text), ByteTokenizer().encode(text.encode()))


@pytest.mark.parametrize("text", ["", "plain", "naïve 日本語 🙂\n\r\n\0"])
@pytest.mark.parametrize("markers", [True, False])
def test_decode_gives_the_text_back_without_markers(text, markers):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text, bos=markers, eos=markers)) == text


def test_decode_takes_lists_and_wider_integers():
    assert ByteTokenizer().decode([256, 104, 105, 257]) == "hi"
    assert ByteTokenizer().decode(np.array([104, 105, 257], np.int32)) == "hi"


def test_decode_replaces_what_is_no_utf8():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("a\xe9b".encode("latin-1"))) == "a\N{REPLACEMENT CHARACTER}b"


def test_a_text_ends_with_its_end():
    assert ByteTokenizer().stops == (257,)


def test_a_text_that_spells_a_marker_is_only_text():
    assert ByteTokenizer().encode("<eos>", bos=False, eos=False).max() < 256
