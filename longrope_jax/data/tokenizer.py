"""Text <-> tokens."""

import numpy as np


class ByteTokenizer:
    """One token a byte, 0..255, and two more for where a document begins and ends: no vocabulary file, no unknown
    text.
    """

    vocab_size = 258
    bos = 256
    eos = 257

    def encode(self, text: str | bytes, *, bos: bool = True, eos: bool = True) -> np.ndarray:
        """uint16[tokens]; a str is taken as UTF-8."""
        data = text.encode() if isinstance(text, str) else text
        parts = [[self.bos]] * bos + [np.frombuffer(data, np.uint8)] + [[self.eos]] * eos
        return np.concatenate([np.asarray(part, np.uint16) for part in parts])

    def decode(self, tokens: np.ndarray) -> str:
        """The text between the markers; bytes that are no UTF-8 become the replacement character."""
        tokens = np.asarray(tokens)
        return tokens[tokens < 256].astype(np.uint8).tobytes().decode(errors="replace")
