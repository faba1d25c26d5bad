import json

import numpy as np
import pytest
import tiny_gguf as tiny
from gguf import TokenType
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from longrope_jax.data.tokenizer import SubwordTokenizer
from longrope_jax.interop.gguf import gguf_tokenizer

PROSE = "It was the best of times, it was the worst of times; in 1859 DON'T say they've said 12 12345 so.\n\n  x" * 3
TEXTS = {
    "empty": "",
    "english": "Call me Ishmael. Some years ago--never mind how long, don't ask DON'T.",
    "code": "def f(x):\n    return x**2  # 12345\n\n\n\tif  a:\n",
    "unicode": "naïve 日本語 Ωμέγα e\N{COMBINING ACUTE ACCENT} \u00a0\u2003x\u200b",
    "emoji": "🙂👩‍👩‍👧",
    "spaces": " " * 37 + "x" + "\t\t\n \n",
    "crlf": "a\r\nb.\r\n\r\nc",
    "digits": "3.14159 10,000,000 ½ ² 2024",
    "special": "<bos>a</s>b<eos",
}
# How the models themselves cut words, in the terms of their tokenizer.json.
ORIGINALS = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(
                    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
                "isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


def train(words, **options):
    """A byte-level tokenizer of a model that cuts words in this way, "<bos>" and "</s>" its special tokens."""
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = ORIGINALS[words]()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<bos>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PROSE], trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def byte_level(tokenizer, words, **changes):
    """Its metadata in a GGUF file."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    types = [TokenType.CONTROL if token in ("<bos>", "</s>") else TokenType.NORMAL for token in tokens]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": words,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    } | {f"tokenizer.{key.replace('__', '.')}": value for key, value in changes.items()}


def with_tokens(metadata, tokens, kind=TokenType.NORMAL):
    """The same with more tokens; those that it has already are none."""
    there = metadata["tokenizer.ggml.tokens"]
    new = [token for token in tokens if token not in there]
    types = [*metadata["tokenizer.ggml.token_type"], *[int(kind)] * len(new)]
    return metadata | {"tokenizer.ggml.tokens": there + new, "tokenizer.ggml.token_type": types}


@pytest.fixture(scope="module")
def smollm():
    return byte_level(train("smollm"), "smollm")


def load(tmp_path, metadata):
    metadata = {key: value for key, value in metadata.items() if value is not None}
    return gguf_tokenizer(tiny.write(tmp_path / "a.gguf", metadata))


@pytest.mark.parametrize("words", ORIGINALS)
def test_byte_level_tokens_are_those_of_the_model(tmp_path, words):
    original = train(words)
    tokenizer = load(tmp_path, byte_level(original, words))
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos, tokenizer.stops) == (290, 0, 1, (1,))
    for name, text in (TEXTS | {"prose": PROSE}).items():
        tokens = tokenizer.encode(text, bos=False, eos=False)
        assert tokens.tolist() == original.encode(text, add_special_tokens=False).ids, name
        assert not {0, 1} & set(tokens.tolist()), name
        assert tokenizer.decode(tokenizer.encode(text)) == text, name


@pytest.mark.parametrize("words", ["default", None])
def test_words_of_the_default(tmp_path, smollm, words):
    """Digits in threes, and marks apart from letters and spaces."""
    metadata = smollm | {"tokenizer.ggml.pre": words}
    metadata["tokenizer.ggml.merges"] = [f"{a} {b}" for a, b in zip("123,Ġ", "234xx", strict=True)]
    metadata = with_tokens(metadata, ["12", "23", "34", ",x", "Ġx"])
    tokenizer = load(tmp_path, metadata)
    tokens = [tokenizer.decode([token]) for token in tokenizer.encode("1234,x x", bos=False, eos=False)]
    assert tokens == ["12", "3", "4", ",", "x", " x"]


def test_llama_3_takes_words_that_are_tokens_as_they_are(tmp_path):
    metadata = byte_level(train("llama-bpe"), "llama-bpe")
    metadata = with_tokens(metadata, ["ĠIshmael"])
    assert load(tmp_path, metadata).encode(" Ishmael", bos=False, eos=False).tolist() == [290]
    without = load(tmp_path, metadata | {"tokenizer.ggml.pre": "gpt-2"})
    assert 290 not in without.encode(" Ishmael")


def test_tokens_that_are_always_whole_are_text(tmp_path, smollm):
    tokenizer = load(tmp_path, with_tokens(smollm, ["<tool> "], TokenType.USER_DEFINED))
    tokens = tokenizer.encode("a<tool> b")
    assert 290 in tokens
    assert tokenizer.decode(tokens) == "a<tool> b"


def test_every_end_stops_a_text(tmp_path, smollm):
    tokenizer = load(tmp_path, smollm | {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 1})
    assert tokenizer.stops == (1, 7)


def test_without_ids_there_is_neither_bos_nor_eos(tmp_path, smollm):
    metadata = smollm | {"tokenizer.ggml.bos_token_id": None, "tokenizer.ggml.eos_token_id": None}
    tokenizer = load(tmp_path, metadata)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.stops) == (None, None, ())
    assert not {0, 1} & set(tokenizer.encode("<bos>x</s>").tolist())


@pytest.mark.parametrize(("metadata", "wanted"), [({}, []), ({"tokenizer.ggml.add_bos_token": True}, [0])])
def test_files_are_the_same_tokenizer(tmp_path, smollm, metadata, wanted):
    tokenizer = load(tmp_path, smollm | {"tokenizer.chat_template": "{{ messages }}"} | metadata)
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in tokenizer.files.items():
        (folder / name).write_bytes(content)
    config = json.loads(tokenizer.files["tokenizer_config.json"])
    assert config["chat_template"] == "{{ messages }}"
    assert (config["bos_token"], config["eos_token"]) == ("<bos>", "</s>")
    again = SubwordTokenizer.from_folder(folder)
    assert (again.bos, again.eos, again.stops) == (0, 1, (1,))
    assert again.window_bos == tokenizer.window_bos == (wanted[0] if wanted else None)
    for text in TEXTS.values():
        np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))
    # Other programs add what the file wants unasked.
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert plain.encode("x").ids == wanted + tokenizer.encode("x", bos=False, eos=False).tolist()


# SentencePiece

PIECES = {
    "<unk>": (0.0, TokenType.UNKNOWN),
    "<s>": (0.0, TokenType.CONTROL),
    "</s>": (0.0, TokenType.CONTROL),
    **{f"<0x{byte:02X}>": (0.0, TokenType.BYTE) for byte in range(256)},
    **{
        piece: (-float(rank), TokenType.NORMAL)
        for rank, piece in enumerate(
            ["▁t", "he", "▁the", "in", "▁▁", "</", "s>", "<s", "en", "hen", "▁▁▁▁", *"▁theins<>/abc"]
        )
    },
}


def sentencepiece(**changes):
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": list(PIECES),
        "tokenizer.ggml.scores": [score for score, _ in PIECES.values()],
        "tokenizer.ggml.token_type": [int(kind) for _, kind in PIECES.values()],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


# Merged by hand: the best piece that any two neighbours make, then again.
SENTENCEPIECE = {
    "the": ["▁the"],
    "then": ["▁the", "n"],  # "he" has a better score than "en", so "hen" never comes up
    " the": ["▁", "▁the"],
    "tin": ["▁t", "in"],
    "x": ["▁", "<0x78>"],
    "é": ["▁", "<0xC3>", "<0xA9>"],
    "</s>": ["▁", "</", "s>"],
    "<s>": ["▁", "<", "s>"],
    "a     b": ["▁", "a", "▁▁▁▁", "▁", "b"],
    "a\nb": ["▁", "a", "<0x0A>", "b"],
    "": [],
}


@pytest.mark.parametrize("text", SENTENCEPIECE)
def test_sentencepiece_merges_by_score(tmp_path, text):
    tokenizer = load(tmp_path, sentencepiece())
    tokens = tokenizer.encode(text, bos=False, eos=False)
    assert [list(PIECES)[token] for token in tokens] == SENTENCEPIECE[text]
    assert tokenizer.decode(tokens) == text
    assert tokenizer.encode(text).tolist() == [1, *tokens, 2]


def test_sentencepiece_without_a_space_before_the_text(tmp_path):
    tokenizer = load(tmp_path, sentencepiece(add_space_prefix=False))
    tokens = tokenizer.encode("the the", bos=False, eos=False)
    assert [list(PIECES)[token] for token in tokens] == ["t", "he", "▁the"]
    assert tokenizer.decode(tokens) == "the the"
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"


def test_sentencepiece_files_are_the_same_tokenizer_and_add_a_bos(tmp_path):
    tokenizer = load(tmp_path, sentencepiece())
    plain = Tokenizer.from_str(tokenizer.files["tokenizer.json"].decode())
    assert plain.encode("the").ids == tokenizer.encode("the", eos=False).tolist()
    assert json.loads(tokenizer.files["tokenizer_config.json"])["unk_token"] == "<unk>"


@pytest.mark.parametrize(("said", "wanted"), [({}, 1), ({"add_bos_token": True}, 1), ({"add_bos_token": False}, None)])
def test_sentencepiece_windows_begin_with_bos_unless_the_file_says_no(tmp_path, said, wanted):
    assert load(tmp_path, sentencepiece(**said)).window_bos == wanted


def test_windows_of_llama_3_begin_with_bos(tmp_path, smollm):
    assert load(tmp_path, smollm).window_bos is None
    assert load(tmp_path, smollm | {"tokenizer.ggml.pre": "llama-bpe"}).window_bos == 0


# bad input


def test_a_file_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="a.gguf: tokenizer.ggml.model = None must be one of gpt2, llama"):
        gguf_tokenizer(tiny.write_model(tmp_path / "a.gguf", tiny.make_weights()))
    with pytest.raises(ValueError, match="tokenizer.ggml.model = 'none' must be"):
        load(tmp_path, {"general.architecture": "llama", "tokenizer.ggml.model": "none"})


BAD = {
    "model = 'bert' must be one of gpt2, llama": {"model": "bert"},
    "pre = 'tekken' must be one of gpt-2, smollm, llama-bpe, default": {"pre": "tekken"},
    r"model = \[1, 2\] must be one of": {"model": [1, 2]},
    r"pre = \[1, 2\] must be one of": {"pre": [1, 2]},
    "tokens = None must be a list of str": {"tokens": None},
    "merges = 7 must be a list of str": {"merges": 7},
    "merges: number 0 must be two tokens": {"merges": ["abc"]},
    "merges do not fit the tokens": {"merges": ["nix nix"]},
    "token_type = .* must be a list of int, 290 in all": {"token_type": [1, 1]},
    "eos_token_id = 290 must be below the 290 tokens": {"eos_token_id": 290},
    "bos_token_id = '<bos>' must be below": {"bos_token_id": "<bos>"},
}


@pytest.mark.parametrize("message", BAD)
def test_a_tokenizer_that_is_not_supported(tmp_path, smollm, message):
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path, smollm | {f"tokenizer.ggml.{key}": value for key, value in BAD[message].items()})
    assert str(error.value).startswith(str(tmp_path / "a.gguf"))
    assert "\n" not in str(error.value)


def test_a_token_that_occurs_twice(tmp_path, smollm):
    tokens = [*smollm["tokenizer.ggml.tokens"][:-1], "a"]
    with pytest.raises(ValueError, match="'a' occurs twice"):
        load(tmp_path, smollm | {"tokenizer.ggml.tokens": tokens})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "scores = None must be a list of float"),
        ({"scores": [0.0]}, r"scores = \[0.0\] must be a list of float, .* in all"),
        ({"token_type": None}, "token_type = None must be a list of int"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces = True is not supported"),
        ({"precompiled_charsmap": [1, 2]}, r"precompiled_charsmap = \[1, 2\] is not supported"),
    ],
)
def test_a_sentencepiece_that_is_not_supported(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, sentencepiece(**changes))


def test_a_damaged_file(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF\3\0\0")
    with pytest.raises(ValueError, match="cut off or damaged"):
        gguf_tokenizer(tmp_path / "a.gguf")
