"""What devices send each other in a compiled program: read from the compiler's text, loops multiplied out."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all", "ragged-all-to-all")
_ITEM_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
_ITEM_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")
_CALLS = "calls|to_apply|body|branch_computations|true_computation|false_computation"
_CALLED = re.compile(rf"\b(?:{_CALLS})=(\{{[^}}]*\}}|%?[\w.\-]+)")


class Traffic(NamedTuple):
    """Of one kind of collective, over a whole run of the program.

    Attributes:
        count: how many are started by a device.
        bytes: that a device receives, if rings are used: of n devices' pieces n - 1, of a sum twice as much.
    """

    count: int
    bytes: int


class _Operation(NamedTuple):
    name: str
    result: str
    kind: str
    rest: str


def traffic(hlo: str) -> dict[str, Traffic]:
    """Compiled HLO text -> what a device receives, by kind of collective.

    Bodies of loops count as often as they are run, where the number is a constant of the program; else once. Branches
    of conditionals count all.
    """
    computations, entry = _computations(hlo)
    times = _times_run(computations, entry)
    count, received = Counter(), Counter()
    for name, operations in computations.items():
        for operation in operations:
            kind = operation.kind.removesuffix("-start")
            if kind in _KINDS and times[name]:
                count[kind] += times[name]
                received[kind] += times[name] * _received(kind, operation)
    return {kind: Traffic(count[kind], int(received[kind])) for kind in sorted(count)}


def _computations(hlo: str) -> tuple[dict[str, list[_Operation]], str]:
    computations, entry, current = {}, "", []
    for line in hlo.splitlines():
        if begin := _COMPUTATION.match(line):
            current = computations[begin[1]] = []
            entry = begin[1] if line.startswith("ENTRY") else entry
        elif found := _OPERATION.match(line):
            current.append(_Operation(*found.groups()))
    return computations, entry


def _times_run(computations: dict[str, list[_Operation]], entry: str) -> Counter[str]:
    """How often each computation is run in one run of the entry."""
    times = Counter()

    def run(name: str, often: int) -> None:
        times[name] += often
        for operation in computations.get(name, ()):
            turns = often * (_trips(operation, computations) if operation.kind == "while" else 1)
            for called in _called(operation):
                run(called, turns)

    run(entry, 1)
    return times


def _called(operation: _Operation) -> Iterator[str]:
    for found in _CALLED.finditer(operation.rest):
        yield from re.findall(r"[\w.\-]+", found[1])


def _trips(loop: _Operation, computations: dict[str, list[_Operation]]) -> int:
    """Of a loop that counts from 0 up to a constant; 1 if it is not known."""
    if stated := re.search(r"known_trip_count[^\d]*(\d+)", loop.rest):
        return int(stated[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    bounds = [
        int(found[1])
        for operation in computations.get(condition[1] if condition else "", ())
        if operation.kind == "constant" and operation.result.startswith("s32[]")
        if (found := re.match(r"(\d+)\)", operation.rest))
    ]
    return max(bounds, default=1)


def _received(kind: str, operation: _Operation) -> float:
    sizes = [_size(*shape) for shape in _SHAPE.findall(operation.result)]
    # The result of a start holds what is sent as well, and counters.
    size = max(sizes, default=0) if operation.kind.endswith("-start") and kind != "all-reduce" else sum(sizes)
    group = _group(operation.rest)
    if kind == "collective-permute":
        return size
    if kind == "reduce-scatter":  # its result is one piece
        return size * (group - 1) if not operation.kind.endswith("-start") else size * (group - 1) / group
    return size * (group - 1) / group * (2 if kind == "all-reduce" else 1)


def _size(kind: str, dims: str) -> float:
    return _ITEM_BYTES.get(kind, 1) * math.prod(int(n) for n in dims.split(",") if n)


def _group(rest: str) -> int:
    """Devices that take part in one collective."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        # An axis, or a part of one: 'axis_1':(2)4 is 4 of it.
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed[1].split(","))
    return 1
