"""Bytes that one device moves to and from its memory in a step, read off a compiled program.

Each instruction that is not inside a fusion reads its operands and writes its result. Where a
fusion only slices an operand (the layer's part of a stack) the slices count, and where it updates a
slice in place the update does. What lies in fast on-chip memory counts nothing. Split into the
instructions with matrix products, whose traffic overlaps with their arithmetic, and all others.
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
                moved = _moved(instruction, inside, by_name)
                found[products] += program.runs[name] * moved
    return Traffic(found[True], found[False])


def _inside(instruction: Instruction, program: Program) -> tuple[Instruction, ...]:
    if instruction.opcode != "fusion":
        return ()
    return program.computations.get(dict(called(instruction)).get("calls", ""), ())


def _moved(instruction, inside, by_name):
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
        if _bytes(by_name[name]):
            read += _read(places.get(place), by_name[name], inside)
    updated = [i for i in inside if i.opcode == "dynamic-update-slice"]
    whole = {array.shape for i in updated for array in i.arrays}
    written += sum(
        array.bytes
        for array in instruction.arrays
        if not array.on_chip and array.shape not in whole
    )
    written += sum(_bytes(of_inside[i.operands[1]]) for i in updated)
    return read + written


def _read(parameter, operand, inside):
    """Bytes that a fusion reads of one operand."""
    users = [i for i in inside if parameter and parameter.name in i.operands]
    if users and all(i.opcode in SLICES and i.operands[0] == parameter.name for i in users):
        return min(sum(_bytes(i) for i in users), _bytes(operand))
    if users and all(
        i.opcode == "dynamic-update-slice" and i.operands[0] == parameter.name for i in users
    ):
        return 0.0
    return _bytes(operand)


def _bytes(instruction):
    return sum(array.bytes for array in instruction.arrays if not array.on_chip)
