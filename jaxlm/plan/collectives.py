"""What the devices of a compiled program send to each other in one step, by kind and mesh axis.

Bytes are those that one device sends, trips of loops multiplied. Of a group of n devices and b
bytes of the whole array (what an all-gather returns, what an all-reduce or reduce-scatter reads):

    all-gather, reduce-scatter, all-to-all    b·(n - 1)/n
    all-reduce                                2·b·(n - 1)/n    a reduce-scatter and an all-gather
    collective-permute                        b

which is what rings and trees that are not wasteful come to. Devices are numbered as the mesh lists
them, so a group's members tell along which axes of the mesh it runs.

XLA names groups in four ways: written out {{0,1},{2,3}}, as an iota [2,2]<=[4] (perhaps
transposed), by the axes of a mesh of its own mesh['a'=2,'b'=2] {'a'} (perhaps with device_ids, such
an iota), or, of a permute, as pairs.
"""

import re
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from jaxlm.plan.hlo import Instruction, Program, called

KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)


class Collective(NamedTuple):
    kind: str
    axes: tuple[str, ...]  # of the mesh, along which it runs
    members: tuple[int, ...]  # positions in the mesh of one of its groups
    bytes: float  # that one device sends each time
    times: float  # in one step

    @property
    def total(self) -> float:
        return self.bytes * self.times


def collectives(
    program: Program, mesh_shape: dict[str, int], *, stand_in: bool = False
) -> list[Collective]:
    """Every collective of a program compiled for a mesh with these axes and sizes.

    With `stand_in` a program that was compiled for CPUs is read as a GPU's compiler would have made
    it: an all-reduce of which each device only reads its slice is a reduce-scatter, and what was
    bfloat16 before the CPU's compiler widened it travels as that.
    """
    found = {}
    for name, instructions in program.computations.items():
        for instruction in instructions:
            kind = _kind(instruction.opcode)
            if not kind or not program.runs[name]:
                continue
            group = _members(instruction.attributes, kind, mesh_shape)
            if len(group) < 2:
                continue
            scatter = name.startswith("all-reduce-scatter")  # what a TPU's fusion of both is called
            for part, sent in _parts(kind, instruction, len(group), name, program, stand_in):
                part, sent = ("reduce-scatter", sent / 2) if scatter else (part, sent)
                one = Collective(part, _axes(group, mesh_shape), group, sent, program.runs[name])
                # A TPU spreads a collective over several fusions, under one channel. Where some lie
                # in a loop that it lasts through, it begins and ends outside, and runs as often.
                spread = instruction.channel and name in program.fused and not scatter
                key = (
                    (instruction.channel, part, sent) if spread else (name, instruction.name, part)
                )
                if key not in found or one.times < found[key].times:
                    found[key] = one
    return list(found.values())


def by_kind_and_axes(found: list[Collective]) -> dict[tuple[str, tuple[str, ...]], float]:
    """Bytes that one device sends in a step, the largest first."""
    sums = defaultdict(float)
    for one in found:
        sums[one.kind, one.axes] += one.total
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def _kind(opcode):
    opcode = opcode.removesuffix("-start")
    return opcode if opcode in KINDS else ""


def _parts(kind, instruction: Instruction, n, computation, program, stand_in):
    """(kind, bytes that one device sends); two parts where some of its sums are scattered."""
    by_name = {i.name: i for i in program.computations[computation]}
    share = {"all-gather": n - 1, "collective-permute": 1}.get(kind, (n - 1) / n)
    sums = {kind: 0.0}
    for place, name in enumerate(instruction.operands):
        size = sum(array.bytes for array in by_name[name].arrays) * share
        if stand_in and _was_widened(instruction, by_name[name], program):
            size /= 2
        if kind != "all-reduce":
            sums[kind] += size
        elif stand_in and _is_sliced(instruction, place, computation, program):
            sums["reduce-scatter"] = sums.get("reduce-scatter", 0.0) + size
        else:
            sums[kind] += 2 * size
    return [(kind, size) for kind, size in sums.items() if size]


def _was_widened(instruction, operand, program):
    """Whether a CPU made float32 of a bfloat16 operand: in the sum, or just before."""
    if any(array.dtype != "f32" for array in operand.arrays):
        return False
    if re.search(r"to_apply=%\S*_promoted", instruction.attributes):
        return True
    fused = dict(called(operand)).get("calls") if operand.opcode == "fusion" else None
    return any(a.dtype == "bf16" for i in program.computations.get(fused, ()) for a in i.arrays)


def _is_sliced(instruction, place, computation, program):
    """Whether of one of an all-reduce's results each device only reads its own slice."""
    instructions = program.computations[computation]
    if len(instruction.operands) > 1:
        picked = [
            i
            for i in instructions
            if instruction.name in i.operands
            and f"index={place}" in re.split("[ ,]+", i.attributes)
        ]
    else:
        picked = [instruction]
    return bool(picked) and all(_only_slices(i.name, computation, program) for i in picked)


PASSES_ON = ("get-tuple-element", "convert", "bitcast", "copy", "reshape")


def _only_slices(name, computation, program):
    """Whether all that reads a value in a computation reads slices of it.

    Looks through changes of type and form, into fusions, and behind those that pass it on whole.
    """
    users = [i for i in program.computations[computation] if name in i.operands]
    return bool(users) and all(_slices(user, name, computation, program) for user in users)


def _slices(user, name, computation, program):
    if user.opcode == "dynamic-slice":
        return user.operands[0] == name
    if user.opcode in PASSES_ON:
        return not user.root and _only_slices(user.name, computation, program)
    if user.opcode != "fusion":
        return False
    fused = dict(called(user))["calls"]
    inside = program.computations[fused]
    place = [i for i in inside if i.opcode == "parameter" and user.operands[int(i.inside)] == name]
    if len(inside) == len(place) + 1 and inside[-1].opcode in PASSES_ON:
        return _only_slices(user.name, computation, program)
    return all(_only_slices(i.name, fused, program) for i in place)


def _members(attributes, kind, mesh_shape):
    """Positions in the mesh of the group that holds position 0, or of the first group."""
    devices = int(np.prod(list(mesh_shape.values())))
    if kind == "collective-permute":
        return _ring(attributes, devices)
    order = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
    ids = rf"(?:, *device_ids=\({order}\))?"
    if found := re.search(rf"replica_groups=mesh\[([^\]]*)\]{ids} *\{{([^}}]*)\}}", attributes):
        sizes, source, turned, axes = found.groups()
        return _of_named_axes(sizes, axes, source and _iota(source, turned))
    if found := re.search(rf"replica_groups=\[([\d,]+)\]<={order}", attributes):
        groups, source, turned = found.groups()
        return tuple(int(i) for i in _iota(source, turned).reshape(_numbers(groups))[0])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return tuple(int(i) for i in found.group(1).split(",") if i)
    return tuple(range(devices))  # an empty list: all of them


def _iota(sizes, order):
    """The numbers of devices as [2,4]T(1,0) names them, in a row."""
    ids = np.arange(np.prod(_numbers(sizes))).reshape(_numbers(sizes))
    return (ids.transpose(_numbers(order)) if order else ids).ravel()


def _numbers(text):
    return [int(n) for n in text.split(",") if n]


def _of_named_axes(sizes, axes, ids):
    """mesh['a'=2,'b'=4] {'b'}, and of an axis split further 'b':(2)2, 2 within each 2."""
    shape = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", sizes)}
    ids = np.arange(np.prod(list(shape.values()))) if ids is None else ids
    ids = ids.reshape(list(shape.values()))
    index = [[0] for _ in shape]
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes):
        whole, place = shape[name], list(shape).index(name)
        before, size = int(before or 1), int(size or whole)
        stride = whole // (before * size)
        index[place] = [i * stride for i in range(size)]
    return tuple(int(i) for i in ids[np.ix_(*index)].ravel())


def _ring(attributes, devices):
    """The positions that a permute's arrows lead through from the first one."""
    arrows = re.findall(r"\{(\d+),(\d+)\}", _pairs(attributes))
    pairs = {int(a): int(b) for a, b in arrows}
    if not pairs:
        return ()
    at = start = next(iter(pairs))
    ring = [start]
    while (at := pairs.get(at, start)) not in ring and len(ring) <= devices:
        ring.append(at)
    return tuple(ring)


def _pairs(attributes):
    found = re.search(r"source_target_pairs=(\{\{.*?\}\})", attributes)
    return found.group(1) if found else ""


def _axes(group, mesh_shape):
    """The axes of the mesh along which a group's members differ."""
    places = np.array(np.unravel_index(group, list(mesh_shape.values())))
    return tuple(
        axis for axis, along in zip(mesh_shape, places, strict=True) if len(set(along.tolist())) > 1
    )
