"""The tokenizer in a GGUF file."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from longrope_jax.data.tokenizer import SubwordTokenizer
from longrope_jax.errors import beginning, shortened
from longrope_jax.interop.gguf.file import read_gguf

# How llama.cpp and Hugging Face call tokens with a meaning; the last two only end a text.
_MEANINGS = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad", "eot": None, "eom": None}


def gguf_tokenizer(path: str | os.PathLike) -> SubwordTokenizer | None:
    """The tokenizer in a GGUF file: byte-level BPE ("gpt2") or SentencePiece's BPE ("llama"); None where it has none.

    Its `files` are what Transformers needs to load the same tokenizer, chat template included. `stops` are the ends of
    a text, of a turn and of a message.

    Raises:
        ValueError: no sound GGUF file, a tokenizer of another kind or one that cuts words in a way not known here, or
            metadata that don't belong together.
    """
    metadata = read_gguf(path).metadata
    if metadata.get(PREFIX + "model", "none") in ("none", "no_vocab"):
        return None
    try:
        return _from_metadata(metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {beginning(error)}") from None


def _from_metadata(metadata: Mapping[str, Any]) -> SubwordTokenizer:
    tokenizer = build(metadata)
    tokens = read_list(metadata, "tokens", str)
    ids = {name: metadata[f"{PREFIX}{name}_token_id"] for name in _MEANINGS if f"{PREFIX}{name}_token_id" in metadata}
    for name, index in ids.items():
        if not isinstance(index, int) or not 0 <= index < len(tokens):
            raise ValueError(f"{PREFIX}{name}_token_id = {index!r} must be below the {len(tokens)} tokens")
    _add_special_tokens(tokenizer, metadata, tokens, set(ids.values()))
    by_default = {name: ids[name] for name in ("bos", "eos") if name in ids and _is_default(metadata, name)}
    if by_default:
        tokenizer.post_processor = _template(**{name: (tokens[index], index) for name, index in by_default.items()})
    named = {f"{_MEANINGS[name]}_token": tokens[index] for name, index in ids.items() if _MEANINGS[name]}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
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
    """Control tokens, and those that are always taken whole (they are text, and not special)."""
    types = read_list(metadata, "token_type", int, len(tokens)) if PREFIX + "token_type" in metadata else []
    special = named | {index for index, kind in enumerate(types) if kind in (TokenType.CONTROL, TokenType.UNKNOWN)}
    whole = [index for index, kind in enumerate(types) if kind == TokenType.USER_DEFINED and index not in special]
    tokenizer.add_special_tokens([AddedToken(tokens[index], normalized=False) for index in sorted(special)])
    tokenizer.add_tokens([AddedToken(tokens[index], normalized=False) for index in whole])


def _is_default(metadata: Mapping[str, Any], name: str) -> bool:
    """Whether a text gets a BOS or EOS unasked. llama.cpp adds a BOS where SentencePiece or Llama 3 leave it open."""
    usual = metadata[PREFIX + "model"] == "llama" or metadata.get(PREFIX + "pre") == "llama-bpe"
    return metadata.get(f"{PREFIX}add_{name}_token", usual and name == "bos")


def _template(**marks: tuple[str, int]) -> processors.TemplateProcessing:
    """What puts the tokens for `bos` and `eos` around a text when a program asks for special tokens."""
    before, after = ([marks[name][0]] if name in marks else [] for name in ("bos", "eos"))
    single = [*before, "$A", *after]
    pair = [*single, *(f"{part}:1" for part in [*before, "$B", *after])]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=list(marks.values()))


PREFIX = "tokenizer.ggml."
# Regular expressions that cut a text into words, one after the other, by the names that llama.cpp gives them. What
# none of them matches is a word too.
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
_LONGEST = 4096  # characters of a token; merges are looked for at every one of them
_MARK = "▁"  # how SentencePiece writes a space


def build(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a file's metadata, without its special tokens.

    Raises:
        ValueError: one of another kind, or one that cuts words in a way not known here, or lists that don't belong
            together.
    """
    kind = metadata.get(PREFIX + "model")
    if kind == "gpt2":
        return _byte_level(metadata)
    if kind == "llama":
        return _sentencepiece(metadata)
    raise ValueError(f"{PREFIX}model = {shortened(kind)} is not supported; 'gpt2' and 'llama' are")


def read_list(metadata: Mapping[str, Any], name: str, kind: type, length: int | None = None) -> list:
    """A list of the metadata, checked.

    Raises:
        ValueError: it is missing, holds something else, or is of another length.
    """
    values = metadata.get(PREFIX + name)
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise ValueError(f"{PREFIX}{name} must be a list of {kind.__name__}, and is {str(values)[:40]}")
    if length is not None and len(values) != length:
        raise ValueError(f"{PREFIX}{name} has {len(values)} entries for {length} tokens")
    return values


def _byte_level(metadata: Mapping[str, Any]) -> Tokenizer:
    """GPT-2's: on bytes, each written as a printable character, within words."""
    words = metadata.get(PREFIX + "pre")
    if words is None:
        words = "default"
        logging.warning("%spre is missing: words are cut as by 'default', but an old file may mean another", PREFIX)
    if words not in list(_WORDS):  # a damaged file may have a list here, which no dict can look up
        raise ValueError(f"{PREFIX}pre = {shortened(words)} is not supported; {', '.join(_WORDS)} are")
    pairs = [tuple(merge.split(" ")) for merge in read_list(metadata, "merges", str)]
    wrong = [index for index, pair in enumerate(pairs) if len(pair) != 2]
    if wrong:
        raise ValueError(f"{PREFIX}merges: number {wrong[0]} must be two tokens with a space in between")
    # Llama 3 takes a word that is a token as it is, even where no merges lead to it.
    tokenizer = Tokenizer(_bpe(_vocabulary(metadata), pairs, ignore_merges=words == "llama-bpe"))
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _WORDS[words]]
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any]) -> Tokenizer:
    """SentencePiece's: on the characters of the whole text, what makes the piece of the highest score first; characters
    that are no pieces fall back to bytes.
    """
    for key in ("precompiled_charsmap", "remove_extra_whitespaces"):
        if metadata.get(PREFIX + key):
            raise ValueError(f"{PREFIX}{key} is set: tokenizers that change the text are not supported")
    vocabulary = _vocabulary(metadata)
    scores = read_list(metadata, "scores", float, len(vocabulary))
    types = read_list(metadata, "token_type", int, len(vocabulary))
    # Merges never make a control token: the text "</s>" must not be able to end a document.
    pieces = {token: index for token, index in vocabulary.items() if types[index] == TokenType.NORMAL}
    unknown = next((token for token, index in vocabulary.items() if types[index] == TokenType.UNKNOWN), None)
    merges = _merges(pieces, scores)
    tokenizer = Tokenizer(_bpe(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    as_marks: list[normalizers.Normalizer] = [normalizers.Replace(" ", _MARK)]
    as_text = [decoders.Replace(_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get(PREFIX + "add_space_prefix", True):
        # Before the text, and again after a token that is taken whole: as llama.cpp has it.
        as_marks.insert(0, normalizers.Prepend(_MARK))
        as_text.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(as_marks)
    tokenizer.decoder = decoders.Sequence(as_text)
    return tokenizer


def _merges(pieces: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best first. Of the ways to make one piece, those with the longer left
    part come first: SentencePiece merges what stands further left first.
    """
    ways = [
        (-scores[index], index, -cut, (piece[:cut], piece[cut:]))
        for piece, index in pieces.items()
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    return [pair for *_, pair in sorted(ways)]


def _bpe(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], **options: Any) -> models.BPE:
    try:
        return models.BPE(dict(vocabulary), list(merges), **options)
    except Exception as error:  # the package raises Exception itself
        raise ValueError(f"{PREFIX}merges do not fit the tokens: {beginning(error)}") from None


def _vocabulary(metadata: Mapping[str, Any]) -> dict[str, int]:
    tokens = read_list(metadata, "tokens", str)
    longest = max(map(len, tokens), default=0)
    if longest > _LONGEST:
        raise ValueError(f"{PREFIX}tokens: one has {longest} characters, {_LONGEST} at most are read")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocabulary[token] != index)
        raise ValueError(f"{PREFIX}tokens: {twice!r} occurs twice")
    return vocabulary
