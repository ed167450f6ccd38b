"""Which knobs of a recipe would save memory, the largest saving first; reckoned, not compiled."""

from typing import NamedTuple

from jaxlm.build import build
from jaxlm.models.options import REMAT
from jaxlm.plan import memory
from jaxlm.plan.make import Plan, changed, has_kernel
from jaxlm.specs import Run


class Knob(NamedTuple):
    flag: str
    saves: float  # bytes on one device
    costs: str


def helpful(plan: Plan) -> list[Knob]:
    """Knobs that save at least 1 % of what a device holds, or of what it can hold."""
    run, before = plan.built.run, plan.memory.total
    least = 0.01 * min(before, plan.capacity)
    found = []
    for flag, costs, other in _candidates(run, dict(plan.built.mesh.shape)):
        try:
            built = build(other, run.model.vocabulary, list(plan.built.mesh.devices.flat))
        except ValueError:  # rows or heads that would not divide
            continue
        saves = before - memory.reckon(built, has_kernel(built, plan.topology)).total
        if saves > least:
            found.append(Knob(flag, saves, costs))
    return sorted(found, key=lambda knob: -knob.saves)


def _candidates(run: Run, sizes: dict[str, int]):
    """(flag, what it costs, the run with it)."""
    for name in REMAT:
        if name not in ("none", run.model.remat):
            costs = {
                "full": "each block's forward pass once more",
                "dots_offloaded": "traffic to the host",
            }.get(name, "part of each block's forward pass once more")
            yield f"--config.model.remat={name}", costs, changed(run, model__remat=name)
    for times in (2, 4):
        micro = run.accumulate * times
        text = f"weights gathered {times} times as often"
        yield f"--config.accumulate={micro}", text, changed(run, accumulate=micro)
    _, rows, length = memory.share_of_one(run, sizes)
    at_once = min(run.model.loss_chunk or rows * length, rows * length)
    chunk = max(at_once // 4, 1)
    yield (
        f"--config.model.loss_chunk={chunk}",
        "little",
        changed(run, model__loss_chunk=chunk),
    )
    if not run.optimizer.offload:
        stacked = " --config.model.scan_layers=on" * (run.model.scan_layers == "off")
        yield (
            f"--config.optimizer.offload=True{stacked}",
            "the moments to and from the host in each step",
            changed(run, optimizer__offload=True, model__scan_layers="on"),
        )
    if run.optimizer.moment_dtype != "bfloat16":
        yield (
            "--config.optimizer.moment_dtype=bfloat16",
            "a coarser first moment",
            changed(run, optimizer__moment_dtype="bfloat16"),
        )
    if run.optimizer.second_moment_dtype != "bfloat16":
        yield (
            "--config.optimizer.second_moment_dtype=bfloat16",
            "a noisier second moment",
            changed(run, optimizer__second_moment_dtype="bfloat16"),
        )
    if 1 < run.accumulate <= 256 and run.optimizer.gradient_dtype != "bfloat16":
        yield (
            "--config.optimizer.gradient_dtype=bfloat16",
            "coarser sums of gradients",
            changed(run, optimizer__gradient_dtype="bfloat16"),
        )
    if sizes["data"] > 1:
        text = "parameters gathered from more devices"
        flag = "--config.mesh.data=1 --config.mesh.fsdp=-1"
        yield flag, text, changed(run, mesh__data=1, mesh__fsdp=-1)
    for axis in ("tensor", "sequence"):
        size = 2 * sizes[axis]
        yield (
            f"--config.mesh.{axis}={size} --config.accumulate={run.accumulate}",
            "activations exchanged in every block",
            changed(run, **{f"mesh__{axis}": size, "mesh__fsdp": -1}),
        )
