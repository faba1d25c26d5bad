"""Text <-> tokens: what every tokenizer does, and the one that needs no files."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import tokenizers
from absl import logging
from etils import epath
from jaxtyping import Integer, UInt16

from longrope_jax import json_files
from longrope_jax.errors import beginning, shortened


class Tokenizer(Protocol):
    """What the rest of the library knows of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Every id is below it."""

    @property
    def bos(self) -> int | None:
        """What a document begins with; None where the tokenizer has nothing for it."""

    @property
    def eos(self) -> int | None:
        """What a document ends with, or None."""

    @property
    def stops(self) -> tuple[int, ...]:
        """The ids that end a generated text."""

    @property
    def fingerprint(self) -> str:
        """The same for two that make the same tokens of every text, in every process."""

    def encode(self, text: str | bytes, *, bos: bool = True, eos: bool = True) -> Integer[np.ndarray, "tokens"]:
        """The ids of a text, between BOS and EOS where asked for and where there are such: uint16 if all ids fit into
        it, else uint32. The text is only text: what looks like a special token in it does not become one.
        """

    def decode(self, tokens: Sequence[int] | Integer[np.ndarray, "tokens"]) -> str:
        """The text of some ids; special tokens are left out."""


class ByteTokenizer:
    """One token a byte, 0..255, and two more for where a document begins and ends: no vocabulary file, no unknown
    text.
    """

    vocab_size = 258
    bos = 256
    eos = 257
    stops = (eos,)
    fingerprint = "bytes"

    def encode(self, text: str | bytes, *, bos: bool = True, eos: bool = True) -> UInt16[np.ndarray, "tokens"]:
        """uint16[tokens]; a str is taken as UTF-8."""
        data = text.encode() if isinstance(text, str) else text
        parts = [[self.bos]] * bos + [np.frombuffer(data, np.uint8)] + [[self.eos]] * eos
        return np.concatenate([np.asarray(part, np.uint16) for part in parts])

    def decode(self, tokens: Sequence[int] | Integer[np.ndarray, "tokens"]) -> str:
        """The text between the markers; bytes that are no UTF-8 become the replacement character."""
        tokens = np.asarray(tokens)
        return tokens[tokens < 256].astype(np.uint8).tobytes().decode(errors="replace")


_TOKENIZER = "tokenizer.json"
# What an exported model hands on, and what is only read: which ids begin and end a text.
_FILES = (
    _TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
_CONFIGS = ("generation_config.json", "config.json")
# Sixty times those of today; `tokenizers` takes memory and time for every id up to the largest, there or not.
_LARGEST_VOCABULARY = 1 << 24


class SubwordTokenizer:
    """A `data.tokenizer.Tokenizer` around one of Hugging Face's `tokenizers`.

    About 200,000 tokens a second. A text is never cut before it is encoded: where that would leave the tokens as they
    are differs from tokenizer to tokenizer, and one string of megabytes is hardly slower than its lines.

    Attributes:
        files: name -> content of the tokenizer's files, to hand on with an exported model.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        files: Mapping[str, bytes],
        *,
        bos: int | None = None,
        eos: int | None = None,
        stops: Sequence[int] = (),
    ):
        """Takes over the tokenizer: truncation, padding and special tokens in texts are switched off.

        Args:
            stops: ids that end a generated text, beside `eos`.

        Raises:
            ValueError: `bos`, `eos` or one of `stops` is no id of the tokenizer, or a token has an id beyond reason.
        """
        self.vocab_size = max(tokenizer.get_vocab().values(), default=-1) + 1
        if self.vocab_size > _LARGEST_VOCABULARY:
            raise ValueError(f"a token has id {self.vocab_size - 1}; ids must be below {_LARGEST_VOCABULARY}")
        ends = ([] if eos is None else [eos]) + list(stops)
        for name, ids in {"bos": [] if bos is None else [bos], "eos": ends}.items():
            wrong = [i for i in ids if not _is_id(i, self.vocab_size) or tokenizer.id_to_token(i) is None]
            if wrong:
                raise ValueError(
                    f"{name} = {shortened(wrong[0])} must be an id of the tokenizer, below {self.vocab_size}"
                )
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _make_special(tokenizer, {mark for mark in (bos, eos) if mark is not None}, stops)
        # Special tokens enter by `bos` and `eos` only; a text that spells one must not be able to end a document.
        tokenizer.encode_special_tokens = True
        self.bos, self.eos, self.stops = bos, eos, tuple(dict.fromkeys(ends))
        self.files = dict(files)
        self._tokenizer = tokenizer
        _warn_of_merges_to(tokenizer, {index for index in (bos, *ends) if index is not None})
        self._dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that a text's tokens depend on."""
        told = f"{self._tokenizer.to_str()}\n{self.bos}\n{self.eos}"
        return f"sha256:{hashlib.sha256(told.encode()).hexdigest()}"

    @classmethod
    def from_folder(cls, folder: epath.PathLike) -> "SubwordTokenizer":
        """Reads the tokenizer of a Hugging Face folder (on any file system that etils knows).

        BOS and EOS are those of tokenizer_config.json or special_tokens_map.json, else the ids in
        generation_config.json or config.json, whose EOS ids are all `stops`.

        Raises:
            ValueError: the folder has no tokenizer.json, or a file can't be read or does not fit the others.
        """
        folder = epath.Path(folder)
        if not (folder / _TOKENIZER).is_file():
            raise ValueError(f"{folder}: {_missing(folder)}")
        files = {name: (folder / name).read_bytes() for name in _FILES if (folder / name).is_file()}
        named = _json(folder, "special_tokens_map.json") | _json(folder, "tokenizer_config.json")
        ids = _json(folder, _CONFIGS[1]) | _json(folder, _CONFIGS[0])
        try:
            tokenizer = _read(files[_TOKENIZER])
            bos, eos = (_id_of(tokenizer, name, named, ids) for name in ("bos", "eos"))
            return cls(tokenizer, files, bos=bos, eos=eos, stops=_as_list(ids.get("eos_token_id")))
        except ValueError as error:
            raise ValueError(f"{folder}: {beginning(error)}") from None

    def encode(self, text: str | bytes, *, bos: bool = True, eos: bool = True) -> Integer[np.ndarray, "tokens"]:
        """See `Tokenizer`; bytes that are no UTF-8 become the replacement character."""
        text = text if isinstance(text, str) else text.decode(errors="replace")
        # The batched method is the one that does not keep track of every token's place in the text.
        ids = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        before = [self.bos] if bos and self.bos is not None else []
        after = [self.eos] if eos and self.eos is not None else []
        return np.asarray(before + ids + after, self._dtype)

    def decode(self, tokens: Sequence[int] | Integer[np.ndarray, "tokens"]) -> str:
        """See `Tokenizer`; ids that the tokenizer does not have are left out as well."""
        return self._tokenizer.decode(np.asarray(tokens, np.uint32).tolist(), skip_special_tokens=True)


def _is_id(value: Any, vocab_size: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size


def _make_special(tokenizer: tokenizers.Tokenizer, marks: set[int], stops: Sequence[int]) -> None:
    """Makes sure that BOS and EOS, and what else ends a text and is no plain subword, count as special tokens; some
    files only say so outside of tokenizer.json.
    """
    added = tokenizer.get_added_tokens_decoder()
    wanted = {index for index in [*marks, *stops] if index in marks or index in added}
    special = sorted(index for index in wanted if index not in added or not added[index].special)
    tokens = [tokenizer.id_to_token(index) for index in special]
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in tokens])


def _warn_of_merges_to(tokenizer: tokenizers.Tokenizer, marks: set[int]) -> None:
    """Some conversions from SentencePiece have merges that spell a special token: nothing keeps texts from those."""
    for index in sorted(marks & tokenizer.get_added_tokens_decoder().keys()):
        token = tokenizer.id_to_token(index)
        if index in tokenizer.encode(token, add_special_tokens=False).ids:
            logging.warning("the tokenizer's merges turn the text %r into the special token itself", token)


def _read(content: bytes) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the package raises Exception itself
        raise ValueError(f"{_TOKENIZER} can't be read: {error}") from None


def _missing(folder: epath.Path) -> str:
    if (folder / "tokenizer.model").is_file():
        return (
            f"has a SentencePiece tokenizer.model but no {_TOKENIZER}; make one with Transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    return f"has no {_TOKENIZER}"


def _json(folder: epath.Path, name: str) -> dict[str, Any]:
    """The JSON object in a file, empty where there is no such file."""
    path = folder / name
    if not path.is_file():
        return {}
    return json_files.read_object(path)


def _id_of(tokenizer: tokenizers.Tokenizer, name: str, named: Mapping[str, Any], ids: Mapping[str, Any]) -> int | None:
    """The id of `bos` or `eos`: of the token in the tokenizer's own files, where null says that there is none; else the
    first id in the model's.
    """
    if f"{name}_token" not in named:
        return next(iter(_as_list(ids.get(f"{name}_token_id"))), None)
    token = named[f"{name}_token"]
    text = token.get("content") if isinstance(token, dict) else token
    if text is None:
        return None
    found = tokenizer.token_to_id(text) if isinstance(text, str) else None
    if found is None:
        raise ValueError(f"{name}_token = {shortened(text)} is no token of {_TOKENIZER}")
    return found


def _as_list(ids: Any) -> list:
    if ids is None:
        return []
    return ids if isinstance(ids, list) else [ids]
