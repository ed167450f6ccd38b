"""What a run tells a person about itself: the machine, the data card, the plan, the outcome."""

import shlex
import time

import jax
import numpy as np

from jaxlm import commandline, folder, goodput, metrics
from jaxlm.data import mix
from jaxlm.folder import describe_device
from jaxlm.host.console import Console

FOOTNOTE = (
    "xz primed has read the text that the model was trained on; the model saw the same text, and "
    "its weights are not counted."
)
TRIED_STEPS = 3  # that a dry run takes, to time them


def machine(mesh, peak: tuple[float, str], dtype: str) -> str:
    """One line: devices, mesh, peak."""
    sizes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "none"
    return (
        f"{jax.device_count()} × {describe_device()}, mesh split: {sizes}; {dtype} matrix products "
        f"at {peak[0] / 1e9:,.0f} GFLOP/s ({peak[1]}); jax {jax.__version__}"
    )


def data_card(console: Console, prepared, run) -> None:
    """The sources of the mixture: what they hold, what was left out, how often they are read."""
    header = (
        "source",
        "documents",
        "characters",
        "tokens",
        "chars/token",
        "duplicates",
        "held out",
    )
    rows = [
        (
            name,
            f"{card['documents']:,}",
            f"{card['characters']:,}",
            f"{card['tokens']:,}",
            f"{card['chars_per_token']:.2f}",
            f"{card['duplicates']:,}",
            f"{card['held_out_documents']:,} ({share(card):.1%})",
        )
        for name, card in prepared.card["sources"].items()
    ]
    console.table(rows, header)
    for line in conversations(prepared):
        console.say(f"  {line}")
    console.say(
        f"  corpus {prepared.hash[:16]}, {prepared.tokenizer.vocabulary_size:,} token types"
    )
    for line in epochs(prepared, run):
        console.say(f"  {line}")


def conversations(prepared) -> list[str]:
    """What the table does not say of sources that are no text."""
    lines = []
    for name, card in prepared.card["sources"].items():
        if "format" not in card:
            continue
        left_out = dict(card["useless"]) | {"malformed": card["malformed"]}
        said = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items() if count)
        part = card["tokens"] / max(card["positions"], 1)
        lines.append(
            f"{name} ({card['format']}): the tokens are those of responses, {part:.0%} of what is "
            f"read; {card['rows']:,} rows and {card['held_out_rows']:,} held out; left out: "
            f"{said or 'nothing'}"
        )
    return lines


def share(card) -> float:
    """Held-out share of the characters of a source; of its examples, where it is no text."""
    if "format" in card:
        return card["held_out_documents"] / max(card["documents"] + card["held_out_documents"], 1)
    return card["held_out_characters"] / max(card["characters"] + card["held_out_characters"], 1)


def epochs(prepared, run) -> list[str]:
    """How often each source is read, in words. Raises `ValueError` where one is used up."""
    total = run.steps * run.rows
    weights = {source.name: source.weight for source in prepared.sources}
    stages = mix.parse_stages(run.data.stages, weights, total)
    taken = mix.check_rows(prepared.sources, stages, total)
    return [
        f"{source.name}: {taken[source.name] * source.tokens:,.0f} tokens to train on, "
        f"{taken[source.name]:.2f} epochs"
        for source in prepared.sources
    ]


def weights(run, prepared):
    """step -> {"weights/<source>": share of the mixture}; empty where the shares never change."""
    if not run.data.stages:
        return lambda step: {}
    known = {source.name: source.weight for source in prepared.sources}
    stages = mix.parse_stages(run.data.stages, known, run.steps * run.rows)

    def of(step):
        now = [s for s in stages if s.first_row <= (step - 1) * run.rows][-1].weights
        return {f"weights/{name}": now.get(name, 0.0) / sum(now.values()) for name in known}

    return of


def chars_per_token(run, prepared):
    """step -> characters per token of the mixture, by the weights of its sources at that step.

    None where the loss is not that of text: of preferences, or of a teacher's distributions.
    """
    if not run.method.likelihood:
        return None
    fixed = {f"weights/{s.name}": s.weight for s in prepared.sources}
    staged = weights(run, prepared)
    each = {f"weights/{s.name}": s.characters / max(s.tokens, 1) for s in prepared.sources}

    def of(step):
        now = staged(step) or fixed
        return sum(now[name] * each[name] for name in each) / sum(now.values()) or 1.0

    return of


def dry_run(console: Console, built, prepared) -> int:
    """Prints what the run would be; compiles and times a few steps, and writes nothing."""
    run = built.run
    console.say("\nThe resolved config (* = differs from the defaults):")
    for key, value in sorted(run.config.items()):
        console.say(f"  {'*' if key in run.changed else ' '} --config.{key}={value}")
    parts = built.parameters()
    console.say("\nParameters:")
    console.table([(k, f"{v:,}") for k, v in (parts | {"total": sum(parts.values())}).items()])
    tokens = run.steps * run.tokens_per_step
    console.say(f"\nTokens: {tokens:,} in {run.steps:,} steps")
    for line in epochs(prepared, run):
        console.say(f"  {line}")
    _estimate(console, built)
    return 0


def _estimate(console, built):
    run = built.run
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(built.abstract))
    free = _free_memory()
    console.say(f"\nMemory of the state: {kept / 2**20:,.0f} MiB")
    if built.mesh.devices.flat[0].platform == "cpu" and kept > 0.8 * free:
        console.warn(
            f"the state alone takes {kept / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free "
            "here; nothing was compiled or timed"
        )
        return
    with console.phase(3, 6, "estimate", f"compiling, then timing {TRIED_STEPS} steps on zeros"):
        step, _ = built.step()
        rows = built.zeros(run.rows)
        rows |= {k: np.ones_like(rows[k]) for k in ("segments", "weights")}
        where = np.arange(run.data.length, dtype=np.int32)
        rows["positions"] = np.broadcast_to(where, rows["tokens"].shape)
        batch, state, key = built.put_whole(rows), built.first_state(), jax.random.key(0)
        compiled = step.lower(state, batch, key).compile()
        memory = compiled.memory_analysis()
        state, metrics = compiled(state, batch, key)
        jax.block_until_ready(metrics)
        begin = time.monotonic()
        for _ in range(TRIED_STEPS):
            state, metrics = compiled(state, batch, key)
        jax.block_until_ready(metrics)
        seconds = (time.monotonic() - begin) / TRIED_STEPS
    if memory is not None:
        peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        console.say(f"  memory of a step, per device: {peak / 2**20:,.0f} MiB")
    speed = run.tokens_per_step / seconds
    console.say(
        f"  {seconds * 1e3:,.0f} ms a step, {speed:,.0f} tokens/s: the {run.steps:,} steps take "
        f"about {run.steps * seconds / 60:,.1f} minutes, without evaluation"
    )


def _free_memory() -> float:
    """Bytes of memory that this machine can still give."""
    try:
        with open("/proc/meminfo") as lines:
            found = dict(line.split(":", 1) for line in lines)
        return float(found["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return float("inf")


def results(console: Console, run, found: dict) -> None:
    """The table of the model next to the compressors, other figures, and the samples."""
    if found["bits_per_char"]:
        _beside_compressors(console, found)
    _by_objective(console, run, found.get("figures", {}))
    for sample in found["samples"]:
        console.say(f"\nA prompt from held-out {sample['source']}; from the arrow on, the model:")
        console.say(_indented(f"{sample['prompt']}⟶{sample['text']}"))
    if not run.data.structured:
        console.say("\n(A model of this size learns the style of its text, and no meaning.)")


def _by_objective(console, run, figures):
    """What the objective says of held-out conversations, preferences and feedback."""
    for source in run.data.structured:
        of = {k.removesuffix(f"/{source.name}"): v for k, v in figures.items()}
        rows = [(k, f"{v:.4f}") for k, v in of.items() if f"{k}/{source.name}" in figures]
        if rows:
            console.say(f"\nHeld-out {source.name}, by the objective that was trained:")
            console.table(rows, ("figure", "value"))


def _beside_compressors(console, found):
    names = [n for n in ("xz primed", "xz", "bz2", "gzip") if _has(found, n)]
    rows = [
        (
            source,
            f"{value:.3f}",
            *(f"{found['compressors'][source].get(n, float('nan')):.3f}" for n in names),
        )
        for source, value in found["bits_per_char"].items()
    ]
    console.say("\nBits per character on held-out text (lower is better):")
    console.table(rows, ("source", "this model", *names))
    per_file = [n for n in ("xz", "bz2", "gzip") if _has(found, n)]
    console.say("The same, each file compressed on its own:")
    console.table(
        [
            (source, *(f"{found['compressors_per_file'][source][n]:.3f}" for n in per_file))
            for source in found["bits_per_char"]
        ],
        ("source", *per_file),
    )
    console.say(found["context"])
    if "xz primed" in names:
        console.say(FOOTNOTE)


def _has(found, name):
    return any(name in row for row in found.get("compressors", {}).values())


def _indented(text):
    return "\n".join("    | " + line for line in text.splitlines() or [""])


def verdict(run, found: dict) -> list[str]:
    """In words: what was reached, beside what the recipe promised."""
    lines = []
    expected, bounds = run.expect.figures(), run.expect.bounds()
    if run.overridden:  # only what was promised for this run, not for the recipe's own settings
        said = []
        if expected and "bits_per_char" not in run.judged:
            figures = ", ".join(f"{source} {most:.2f}" for source, most in expected.items())
            said, expected = [f"at most {figures} bits per character"], {}
        if bounds and "others" not in run.judged:
            said += [f"{name} {side} {bound:g}" for name, side, bound in bounds]
            bounds = []
        if said:
            lines.append(
                f"The recipe promises {', '.join(said)} for its own settings; this run set "
                f"{', '.join(run.overridden)}, so it is not judged by them."
            )
    figures = found.get("figures", {})
    for name, side, bound in bounds:
        value = figures.get(name)  # a mistyped name and a figure that is not finite have none
        said = f"not given (there is {', '.join(figures) or 'none'})"
        word = "not reached"
        if value is not None:
            said = f"{value:.3f}"
            word = "reached" if (value <= bound if side == "<=" else value >= bound) else word
        lines.append(f"{name}: {said}; {side} {bound:g} expected: {word}.")
    for source, most in expected.items():
        value = found["bits_per_char"].get(source)
        if value is None:
            lines.append(
                f"{source}: no bits per character were given; at most {most:.2f} expected: not "
                "reached."
            )
            continue
        word = "reached" if value <= most else "not reached"
        lines.append(
            f"{source}: {value:.3f} bits per character; at most {most:.2f} expected: {word}."
        )
        primed = found.get("compressors", {}).get(source, {}).get("xz primed")
        if primed:
            side = "below" if value < primed else "not below"
            lines[-1] += f" That is {side} primed xz ({primed:.3f})."
    return lines


def goodput_so_far(run) -> str:
    """In one line: the share of the run's life that went into steps that count; or ""."""
    found = goodput.goodput(metrics.read(run.workdir / metrics.EVENTS))
    return goodput.sentence(found) if found else ""


def farewell(console: Console, run, found: dict, page, command: str = "") -> None:
    """The last lines: what was reached, where things are, what to try next.

    `command`: which started the run, and names its recipe as it can be found from here.
    """
    minutes = found["seconds"] / 60
    console.say(
        f"\nTrained {found['steps']:,} steps on {found['tokens']:,} tokens; "
        f"{minutes:.1f} minutes since this start."
    )
    console.say(goodput_so_far(run))
    for line in found["verdict"]:
        console.say(line)
    python = folder.python()
    console.say(
        f"\n  the page     {page}\n"
        f"  checkpoint   {run.workdir / 'checkpoints'}\n"
        f"  metrics      {run.workdir / 'metrics.jsonl'}, {run.workdir / 'train.log'}\n"
        "Try next:\n"
        f'  {python} -m jaxlm.generate --workdir="{run.workdir}" {folder.asking(run)}'
    )
    if run.name == "quickstart":
        recipe = commandline.value_of("config", shlex.split(command)) or "configs/quickstart.py"
        console.say(
            f"  {python} -m jaxlm.train --config={shlex.quote(recipe)} "
            "--config.workdir=runs/mostly-code --config.data.mix.code.weight=0.9"
        )
