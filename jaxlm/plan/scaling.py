"""Weak scaling on paper: the same work for each device, on 8 to 4,096 of them.

Each device keeps the rows and micro-batches that the recipe gives it on `OF` devices. Of the meshes
of `data` replicas, `fsdp` parts and, within a node of GPUs, `tensor` parts that hold the state, the
fastest is taken. Groups within a slice or node have its links, all others the network; a slice is
taken to be a torus closed in every dimension. State and gradients are those of one device by
itself, shared out; other memory, collectives and traffic are reckoned (`reckon`), FLOPs counted.
"""

import dataclasses
from typing import NamedTuple

import jax

from jaxlm.build import build
from jaxlm.chips import Chip
from jaxlm.models.options import experts_fit
from jaxlm.plan import make, memory, reckon
from jaxlm.plan.memory import Memory
from jaxlm.plan.roofline import REACHED, Times, of_moments
from jaxlm.plan.topology import capacity
from jaxlm.sharding import MESH_AXES
from jaxlm.specs import Run

DEVICES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
ROOM = 0.95  # of the memory
OF = 256  # devices among which a recipe's batch is shared out


class Point(NamedTuple):
    devices: int
    sizes: dict[str, int]  # of the mesh
    fits: bool
    times: Times
    mfu: float  # collectives within a slice hidden as far as they fit
    exposed: float  # MFU where nothing is hidden


def weak_scaling(recipe: Run, chip: Chip) -> list[Point]:
    """One point for each number of devices; where they hold too little it does not `fit`."""
    alone = {f"mesh__{axis}": 1 for axis in MESH_AXES}
    one = make.changed(recipe, batch=max(recipe.batch // OF, recipe.accumulate), **alone)
    built = build(one, recipe.model.vocabulary or recipe.data.vocabulary, jax.devices()[:1])
    whole = memory.reckon(built, True)
    needed, computed = make.step_flops(built)
    return [_point(built.run, chip, n, whole, needed, computed) for n in DEVICES]


def _point(
    one: Run, chip: Chip, devices: int, whole: Memory, needed: float, computed: float
) -> Point:
    run = dataclasses.replace(one, batch=one.batch * devices)
    fitting = [
        sizes
        for sizes in _meshes(devices, chip)
        if experts_fit(run.model, sizes)
        and run.model.kv_heads % sizes["tensor"] == 0
        and held(run, whole, sizes) <= ROOM * capacity(chip)
    ]
    meshes = fitting or [_mesh(devices, devices, 1)]
    times = [_times(run, chip, sizes, whole, computed) for sizes in meshes]
    sizes, best = min(zip(meshes, times, strict=True), key=lambda pair: pair[1].step)
    mfu = lambda seconds: needed / (seconds * chip.flops)
    return Point(devices, sizes, bool(fitting), best, mfu(best.step), mfu(best.nothing_hidden))


def _meshes(devices, chip):
    node = chip.joined if chip.platform == "gpu" else 1
    return [
        _mesh(devices, fsdp, tensor)
        for tensor in (1, 2, 4, 8)
        for fsdp in (2**i for i in range(13))
        if tensor <= node and 8 <= fsdp * tensor <= devices
    ]


def _mesh(devices, fsdp, tensor):
    return {"data": devices // (fsdp * tensor), "fsdp": fsdp, "sequence": 1, "tensor": tensor}


def held(run: Run, whole: Memory, sizes: dict[str, int]) -> float:
    """Bytes on one device: its part of the state and the gradients, of which a device alone would
    hold the `whole`, then what passes leave."""
    state = (whole.state + whole.gradients) / (sizes["fsdp"] * sizes["tensor"])
    return state + memory.passes(*memory.share_of_one(run, sizes), sizes["fsdp"], True)


def _times(run, chip, sizes, whole, computed):
    """Each axis has the links where its groups stay within what they join, `tensor` innermost."""
    links = network = 0.0
    reach = 1
    for axis, bytes in reversed(reckon.sent(run, sizes)._asdict().items()):
        reach *= sizes[axis]
        if reach <= (chip.joined or reach):
            links += bytes / (chip.link * REACHED)
        else:
            network += bytes / (chip.network * REACHED)
    moved = reckon.traffic(run, sizes) / (chip.memory * REACHED)
    host = of_moments(chip, whole.host / (sizes["fsdp"] * sizes["tensor"]))
    return Times(computed / chip.flops, moved, links, network, host)
