"""Key-value pairs planted in text: dependencies at known distances, also far beyond a context window.

A pair is a line of its own, such as `Cairo = 4821907`, that comes back several times in its document. Only a model that
still reads an earlier line with the pair can predict its number, so such text tells how much of its context a model
uses.
"""

import hashlib
import heapq
import io
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from longrope_jax.data.needles import CITIES

MARK = " with pairs"
"""The end of the name of a document that has pairs."""
DIGITS = 7
"""Of a value, all different, so that each determines the next one: tiny models learn to look such numbers up sooner."""

_PAIR = re.compile(rb"^([A-Z][a-z]+) = (\d{%d})$" % DIGITS, re.MULTILINE)
_LINE = 17  # bytes, about
_REPEATED = 0.8  # so a pair has five lines on average


def plant(name: str, text: bytes, share: float, density: float, distances: tuple[int, ...]) -> tuple[str, bytes]:
    """Name and text of a document, with or without pairs. The name is the seed, so it should be unique.

    Args:
        share: of all documents, those that have pairs.
        density: share of a document's bytes that are pairs, where it is much longer than the distances; less where more
            pairs than there are cities would have to come back.
        distances: the smallest and the largest number of bytes, drawn log-uniformly, from the end of a pair's line to
            where it may come back; it comes back at the next end of a line.
    """
    rng = np.random.default_rng(list(hashlib.sha256(name.encode()).digest()))
    if rng.random() >= share:
        return name, text
    new_per_byte = density / (1 - density) / _LINE * (1 - _REPEATED)
    parts, size, due, free = list[bytes](), 0, list[tuple[float, str, bytes]](), set(CITIES)
    for line in io.BytesIO(text):
        parts.append(line)
        size += len(line)
        if not line.endswith(b"\n"):  # the last one
            break
        for city in rng.permutation(sorted(free))[: rng.poisson(new_per_byte * len(line))]:
            free.remove(city)
            number = "".join(map(str, rng.permutation(10)[:DIGITS]))
            heapq.heappush(due, (0, city, f"{city} = {number}\n".encode()))
        while due and due[0][0] <= size:
            _, city, pair = heapq.heappop(due)
            parts.append(pair)
            size += len(pair)
            if rng.random() < _REPEATED:
                heapq.heappush(due, (size + np.exp(rng.uniform(*np.log(distances))), city, pair))
            else:
                free.add(city)
    return name + MARK * (size > len(text)), b"".join(parts)


class Answers(NamedTuple):
    """The values in rows of text whose pair stands earlier in the same row.

    Attributes:
        rows: index of the row.
        starts: index of the value's first byte.
        distances: from the last value of the same pair, bytes.
    """

    rows: Int[np.ndarray, "A"]
    starts: Int[np.ndarray, "A"]
    distances: Int[np.ndarray, "A"]

    def places(self) -> tuple[Int[np.ndarray, "A 1"], Int[np.ndarray, "A digits"]]:
        """Rows and columns of the targets that are the digits of each value: target k is token k + 1."""
        return self.rows[:, None], self.starts[:, None] - 1 + np.arange(DIGITS)


def find_answers(names: Sequence[str], tokens: Int[np.ndarray, "N T"]) -> Answers:
    """The answers in rows of bytes, each from the document of that name."""
    found = []
    for row, name in enumerate(names):
        before: dict[bytes, tuple[int, bytes]] = {}
        for pair in _PAIR.finditer(tokens[row].astype(np.uint8).tobytes()) if name.endswith(MARK) else ():
            start = pair.start(2)
            last = before.get(pair[1])
            if last and last[1] == pair[2]:
                found.append((row, start, start - last[0]))
            before[pair[1]] = start, pair[2]
    return Answers(*np.array(found, int).reshape(-1, 3).T)
