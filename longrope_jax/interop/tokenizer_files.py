"""The files by which others know a tokenizer of ours."""

import json
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from longrope_jax.data.subwords import SubwordTokenizer
from longrope_jax.data.tokenizer import ByteTokenizer, Tokenizer

_BOS, _EOS = "<s>", "</s>"
_CONFIG = "tokenizer_config.json"


def tokenizer_files(tokenizer: Tokenizer, longest: int) -> dict[str, bytes]:
    """Name -> content of what Transformers needs to make the same tokens: those that a tokenizer was read from, or
    for bytes a vocabulary of all of them.

    Args:
        longest: tokens of the longest context. Where the files say that texts are cut at less, they say this.
    """
    files = tokenizer.files if isinstance(tokenizer, SubwordTokenizer) else _byte_files()
    config = json.loads(files.get(_CONFIG, b"{}"))
    limit = config.get("model_max_length")
    if isinstance(limit, int) and limit < longest:
        files = {**files, _CONFIG: _json({**config, "model_max_length": longest})}
    return files


def _byte_files() -> dict[str, bytes]:
    """BPE without merges over the characters that GPT-2 spells bytes with, in the order of `ByteTokenizer`'s ids."""
    vocab = {character: byte for byte, character in enumerate(_spelling())}
    made = tokenizers.Tokenizer(models.BPE(vocab | {_BOS: ByteTokenizer.bos, _EOS: ByteTokenizer.eos}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([_BOS, _EOS])
    made.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", pair=f"{_BOS} $A {_BOS}:1 $B:1", special_tokens=[(_BOS, ByteTokenizer.bos)]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": _BOS,
        "eos_token": _EOS,
    }
    return {"tokenizer.json": made.to_str().encode(), _CONFIG: _json(config)}


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _spelling() -> list[str]:
    """One character for every byte: itself where it can be printed in Latin-1, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
