"""The bytes that devices send each other in a compiled program, read from the compiler's text (HLO). Loops count as
often as they run.

JAX has no interface for this: the instructions of an `HloModule` have opcodes and operands, but no shapes, no groups
and no called computations, which only their text has.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all", "ragged-all-to-all")
RING = "ring"
"""The kind of the collective-permutes that send keys and values (`model/ring.py`). Other collective-permutes are
gathers and sums of parameters that the compiler has split, to send pieces during products."""
_RING_SCOPE = "ring_send"

_ITEM_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
_ITEM_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_OPERATION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")
_CALLS = "calls|to_apply|body|branch_computations|true_computation|false_computation"
_CALLED = re.compile(rf"\b(?:{_CALLS})=(\{{[^}}]*\}}|%?[\w.\-]+)")
_OPERAND = re.compile(r"%([\w.\-]+)")
_COUNTERS = ("s32[]", "u32[]")


@dataclass(frozen=True)
class Traffic:
    """One kind of collective, or the `RING`, over a whole run of the program.

    Attributes:
        count: how many a device starts.
        bytes: that a device receives, by ring algorithms: n - 1 pieces of n devices', twice as much for a sum.
    """

    count: int
    bytes: int


class _Operation(NamedTuple):
    is_root: bool
    name: str
    result: str
    kind: str
    rest: str


def traffic(hlo: str) -> dict[str, Traffic]:
    """Compiled HLO text -> what a device receives, by kind of collective.

    A loop's body counts as often as it runs if that number is a constant of the program, else once. All branches of a
    conditional count.
    """
    computations, entry = _computations(hlo)
    times = _times_run(computations, entry)
    devices = max(map(int, re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", hlo[: hlo.find("\n")])), default=1)
    count: Counter[str] = Counter()
    received: defaultdict[str, float] = defaultdict(float)
    for name, operations in computations.items():
        if not times[name] or _continues_collective(name, operations):
            continue
        for operation in operations:
            if kind := _kind(name, operation):
                count[kind] += times[name]
                received[kind] += times[name] * _received(kind, operation, devices)
    return {kind: Traffic(count[kind], int(received[kind])) for kind in sorted(count)}


def _continues_collective(name: str, operations: list[_Operation]) -> bool:
    """Whether a fusion repeats a collective that another fusion has started.

    TPUs overlap a collective with other work: every fusion from its start to its end contains it.
    """
    return name.startswith("async_collective_fusion") or any("AsyncCollectiveDone" in step.rest for step in operations)


def _kind(computation: str, operation: _Operation) -> str | None:
    kind = operation.kind.removesuffix("-start")
    if kind == "collective-permute" and f"/{_RING_SCOPE}/" in operation.rest:
        return RING
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):  # a fusion that uses one piece of it
        return "reduce-scatter"
    return kind if kind in _KINDS else None


def _computations(hlo: str) -> tuple[dict[str, list[_Operation]], str]:
    computations: dict[str, list[_Operation]] = {}
    entry, current = "", []
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations[header[1]] = []
            entry = header[1] if line.startswith("ENTRY") else entry
        elif found := _OPERATION.match(line):
            current.append(_Operation(bool(found[1]), *found.groups()[1:]))
    return computations, entry


def _times_run(computations: dict[str, list[_Operation]], entry: str) -> Counter[str]:
    """How often each computation runs in one run of the entry computation."""
    times: Counter[str] = Counter()

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
    """Trip count of a loop that counts from 0 up to a constant; 1 if it is unknown."""
    if stated := re.search(r"known_trip_count[^\d]*(\d+)", loop.rest):
        return int(stated[1])
    condition, body = (computations.get(_attribute(loop, name), []) for name in ("condition", "body"))
    bounds = [number for operation in condition if (number := _constant(operation)) is not None]
    return -(-max(bounds, default=1) // _step(condition, body))


def _attribute(operation: _Operation, name: str) -> str:
    found = re.search(rf"\b{name}=%?([\w.\-]+)", operation.rest)
    return found[1] if found else ""


def _constant(operation: _Operation) -> int | None:
    is_number = operation.kind == "constant" and operation.result.startswith(_COUNTERS)
    found = re.match(r"(\d+)\)", operation.rest) if is_number else None
    return int(found[1]) if found else None


def _step(condition: list[_Operation], body: list[_Operation]) -> int:
    """What a loop's body adds to its counter, the one element of the state that the condition reads.

    2 where the compiler has unrolled two turns into one; 1 if it is unknown.
    """
    read = {_attribute(step, "index") for step in condition if step.kind == "get-tuple-element"}
    by_name = {step.name: step for step in body}
    root = next((step for step in body if step.is_root and step.kind == "tuple"), None)
    if len(read) != 1 or root is None:
        return 1
    counter = by_name.get(_operands(root)[int(read.pop())])
    while counter is not None and counter.kind in ("copy", "bitcast"):
        counter = by_name.get(_operands(counter)[0])
    if counter is None or counter.kind != "add":
        return 1
    added = [_constant(by_name[name]) for name in _operands(counter) if name in by_name]
    return next((number for number in added if number), 1)


def _operands(operation: _Operation) -> list[str]:
    return _OPERAND.findall(operation.rest.partition(")")[0])


def _received(kind: str, operation: _Operation, devices: int) -> float:
    result = operation.result
    if operation.kind.endswith("-start") and operation.kind != "all-reduce-start":
        result = _elements(result)[1]  # what is sent, what is received, and counters
    size, group = sum(_size(*shape) for shape in _SHAPE.findall(result)), _group(operation.rest) or devices
    if kind in (RING, "collective-permute"):
        return size
    if kind == "reduce-scatter" and operation.kind != "all-reduce":  # its result is one piece
        return size * (group - 1)
    return size * (group - 1) / group * (2 if kind == "all-reduce" else 1)


def _elements(tuple_type: str) -> list[str]:
    """ "(a, (b, c{1:T(8)}))" -> ["a", "(b, c{1:T(8)})"]."""
    elements, depth = [""], 0
    for letter in tuple_type[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            elements.append("")
        else:
            elements[-1] += letter
    return elements


def _size(kind: str, dims: str) -> float:
    return _ITEM_BYTES.get(kind, 1) * math.prod(int(n) for n in dims.split(",") if n)


def _group(rest: str) -> int:
    """Devices that take part in one collective; 0 means all devices."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        # An axis, or a part of one: 'axis_1':(2)4 is 4 of it.
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed[1].split(","))
    return 0
