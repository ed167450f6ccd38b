"""A plan in words and tables."""

import jax

from jaxlm.host import gpu_memory
from jaxlm.host.terminal import count, duration
from jaxlm.plan import knobs, reckon, scaling
from jaxlm.plan.collectives import by_kind_and_axes
from jaxlm.plan.make import Plan
from jaxlm.plan.roofline import REACHED

UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
DAY = 24 * 3600
TIGHT = 0.85  # of the capacity, from which on knobs are told


def all_of(console, plan: Plan, budget_tokens: float) -> None:
    head(console, plan)
    memory_of(console, plan)
    flops(console, plan)
    if plan.times:
        collectives(console, plan)
        times(console, plan, budget_tokens)
    if not plan.fits or plan.peak_bytes > TIGHT * plan.capacity:
        what_helps(console, plan)


def unit_of(largest: float) -> tuple[str, int]:
    """(name, bytes) of the unit in which two decimals tell a table whose largest entry this is."""
    return next(((name, size) for name, size in UNITS if largest >= 0.5 * size), UNITS[-1])


def head(console, plan: Plan) -> None:
    topology, run = plan.topology, plan.built.run
    mesh = reckon.spread(dict(plan.built.mesh.shape))
    slices = f" in {topology.slices} slices" if topology.slices > 1 else ""
    how = "for these devices" if topology.compiled_for_it else "for CPUs in their place"
    console.say(
        f"{run.name} on {len(topology.devices)} × {topology.chip.name}{slices}, mesh {mesh}\n"
        f"a step of {run.batch * run.members:,} × {run.data.length:,} tokens in {run.accumulate} "
        f"micro-batch{'es' * (run.accumulate > 1)}\n"
        f"compiled {how} in {plan.compiled.seconds:.0f} s by jax {jax.__version__}"
    )


def memory_of(console, plan: Plan) -> None:
    kinds, needs, has = plan.memory, plan.peak_bytes, plan.capacity
    unit, size_of_unit = unit_of(needs)
    shown = lambda size: f"{size / size_of_unit:,.2f}"
    console.say(f"\nMemory of one device, {unit}")
    console.table([(name, shown(size), why) for name, size, why in rows_of_memory(plan) if size])
    if kinds.host:
        console.say(f"  on its host {shown(kinds.host)}: moments, which come and go each step")
    verdict = "it fits" if plan.fits else "IT DOES NOT FIT"
    larger, size_of_larger = unit_of(has)
    total = f"{shown(needs)} of {has / size_of_larger:,.2f}"
    if larger != unit:
        total = f"{shown(needs)} {unit} of {has / size_of_larger:,.2f} {larger}"
    console.say(f"  in all {total}, {needs / has:.0%}: {verdict}")
    if plan.compiled.has:
        chips = f"{plan.topology.capacity / size_of_larger:,.2f} {larger}"
        console.say(f"  what there is: {chips}, less what the compiler keeps back of it")
    elif plan.topology.measured:
        console.say("  what there is, as JAX tells it of the device")
    elif plan.topology.platform == "gpu":
        share = f"{gpu_memory.share():.0%}"
        console.say(f"  what there is: JAX takes {share} of a GPU ({gpu_memory.VARIABLE})")


def rows_of_memory(plan: Plan) -> list[tuple[str, float, str]]:
    """(what, bytes of one device, where that is from), which together are all that it holds."""
    kinds, compiled = plan.memory, plan.compiled
    state = [
        ("parameters", kinds.parameters, "from their shardings"),
        ("optimizer", kinds.optimizer, "from their shardings"),
        ("extras", kinds.extras, "from their shardings"),
    ]
    passes = [
        ("gradients", kinds.gradients, "reckoned"),
        ("activations", kinds.activations, "reckoned: stored for the backward pass"),
    ]
    if not plan.topology.compiled_for_it:
        working = ("working set", kinds.working, "reckoned: a block or a chunk of the loss")
        return [*state, *passes, working]
    held = plan.peak_bytes - compiled.code - kinds.state
    rest = held - kinds.gradients - kinds.activations
    program = ("program", compiled.code, "the compiler's")
    if held < 0:  # it would have told of a part only
        return [("all", plan.peak_bytes, "the compiler's")]
    if rest < 0:  # the compiler found a way to hold less than reckoned
        return [*state, ("activations, gradients", held, "the compiler's temporaries"), program]
    told = "the compiler's total, less all other rows"
    return [*state, *passes, ("other temporaries", rest, told), program]


def flops(console, plan: Plan) -> None:
    model, computed = plan.model_flops, plan.computed_flops
    console.say("\nFLOPs of a step")
    console.table(
        [
            ("the model's", f"{model:.4g}", f"{model / plan.tokens:.4g} a token, causal attention"),
            ("computed", f"{computed:.4g}", f"{computed / model:.3f} times: with what is redone"),
        ]
    )


def collectives(console, plan: Plan) -> None:
    found = by_kind_and_axes(plan.compiled.collectives)
    console.say("\nSent by one device in a step, MB")
    console.table(
        [(kind, " × ".join(axes), f"{size / 1e6:,.1f}") for (kind, axes), size in found.items()]
        or [("nothing", "", "0")]
    )
    if plan.compiled.program and plan.compiled.program.unknown_loops:
        loops = ", ".join(plan.compiled.program.unknown_loops)
        console.say(f"  counted once, since their trips are not known: {loops}")


def times(console, plan: Plan, budget_tokens: float) -> None:
    t, chip = plan.times, plan.topology.chip
    assert t is not None
    console.say("\nTime of a step by the roofline, s")
    parts = [("products", t.products), ("memory", t.rest), ("links", t.links)]
    parts += [("network", t.network)] if t.network else []
    parts += [("host", t.host)] if t.host else []
    console.table([(name, f"{seconds:.3g}") for name, seconds in parts])
    for text, seconds in (("collectives hidden", t.step), ("nothing hidden", t.nothing_hidden)):
        speed = plan.tokens / seconds
        console.say(
            f"  {text}: {seconds:.3g} s, {plan.mfu(seconds):.1%} MFU, {speed:,.0f} tokens/s, "
            f"{count(speed * DAY)} tokens a day; {count(budget_tokens)} tokens take "
            f"{duration(budget_tokens / speed, fine=True)}"
        )
    host = f", host {chip.host / 1e9:,.0f}" if t.host else ""
    bandwidths = (
        f"; {REACHED:.0%} of memory {chip.memory / 1e9:,.0f}{host}, links {chip.link / 1e9:,.0f} "
        f"and network {chip.network / 1e9:,.1f} GB/s"
        if chip.platform != "cpu"
        else "; bandwidths unknown, and so not counted"
    )
    console.say(f"  assumed, of one device: {chip.flops / 1e12:,.3g} TFLOP/s{bandwidths}")


def what_helps(console, plan: Plan) -> None:
    """The largest savings. Where the compiler's total is below the reckoned one, which they are
    part of, they are as much smaller: none is larger than what there is."""
    found = knobs.helpful(plan)
    unit, size = unit_of(plan.peak_bytes)
    short = (plan.peak_bytes - plan.capacity) / size
    missing = f"; {short:,.2f} {unit} are missing" if short > 0 else ""
    console.say(f"\nWhat saves memory, reckoned and each alone{missing}")
    less = min(plan.peak_bytes / plan.memory.total, 1.0) / size
    console.table(
        [(k.flag, f"{k.saves * less:,.2f} {unit}", f"costs: {k.costs}") for k in found[:6]]
        or [("nothing that this plan knows", "", "take more or larger devices")]
    )


def weak_scaling(console, run, chip, points) -> None:
    """The table of `scaling.weak_scaling`."""
    rows = max(run.batch // scaling.OF, run.accumulate)
    console.say(f"{run.name} on {chip.name}: {rows} rows of {run.data.length:,} tokens a device")
    waits = ["computing", "links", "network"] + ["host"] * any(p.times.host for p in points)
    rows = [
        (
            f"{p.devices:,}",
            reckon.spread(p.sizes),
            *(f"{getattr(p.times, wait):.2f}" for wait in waits),
            *((f"{p.mfu:.1%}", f"{p.exposed:.1%}") if p.fits else ("does not fit", "")),
        )
        for p in points
    ]
    header = ("devices", "mesh", *(f"{wait}, s" for wait in waits), "MFU", "nothing hidden")
    console.table(rows, header)
