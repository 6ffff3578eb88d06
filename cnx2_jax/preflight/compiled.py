"""Reads the text of compiled programs: collectives, the bytes they send, and estimated cycles.

XLA prints a program as computations with one instruction per line. Loops count times their trips, and those
that end as their data decides, such as a detector's suppression, count once. An asynchronous operation, which
takes several lines, counts once.
"""

import collections
import functools
import math
import re
from collections.abc import Callable, Iterator

BYTES = {"pred": 1, "bf16": 2, "f16": 2}  # the names of other types contain their number of bits
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_KIND = "|".join(COLLECTIVES)
# The shape can be a tuple with comments such as `/*index=5*/` in it.
_COLLECTIVE = re.compile(rf" = (?P<shape>.*?) (?P<kind>{_KIND})(?P<start>-start)?\(")
# Transfers over the network between TPU slices, beside the collectives within each.
BETWEEN_SLICES = "between slices"
_SENT = re.compile(r" = (?P<shape>.*?) send\(.*xla_megascale_runtime")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
Tally = collections.Counter


def cycles_by_kind(text: str) -> dict[str, int]:
    """Returns the estimated cycles in a compiled TPU program's text by kind of operation, most first.

    They are the TPU compiler's own cost model, which knows no overlap and leaves some operations out. Use
    them to compare two forms of one program, not as times.

    Raises:
      ValueError: the number of trips of a loop cannot be read.
    """

    def cycles(line: str, _: str) -> Tally:
        if not (found := re.search(r'"estimated_cycles":"(\d+)"', line)):
            return Tally()
        operation = re.search(r'op_name="([^"]*)"', line)
        return Tally({operation[1].split("/")[-1] if operation else "unnamed": int(found[1])})

    return dict(_sum(text, cycles).most_common())


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Returns a compiled program's collectives and the bytes that each device sends for them, by kind.

    For several TPU slices the compiler turns an all-reduce into collectives within each slice and transfers
    between slices, which are a kind of their own: the bytes that each device hands over.

    Bytes are those of a ring of n devices: (n - 1) / n of an array that is gathered, scattered or exchanged,
    twice that of one that is all-reduced, and all of one that is permuted.

    Returns:
      `{kind: {"count": operations, "bytes": bytes}}` for one device and one run of the program.

    Raises:
      ValueError: the groups of a collective, or the number of trips of a loop, cannot be read.
    """

    def collective(line: str, computation: str) -> Tally:
        if sent := _SENT.search(line):
            return Tally({(BETWEEN_SLICES, "count"): 1, (BETWEEN_SLICES, "bytes"): _bytes(sent["shape"])})
        found = _COLLECTIVE.search(line)
        # On TPUs an asynchronous operation is part of several fusions; only the first has no start flag.
        if not found or re.search(r'"async_collective_fusion_config":\{"flag_start":"\d', line):
            return Tally()
        kind, size = found["kind"], _bytes(found["shape"])
        if kind == "collective-permute":  # the shape of an asynchronous one has operand and result
            return Tally({(kind, "count"): 1, (kind, "bytes"): size // 2 if found["start"] else size})
        group = _group_size(line)
        if group == 1:
            return Tally()  # nothing leaves the device
        if kind in ("all-gather", "reduce-scatter") and found["start"]:
            # The shape has operand and result, one of which is an n-th of the other.
            size = size * group // (group + 1)
        elif kind == "reduce-scatter":
            size *= group
        elif kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # the TPU compiler's form of it
        trips = 2 if kind == "all-reduce" else 1
        return Tally({(kind, "count"): 1, (kind, "bytes"): trips * size * (group - 1) // group})

    sums = _sum(text, collective, inside_fusions=True)
    return {
        kind: {what: sums[kind, what] for what in ("count", "bytes")}
        for kind in (*COLLECTIVES, BETWEEN_SLICES)
        if sums[kind, "count"]
    }


def has_loops(text: str) -> bool:
    """Returns whether a compiled program has loops; XLA's cost analysis counts every loop's body once."""
    return " while(" in text


def _bytes(shape: str) -> int:
    """Returns the bytes of a shape such as `(f32[8,2]{1,0}, u32[])`; scalars of type u32 are flags."""
    return sum(
        _item_bytes(kind) * math.prod(int(n) for n in sizes.split(",") if n)
        for kind, sizes in _ARRAY.findall(re.sub(r"\{[^}]*\}|u32\[\]|token\[\]", "", shape))
    )


def _item_bytes(kind: str) -> int:
    bits = re.search(r"\d+", kind)
    return BYTES.get(kind) or max(1, int(bits[0]) // 8 if bits else 1)


def _group_size(line: str) -> int:
    """Returns the number of devices in each group of a collective, from any of XLA's three notations."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if table := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(table[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\].*? \{('[^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    raise ValueError(f"cannot read the groups of the collective: {line.strip()[:200]}")


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns the instructions of every computation, and the name of the one that is the program."""
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if found := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
            name = found[2]
            computations[name] = []
            entry = name if found[1] else entry
        elif name and " = " in line:
            computations[name].append(line)
    return computations, entry


def _sum(text: str, of: Callable[[str, str], Tally], *, inside_fusions: bool = False) -> Tally:
    """Sums `of(instruction, its computation)` over all instructions that a program runs."""
    computations, entry = _computations(text)

    def called(line: str) -> Iterator[str]:
        if re.search(r" (call|conditional)\(", line):
            for names in re.findall(r"(?:to_apply|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)", line):
                yield from re.findall(r"[\w.\-]+", names)
            yield from re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)
        elif inside_fusions and re.search(r" (fusion|async-start)\(", line):
            yield from re.findall(r"calls=%?([\w.\-]+)", line)

    @functools.cache
    def total(name: str) -> Tally:
        sums: Tally = Tally()
        for line in computations[name]:
            if loop := re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
                if inner := total(loop[2]):
                    trips = _trips(line, computations[loop[1]])
                    sums.update({kind: trips * count for kind, count in inner.items()})
                continue
            sums.update(of(line, name))
            for inside in called(line):
                sums.update(total(inside))
        return sums

    return total(entry)


def _trips(loop: str, condition: list[str]) -> int:
    """Returns a loop's trips: XLA's own count, or the constant that its counter, from 0, is compared with.

    Returns 1 for a loop that ends as its data decides: its condition has no whole number.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop):
        return int(known[1])
    if not re.search(r"= [su]\d+\[\]", "\n".join(condition)):
        return 1
    constants = re.findall(r"[su]32\[\]\S* constant\((\d+)\)", "\n".join(condition))
    if len(constants) != 1:
        raise ValueError(f"cannot read the number of trips of the loop with the condition: {condition}")
    return int(constants[0])
