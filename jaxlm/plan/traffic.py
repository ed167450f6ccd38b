"""Bytes that one device moves to and from its memory in a step, read off a compiled program.

Each instruction that is not inside a fusion reads its operands and writes its result. Where a
fusion, or one inside it, only slices an operand (the layer's part of a stack) the slices count, and
where it updates a slice in place the update does. What lies in fast on-chip memory counts nothing.
Split into the instructions with matrix products, whose traffic overlaps with their arithmetic, and
all others.
"""

from typing import NamedTuple

from jaxlm.plan.hlo import Instruction, Program, called

FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "after-all", "partition-id", "replica-id", "iota", "opt-barrier", "domain"),
}
PRODUCTS = {"dot", "convolution"}
CUBLAS = 'custom_call_target="__cublas'  # a product by NVIDIA's library
SLICES = {"dynamic-slice", "gather", "slice"}
STARTS = {"copy-start": 0, "slice-start": 1}  # and which of their results is new


class Traffic(NamedTuple):
    with_products: float  # bytes
    without: float


def traffic(program: Program) -> Traffic:
    found = {True: 0.0, False: 0.0}
    for name, instructions in program.computations.items():
        if not program.runs[name] or name in program.fused:
            continue
        by_name = {i.name: i for i in instructions}
        for instruction in instructions:
            if instruction.opcode not in FREE and not instruction.opcode.endswith("-done"):
                inside = _inside(instruction, program)
                products = any(i.opcode in PRODUCTS for i in (instruction, *inside))
                products |= CUBLAS in instruction.attributes
                moved = _moved(instruction, inside, by_name, program)
                found[products] += program.runs[name] * moved
    return Traffic(found[True], found[False])


def _inside(instruction: Instruction, program: Program) -> tuple[Instruction, ...]:
    if instruction.opcode != "fusion":
        return ()
    return program.computations.get(dict(called(instruction)).get("calls", ""), ())


def _moved(instruction, inside, by_name, program):
    if instruction.opcode in STARTS:  # results are its operand once more, and what is new
        new = instruction.arrays[STARTS[instruction.opcode]]
        from_memory = bool(_bytes(by_name[instruction.operands[0]]))
        return new.bytes * (from_memory + (not new.on_chip))
    if instruction.opcode in SLICES:
        return 2 * _bytes(instruction)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _bytes(by_name[instruction.operands[1]])
    if CUBLAS in instruction.attributes:  # its second result is a place to work in
        written = sum(array.bytes for array in instruction.arrays[:1])
        return written + sum(_bytes(by_name[n]) for n in instruction.operands)
    if not inside:
        return _bytes(instruction) + sum(_bytes(by_name[n]) for n in instruction.operands)
    of_inside = {i.name: i for i in inside}
    places = {int(i.inside): i for i in inside if i.opcode == "parameter"}
    read = written = 0.0
    for place, name in enumerate(instruction.operands):
        if size := _bytes(by_name[name]):
            read += _read(places[place].name, size, inside, program) if place in places else size
    updated = [i for i in inside if i.opcode == "dynamic-update-slice"]
    whole = {array.shape for i in updated for array in i.arrays}
    written += sum(
        array.bytes
        for array in instruction.arrays
        if not array.on_chip and array.shape not in whole
    )
    written += sum(_bytes(of_inside[i.operands[1]]) for i in updated)
    return read + written


def _read(name, size, inside, program):
    """Bytes that the inside of a fusion reads of what it calls `name`."""
    read = 0.0
    for user in inside:
        if name not in user.operands:
            continue
        first = user.operands[0] == name
        if user.opcode == "fusion":  # a fusion in it
            nested = _inside(user, program)
            parts = [i for i in nested if i.opcode == "parameter"]
            names = [i.name for i in parts if user.operands[int(i.inside)] == name]
            read += sum(_read(name, size, nested, program) for name in names)
        elif user.opcode == "bitcast":
            read += _read(user.name, size, inside, program)
        elif user.opcode in SLICES and first:
            read += _bytes(user)
        elif not (user.opcode == "dynamic-update-slice" and first):
            return size
    return min(read, size)


def _bytes(instruction):
    return sum(array.bytes for array in instruction.arrays if not array.on_chip)
