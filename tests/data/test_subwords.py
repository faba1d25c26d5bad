import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from longrope_jax.data.tokenizer import SubwordTokenizer

PROSE = "It was the best of times, it was the worst of times; in 1859 they said so. " * 4
TEXTS = {
    "empty": "",
    "english": "Call me Ishmael. Some years ago--never mind how long precisely.",
    "code": "def f(x):\n    return x**2  # 12345\n\n\n\tif  a:\n",
    "unicode": "naïve 日本語 Ωμέγα e\N{COMBINING ACUTE ACCENT} \u00a0\u2003x\u200b",
    "emoji": "🙂👩‍👩‍👧",
    "spaces": " " * 37 + "x" + "\t\t\n \n",
    "crlf": "a\r\nb\r\n\r\nc",
    "digits": "3.14159 10,000,000 ½ ²",
    "control characters": "x\0y\x7f",
    "special": "<bos>a<eos>b<tool>c<eos",
}


def make_tokenizer(vocab_size=290):
    """A byte-level tokenizer as people publish them: with a template that puts BOS and EOS around every text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<bos>", "<eos>", "<tool>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PROSE], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    return tokenizer


def write(folder, tokenizer=None, **files):
    """A folder with a tokenizer and JSON files, named without their ending."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text((tokenizer or make_tokenizer()).to_str())
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = {"bos_token": "<bos>", "eos_token": {"content": "<eos>", "lstrip": False}}
    return write(tmp_path_factory.mktemp("model"), tokenizer_config=config)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return SubwordTokenizer.from_folder(folder)


def test_what_the_library_knows_of_it(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos, tokenizer.stops) == (290, 0, 1, (1,))
    assert tokenizer.window_bos == 0  # its template adds BOS


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_text_comes_back_and_no_special_token_is_in_it(tokenizer, text):
    tokens = tokenizer.encode(text, bos=False, eos=False)
    assert tokens.dtype == np.uint16 and tokens.ndim == 1
    assert not {0, 1, 2} & set(tokens.tolist())
    assert tokenizer.decode(tokens) == text


def test_tokens_are_subwords(tokenizer):
    assert len(tokenizer.encode(PROSE)) < len(PROSE) / 2


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_markers_come_as_asked_and_only_then(tokenizer, bos, eos):
    inner = tokenizer.encode("it was", bos=False, eos=False).tolist()
    marked = tokenizer.encode("it was", bos=bos, eos=eos)
    assert marked.tolist() == [0] * bos + inner + [1] * eos
    assert tokenizer.decode(marked) == "it was"


def test_truncation_and_padding_of_the_file_do_not_apply(tokenizer):
    assert len(tokenizer.encode("1234567890", bos=False, eos=False)) == 10


def test_bytes_are_utf8(tokenizer):
    text = TEXTS["unicode"]
    np.testing.assert_array_equal(tokenizer.encode(text.encode()), tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(b"d\xe9j")) == "d\N{REPLACEMENT CHARACTER}j"


def test_decode_takes_lists_and_wider_integers_and_leaves_unknown_ids_out(tokenizer):
    inner = tokenizer.encode("it was", bos=False, eos=False)
    assert tokenizer.decode(inner.tolist()) == "it was"
    assert tokenizer.decode(np.append(inner, 299_999).astype(np.int32)) == "it was"


def test_large_vocabularies_need_32_bits():
    vocabulary = {f"t{i}": i for i in range(65_537)}
    for size, dtype in ((65_536, np.uint16), (65_537, np.uint32)):
        words = models.WordLevel({token: i for token, i in vocabulary.items() if i < size}, unk_token="t0")
        tokenizer = SubwordTokenizer(tokenizers.Tokenizer(words), {})
        tokens = tokenizer.encode(f"t{size - 1}")
        assert tokens.dtype == dtype
        assert tokens.tolist() == [size - 1]


def test_without_bos_and_eos_nothing_is_added():
    tokenizer = SubwordTokenizer(make_tokenizer(), {})
    assert (tokenizer.bos, tokenizer.eos, tokenizer.stops) == (None, None, ())
    assert len(tokenizer.encode("x")) == 1


def test_files_are_those_to_hand_on(folder, tokenizer):
    assert set(tokenizer.files) == {"tokenizer.json", "tokenizer_config.json"}
    assert all(tokenizer.files[name] == (folder / name).read_bytes() for name in tokenizer.files)


def test_merges_that_spell_a_special_token_are_warned_of(caplog):
    letters = {token: i for i, token in enumerate(["<", "s", ">", "<s", "<s>"])}
    bpe = models.BPE(letters, [("<", "s"), ("<s", ">")])
    SubwordTokenizer(tokenizers.Tokenizer(bpe), {}, bos=4)
    assert "merges turn the text '<s>' into the special token" in caplog.text
    caplog.clear()
    SubwordTokenizer(make_tokenizer(), {}, bos=0, eos=1)
    assert not caplog.text


# where BOS, EOS and the stops are named

NAMED = {"bos_token": "<bos>", "eos_token": "<eos>"}
PLACES = {
    "special_tokens_map": ({"special_tokens_map": NAMED}, (0, 1, (1,))),
    "config.json": ({"config": {"bos_token_id": 0, "eos_token_id": 1}}, (0, 1, (1,))),
    "generation_config": ({"generation_config": {"bos_token_id": 0, "eos_token_id": [2, 1]}}, (0, 2, (2, 1))),
    "all ids end a text": ({"tokenizer_config": NAMED, "generation_config": {"eos_token_id": [2, 1]}}, (0, 1, (1, 2))),
    "generation before model": (
        {"config": {"eos_token_id": 2}, "generation_config": {"eos_token_id": 1}},
        (None, 1, (1,)),
    ),
    "null is none": ({"tokenizer_config": {"bos_token": None}, "config": {"bos_token_id": 0}}, (None, None, ())),
    "nowhere": ({}, (None, None, ())),
}


@pytest.mark.parametrize("place", PLACES)
def test_where_bos_eos_and_stops_are_named(tmp_path, place):
    files, wanted = PLACES[place]
    tokenizer = SubwordTokenizer.from_folder(write(tmp_path / "model", **files))
    assert (tokenizer.bos, tokenizer.eos, tokenizer.stops) == wanted


LLAMA = NAMED | {"tokenizer_class": "LlamaTokenizerFast"}
TEMPLATES = {"BOS and EOS": "<bos> $A <eos>", "EOS": "$A <eos>"}
BYTE_LEVEL = processors.ByteLevel(trim_offsets=False)
WINDOW_BOS = {
    "as the template adds it": ("BOS and EOS", NAMED, 0),
    "a template without it": ("EOS", NAMED, None),
    "no template": (None, NAMED, None),
    "another BOS than the template's": ("BOS and EOS", NAMED | {"bos_token": "<tool>"}, None),
    "no BOS": ("BOS and EOS", {"bos_token": None, "add_bos_token": True}, None),
    "the config says so": (None, NAMED | {"add_bos_token": True}, 0),
    "the config says no": ("BOS and EOS", LLAMA | {"add_bos_token": False}, None),
    "null says nothing": ("BOS and EOS", NAMED | {"add_bos_token": None}, 0),
    "LlamaTokenizer's default": (None, LLAMA, 0),
}


@pytest.mark.parametrize("case", WINDOW_BOS)
def test_whether_windows_begin_with_bos(tmp_path, case):
    template, config, wanted = WINDOW_BOS[case]
    plain = make_tokenizer()
    plain.post_processor = BYTE_LEVEL
    if template:
        ends = processors.TemplateProcessing(single=TEMPLATES[template], special_tokens=[("<bos>", 0), ("<eos>", 1)])
        plain.post_processor = processors.Sequence([BYTE_LEVEL, ends])  # as Llama 3
    folder = write(tmp_path / "model", plain, tokenizer_config=config)
    assert SubwordTokenizer.from_folder(folder).window_bos == wanted


def test_ends_of_a_text_are_special_even_where_the_file_does_not_say_so(tmp_path):
    plain = make_tokenizer()
    plain.add_tokens([AddedToken("<turn>", special=False)])
    end = plain.token_to_id("<turn>")
    folder = write(tmp_path / "model", plain, tokenizer_config=NAMED, generation_config={"eos_token_id": [1, end]})
    tokenizer = SubwordTokenizer.from_folder(folder)
    tokens = tokenizer.encode("a<turn>b", bos=False, eos=False)
    assert end not in tokens
    assert tokenizer.decode([*tokens, end]) == "a<turn>b"


def test_a_subword_that_ends_a_text_stays_a_subword(tmp_path):
    newline = make_tokenizer().token_to_id("Ċ")
    folder = write(tmp_path / "model", tokenizer_config=NAMED, generation_config={"eos_token_id": [1, newline]})
    tokenizer = SubwordTokenizer.from_folder(folder)
    assert tokenizer.stops == (1, newline)
    assert tokenizer.decode(tokenizer.encode("a\nb")) == "a\nb"


BAD = {
    "no token of tokenizer.json": {"tokenizer_config": {"bos_token": "<nix>"}},
    "bos_token = 7 is no token": {"tokenizer_config": {"bos_token": 7}},
    "eos = 290 must be an id of the tokenizer, below 290": {"config": {"eos_token_id": 290}},
    "eos = 9223372036854775808 must be an id": {"config": {"eos_token_id": 2**63}},
    "bos = True must be an id": {"config": {"bos_token_id": True}},
    "eos = '<eos>' must be an id": {"generation_config": {"eos_token_id": ["<eos>"]}},
    "add_bos_token = 'yes' must be true or false": {"tokenizer_config": NAMED | {"add_bos_token": "yes"}},
    "tokenizer_config.json: must hold a JSON object": {"tokenizer_config": ["<bos>"]},
}


@pytest.mark.parametrize("message", BAD)
def test_files_that_do_not_fit(tmp_path, message):
    folder = write(tmp_path / "model", **BAD[message])
    with pytest.raises(ValueError, match=message) as error:
        SubwordTokenizer.from_folder(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {"type": "New"}}', "\0"])
def test_a_damaged_tokenizer(tmp_path, content):
    folder = write(tmp_path / "model")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="model: tokenizer.json can't be read"):
        SubwordTokenizer.from_folder(folder)


def test_an_id_that_would_fill_the_memory_is_refused(tmp_path):
    folder = write(tmp_path / "model")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["more"] = 2**30
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="model: a token has id 1073741824; ids must be below 16777216"):
        SubwordTokenizer.from_folder(folder)


def test_a_damaged_config(tmp_path):
    folder = write(tmp_path / "model")
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json: Expecting"):
        SubwordTokenizer.from_folder(folder)


def test_folders_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        SubwordTokenizer.from_folder(tmp_path / "nowhere")
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    with pytest.raises(ValueError, match="has a SentencePiece tokenizer.model but no tokenizer.json; make one"):
        SubwordTokenizer.from_folder(tmp_path)


def test_a_long_text_is_one_text_and_fast():
    """No cut shows: the normalizer puts a mark before the whole text, and words reach over line breaks."""
    tokenizer = make_tokenizer()
    tokenizer.normalizer = normalizers.Prepend("~")
    text = (PROSE + "\n  \n") * 1000
    start = time.process_time()
    tokens = SubwordTokenizer(tokenizer, {}).encode(text)
    seconds = time.process_time() - start
    again = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokens.tolist() == again
    assert tokenizer.decode(again).count("~") == 1
    assert seconds < 10, f"{len(text) / seconds:.0f} characters a second"


IDENTITY = """
import sys
from longrope_jax.data.tokenizer import SubwordTokenizer
print(SubwordTokenizer.from_folder(sys.argv[1]).fingerprint)
"""


def test_the_fingerprint_is_that_of_the_tokens_it_makes_in_every_process(folder, tmp_path):
    mine = SubwordTokenizer.from_folder(folder).fingerprint
    line = [sys.executable, "-c", IDENTITY, str(folder)]
    child = subprocess.run(line, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert child.stdout.strip() == mine
    ends = {"bos_token": "<bos>", "eos_token": "<eos>"}
    others = [
        write(tmp_path / "vocabulary", make_tokenizer(280), tokenizer_config=ends),
        write(tmp_path / "no_bos", tokenizer_config={**ends, "bos_token": None}),
        write(tmp_path / "eos", tokenizer_config={**ends, "eos_token": "<tool>"}),
    ]
    same = write(tmp_path / "same", tokenizer_config=ends, generation_config={"eos_token_id": [1, 2]})
    assert SubwordTokenizer.from_folder(same).fingerprint == mine  # what ends a generated text is not in texts
    assert len({mine, *(SubwordTokenizer.from_folder(other).fingerprint for other in others)}) == 4
