"""Weak scaling on paper: the same work for each device, on 8 to 4,096 of them.

Each device keeps the rows and micro-batches that the recipe gives it on `OF` devices. Of the meshes
of `data` replicas and `fsdp` parts that hold the state, the fastest is taken. Groups within a slice
or node have its links, all others the network; a slice is taken to be a torus closed in every
dimension. Memory, collectives and traffic are reckoned (`reckon`), FLOPs counted.
"""

import dataclasses
from typing import NamedTuple

import jax

from jaxlm.build import build
from jaxlm.chips import Chip
from jaxlm.config import Run
from jaxlm.plan import make, memory, reckon
from jaxlm.plan.roofline import REACHED, Times

DEVICES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
ROOM = 0.95  # of the memory
OF = 256  # devices among which a recipe's batch is shared out


class Point(NamedTuple):
    devices: int
    fsdp: int
    fits: bool
    times: Times
    mfu: float  # collectives within a slice hidden as far as they fit
    exposed: float  # MFU where nothing is hidden


def weak_scaling(recipe: Run, chip: Chip) -> list[Point]:
    """One point for each number of devices; where they hold too little it does not `fit`."""
    one = make.changed(recipe, batch=max(recipe.batch // OF, recipe.accumulate), mesh__fsdp=1)
    built = build(one, recipe.model.vocabulary or recipe.data.vocabulary, jax.devices()[:1])
    needed, computed = make.step_flops(built)
    return [_point(built.run, chip, n, needed, computed) for n in DEVICES]


def _point(one: Run, chip: Chip, devices: int, needed: float, computed: float) -> Point:
    run = dataclasses.replace(one, batch=one.batch * devices)
    ways = [2**i for i in range(3, 13) if 2**i <= devices]
    fitting = [n for n in ways if held(run, devices, n) <= ROOM * chip.memory_bytes]
    meshes = [{"data": devices // n, "fsdp": n} for n in fitting or [devices]]
    of = lambda sizes: _times(run, chip, sizes | {"sequence": 1, "tensor": 1}, computed)
    best = min(meshes, key=lambda sizes: of(sizes).step)
    mfu = lambda seconds: needed / (seconds * chip.flops)
    t = of(best)
    return Point(devices, best["fsdp"], bool(fitting), t, mfu(t.step), mfu(t.nothing_hidden))


def held(run: Run, devices: int, fsdp: int) -> float:
    """Bytes on one device: float32 params, gradients and two moments; then what passes leave."""
    sizes = {"data": devices // fsdp, "fsdp": fsdp, "sequence": 1, "tensor": 1}
    numbers = 4 * (3 + 1 + (run.accumulate > 1))
    state = numbers * sum(reckon.parameters(run)) / fsdp
    return state + memory.passes(*memory.share_of_one(run, sizes), fsdp, True)


def _times(run, chip, sizes, computed):
    sent = reckon.sent(run, sizes)
    inner = min(chip.joined or sizes["fsdp"], sizes["fsdp"])
    links, network = sent.fsdp / (chip.link * REACHED), sent.data / (chip.network * REACHED)
    if inner < sizes["fsdp"]:  # gathered over the network; within a node while that goes on
        links, network = 0.0, network + sent.fsdp / (chip.network * REACHED)
    elif chip.joined >= sizes["fsdp"] * sizes["data"]:
        links, network = links + sent.data / (chip.link * REACHED), 0.0
    moved = reckon.traffic(run, sizes) / (chip.memory * REACHED)
    return Times(computed / chip.flops, moved, links, network)
