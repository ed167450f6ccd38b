"""The training step of a recipe, compiled for a topology; nothing is run and no data is read.

The program is the one that training builds there: backends and layout follow the mesh's devices.
"""

import dataclasses
import time
from typing import NamedTuple

import jax

from jaxlm import chips
from jaxlm.build import Built, build
from jaxlm.host import exhausted
from jaxlm.plan import hlo
from jaxlm.plan.collectives import Collective, collectives
from jaxlm.plan.topology import Topology, quiet
from jaxlm.specs import Run

STAND_IN: dict[str, str | bool] = {
    "xla_backend_optimization_level": "0"
}  # nobody will run its code


class Compiled(NamedTuple):
    """What the compiler tells of one device; None where it gave up for lack of memory."""

    seconds: float
    program: hlo.Program | None
    collectives: list[Collective]
    arguments: float = 0.0  # bytes
    temporaries: float = 0.0
    outputs: float = 0.0  # that reuse no argument's memory
    code: float = 0.0
    needs: float = 0.0  # bytes, where it did not fit
    has: float = 0.0

    @property
    def peak(self) -> float:
        return self.needs or self.arguments + self.temporaries + self.outputs + self.code


def plan_run(run: Run, topology: Topology) -> Built:
    """The run, built for the topology's devices. Raises `ValueError` for what cannot be there."""
    vocabulary = run.model.vocabulary or run.data.vocabulary
    if topology.platform == "gpu" and not topology.compiled_for_it:
        if run.model.quantize == "fp8" and not topology.chip.fp8:
            raise ValueError(chips.no_fp8(topology.chip.name))
        # A CPU takes minutes to compile layers that a GPU unrolls; scanned, they send the same.
        model = dataclasses.replace(run.model, scan_layers="on", attention="xla")
        run = dataclasses.replace(run, model=model)
    return build(run, vocabulary, topology.devices)


def compile_step(built: Built, topology: Topology) -> Compiled:
    """Traces, lowers and compiles the step; running out of the device's memory is an answer too."""
    began = time.monotonic()
    with quiet():
        lowered = built.trace().lower()
        try:
            compiled = lowered.compile(None if topology.compiled_for_it else STAND_IN)
        except jax.errors.JaxRuntimeError as error:
            sizes = exhausted.sizes(error)  # a GPU's and a CPU's program runs out when it runs
            if sizes is None:
                raise
            return Compiled(time.monotonic() - began, None, [], needs=sizes.needs, has=sizes.has)
    program = hlo.parse(compiled.as_text() or "")
    found = collectives(program, dict(built.mesh.shape), stand_in=not topology.compiled_for_it)
    memory = compiled.memory_analysis()
    assert memory is not None, "every compiler that plans are for tells it"
    return Compiled(
        time.monotonic() - began,
        program,
        found,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.generated_code_size_in_bytes,
    )
