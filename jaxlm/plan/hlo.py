"""The text of a compiled program as computations, and how often each of them runs in one step.

XLA prints a program as computations of one instruction a line:

    %body.2 (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
      %p = (s32[], f32[8,4]{1,0}) parameter(0)
      ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%i, %x)
    }

A loop's trips are taken from its name (`flops.usual_trips`) where they depend on the data, from
`known_trip_count` where the compiler wrote it (CPU, GPU), and else (TPU) from the constant that its
condition compares a counter with and the one that its body adds to it; JAX's scans and XLA's own
loops count up from 0.
"""

import dataclasses
import math
import re
from typing import NamedTuple

from jaxlm.flops import USUAL_TRIPS

DTYPE_BYTES = {"pred": 1, "c64": 8, "c128": 16, "token": 0, "opaque": 0}
CALLS = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation|branch_computations|"
    r"called_computations|async_computation)=(\{[^}]*\}|%?[\w.-]+)"
)
HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = (.*)$")
ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?")


class Array(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    on_chip: bool  # in fast memory, not in the one that the capacity is about

    @property
    def bytes(self) -> float:
        return math.prod(self.shape) * dtype_bytes(self.dtype)


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    arrays: tuple[Array, ...]  # of the result, a tuple's in order
    operands: tuple[str, ...]
    inside: str  # what stands in the parentheses: operands, a constant's value, a parameter's place
    attributes: str  # what follows
    root: bool

    @property
    def channel(self) -> str:
        found = re.search(r"\bchannel_id=(\d+)", self.attributes)
        return found.group(1) if found else ""


@dataclasses.dataclass(frozen=True)
class Program:
    computations: dict[str, tuple[Instruction, ...]]
    entry: str
    runs: dict[str, float]  # computation -> times it runs in one step
    fused: frozenset[str]  # computations that are the inside of one instruction
    unknown_loops: tuple[str, ...]  # whose trips could not be told; counted once


def parse(text: str) -> Program:
    """A program from `compiled.as_text()`."""
    computations, entry, name, lines = {}, "", "", []
    for line in text.splitlines():
        if header := HEADER.match(line):
            name, lines = header.group(2), []
            entry = name if header.group(1) else entry
        elif line == "}" and name:
            computations[name] = tuple(lines)
            name = ""
        elif name and (found := INSTRUCTION.match(line)):
            lines.append(_instruction(*found.groups()))
    runs, fused, unknown = _runs(computations, entry)
    return Program(computations, entry, runs, frozenset(fused), tuple(unknown))


def dtype_bytes(dtype: str) -> float:
    """Of one number: "bf16" 2, "f8e4m3fn" 1, "s4" 1/2."""
    if dtype in DTYPE_BYTES:
        return DTYPE_BYTES[dtype]
    bits = re.match(r"[a-z]+(\d+)", dtype)
    return int(bits.group(1)) / 8 if bits else 0


def called(instruction: Instruction) -> list[tuple[str, str]]:
    """(role, computation) of all that an instruction calls."""
    found = []
    for role, names in CALLS.findall(instruction.attributes):
        found += [(role, name.strip(" %{}")) for name in names.split(",")]
    return found


def _instruction(root, name, rest):
    """From what stands right of the equals sign: shape, opcode(operands), attributes."""
    end = _close(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _close("(" + rest, 0) - 1
    inside, attributes = rest[: end - 1], rest[end:]
    arrays = tuple(
        Array(kind, tuple(int(n.strip("<=")) for n in size.split(",") if n), "S(" in layout)
        for kind, size, layout in ARRAY.findall(shape)
    )
    names = tuple(re.findall(r"%([\w.-]+)", inside))
    return Instruction(name, opcode.strip(), arrays, names, inside, attributes, bool(root))


def _close(text, start):
    """The index behind the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i + 1
    return len(text)


def _runs(computations, entry):
    """How often each computation runs; the fused ones; loops of unknown length."""
    runs, fused, unknown = dict.fromkeys(computations, 0.0), set(), []

    def visit(name, times):
        runs[name] += times
        for instruction in computations[name]:
            trips = 1.0
            if instruction.opcode == "while":
                found = _trips(instruction, computations)
                trips = 1.0 if found is None else found
                if found is None:
                    unknown.append(instruction.name)
            for role, callee in called(instruction):
                if callee not in computations:
                    continue
                if instruction.opcode in ("fusion", "custom-call") or role == "to_apply":
                    fused.add(callee)
                if role != "to_apply" or instruction.opcode == "call":
                    visit(callee, times * trips)

    visit(entry, 1.0)
    return runs, fused, unknown


def _trips(loop, computations):
    """Trips of a loop, or None."""
    name = re.search(r'op_name="([^"]*)"', loop.attributes)
    if usual := name and USUAL_TRIPS.search(name.group(1)):
        return float(usual.group(1))
    if known := re.search(r"known_trip_count\W+n\W+(\d+)", loop.attributes):
        return float(known.group(1))
    roles = dict(called(loop))
    condition = {i.name: i for i in computations.get(roles.get("condition"), ())}
    body = {i.name: i for i in computations.get(roles.get("body"), ())}
    constants = {i.name: int(i.inside) for i in condition.values() if _is_number(i)}
    for compare in condition.values():
        bounds = [name for name in compare.operands if name in constants]
        if compare.opcode == "compare" and len(bounds) == 1:
            counter = next(name for name in compare.operands if name not in constants)
            step = _step(condition.get(counter), body)
            closed = re.search(r"direction=[LG]E", compare.attributes) is not None
            return float(math.ceil((constants[bounds[0]] + closed) / step))
    # The comparison may be fused, with its constant outside: the only one then.
    return float(*constants.values()) if len(constants) == 1 else None


def _step(counter, body):
    """What a loop's body adds to the counter that its condition reads; 1 if that is not plain."""
    place = counter and re.search(r"index=(\d+)", counter.attributes)
    root = next((i for i in body.values() if i.root), None)
    if not place or root is None or root.opcode != "tuple":
        return 1
    new = body.get(root.operands[int(place.group(1))])
    if new is None or new.opcode != "add":
        return 1
    added = [int(body[name].inside) for name in new.operands if _is_number(body.get(name))]
    return added[0] if added and added[0] > 0 else 1


def _is_number(instruction):
    return (
        instruction is not None
        and instruction.opcode == "constant"
        and bool(re.fullmatch(r"-?\d+", instruction.inside))
    )
