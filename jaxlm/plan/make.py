"""All that a plan tells of one run on one topology, as numbers."""

import dataclasses
from typing import NamedTuple

from jaxlm.build import Built
from jaxlm.flops import mean_visible_share
from jaxlm.plan import memory, reckon, roofline
from jaxlm.plan.program import Compiled, compile_step, plan_run
from jaxlm.plan.topology import Topology
from jaxlm.plan.traffic import Traffic, traffic
from jaxlm.specs import Run


class Plan(NamedTuple):
    built: Built
    topology: Topology
    compiled: Compiled
    memory: memory.Memory  # reckoned; `compiled` has the compiler's figures
    model_flops: int  # of a step, all devices
    computed_flops: float
    times: roofline.Times | None  # None where the program does not fit

    @property
    def peak_bytes(self) -> float:
        """Of one device: the compiler's figure, where it was this device's compiler."""
        return self.compiled.peak if self.topology.compiled_for_it else self.memory.total

    @property
    def capacity(self) -> float:
        return self.compiled.has or self.topology.capacity

    @property
    def fits(self) -> bool:
        return self.compiled.program is not None and self.peak_bytes <= self.capacity

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.built.run.tokens_per_step

    def mfu(self, seconds: float) -> float:
        """Model FLOPs / (seconds × devices × peak)."""
        devices = len(self.topology.devices)
        return self.model_flops / (seconds * devices * self.topology.chip.flops)


def plan(run: Run, topology: Topology) -> Plan:
    """Builds, compiles and times a run on paper. Raises `ValueError` for what cannot be."""
    built = plan_run(run, topology)
    kernel = has_kernel(built, topology)
    model, computed = step_flops(built, kernel)
    held = memory.reckon(built, kernel)
    compiled = compile_step(built, topology)
    times = None
    if compiled.program is not None:
        share = computed / len(topology.devices)
        devices, moved = list(built.mesh.devices.flat), traffic(compiled.program)
        if not topology.compiled_for_it:  # its attention holds scores that a GPU's never do
            moved = Traffic(0.0, reckon.traffic(built.run, dict(built.mesh.shape)))
        sent = compiled.collectives
        times = roofline.times(topology, devices, share, moved, sent, held.host)
    return Plan(built, topology, compiled, held, model, computed, times)


def has_kernel(built: Built, topology: Topology) -> bool:
    """Whether attention runs in a kernel there, which a stand-in for a GPU has not."""
    stand_in = not topology.compiled_for_it
    return stand_in or memory.flash(built)


def step_flops(built: Built, kernel: bool | None = None) -> tuple[int, float]:
    """FLOPs that the model needs for a step, and those that are computed.

    A kernel's attention skips what no query may see, and computes each score once more in its
    backward pass: a sixth of its products without rematerialisation.
    """
    run = built.run
    seen = mean_visible_share(run.data.length, [kind.window for kind in run.model.kinds])
    plain, plain_attention = built.plain_flops("none", experts_over="")
    total, attention = built.plain_flops(run.model.remat)
    model = built.needed(plain, plain_attention)
    if not (memory.flash(built) if kernel is None else kernel):
        return model, total
    return model, total - attention + seen * (attention + plain_attention / 6)


def changed(run: Run, **keys) -> Run:
    """The run with other values, by dotted names with __ for the dot: model__remat="full"."""
    for name, value in keys.items():
        group, _, key = name.rpartition("__")
        if group:
            value = dataclasses.replace(getattr(run, group), **{key: value})
        run = dataclasses.replace(run, **{group or key: value})
    return run
