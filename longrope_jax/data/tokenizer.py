"""Text <-> tokens: what every tokenizer does, and the one that needs no files."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Integer, UInt16


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
    def identity(self) -> str:
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
    identity = "bytes"

    def encode(self, text: str | bytes, *, bos: bool = True, eos: bool = True) -> UInt16[np.ndarray, "tokens"]:
        """uint16[tokens]; a str is taken as UTF-8."""
        data = text.encode() if isinstance(text, str) else text
        parts = [[self.bos]] * bos + [np.frombuffer(data, np.uint8)] + [[self.eos]] * eos
        return np.concatenate([np.asarray(part, np.uint16) for part in parts])

    def decode(self, tokens: Sequence[int] | Integer[np.ndarray, "tokens"]) -> str:
        """The text between the markers; bytes that are no UTF-8 become the replacement character."""
        tokens = np.asarray(tokens)
        return tokens[tokens < 256].astype(np.uint8).tobytes().decode(errors="replace")
