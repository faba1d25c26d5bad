"""What is asked of candidates: which tokens of which text count, for any tokenizer."""

import string

import numpy as np
import pytest
import tokenizers

from longrope_jax.data.corpus import Document
from longrope_jax.data.needles import ANSWER_DIGITS, CITIES
from longrope_jax.data.tokenizer import ByteTokenizer, SubwordTokenizer
from longrope_jax.search.objective import (
    TermSettings,
    document_weights,
    make_terms,
    needle_cloze_term,
    needle_term,
    perplexity_term,
)

SENTENCES = ["Version 3.14 is out. ", "The cat sat there! ", "Did anybody see it?\nNo. ", "One line\n"]
TEXT = "".join(np.random.default_rng(0).choice(SENTENCES, 800))


def make_subwords():
    """Merges within words and numbers, so that numbers of seven digits have different numbers of tokens."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    numbers = " ".join(str(number) for number in np.random.default_rng(0).integers(10, 1000, 3000))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=[*tokenizers.pre_tokenizers.ByteLevel.alphabet(), *string.printable],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT, numbers, f"The magic number of {' '.join(CITIES)} is"], trainer)
    return SubwordTokenizer(tokenizer, {}, bos=0, eos=1)


TOKENIZERS = {"bytes": ByteTokenizer(), "subwords": make_subwords()}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


NEEDLES = pytest.mark.parametrize("needles", [needle_term, needle_cloze_term])


def documents_of(tokenizer):
    texts = {"long": TEXT, "other": TEXT[::-1], "short": TEXT[:50]}
    return [Document(name, tokenizer.encode(text), len(text)) for name, text in texts.items()]


@NEEDLES
def test_needles_are_rows_of_one_length_whose_digits_alone_count(tokenizer, needles):
    length, count = 500, 12
    term = needles(documents_of(tokenizer), tokenizer, length, count, seed=3)
    assert term.tokens.shape == (count, length + 1) and term.tokens.dtype == np.int32
    assert term.weights.shape == (count, length) and term.weights.dtype == np.float32
    np.testing.assert_allclose(term.weights.sum(1), 1, rtol=1e-6)
    answers = []
    for tokens, weights in zip(term.tokens, term.weights, strict=True):
        counting = tokens[1:][weights > 0]
        assert len(set(weights[weights > 0].tolist())) == 1  # all digits count the same
        answer = tokenizer.decode(counting).strip()
        assert answer.isdigit() and len(answer) == ANSWER_DIGITS["needle"]
        text = tokenizer.decode(tokens)
        assert text.count(answer) == 2 and text.endswith(answer)  # in the needle, and at the very end
        assert weights[-1] > 0 and not weights[: length - 20].any()
        answers.append((answer, len(counting)))
    assert len({answer for answer, _ in answers}) == count
    if tokenizer is TOKENIZERS["subwords"]:  # else this would show nothing that bytes don't
        assert len({tokens for _, tokens in answers}) > 1


@NEEDLES
def test_depths_spread_from_the_beginning_to_the_end(tokenizer, needles):
    length, count = 700, 10
    term = needles(documents_of(tokenizer), tokenizer, length, count, seed=0)
    depths = np.array([int(name.removeprefix("needle at ").removesuffix("%")) for name in term.names])
    np.testing.assert_allclose(
        depths, 100 * (np.arange(count) + 0.5) / count, atol=7
    )  # to the nearest end of a sentence
    assert len(set(depths)) == count
    for tokens, depth in zip(term.tokens, depths, strict=True):
        text = tokenizer.decode(tokens)
        place = text.index("\nThe magic number of") / len(text)  # the instruction before it, the question after it
        assert abs(place - depth / 100) < 0.3


def test_a_needle_term_is_the_same_for_the_same_seed_only():
    tokenizer = TOKENIZERS["subwords"]
    first, again, other = (needle_term(documents_of(tokenizer), tokenizer, 400, 3, seed).tokens for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    # Another number of them: other depths, but the same numbers and stretches, so that a longer test is a longer test.
    more = needle_term(documents_of(tokenizer), tokenizer, 400, 4, 1)
    np.testing.assert_array_equal(more.tokens[0, -3:], first[0, -3:])


def test_all_targets_of_a_perplexity_term_count_the_same(tokenizer):
    term = perplexity_term(documents_of(tokenizer), tokenizer, 300, 5, seed=0)
    assert term.tokens.shape == (5, 301) and set(term.names) == {"long", "other"}
    np.testing.assert_array_equal(term.weights, np.float32(1 / 300))


def make_bos_first():
    """The subwords of a model that reads BOS first."""
    tokenizer = make_subwords()
    tokenizer.window_bos = tokenizer.bos
    return tokenizer


def test_windows_begin_with_bos_where_the_tokenizer_says_so():
    first, plain = make_bos_first(), TOKENIZERS["subwords"]
    documents = documents_of(plain)
    with_bos, without = (perplexity_term(documents, tokenizer, 300, 5, seed=0) for tokenizer in (first, plain))
    assert (with_bos.tokens[:, 0] == plain.bos).all() and (without.tokens[:, 0] != plain.bos).all()
    np.testing.assert_array_equal(with_bos.tokens[:, 1:], without.tokens[:, 1:])
    np.testing.assert_array_equal(with_bos.weights, without.weights)
    whole = perplexity_term(documents, first, len(documents[0].tokens) - 1, 1, seed=0)
    assert whole.tokens[0].tolist() == documents[0].tokens.tolist()  # which begins with BOS, once


@NEEDLES
def test_a_needle_has_one_bos_at_its_beginning(needles):
    for tokenizer in (make_bos_first(), *TOKENIZERS.values()):
        tokens = needles(documents_of(tokenizer), tokenizer, 500, 3, seed=0).tokens
        assert (tokens[:, 0] == tokenizer.bos).all() and (tokens == tokenizer.bos).sum() == 3


def test_terms_have_lengths_numbers_and_shares_of_their_own():
    settings = {
        "near": TermSettings(length=100, documents=4),
        "far": TermSettings(share=2.0),
        "needle": TermSettings("needle", share=5.0, documents=2),
        "cloze": TermSettings("needle_cloze", share=2.0, length=90, documents=1),  # a needle would not fit
    }
    tokenizer = TOKENIZERS["bytes"]
    terms = make_terms(settings, documents_of(tokenizer), tokenizer, target_length=600, count=3, seed=0)
    assert list(terms) == ["near", "far", "needle", "cloze"]
    assert [term.tokens.shape for term in terms.values()] == [
        (4, 113),
        (3, 676),
        (2, 601),
        (1, 91),
    ]  # perplexity with its margin
    weights = document_weights(list(terms.values()))
    np.testing.assert_allclose(weights, [1 / 40] * 4 + [2 / 30] * 3 + [5 / 20] * 2 + [2 / 10])


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (
            TermSettings(length=100_000),
            "^objective.mine: none of 3 .* has the 112501 tokens .* a margin of 12500",
        ),
        (TermSettings("needle", length=100_000), "^objective.mine: none of 3 documents has the .* a needle prompt"),
        (TermSettings("needle", length=30), "^objective.mine: length = .* too short for a needle prompt"),
    ],
)
def test_text_that_does_not_suffice_is_reported_with_the_name_of_the_term(tokenizer, term, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_terms({"mine": term}, documents_of(tokenizer), tokenizer, 300, 2, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("margin", [1 / 8, 1 / 16, 1.0, 0.001])
def test_a_margin_is_read_beyond_the_length_and_counts_the_same(margin):
    settings, window = {"text": TermSettings(margin=margin)}, 160 + round(160 * margin)
    (term,) = make_terms(settings, documents_of(TOKENIZERS["bytes"]), TOKENIZERS["bytes"], 160, 3, 0).values()
    assert term.tokens.shape == (3, window + 1)
    np.testing.assert_array_equal(term.weights, np.full((3, window), np.float32(1 / window)))


def test_the_papers_objective_is_the_mean_over_the_length():
    tokenizer = TOKENIZERS["bytes"]
    (term,) = make_terms({"text": TermSettings.paper()}, documents_of(tokenizer), tokenizer, 160, 3, 0).values()
    np.testing.assert_array_equal(term.weights, np.full((3, 160), np.float32(1 / 160)))
