import re
import string

import numpy as np
import pytest
import tokenizers

from longrope_jax.data import needles
from longrope_jax.data.corpus import Document
from longrope_jax.data.needles import cloze_example, cloze_size, max_answer_tokens, needle, needle_cloze, passkey
from longrope_jax.data.tokenizer import ByteTokenizer, SubwordTokenizer

SENTENCES = [
    "Version 3.14 is out. It has many new words",
    "The cat sat there!",
    "Did anybody see it?\nNo. ",
    "One line\n",
]


def draw_text(seed, sentences=400):
    return "".join(f"{sentence} " for sentence in np.random.default_rng(seed).choice(SENTENCES, sentences))


TEXT = draw_text(0)


def make_byte_level():
    """Merges within words, digits by themselves, spaces before words: as GPT-2 and its heirs."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(individual_digits=True), tokenizers.pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    train(tokenizer, tokenizers.pre_tokenizers.ByteLevel.alphabet())
    return SubwordTokenizer(tokenizer, {})


def make_sentencepiece():
    """Spaces are part of the words, and every text begins with one: as LLaMA-2. It has a BOS."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(" ", 1, 0)]
    )
    train(tokenizer, [*string.printable])
    return SubwordTokenizer(tokenizer, {}, bos=1, eos=2)


def train(tokenizer, alphabet):
    more = f"{needles.FILLER} The pass key is 0123456789, {' '.join(needles.CITIES)}? Remember it: magic number; quiz."
    tokenizer.train_from_iterator(
        [TEXT, more * 5],
        tokenizers.trainers.BpeTrainer(
            vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )


TOKENIZERS = {"bytes": ByteTokenizer(), "byte level": make_byte_level(), "sentencepiece": make_sentencepiece()}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


def make_documents(tokenizer, text=TEXT):
    return [Document("text", tokenizer.encode(text), len(text))]


def make_passkey(tokenizer, length=600, seed=0, depth=None):
    return passkey(length, tokenizer, np.random.default_rng(seed), depth)


def make_needle(tokenizer, length=600, seed=0, depth=0.5, documents=None):
    documents = make_documents(tokenizer) if documents is None else documents
    return needle(length, depth, tokenizer, np.random.default_rng(seed), documents)


def make_cloze(tokenizer, length=600, seed=0, depth=0.5, documents=None):
    documents = make_documents(tokenizer) if documents is None else documents
    return needle_cloze(length, depth, tokenizer, np.random.default_rng(seed), documents)


BOTH = pytest.mark.parametrize("make", [make_passkey, make_needle])
ALL = pytest.mark.parametrize("make", [make_passkey, make_needle, make_cloze])
TASKS = {make_passkey: "passkey", make_needle: "needle", make_cloze: "needle_cloze"}


def test_these_tokenizers_are_different_and_reversible():
    lengths = {name: len(tokenizer.encode(TEXT)) for name, tokenizer in TOKENIZERS.items()}
    assert len(set(lengths.values())) == 3
    for tokenizer in TOKENIZERS.values():
        assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


@ALL
def test_the_length_is_exact(make, tokenizer):
    for length in range(350, 420):
        prompt = make(tokenizer, length, seed=length)
        assert prompt.tokens.shape == (length,)
        assert prompt.tokens.dtype == np.int32


@ALL
def test_the_only_bos_is_the_first_token(make, tokenizer):
    places = np.flatnonzero(make(tokenizer).tokens == tokenizer.bos).tolist()
    assert places == ([] if tokenizer.bos is None else [0])


@BOTH
def test_what_a_prompt_says(make, tokenizer):
    prompt = make(tokenizer)
    text = tokenizer.decode(prompt.tokens)
    digits = {make_passkey: 5, make_needle: 7}[make]
    assert re.fullmatch(rf"[1-9]\d{{{digits - 1}}}", prompt.answer)
    assert text.startswith("There is ")
    assert re.search(
        r"\n ?What is the (pass key|magic number of (\w+))\?( The pass key| The magic number of \2) is$", text
    )
    sentence = {
        make_passkey: rf"\n ?The pass key is {prompt.answer}\. Remember it\. {prompt.answer} is the pass key\.\n",
        make_needle: rf"\n ?The magic number of \w+ is {prompt.answer}\.\n",
    }[make]
    assert len(re.findall(sentence, text)) == 1
    asked = re.search(r"(pass key|number of \w+) is$", text)[0]
    assert asked in text[: -len(asked)]  # the same city


@ALL
def test_the_place_of_the_needle(make, tokenizer):
    prompt = make(tokenizer, depth=0.5)
    assert tokenizer.decode(prompt.tokens[prompt.start :]).lstrip().startswith("The ")
    before = tokenizer.decode(prompt.tokens[: prompt.start])
    assert re.search(r"[.!?\n] ?$", before), before[-20:]
    assert not prompt.tokens[prompt.start - 1 :].tolist().count(tokenizer.bos)
    assert abs(prompt.depth - 0.5) < 0.08


@BOTH
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_depth_is_the_share_of_the_text_before_it(make, tokenizer, depth):
    prompt = make(tokenizer, 1500, depth=depth)
    instruction = tokenizer.encode("There is", eos=False)
    after = len(tokenizer.decode(prompt.tokens[prompt.start :]))
    assert abs(prompt.depth - depth) < 0.03
    assert prompt.tokens[: len(instruction)].tolist() == instruction.tolist()
    if depth == 1:
        assert after < 170  # nothing but the needle and the question
    if depth == 0:
        assert tokenizer.decode(prompt.tokens[: prompt.start]).endswith("about it.\n")


def test_a_sentence_does_not_end_within_a_number(tokenizer):
    text = "Version 3.14 is " * 30 + "out. And " + "Version 3.14 is " * 30
    documents = make_documents(tokenizer, text)
    room = len(documents[0].tokens) - 2
    fixed = int(
        re.search(r"fixed parts take (\d+)", str(pytest.raises(ValueError, make_needle, tokenizer, 1).value))[1]
    )
    for depth in (0.4, 0.6):
        prompt = make_needle(tokenizer, room + fixed - 3, depth=depth, documents=documents)
        assert tokenizer.decode(prompt.tokens[: prompt.start]).endswith("out.")


def test_random_depths_are_spread(tokenizer):
    depths = [make_passkey(tokenizer, 3000, seed).depth for seed in range(40)]
    assert 0.35 < np.mean(depths) < 0.65
    assert min(depths) < 0.15 < 0.85 < max(depths)


@ALL
def test_the_seed_says_all(make, tokenizer):
    one, same, other = make(tokenizer, seed=1), make(tokenizer, seed=1), make(tokenizer, seed=2)
    np.testing.assert_array_equal(one.tokens, same.tokens)
    assert one.answer == same.answer != other.answer


@ALL
def test_the_answer_continues_the_prompt(make, tokenizer):
    prompt = make(tokenizer)
    whole = tokenizer.decode(np.concatenate([prompt.tokens, prompt.answer_tokens]))
    assert whole == f"{tokenizer.decode(prompt.tokens)} {prompt.answer}"
    assert len(prompt.answer_tokens) < max_answer_tokens(TASKS[make], tokenizer)


def test_the_passkey_is_surrounded_by_filler(tokenizer):
    prompt = make_passkey(tokenizer, 2000, depth=0.5)
    lines = [line.strip() for line in tokenizer.decode(prompt.tokens).split("\n")]
    assert (" ".join([needles.FILLER] * 200)).startswith(lines[1])
    assert (" ".join([needles.FILLER] * 200)).startswith(lines[1] + " " + lines[3])
    assert min(len(lines[1]), len(lines[3])) > 500


def test_the_needle_lies_in_a_stretch_of_a_document():
    tokenizer, texts = ByteTokenizer(), [draw_text(seed, 200) for seed in range(3)]
    documents = [Document(str(i), tokenizer.encode(text), len(text)) for i, text in enumerate(texts)]
    chosen = set()
    for seed in range(12):
        text = tokenizer.decode(make_needle(tokenizer, 800, seed, documents=documents).tokens)
        body = re.sub(r"\nThe magic number of \w+ is \d+\.\n", "", text.split("\n", 1)[1]).rsplit("\nWhat is", 1)[0]
        [owner] = [i for i, whole in enumerate(texts) if body in whole]
        chosen.add((owner, texts[owner].index(body)))
    assert {owner for owner, _ in chosen} == {0, 1, 2}
    assert len(chosen) == 12


def test_a_cloze_is_a_sentence_in_a_stretch_of_text_that_begins_again(tokenizer):
    prompt = make_cloze(tokenizer)
    text = tokenizer.decode(prompt.tokens)
    assert re.fullmatch(r"[1-9]\d{6}", prompt.answer)
    begun = re.search(r"\n ?The magic number of \w+ is$", text)[0]
    before, after = text[: -len(begun)].split(f"{begun} {prompt.answer}.\n")
    assert "".join((before + after).split()) in "".join(TEXT.split())
    assert min(len(before), len(after)) > 200
    assert prompt.tokens.tolist().count(tokenizer.bos) == (tokenizer.bos is not None)


def test_a_cloze_fits_where_a_needle_does_not():
    with pytest.raises(ValueError, match="length = 71 tokens is too short for a needle prompt"):
        make_needle(ByteTokenizer(), 71)
    for seed in range(50):
        make_cloze(ByteTokenizer(), 71, seed)


def test_an_answered_cloze_is_the_prompt_and_its_answer(tokenizer):
    for length in range(120, 160):
        rng = np.random.default_rng(length)
        tokens = cloze_example(length, tokenizer, rng, make_documents(tokenizer))
        assert tokens.shape == (length,)
        assert tokens.dtype == np.int32
        said = re.findall(r"\n ?The magic number of (\w+) is (\d{7})(\.\n|$)", tokenizer.decode(tokens))
        city, number, _ = said[0]
        assert said in ([(city, number, ".\n")] * count + [(city, number, "")] for count in (1, 2))


def test_the_digits_of_a_cloze_are_all_different():
    answers = [make_cloze(ByteTokenizer(), 200, seed).answer for seed in range(200)]
    assert {len(set(answer)) for answer in answers} == {len(answer) for answer in answers} == {7}
    assert {answer[0] for answer in answers} == set("123456789")
    assert {answer[-1] for answer in answers} == set("0123456789")


def test_the_size_of_a_cloze_is_that_of_the_largest():
    tokenizer, shortest = ByteTokenizer(), set()
    for seed in range(50):
        with pytest.raises(ValueError, match="fixed parts take") as raised:
            make_cloze(tokenizer, 1, seed)
        shortest.add(int(re.search(r"take (\d+)", str(raised.value))[1]) + len(" 8888888"))
    assert max(shortest) == cloze_size(tokenizer)
    assert len(shortest) == 3  # names of cities have 4 to 6 letters


def test_every_other_answered_cloze_says_the_needle_twice_if_there_is_room():
    tokenizer = ByteTokenizer()
    documents = make_documents(tokenizer)

    def count(length):
        made = [cloze_example(length, tokenizer, np.random.default_rng(seed), documents) for seed in range(100)]
        return [tokenizer.decode(tokens).count("The magic") - 1 for tokens in made]

    assert set(count(110)) == {1}
    assert set(count(130)) == {1, 2}
    assert 35 < count(130).count(2) < 65


def test_answered_clozes_hide_their_needles_at_all_depths():
    tokenizer = ByteTokenizer()
    texts = [
        tokenizer.decode(cloze_example(1000, tokenizer, np.random.default_rng(seed), make_documents(tokenizer)))
        for seed in range(60)
    ]
    places = [text.index("\nThe magic number") / 930 for text in texts]
    assert 0.35 < np.mean(places) < 0.65
    assert min(places) < 0.15 < 0.85 < max(places)


def test_a_document_of_just_the_length_will_do_without_its_markers():
    tokenizer = ByteTokenizer()

    def make(size):
        return make_needle(tokenizer, 2000, seed=3, documents=make_documents(tokenizer, "x" * size))

    message = r"none of 1 documents has the (\d+) tokens of text that a needle prompt of length = 2000 takes"
    with pytest.raises(ValueError, match=message) as raised:
        make(500)
    room = int(re.search(message, str(raised.value))[1])
    prompt = make(room)
    assert len(prompt.tokens) == 2000
    assert tokenizer.bos not in prompt.tokens[1:]
    assert tokenizer.eos not in prompt.tokens
    with pytest.raises(ValueError, match=f"the longest has {room - 1}$"):
        make(room - 1)


@ALL
def test_the_shortest_prompt(make, tokenizer):
    with pytest.raises(ValueError, match="length = 12 tokens is too short for a .* prompt") as raised:
        make(tokenizer, 12)
    shortest = int(re.search(r"fixed parts take (\d+)", str(raised.value))[1])
    assert len(make(tokenizer, shortest).tokens) == shortest
    with pytest.raises(ValueError, match=f"length = {shortest - 1} tokens is too short"):
        make(tokenizer, shortest - 1)


@pytest.mark.parametrize("depth", [-0.1, 1.01, float("nan")])
def test_bad_depths(depth):
    with pytest.raises(ValueError, match="depth = .* must lie between 0 and 1"):
        make_passkey(ByteTokenizer(), depth=depth)


def test_a_very_long_prompt_is_made_quickly():
    assert len(make_passkey(ByteTokenizer(), 2**21, depth=0.5).tokens) == 2**21
