"""A plan in words and tables."""

import jax

from jaxlm.host import gpu_memory
from jaxlm.plan import knobs, reckon, scaling
from jaxlm.plan.collectives import by_kind_and_axes
from jaxlm.plan.make import Plan
from jaxlm.plan.roofline import REACHED

GIB = 2**30
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


def head(console, plan: Plan) -> None:
    topology, run = plan.topology, plan.built.run
    mesh = reckon.spread(dict(plan.built.mesh.shape))
    slices = f" in {topology.slices} slices" if topology.slices > 1 else ""
    how = "for these devices" if topology.compiled_for_it else "for CPUs in their place"
    console.say(
        f"{run.name} on {len(topology.devices)} × {topology.chip.name}{slices}, mesh {mesh}\n"
        f"a step of {run.batch * run.members:,} × {run.data.length:,} tokens in {run.accumulate} "
        "micro-batches\n"
        f"compiled {how} in {plan.compiled.seconds:.0f} s by jax {jax.__version__}"
    )


def memory_of(console, plan: Plan) -> None:
    kinds, compiled = plan.memory, plan.compiled
    rows = [
        ("parameters", kinds.parameters, "from their shardings"),
        ("optimizer", kinds.optimizer, "from their shardings"),
        ("extras", kinds.extras, "from their shardings"),
        ("gradients", kinds.gradients, "reckoned"),
        ("activations", kinds.activations, "reckoned: stored for the backward pass"),
    ]
    if plan.topology.compiled_for_it and compiled.program:
        held = kinds.gradients + kinds.activations
        rest = compiled.temporaries + compiled.outputs + compiled.arguments - kinds.state - held
        if rest < 0:  # the compiler found a way to hold less than reckoned
            rows[3:] = [("activations, gradients", held + rest, "the compiler's temporaries")]
        else:
            rows.append(("other temporaries", rest, "the compiler's, less the two above"))
        rows.append(("program", compiled.code, "the compiler's"))
    elif not compiled.needs:
        rows.append(("working set", kinds.working, "reckoned: a block or a chunk of the loss"))
    console.say("\nMemory of one device, GiB")
    console.table([(name, f"{size / GIB:.2f}", why) for name, size, why in rows if size])
    if kinds.host:
        size = f"{kinds.host / GIB:.2f}"
        console.say(f"  on its host {size}: moments, which come and go each step")
    verdict = "it fits" if plan.fits else "IT DOES NOT FIT"
    needs, has = plan.peak_bytes / GIB, plan.capacity / GIB
    console.say(f"  in all {needs:.2f} of {has:.2f}, {needs / has:.0%}: {verdict}")
    if plan.topology.measured:
        console.say("  what there is, as JAX tells it of the device")
    elif plan.topology.platform == "gpu":
        share = f"{gpu_memory.share():.0%}"
        console.say(f"  what there is: JAX takes {share} of a GPU ({gpu_memory.VARIABLE})")


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
            f"{speed * DAY / 1e9:,.3g}G tokens a day; {budget_tokens / 1e9:,.4g}G tokens take "
            f"{budget_tokens / speed / DAY:,.3g} days"
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
    found = knobs.helpful(plan)
    short = (plan.peak_bytes - plan.capacity) / GIB
    console.say(f"\nWhat saves memory{f'; {short:.2f} GiB are missing' if short > 0 else ''}")
    console.table(
        [(k.flag, f"{k.saves / GIB:.2f} GiB", f"costs: {k.costs}") for k in found[:6]]
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
