"""Ranks meshes, rematerialisation and micro-batches on paper, and compiles the best three.

What is compared is one step of the recipe's batch. Left out are choices that by the reckoning do
not fit; the compiled figures below the ranking tell how far to trust it.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np

from jaxlm import sharding
from jaxlm.build import Built
from jaxlm.models.options import experts_fit
from jaxlm.plan import make, memory, reckon, roofline, tell
from jaxlm.plan.collectives import Collective
from jaxlm.plan.program import plan_run
from jaxlm.plan.topology import Topology
from jaxlm.plan.traffic import Traffic
from jaxlm.specs import Run

REMATS = ("none", "dots_no_batch", "attention", "full")
ROOM = 0.9  # of the memory, for what the reckoning does not know
MOST_TENSOR = 8
COMPILED = 3


class Choice(NamedTuple):
    run: Run
    sizes: dict[str, int]
    bytes: float
    times: roofline.Times


def run(console, recipe: Run, topology: Topology, budget_tokens: float) -> int:
    """Prints the ranking and the best plan; the exit code is 2 where nothing fits."""
    console.say(f"Ranking what could run {recipe.name} on {topology.name}, by the reckoning:")
    found = rank(recipe, topology)
    if not found:
        console.say("  nothing fits: take more or larger devices")
        return 2
    unit, size = tell.unit_of(max(choice.bytes for choice in found[:10]))
    console.table(
        [_row(choice, recipe, size) for choice in found[:10]],
        ("mesh", "remat", "micro-batches", unit, "s a step"),
    )
    plans = []
    for choice in found[:COMPILED]:
        plans.append(make.plan(choice.run, topology))
        made = plans[-1]
        seconds = f"{made.times.step:.3g} s a step, {made.mfu(made.times.step):.1%} MFU" * bool(
            made.fits and made.times
        )
        unit, size = tell.unit_of(made.peak_bytes)
        of = choice.run
        console.say(
            f"compiled mesh {reckon.spread(choice.sizes)}, remat {of.model.remat}, {of.accumulate} "
            f"micro-batch{'es' * (of.accumulate > 1)} of {recipe.batch // of.accumulate} rows: "
            f"{made.peak_bytes / size:.3g} {unit}, {seconds or 'does not fit'}"
        )
    fitting = [made for made in plans if made.fits and made.times]
    if not fitting:
        return 2
    best = min(fitting, key=lambda made: (_seconds(made.times), made.peak_bytes))
    console.say("\nThe best of them:")
    tell.all_of(console, best, budget_tokens)
    console.say(f"\n  {flags(best.built.run)}")
    return 0


def flags(recipe: Run) -> str:
    """What to add to the command."""
    mesh = " ".join(f"--config.mesh.{a}={getattr(recipe.mesh, a)}" for a in sharding.MESH_AXES)
    return (
        f"{mesh} --config.model.remat={recipe.model.remat} --config.accumulate={recipe.accumulate}"
    )


def rank(recipe: Run, topology: Topology) -> list[Choice]:
    """The choices that fit, the fastest first."""
    found, flops = [], {}
    for mesh in meshes(recipe, topology):
        built = plan_run(make.changed(recipe, **mesh), topology)
        sizes = dict(built.mesh.shape)
        ways = sizes["data"] * sizes["fsdp"]
        micro = [
            n for n in reckon.factors(recipe.batch // ways, 64) if recipe.batch % (n * ways) == 0
        ]
        for remat, accumulate in itertools.product(REMATS, micro):
            other = built._replace(
                run=make.changed(built.run, model__remat=remat, accumulate=accumulate)
            )
            kernel = make.has_kernel(other, topology)
            held = memory.reckon(other, kernel)
            if held.total > ROOM * topology.capacity:
                continue
            if remat not in flops:
                flops[remat] = make.step_flops(other, kernel)[1]
            share = flops[remat] / len(topology.devices)
            times = reckoned_times(other, topology, share, held.host)
            found.append(Choice(other.run, sizes, held.total, times))
    return sorted(found, key=_order)


def _order(choice):
    """By time; then the one with fewer micro-batches, less memory, and the simpler mesh."""
    held = float(f"{choice.bytes:.2g}")
    return _seconds(choice.times), choice.run.accumulate, held, choice.sizes["tensor"]


def _seconds(times):
    """Of a step, as far as it means something: three digits."""
    return float(f"{times.step:.3g}")


def meshes(recipe: Run, topology: Topology) -> list[dict[str, int]]:
    """Meshes whose axes divide the batch and the heads, as changes of a run."""
    devices, model = len(topology.devices), recipe.model
    heads = math.gcd(model.heads, model.kv_heads or model.heads)
    replicas = sorted({topology.slices, recipe.mesh.data})
    return [
        {"mesh__data": data, "mesh__tensor": tensor, "mesh__fsdp": -1, "mesh__sequence": 1}
        for data in replicas
        for tensor in reckon.factors(math.gcd(heads, devices // data), MOST_TENSOR)
        if data % topology.slices == 0 and recipe.batch % (devices // tensor) == 0
        if experts_fit(model, {"fsdp": devices // (data * tensor), "tensor": tensor})
    ]


def reckoned_times(
    built: Built, topology: Topology, flops_of_one: float, on_host: float
) -> roofline.Times:
    sizes = dict(built.mesh.shape)
    sent = reckon.sent(built.run, sizes)._asdict()
    collectives = [
        Collective("reckoned", (axis,), _along(sizes, axis), bytes, 1.0)
        for axis, bytes in sent.items()
        if sizes[axis] > 1
    ]
    moved = Traffic(0.0, reckon.traffic(built.run, sizes))
    devices = list(built.mesh.devices.flat)
    return roofline.times(topology, devices, flops_of_one, moved, collectives, on_host)


def _along(sizes, axis):
    """Positions in the mesh of the devices that differ from the first along an axis only."""
    ids = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
    at = tuple(slice(None) if name == axis else 0 for name in sizes)
    return tuple(int(i) for i in ids[at])


def _row(choice, recipe, unit):
    return (
        reckon.spread(choice.sizes),
        choice.run.model.remat,
        f"{choice.run.accumulate} of {recipe.batch // choice.run.accumulate} rows",
        f"{choice.bytes / unit:.3g}",
        f"{choice.times.step:.3g}",
    )
