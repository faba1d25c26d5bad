"""The tokenizer in a GGUF file, built anew with `tokenizers`.

Neither `gguf` nor `tokenizers` has a conversion. Transformers has one, but it needs PyTorch and ignores how the file
splits words and digits (`pre`).
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from longrope_jax.data.tokenizer import SubwordTokenizer
from longrope_jax.errors import beginning, naming
from longrope_jax.interop.gguf.file import read_gguf
from longrope_jax.json_files import field, problems
from longrope_jax.settings import Rule, one_of

_PREFIX = "tokenizer.ggml."
# Regular expressions that split a text into words, applied in order, by their llama.cpp names. Text between matches is
# a word too.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
_MAX_TOKEN_LENGTH = 4096  # characters; every split of a token is tried as a merge
_MARK = "▁"  # SentencePiece's symbol for a space
# llama.cpp's and Hugging Face's names of special tokens; the last two only end a text.
_CHANGES = ("precompiled_charsmap", "remove_extra_whitespaces")
_MEANINGS = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad", "eot": None, "eom": None}


def gguf_tokenizer(path: str | os.PathLike) -> SubwordTokenizer:
    """The tokenizer in a GGUF file: byte-level BPE ("gpt2") or SentencePiece's BPE ("llama").

    From its `files` Transformers loads the same tokenizer, with the chat template. `stops` are the ends of a text, of a
    turn and of a message.

    Raises:
        ValueError: a damaged GGUF file, no tokenizer, an unsupported kind of one or way to split words, or inconsistent
            metadata.
    """
    metadata = read_gguf(path).metadata
    with naming(path):
        return tokenizer_of(metadata)


def tokenizer_of(metadata: Mapping[str, Any]) -> SubwordTokenizer:
    """The tokenizer that the metadata of a GGUF file describes; raises ValueError as `gguf_tokenizer` does."""
    kind = field(metadata, _PREFIX + "model", one_of(list(_KINDS)))  # a list: damaged values are not hashable
    tokens = _read_list(metadata, "tokens", str)
    is_id = Rule(
        lambda index: isinstance(index, int) and 0 <= index < len(tokens), f"must be below the {len(tokens)} tokens"
    )
    keys = {name: f"{_PREFIX}{name}_token_id" for name in _MEANINGS}
    ids = {name: field(metadata, key, is_id) for name, key in keys.items() if key in metadata}
    tokenizer = _KINDS[kind](metadata)
    _add_special_tokens(tokenizer, metadata, tokens, set(ids.values()))
    # As in llama.cpp, a text gets BOS with SentencePiece and Llama 3 if the file does not say.
    adds = {"bos": kind == "llama" or metadata.get(_PREFIX + "pre") == "llama-bpe", "eos": False}
    before, after = (
        [tokens[ids[name]]] if name in ids and metadata.get(f"{_PREFIX}add_{name}_token", by_default) else []
        for name, by_default in adds.items()
    )
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *(f"{part}:1" for part in [*before, "$B", *after])],
            special_tokens=[(token, tokens.index(token)) for token in {*before, *after}],
        )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {f"{_MEANINGS[name]}_token": tokens[index] for name, index in ids.items() if _MEANINGS[name]}
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    files = {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(config, indent=1) + "\n"}
    return SubwordTokenizer(
        tokenizer,
        {name: content.encode() for name, content in files.items()},
        bos=ids.get("bos"),
        eos=ids.get("eos"),
        stops=[ids[name] for name in ("eot", "eom") if name in ids],
    )


def _add_special_tokens(tokenizer: Tokenizer, metadata: Mapping[str, Any], tokens: list[str], named: set[int]) -> None:
    """Adds control tokens as special, and user-defined ones as text that is never split."""
    types = _read_list(metadata, "token_type", int, len(tokens)) if _PREFIX + "token_type" in metadata else []
    special = named | {index for index, kind in enumerate(types) if kind in (TokenType.CONTROL, TokenType.UNKNOWN)}
    whole = [index for index, kind in enumerate(types) if kind == TokenType.USER_DEFINED and index not in special]
    tokenizer.add_special_tokens([AddedToken(tokens[index], normalized=False) for index in sorted(special)])
    tokenizer.add_tokens([AddedToken(tokens[index], normalized=False) for index in whole])


def _read_list(metadata: Mapping[str, Any], name: str, kind: type, length: int | None = None) -> list:
    """A list in the metadata; raises ValueError if it is missing, or has another type or length."""

    def accepts(values: Any) -> bool:
        is_list = isinstance(values, list) and all(isinstance(value, kind) for value in values)
        return is_list and length in (None, len(values))

    count = "" if length is None else f", {length} in all"
    return field(metadata, _PREFIX + name, Rule(accepts, f"must be a list of {kind.__name__}{count}"))


def _byte_level(metadata: Mapping[str, Any]) -> Tokenizer:
    """GPT-2's BPE: on bytes, each as a printable character, within words."""
    if metadata.get(_PREFIX + "pre") is None:
        logging.warning("%spre is missing: words are split as by 'default'; an old file may differ", _PREFIX)
    words = field(metadata, _PREFIX + "pre", one_of(list(_WORDS)), "default")
    pairs = [tuple(merge.split(" ")) for merge in _read_list(metadata, "merges", str)]
    for index, pair in enumerate(pairs):
        if len(pair) != 2:
            raise ValueError(f"{_PREFIX}merges: number {index} must be two tokens with a space in between")
    # Llama 3 keeps a word that is a token, even if no merges make it.
    tokenizer = Tokenizer(_bpe(_vocabulary(metadata), pairs, ignore_merges=words == "llama-bpe"))
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _WORDS[words]]
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any]) -> Tokenizer:
    """SentencePiece's BPE: on the characters of the whole text, the merge with the highest score first; unknown
    characters fall back to bytes.
    """
    unset = Rule(lambda value: not value, "is not supported: tokenizers that change the text")
    if wrong := problems(metadata, dict.fromkeys([f"{_PREFIX}{name}" for name in _CHANGES], unset)):
        raise ValueError(wrong[0])
    vocabulary = _vocabulary(metadata)
    scores = _read_list(metadata, "scores", float, len(vocabulary))
    types = _read_list(metadata, "token_type", int, len(vocabulary))
    # Merges never make a control token: the text "</s>" must not end a document.
    pieces = {token: index for token, index in vocabulary.items() if types[index] == TokenType.NORMAL}
    unknown = next((token for token, index in vocabulary.items() if types[index] == TokenType.UNKNOWN), None)
    merges = _merges(pieces, scores)
    tokenizer = Tokenizer(_bpe(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    as_marks: list[normalizers.Normalizer] = [normalizers.Replace(" ", _MARK)]
    as_text = [decoders.Replace(_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get(_PREFIX + "add_space_prefix", True):
        # As in llama.cpp: before the text, and again after each added token.
        as_marks.insert(0, normalizers.Prepend(_MARK))
        as_text.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(as_marks)
    tokenizer.decoder = decoders.Sequence(as_text)
    return tokenizer


_KINDS = {"gpt2": _byte_level, "llama": _sentencepiece}


def _merges(pieces: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every merge of two pieces into one, by descending score. Merges into the same piece are sorted by the length of
    the left part, descending, because SentencePiece merges from the left.
    """
    merges = [
        (-scores[index], index, -cut, (piece[:cut], piece[cut:]))
        for piece, index in pieces.items()
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    return [pair for *_, pair in sorted(merges)]


def _bpe(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], **options: Any) -> models.BPE:
    try:
        return models.BPE(dict(vocabulary), list(merges), **options)
    except Exception as error:  # `tokenizers` raises Exception itself
        raise ValueError(f"{_PREFIX}merges do not fit the tokens: {beginning(error)}") from None


def _vocabulary(metadata: Mapping[str, Any]) -> dict[str, int]:
    tokens = _read_list(metadata, "tokens", str)
    longest = max(map(len, tokens), default=0)
    if longest > _MAX_TOKEN_LENGTH:
        raise ValueError(f"{_PREFIX}tokens: one has {longest} characters, {_MAX_TOKEN_LENGTH} at most are read")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocabulary[token] != index)
        raise ValueError(f"{_PREFIX}tokens: {twice!r} occurs twice")
    return vocabulary
