"""Tells what a run would take on machines that need not be here: memory, FLOPs, traffic, time.

    python -m jaxlm.plan --config=configs/pretrain_8b.py --topology=v5e:16x16 [--slices=2]
        [--budget_tokens=1e12] [--sweep | --weak_scaling] [--config.KEY=VALUE ...]

--topology: v5e:16x16 and other TPU slices (needs libtpu, no TPU), h100:8 and other GPUs, cpu:8, or
gpu for those of this machine. The training step is compiled and nothing is run. --sweep ranks
meshes, rematerialisation and micro-batches, and compiles the best three; --weak_scaling projects
MFU on 8 to 4,096 of the topology's devices, and compiles nothing.
"""

from jaxlm.host import process

process.start(__name__)  # before JAX is imported

import sys

from absl import flags

from jaxlm import commandline
from jaxlm.host.console import Console
from jaxlm.plan import make, scaling, sweep, tell, topology


def _define(values):
    text = "Such as v5e:16x16, h100:8, cpu:8, gpu."
    flags.DEFINE_string("topology", "", text, flag_values=values)
    flags.DEFINE_integer("slices", 1, "TPU slices.", 1, flag_values=values)
    flags.DEFINE_float("budget_tokens", 0.0, "0 = the recipe's.", 0.0, flag_values=values)
    flags.DEFINE_bool("sweep", False, "Rank alternatives.", flag_values=values)
    flags.DEFINE_bool("weak_scaling", False, "MFU on 8 to 4,096 devices.", flag_values=values)


def main() -> int:
    topology.prepare(commandline.value_of("topology", sys.argv))  # before JAX looks for devices
    run, given = commandline.parse(sys.argv, __doc__, _define)
    if not given.topology:
        raise SystemExit(f"plan: add --topology=, one of {', '.join(topology.names())}")
    if given.weak_scaling:
        chip = topology.chip_of(given.topology)
        tell.weak_scaling(Console(), run, chip, scaling.weak_scaling(run, chip))
        return 0
    target = topology.resolve(given.topology, given.slices)
    budget = given.budget_tokens or float(run.steps * run.tokens_per_step)
    with Console() as console:
        for note in process.notes:
            console.warn(note)
        if given.sweep:
            return sweep.run(console, run, target, budget)
        made = make.plan(run, target)
        tell.all_of(console, made, budget)
        return 0 if made.fits else 2


if __name__ == "__main__":
    process.run(main)
