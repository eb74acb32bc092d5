"""What a compiled program does on one chip, read from its optimized HLO text: collectives, HBM traffic, and the
operations of attention that cuDNN does.

XLA's own cost analysis counts the body of a loop once, and a scanned decoder is almost all loops. Here every loop is
counted as often as it runs (from its condition, start and step).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_ITEM = {"pred": 1, "s4": 0.5, "u4": 0.5, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+)(?: \(.*)? (?:-> .*)?\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")

# Scratch memory that a call of cuBLAS or cuDNN gets, as the last of its results.
_WORKSPACE = re.compile(r", [su]8\[\d+\]\{0\}\)$")

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
# Of these the operands and results are not moved by the instruction itself.
_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "iota", "opt-barrier", "domain", "add-dependency",
}  # fmt: skip
_FUSIONS = ("fusion", "fusion-start")


class Instruction(NamedTuple):
    """One line of a computation. ``type`` and ``rest`` (attributes) are HLO text."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str


@dataclasses.dataclass
class Collective:
    """All collectives of one kind and group size: how many run per step, and the bytes that each chip sends.

    Bytes are those of ring algorithms: (n - 1) / n of the gathered array, twice that for all-reduce. ``local`` is the
    number of members of a group that are on the same machine.
    """

    kind: str
    group: int
    local: int
    count: int = 0
    bytes: float = 0.0


def array_bytes(text: str, *, hbm_only: bool = False) -> float:
    """Bytes of all arrays in an HLO type; ``hbm_only`` leaves out those in another memory space (layout ``S(n)``)."""
    total = 0.0
    for kind, dims, layout in _ARRAY.findall(text):
        if hbm_only and re.search(r"S\([1-9]", layout):
            continue
        bits = re.search(r"\d+", kind)
        size = _ITEM.get(kind, int(bits.group()) / 8 if bits else 1)
        total += size * math.prod(int(n) for n in dims.split(",") if n)
    return total


def _closing(text: str, start: int) -> int:
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text) - 1


def _instruction(line: str) -> Instruction | None:
    left, equals, right = line.strip().removeprefix("ROOT ").partition(" = ")
    if not equals:
        return None
    end = _closing(right, 0) + 1 if right.startswith("(") else right.find(" ")
    kind, tail = right[:end], right[end:].lstrip()
    opcode, bracket, _ = tail.partition("(")
    if not bracket:
        return None
    close = _closing(tail, len(opcode))
    operands = tuple(re.findall(r"%([\w.\-]+)", tail[len(opcode) : close]))
    text = tail[len(opcode) + 1 : close] if opcode in ("constant", "parameter") else ""
    return Instruction(left.lstrip("%"), kind, opcode, operands, text + tail[close + 1 :])


class Module:
    """A parsed HLO module. Raises ValueError when there is no entry computation."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.roots: dict[str, Instruction] = {}
        self.entry, current, name = "", None, ""
        for line in text.splitlines():
            if line.startswith((" ", "\t")):
                if current is not None and (found := _instruction(line)) is not None:
                    current[found.name] = found
                    if line.lstrip().startswith("ROOT "):
                        self.roots[name] = found
            elif head := _HEAD.match(line):
                name = head.group(1)
                current = self.computations[name] = {}
                if line.startswith("ENTRY"):
                    self.entry = name
            elif line.rstrip() == "}":  # attributes of kernels may span lines that begin with a brace
                current = None
        if not self.entry:
            raise ValueError("not the text of an HLO module: it has no ENTRY computation")

    def executed(self) -> Iterator[tuple[str, float, bool]]:
        """(computation, how often it runs, whether it is a fusion's inside) from the entry on."""
        stack = [(self.entry, 1.0, False)]
        while stack:
            name, times, fused = stack.pop()
            if name not in self.computations:
                continue
            yield name, times, fused
            for instruction in self.computations[name].values():
                factor = self.trip_count(name, instruction) if instruction.opcode == "while" else 1
                inside = fused or instruction.opcode in _FUSIONS
                if instruction.opcode in (*_FUSIONS, "while", "call", "conditional", "async-start"):
                    called = _CALLED.findall(instruction.rest)
                    for branches in _BRANCHES.findall(instruction.rest):
                        called += re.findall(r"%?([\w.\-]+)", branches)
                    stack += [(target, times * factor, inside) for target in called]

    def trip_count(self, computation: str, loop: Instruction) -> int:
        """Iterations of a counted loop; 1 when its condition is not a comparison with a constant."""
        if known := re.search(r"known_trip_count[^\d]*(\d+)", loop.rest):
            return int(known.group(1))
        condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
        body = re.search(r"body=%?([\w.\-]+)", loop.rest)
        if condition is None or body is None:
            return 1
        compare = self.roots.get(condition.group(1))
        inside = self.computations.get(condition.group(1), {})
        if compare is None or compare.opcode != "compare" or len(compare.operands) != 2:
            return 1
        counter = inside.get(compare.operands[0])
        limit = self._constant(condition.group(1), compare.operands[1])
        index = re.search(r"index=(\d+)", counter.rest) if counter is not None else None
        if limit is None or index is None:
            return 1
        slot = int(index.group(1))
        start = self._start(computation, loop, slot)
        limit += "direction=LE" in compare.rest
        return max(1, -(-(limit - start) // self._step(body.group(1), slot)))

    def _constant(self, computation: str, name: str) -> int | None:
        found = self.computations[computation].get(name)
        while found is not None and found.opcode in ("copy", "bitcast") and found.operands:
            found = self.computations[computation].get(found.operands[0])
        if found is None or found.opcode != "constant":
            return None
        value = re.match(r"-?\d+", found.rest)
        return int(value.group()) if value else None

    def _start(self, computation: str, loop: Instruction, slot: int) -> int:
        initial = self.computations[computation].get(loop.operands[0])
        if initial is None or initial.opcode != "tuple" or slot >= len(initial.operands):
            return 0
        return self._constant(computation, initial.operands[slot]) or 0

    def _step(self, body: str, slot: int) -> int:
        """By how much the counter grows: the constants added along the way from the loop's parameter."""
        root, step = self.roots.get(body), 0
        if root is None or root.opcode != "tuple" or slot >= len(root.operands):
            return 1
        name = root.operands[slot]
        for _ in range(16):
            found = self.computations[body].get(name)
            if found is None or found.opcode not in ("add", "copy", "bitcast"):
                break
            name = found.operands[0]
            if found.opcode == "add":
                values = [self._constant(body, operand) for operand in found.operands]
                step += next((value for value in values if value is not None), 0)
                name = found.operands[0] if values[0] is None else found.operands[1]
        return step or 1

    # Totals

    def collectives(self, machine: int = 0) -> list[Collective]:
        """Every collective that one step runs, by kind and group size.

        ``machine`` is the number of devices of one machine, which are consecutive in the mesh; 0 when all devices are
        joined by the same links.
        """
        seen: dict[tuple[str, str], tuple[Instruction, float]] = {}
        for name, times, fused in self.executed():
            for instruction in self.computations[name].values():
                kind = instruction.opcode.removesuffix("-start")
                if kind in KINDS:
                    # An asynchronous collective may be cut into fusions that all name it; elsewhere a channel may serve
                    # several collectives.
                    channel = re.search(r"channel_id=(\d+)", instruction.rest) if fused else None
                    key = (kind, channel.group() if channel else f"{name}/{instruction.name}")
                    if key not in seen or seen[key][1] < times:
                        seen[key] = (instruction, times)
        totals: dict[tuple[str, int, int], Collective] = {}
        for (kind, _), (instruction, times) in seen.items():
            group = group_size(instruction.rest)
            local = local_size(instruction.rest, machine) if machine else group
            entry = totals.setdefault((kind, group, local), Collective(kind, group, local))
            entry.count += round(times)
            entry.bytes += times * _sent(kind, instruction, group)
        return sorted(totals.values(), key=lambda entry: -entry.bytes)

    def hbm_bytes(self) -> float:
        """Bytes that the instructions of one step read from and write to HBM. Kernels (custom calls) count their operands
        and results once.
        """
        return sum(
            times * self._traffic(name, instruction)
            for name, times, fused in self.executed()
            if not fused
            for instruction in self.computations[name].values()
        )

    def attention_flops(self) -> float:
        """Operations of cuDNN's attention calls: of the scores that the mask leaves, two products forward and five
        backward.
        """
        total = 0.0
        for name, times, _ in self.executed():
            for instruction in self.computations[name].values():
                target = re.search(r'custom_call_target="__cudnn\$fmha(\w*)"', instruction.rest)
                scores = re.search(r'"intermediate_tensor_shape":.*?"dimensions":\s*\[([^\]]*)\]', instruction.rest)
                if target is None or scores is None:
                    continue
                batch, heads, length, keys = map(int, re.findall(r"\d+", scores.group(1)))
                seen = length * keys
                if '"CAUSAL"' in instruction.rest:
                    window = re.search(r'"sliding_window_length":\s*"?(\d+)', instruction.rest)
                    width = min(keys, int(window.group(1)) if window else 0) or keys
                    seen = length * width - width * (width - 1) / 2
                queries = _ARRAY.search(self.computations[name][instruction.operands[0]].type)
                assert queries is not None  # an operand of attention is an array
                products = 5 if "Backward" in target.group(1) else 2
                total += times * 2 * products * batch * heads * seen * int(queries.group(2).split(",")[-1])
        return total

    def _traffic(self, computation: str, instruction: Instruction) -> float:
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            return 0.0
        if "AllocateBuffer" in instruction.rest or "ConcatBitcast" in instruction.rest:
            return 0.0
        if opcode == "copy-start":  # its type holds destination and source
            return array_bytes(instruction.type, hbm_only=True)
        siblings = self.computations[computation]
        types = [siblings[name].type if name in siblings else "" for name in instruction.operands]
        inputs = [array_bytes(kind, hbm_only=True) for kind in types]
        custom = opcode == "custom-call" or "kind=kCustom" in instruction.rest
        result = _started(instruction.type) if opcode == "fusion-start" else instruction.type
        output = array_bytes(_WORKSPACE.sub(")", result) if custom else result, hbm_only=True)
        if opcode == "dynamic-update-slice":
            return 2 * inputs[1]
        if opcode in ("dynamic-slice", "gather", "slice"):
            return 2 * output
        if opcode in _FUSIONS and (called := re.search(r"calls=%?([\w.\-]+)", instruction.rest)):
            read, updates = self._reads(called.group(1))
            inputs = [min(whole, read.get(place, whole)) for place, whole in enumerate(inputs)]
            output = min(output, updates) if updates is not None else output
        if opcode.endswith("-start") and opcode not in ("async-start", "fusion-start"):
            output = 0.0  # counted with the operands: the type of a start holds both
        return sum(inputs) + output

    @functools.cached_property
    def _read_cache(self) -> dict[str, tuple[dict[int, float], float | None]]:
        return {}

    def _reads(self, fusion: str) -> tuple[dict[int, float], float | None]:
        """Bytes that a fusion reads of those parameters of which it takes slices only, and what it writes when its
        root is a slice updated in place (else None).
        """
        if fusion not in self._read_cache:
            inside = self.computations.get(fusion, {})
            users: dict[str, list[Instruction]] = {}
            for instruction in inside.values():
                for operand in instruction.operands:
                    users.setdefault(operand, []).append(instruction)
            read: dict[int, float] = {}
            for instruction in inside.values():
                if instruction.opcode == "parameter":
                    size = _sliced(instruction, users, inside)
                    if size is not None:
                        number = re.match(r"\d+", instruction.rest)
                        assert number is not None  # parameter(0), parameter(1), ...
                        read[int(number.group())] = size
            root, updates = self.roots.get(fusion), None
            while root is not None and root.opcode == "bitcast":
                root = inside.get(root.operands[0])
            if root is not None and root.opcode == "dynamic-update-slice":
                updates = array_bytes(inside[root.operands[1]].type)
            if root is not None and root.opcode == "scatter" and len(root.operands) == 3:
                updates = array_bytes(inside[root.operands[2]].type)
            self._read_cache[fusion] = (read, updates)
        return self._read_cache[fusion]


def _sliced(parameter: Instruction, users: dict, inside: dict) -> float | None:
    total, names = 0.0, [parameter.name]
    while names:
        for user in users.get(name := names.pop(), []):
            if user.opcode == "bitcast":
                names.append(user.name)
            elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                total += array_bytes(user.type)
            elif user.opcode in ("dynamic-update-slice", "scatter") and user.operands[0] == name:
                total += 0.0  # written in place
            else:
                return None
    return total


def group_size(attributes: str) -> int:
    """Devices that take part in one group of a collective (1 when the text does not say; 2 for a permutation)."""
    return 2 if "source_target_pairs" in attributes else max(1, len(first_group(attributes)))


def first_group(attributes: str) -> list[int]:
    """The devices, as numbered in the mesh, of a collective's first group (none when the text does not say)."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return [int(device) for device in found.group(1).split(",")]
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\](<=\S*)?", attributes):
        groups, size = int(found.group(1)), int(found.group(2))
        return _device_order(found.group(3) or "", groups * size)[:size].tolist()
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", attributes):
        axes = re.findall(r"'([^']+)'=(\d+)", found.group(1))
        sizes = [int(size) for _, size in axes]
        taken = re.findall(r"'([^']+)'", found.group(3))
        devices = _device_order(found.group(2), math.prod(sizes)).reshape(sizes)
        return devices[tuple(slice(None) if axis in taken else 0 for axis, _ in axes)].ravel().tolist()
    return []


def _device_order(text: str, count: int) -> np.ndarray:
    """Numbers below ``count`` as ``[8,2]T(1,0)`` orders them (an array of that shape, transposed), else in order."""
    found = re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if found is None:
        return np.arange(count)
    devices = np.arange(count).reshape([int(size) for size in found.group(1).split(",")])
    if found.group(2):
        devices = devices.transpose([int(axis) for axis in found.group(2).split(",")])
    return devices.ravel()


def local_size(attributes: str, machine: int) -> int:
    """The fewest members that a group of a collective has on one machine of ``machine`` devices. For a permutation it is
    1 when any pair lies on two machines, else 2.
    """
    if found := re.search(r"source_target_pairs=\{([\d,{} ]*)\}", attributes):
        pairs = re.findall(r"(\d+),(\d+)", found.group(1))
        return 1 if any(int(source) // machine != int(target) // machine for source, target in pairs) else 2
    counts = np.bincount(np.array(first_group(attributes) or [0]) // machine)
    return int(counts[counts > 0].min())


def _elements(kind: str) -> list[str]:
    """The elements of a tuple type."""
    parts, depth, start = [], 0, 1
    for place, letter in enumerate(kind):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(letter, 0)
        if (letter == "," and depth == 1) or depth == 0:
            parts.append(kind[start:place].strip())
            start = place + 1
        if depth == 0:
            break
    return parts


def _started(kind: str) -> str:
    """The result in the type of an asynchronous start, which is (operands, result, ...)."""
    parts = _elements(kind) if kind.startswith("(") else []
    return parts[1] if len(parts) > 1 else kind


def _sent(kind: str, instruction: Instruction, group: int) -> float:
    text = instruction.type
    started = instruction.opcode.endswith("-start")
    # An all-reduce's start may have the type of its result alone, since that is also its operand's.
    if started and (kind != "all-reduce" or text.startswith("((")):
        text = _started(text)
    size = array_bytes(text)
    if kind == "collective-permute":
        return size
    share = (group - 1) / max(group, 1)
    if kind == "reduce-scatter":
        return size * (group - 1)
    return size * share * (2 if kind == "all-reduce" else 1)
