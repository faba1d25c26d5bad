"""Text <-> tokens: the interface of a tokenizer, bytes as tokens, and the subword tokenizers of Hugging Face."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import tokenizers
from absl import logging
from etils import epath
from jaxtyping import Integer, UInt16

from longrope_jax import json_files
from longrope_jax.errors import naming, shortened
from longrope_jax.settings import Rule

_TOKENIZER = "tokenizer.json"
# The files that an exported model gets.
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
# Sixty times the largest vocabularies in use. `tokenizers` needs memory and time for every id below the largest.
_MAX_VOCAB_SIZE = 1 << 24
_IS_FLAG = json_files.optional(Rule(lambda value: isinstance(value, bool), "must be true or false"))


_SENTENCEPIECE = (
    f"has a SentencePiece tokenizer.model but no {_TOKENIZER}; make one with Transformers: "
    "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
)


class Tokenizer(Protocol):
    """The interface that the rest of the library uses."""

    @property
    def vocab_size(self) -> int:
        """Every id is below this number."""

    @property
    def bos(self) -> int | None:
        """The id that begins a document, or None."""

    @property
    def eos(self) -> int | None:
        """The id that ends a document, or None."""

    @property
    def window_bos(self) -> int | None:
        """BOS if every window begins with it, also one from the middle of a document; None if only documents do."""

    @property
    def stops(self) -> tuple[int, ...]:
        """The ids that end a generated text."""

    @property
    def fingerprint(self) -> str:
        """Two tokenizers with the same fingerprint make the same tokens from every text, in every process."""

    def encode(self, text: str | bytes, *, bos: bool = True, eos: bool = True) -> Integer[np.ndarray, "tokens"]:
        """The ids of a text: uint16 if all ids of the tokenizer fit, else uint32.

        Special tokens that the text spells are encoded as ordinary text.

        Args:
            bos, eos: whether to add BOS and EOS, if the tokenizer has them.
        """

    def decode(self, tokens: Sequence[int] | Integer[np.ndarray, "tokens"]) -> str:
        """The text of these ids, without special tokens."""


class ByteTokenizer:
    """One token per byte, 0..255, and two more for BOS and EOS. It needs no vocabulary file and knows every text."""

    vocab_size = 258
    bos = 256
    eos = 257
    window_bos = None
    stops = (eos,)
    fingerprint = "bytes"

    def encode(self, text: str | bytes, *, bos: bool = True, eos: bool = True) -> UInt16[np.ndarray, "tokens"]:
        """See `Tokenizer`; a str is encoded as UTF-8."""
        data = text.encode() if isinstance(text, str) else text
        parts = [[self.bos]] * bos + [np.frombuffer(data, np.uint8)] + [[self.eos]] * eos
        return np.concatenate([np.asarray(part, np.uint16) for part in parts])

    def decode(self, tokens: Sequence[int] | Integer[np.ndarray, "tokens"]) -> str:
        """See `Tokenizer`; invalid UTF-8 becomes the replacement character."""
        tokens = np.asarray(tokens)
        return tokens[tokens < 256].astype(np.uint8).tobytes().decode(errors="replace")


class SubwordTokenizer:
    """A `Tokenizer` that wraps one of Hugging Face's `tokenizers`; about 200,000 tokens per second.

    A text is never split before it is encoded: the safe places to split differ between tokenizers, and one string of
    megabytes is hardly slower than its lines.

    Attributes:
        files: name -> content of the tokenizer's files, for an exported model.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        files: Mapping[str, bytes],
        *,
        bos: int | None = None,
        eos: int | None = None,
        stops: Sequence[int] = (),
        adds_bos: bool | None = None,
    ):
        """Changes the tokenizer: no truncation, no padding, no special tokens from texts.

        Args:
            stops: ids that end a generated text, besides `eos`.
            adds_bos: whether every text that the model reads begins with BOS; None if the tokenizer itself says so.

        Raises:
            ValueError: `bos`, `eos` or one of `stops` is no id of the tokenizer, or an id is too large.
        """
        self.vocab_size = max(tokenizer.get_vocab().values(), default=-1) + 1
        if self.vocab_size > _MAX_VOCAB_SIZE:
            raise ValueError(f"a token has id {self.vocab_size - 1}; ids must be below {_MAX_VOCAB_SIZE}")
        starts, ends = [] if bos is None else [bos], list(stops) if eos is None else [eos, *stops]
        for name, ids in {"bos": starts, "eos": ends}.items():
            wrong = [i for i in ids if not _is_id(i, self.vocab_size) or tokenizer.id_to_token(i) is None]
            if wrong:
                raise ValueError(
                    f"{name} = {shortened(wrong[0])} must be an id of the tokenizer, below {self.vocab_size}"
                )
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _make_special(tokenizer, {*starts, *ends}, always={bos, eos})
        # Only the arguments `bos` and `eos` add special tokens: a text that spells EOS must not end a document.
        tokenizer.encode_special_tokens = True
        self.bos, self.eos, self.stops = bos, eos, tuple(dict.fromkeys(ends))
        if adds_bos is None:
            adds_bos = bos is not None and _begins_texts(tokenizer, tokenizer.id_to_token(bos))
        self.window_bos = bos if adds_bos else None
        self.files = dict(files)
        self._tokenizer = tokenizer
        _warn_of_merges_to(tokenizer, {*starts, *ends})
        self._dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that a text's tokens depend on."""
        content = f"{self._tokenizer.to_str()}\n{self.bos}\n{self.eos}"
        return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"

    @classmethod
    def from_folder(cls, folder: epath.PathLike) -> "SubwordTokenizer":
        """Reads the tokenizer of a Hugging Face folder, local or remote.

        BOS and EOS come from tokenizer_config.json or special_tokens_map.json, else from generation_config.json or
        config.json. All EOS ids of the latter two are `stops`. `add_bos_token` in the first two says whether windows
        begin with BOS. Without it they do for a LlamaTokenizer, as in Transformers, and tokenizer.json decides for all
        others.

        Raises:
            ValueError: the folder has no tokenizer.json, or a file can't be read or contradicts the others.
        """
        folder = epath.Path(folder)
        files = {name: (folder / name).read_bytes() for name in _FILES if (folder / name).is_file()}
        with naming(folder):
            if _TOKENIZER not in files:
                raise ValueError(_SENTENCEPIECE if "tokenizer.model" in files else f"has no {_TOKENIZER}")
            named = _json(folder, "special_tokens_map.json") | _json(folder, "tokenizer_config.json")
            ids = _json(folder, "config.json") | _json(folder, "generation_config.json")
            try:
                tokenizer = tokenizers.Tokenizer.from_buffer(files[_TOKENIZER])
            except Exception as error:  # `tokenizers` raises Exception itself
                raise ValueError(f"{_TOKENIZER} can't be read: {error}") from None
            bos, eos = (_id_of(tokenizer, name, named, ids) for name in ("bos", "eos"))
            is_llama = str(named.get("tokenizer_class")).startswith("LlamaTokenizer")
            adds_bos = json_files.field(named, "add_bos_token", _IS_FLAG, is_llama or None)
            stops = _as_list(ids.get("eos_token_id"))
            return cls(tokenizer, files, bos=bos, eos=eos, stops=stops, adds_bos=adds_bos)

    def encode(self, text: str | bytes, *, bos: bool = True, eos: bool = True) -> Integer[np.ndarray, "tokens"]:
        """See `Tokenizer`; invalid UTF-8 becomes the replacement character."""
        text = text if isinstance(text, str) else text.decode(errors="replace")
        # Only the batch method skips the offsets of the tokens, which takes time.
        ids = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        before = [self.bos] if bos and self.bos is not None else []
        after = [self.eos] if eos and self.eos is not None else []
        return np.asarray(before + ids + after, self._dtype)

    def decode(self, tokens: Sequence[int] | Integer[np.ndarray, "tokens"]) -> str:
        """See `Tokenizer`; unknown ids are left out too."""
        return self._tokenizer.decode(np.asarray(tokens, np.uint32).tolist(), skip_special_tokens=True)


def _begins_texts(tokenizer: tokenizers.Tokenizer, token: str | None) -> bool:
    """Whether a template of the tokenizer puts a token before every text. Nothing is encoded: damaged ones panic."""
    processor = {} if tokenizer.post_processor is None else json.loads(tokenizer.post_processor.__getstate__())
    templates = [part.get("single") or [{}] for part in processor.get("processors", [processor])]
    return any(template[0].get("SpecialToken", {}).get("id") == token for template in templates)


def _is_id(value: Any, vocab_size: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size


def _make_special(tokenizer: tokenizers.Tokenizer, ids: set[int], always: set[int | None]) -> None:
    """Registers tokens as special, those not in `always` only if they are added tokens: some files say so only in their
    configs.
    """
    added = tokenizer.get_added_tokens_decoder()
    missing = [index for index in sorted(ids) if (not added[index].special if index in added else index in always)]
    tokens = [tokenizer.id_to_token(index) for index in missing]
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in tokens])


def _warn_of_merges_to(tokenizer: tokenizers.Tokenizer, special_ids: set[int]) -> None:
    """Warns if merges make a special token, as some conversions from SentencePiece do: nothing can prevent that."""
    for index in sorted(special_ids & tokenizer.get_added_tokens_decoder().keys()):
        token = tokenizer.id_to_token(index)
        if index in tokenizer.encode(token, add_special_tokens=False).ids:
            logging.warning("the tokenizer's merges turn the text %r into the special token itself", token)


def _json(folder: epath.Path, name: str) -> dict[str, Any]:
    """The JSON object in a file, empty if there is no such file."""
    return json_files.read_object(folder / name) if (folder / name).is_file() else {}


def _id_of(tokenizer: tokenizers.Tokenizer, name: str, named: Mapping[str, Any], ids: Mapping[str, Any]) -> int | None:
    """The id of `bos` or `eos`: of the token in the tokenizer's files (null means none), else the model's first id."""
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
