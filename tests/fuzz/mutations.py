"""Valid files -> damaged, hostile and merely odd ones, the same for the same seed."""

import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

BOM = b"\xef\xbb\xbf"
NUMBERS = [
    0,
    -1,
    1,
    2,
    3,
    7,
    255,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**63,
    2**64,
    10**400,
    0.5,
    -0.0,
    1e-45,
]
NUMBERS += [1.5, 1e16, 1e39, 1e308, float("nan"), float("inf"), -float("inf")]
TEXTS = [
    "",
    " ",
    "x",
    "0",
    "1",
    "NaN",
    "\0",
    "a\0b",
    "a\nb",
    "ı",
    "İ",
    "\ud800",
    "日本",
    "..",
    ".",
    "~",
    "%s",
    "{}",
    "x" * 5000,
]
CELLS = [
    "",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "1e39",
    "-1",
    "0",
    "0.5",
    "1_000",
    "0x10",
    "١٢",
    "１",
    '"',
    '"1',
    "1;2",
    "\0",
    "1 2",
    "e",
]


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flipped, cut, repeated, moved, in another encoding: one to four changes."""
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        data = rng.choice(_BYTE_MUTATIONS)(rng, data)
    return data


def mutated_json(rng: random.Random, tree: Any, lures: Sequence[str] = ()) -> Any:
    """The document, which is lost by it, with one to three of its values or keys changed.

    Args:
        lures: texts that a reader could be led astray by, such as paths to elsewhere.
    """
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        tree = _with_change(rng, tree, lures)
    return tree


def json_file(rng: random.Random, content: bytes, lures: Sequence[str] = ()) -> bytes:
    """A file of JSON: mostly another document, sometimes other bytes, sometimes both."""
    kind = rng.random()
    if kind < 0.75:
        content = _dumped(mutated_json(rng, json.loads(content), lures))
    return mutated_bytes(rng, content) if kind > 0.65 else content


def json_lines(rng: random.Random, content: bytes, lures: Sequence[str] = ()) -> bytes:
    """A file of one JSON document a line: one line is another, or gone, or twice, or other bytes."""
    lines = content.splitlines()
    which, kind = rng.randrange(len(lines)), rng.random()
    if kind < 0.75:
        lines[which] = json_file(rng, lines[which], lures)
    elif kind < 0.85:
        lines[which : which + 1] = rng.choice([[], [lines[which]] * 3, [b""], [lines[which][:-5]]])
    content = b"\n".join(lines) + b"\n"
    return mutated_bytes(rng, content) if kind > 0.85 else content


def csv_file(rng: random.Random, content: bytes, lures: Sequence[str] = ()) -> bytes:
    """A file of numbers: other ones, or what is none, other separators, rows more or less, or other bytes."""
    kind = rng.random()
    if kind < 0.7:
        rows = [line.split(",") for line in content.decode().splitlines()]
        for _ in range(rng.choice([1, 1, 2, 5])):
            row = rng.choice(rows)
            row[rng.randrange(len(row))] = rng.choice(CELLS)
            if rng.random() < 0.3:
                rng.choice(rows).append(rng.choice(CELLS))
        text = rng.choice(["\n", "\r\n", "\n\n", "\r"]).join(rng.choice([",", ",", " , "]).join(row) for row in rows)
        content = text.encode()
    return mutated_bytes(rng, content) if kind > 0.6 else content


def with_json_header(rng: random.Random, content: bytes, lures: Sequence[str] = ()) -> bytes:
    """safetensors: its header is JSON behind its own length."""
    if rng.random() < 0.3:
        return mutated_bytes(rng, content)
    size = struct.unpack("<Q", content[:8])[0]
    header = json_file(rng, content[8 : 8 + size], lures)
    stated_size = len(header) if rng.random() < 0.9 else _awkward_size(rng)
    return struct.pack("<Q", stated_size) + header + content[8 + size :]


def binary_header(rng: random.Random, content: bytes, lures: Sequence[str] = ()) -> bytes:
    """A binary file whose interesting part is its beginning: sizes and types there are others."""
    if rng.random() < 0.2:
        return mutated_bytes(rng, content)
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 3])):
        place = rng.randrange(min(len(changed), rng.choice([64, 512, 4096])))
        form = rng.choice("BBIQ")
        value = _awkward_size(rng) if rng.random() < 0.5 else rng.randrange(16)
        packed = struct.pack(f"<{form}", value % 256 ** struct.calcsize(form))
        changed[place : place + len(packed)] = packed
    return bytes(changed)


def _awkward_size(rng: random.Random) -> int:
    return min(max(0, rng.choice([2**k + rng.choice([-1, 0, 1]) for k in range(64)])), 2**64 - 1)


def _dumped(tree: Any) -> bytes:
    return json.dumps(tree).encode()


# --- JSON -------------------------------------------------------------------------------------------------------------


def _with_change(rng: random.Random, tree: Any, lures: Sequence[str]) -> Any:
    places = list(_places(tree))
    if not places or rng.random() < 0.02:
        return _awkward(rng, tree, lures)
    holder, key = rng.choice(places)
    kind = rng.random()
    if kind < 0.55:
        holder[key] = _awkward(rng, holder[key], lures)
    elif kind < 0.7:
        del holder[key]
    elif kind < 0.8:
        other_holder, other_key = rng.choice(places)
        # As copies: one may lie within the other, and no document holds itself.
        holder[key], other_holder[other_key] = (json.loads(_dumped(v)) for v in (other_holder[other_key], holder[key]))
    elif isinstance(holder, list):
        holder[key:key] = [holder[key]] * rng.choice([1, 2, 100])
    else:
        holder[rng.choice([*TEXTS, *lures, key + "_"])] = holder.pop(key)
    return tree


def _places(tree: Any):
    """Every (holder, key) in a document."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in pairs:
            yield node, key
            waiting.append(value)


def _awkward(rng: random.Random, value: Any, lures: Sequence[str]) -> Any:
    """Something else in place of a value, sometimes close to it."""
    kind = rng.random()
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    if is_number and kind < 0.4:
        return rng.choice([-value, value + 1, value - 1, value * 2, value * 10**6, value / 3, float(value), str(value)])
    if isinstance(value, str) and kind < 0.4:
        return rng.choice([value + "x", value[:-1], value.upper(), value * 2, [value], *lures])
    if isinstance(value, list) and kind < 0.4:
        return rng.choice([value[:-1], value * 2, value[::-1], [value], {"0": value}, value + [None]])
    return rng.choice(
        [
            None,
            True,
            False,
            rng.choice(NUMBERS),
            rng.choice([*TEXTS, *lures]),
            [],
            {},
            [value],
            {"x": value},
            _nested(rng.choice([3, 100, 400])),
            [rng.choice(NUMBERS)] * rng.choice([1, 8, 2000]),
        ]
    )


def _nested(depth: int) -> Any:
    made: Any = 1
    for _ in range(depth):
        made = [made]
    return made


# --- bytes ------------------------------------------------------------------------------------------------------------


def _span(rng: random.Random, data: bytes) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice([1, 1, 2, 8, 64, len(data)]))


def _flip(rng, data):
    if not data:
        return b"\xff"
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]


def _overwrite(rng, data):
    start, stop = _span(rng, data)
    return data[:start] + rng.randbytes(stop - start) + data[stop:]


def _cut(rng, data):
    start, stop = _span(rng, data)
    return data[:start] if rng.random() < 0.5 else data[:start] + data[stop:]


def _repeat(rng, data):
    start, stop = _span(rng, data)
    return data[:stop] + data[start:stop] * rng.choice([1, 2, 50]) + data[stop:]


def _insert(rng, data):
    start, _ = _span(rng, data)
    more = [b"\0", b"\xff", b"\r\n", b"[" * 3000, b'{"a":' * 3000, b"\xed\xa0\x80", b"9" * 5000, b"//x", b"NaN", b"'"]
    return data[:start] + rng.choice(more) + data[start:]


def _reencode(rng, data):
    text = data.decode("latin-1")
    made: list[Callable[[], bytes]] = [
        lambda: BOM + data,
        lambda: text.encode("utf-16"),
        lambda: text.encode("utf-32"),
        lambda: text.encode("utf-16-be"),
        lambda: data.replace(b"a", "ä".encode("latin-1")),
        lambda: data.replace(b"\n", b"\r\n"),
    ]
    return rng.choice(made)()


def _replace(rng, data):
    return rng.choice(
        [b"", b"\0", b"null", b"[]", b"{}", b"1", b"[" * 100_000, b'{"a":' * 100_000, rng.randbytes(64), BOM]
    )


_BYTE_MUTATIONS = [_flip, _flip, _flip, _overwrite, _cut, _cut, _repeat, _insert, _reencode, _replace]
