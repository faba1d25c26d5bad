"""The tokenizer in a GGUF file."""

import json
import os
from collections.abc import Mapping
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, processors

from longrope_jax.data.subwords import SubwordTokenizer
from longrope_jax.interop.gguf.bpe import PREFIX, build, read_list
from longrope_jax.interop.gguf.file import read_gguf
from longrope_jax.messages import beginning

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
