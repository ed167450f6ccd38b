"""Trains a language model as a recipe says.

    python -m jaxlm.train --config=configs/quickstart.py [--config.KEY=VALUE ...] [--dry_run]

Every key of the recipe can be set on the command line, e.g. --config.steps=500; --dry_run prints
them all, with what the run would take. The same command continues a run that was stopped.
"""

from jaxlm.host import process

process.start(__name__)  # before JAX is imported: huge pages, quiet libraries

import sys
import time
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import (
    columns,
    commandline,
    folder,
    report,
    restarts,
    sharding,
    stored,
    summary,
    tasks,
    together,
)
from jaxlm.build import Built, build
from jaxlm.checkpoint import Checkpoints
from jaxlm.contract import BASE
from jaxlm.data.batches import batches
from jaxlm.data.mix import parse_stages
from jaxlm.data.prepare import Prepared
from jaxlm.flops import count_flops, peak_flops
from jaxlm.host import cluster
from jaxlm.host.console import Console
from jaxlm.host.signals import Signals
from jaxlm.journal import Journal
from jaxlm.metrics import Clock, Writer
from jaxlm.models.proof import require_right
from jaxlm.observe import Observer
from jaxlm.profile import Profile
from jaxlm.resume import restore_or_start, save
from jaxlm.specs import Run
from jaxlm.start import notes_of_models, require_figure, require_same_tokens, start_of

AGAIN = "the same command goes on from the last checkpoint, where there is one"
ROOM = (
    "`python -m jaxlm.plan` with the same --config flags and --topology=gpu (or v5e:4x4, cpu:8, "
    "...) tells what takes how much of it, and which knobs save most: --config.accumulate, "
    "--config.model.remat=full, --config.model.loss_chunk, --config.optimizer.offload=True, or "
    "more devices along --config.mesh.fsdp"
)
PHASES = 6
EXIT = {"Ctrl-C": 130, "SIGTERM": 143, "SIGHUP": 129}


def train(run: Run, console: Console, *, command: str = "", dry_run: bool = False) -> int:
    """One run from start to end; returns the exit code.

    Raises `ValueError` for whatever the user can mend, before anything is compiled.
    """
    clock, began = Clock(), process.began()
    clock.add("setup", time.time() - began)  # imports, and other hosts waited for

    # ------------------------------------------------ 1 setup
    with console.phase(1, PHASES, "setup", "looking at this machine"):
        mesh = sharding.make_mesh(run.mesh)
        run.check_devices(mesh)
        # Tells what is wrong before any data is prepared.
        require_figure(built := build(run, run.model.vocabulary or 2))
        start = None if stored.is_run(run.workdir) else start_of(run)
        weights = {source.name: source.weight for source in run.data.sources}
        parse_stages(run.data.stages, weights, run.steps * run.rows)
        tasks.loaded(run.eval)
        if idle := process.unused_accelerator(jax.devices()):
            console.warn(idle)
        with clock("setup"):
            peak = peak_flops(jax.local_devices()[0], run.model.dtype)
        console.say(f"  {summary.machine(mesh, peak, run.model.dtype)}")
        for note in (*run.notes, *notes_of_models(built, start)):
            console.say(f"  note: {note}")

    # ------------------------------------------------ 2 data
    with console.phase(2, PHASES, "data", "preparing the mixture"), clock("data"):
        cache = process.cache_dir() / "data"
        prepared = together.prepare_data(run, cache, _ticker(console))
        if prepared.cached:
            console.say("  found prepared in the cache; nothing had to be built")
        summary.data_card(console, prepared, run)
        for note in prepared.notes:
            console.warn(note)

    with jax.set_mesh(mesh):
        built = build(run, prepared.tokenizer.vocabulary_size)
        require_same_tokens(built, prepared.tokenizer, start)
        with clock("compile"):
            require_right(built.apart, mesh)
        if dry_run:
            return summary.dry_run(console, built, prepared)
        with (
            closing(_writer(run)) as writer,
            _checkpoints(run, console) as checkpoints,
        ):
            console.on_warning(lambda text: writer.event("warning", text=text))
            return _train(
                built, prepared, console, writer, checkpoints, clock, peak, command, began
            )


def _train(
    built: Built, prepared: Prepared, console, writer, checkpoints, clock, peak, command, began
):
    run = built.run

    # ------------------------------------------------ 3 compile
    with console.phase(3, PHASES, "compile", "building and compiling the training step"):
        with clock("restore"):
            state, start = restore_or_start(built, prepared, checkpoints)
        # Whether the state's step has to be looked at again: a signal had cut that short.
        unseen = start > 0 and checkpoints.about(start).get("unseen", False)
        writer.truncate(start, start if unseen else run.steps)
        writer.event("resume" if start else "start", step=start, time=began)
        step_fn, between = built.step()
        key = jax.random.key(run.seed)
        beside = _beside(built, prepared, console, clock, checkpoints, None if start else state)
        observer = Observer(built, prepared, console, writer, clock, beside)
        rows = feed(run, prepared, start if start < run.steps else 0, built.rows_here(), beside)
        with clock("compile"):
            batch = built.put(next(rows))
            traced = step_fn.trace(state, batch, key)
            on_cpu = sharding.platform(built.mesh) == "cpu"  # whose peak is measured, and shared
            flops = count_flops(traced.jaxpr) if on_cpu else built.model_flops()
            step_fn = traced.lower().compile()
            observer.compile(state)
            # Gloo, which joins CPUs, gives the processes half a minute to come to the first run.
            cluster.share()
        folder.write_run(built, prepared, flops, peak, command)
        if start:
            console.say(f"  continuing at step {start:,} of {run.steps:,}")
            console.say(f"  {summary.goodput_so_far(run)}")

    # ------------------------------------------------ 4 train
    journal = Journal(
        console,
        writer,
        clock,
        start=start,
        steps=run.steps,
        every=run.log.every,
        tokens_per_step=run.tokens_per_step,
        chars_per_token=summary.chars_per_token(run, prepared),
        flops_per_step=flops,
        peak_flops_of_all=peak[0] * jax.device_count(),
        learning_rates=np.asarray(jax.vmap(built.schedule)(jnp.arange(run.steps))),
        minutes=run.expect.minutes,
        weights=summary.weights(run, prepared),
    )
    text = f"{run.steps - start:,} steps of {run.batch * run.members} × {run.data.length} tokens"
    signal = ""
    with (
        console.phase(4, PHASES, "train", text),
        Signals(console.say) as signals,
        Profile(run.profile, run.workdir / "profile", console.say) as profile,
    ):
        if unseen:
            resume = journal.pause()
            unseen = not observer.look(start, state, signals.look_up)
            checkpoints.add_metrics(start, observer.figures_at(start))
            resume()
        for step in range(start, start if unseen else run.steps):
            if profile.begins(step + 1):
                journal.fetch()
                with clock("profile"):
                    profile.begin(step + 1)
            with clock("train_step"), jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                state, metrics = step_fn(state, batch, key)
                state = between(step + 1, state)
            journal.step(step + 1, metrics)
            if step + 1 < run.steps:
                with clock("data_wait"):
                    batch = built.put(next(rows))
            if profile.ends(step + 1):
                journal.fetch()
                resume = journal.pause()
                with clock("profile"):
                    profile.end(step + 1)
                resume()
            if observer.due(step + 1):
                journal.fetch()
                resume = journal.pause()
                unseen = not observer.look(step + 1, state, signals.look_up)
                resume()
            if (step + 1) % run.checkpoint.every == 0:
                journal.fetch()
                if not journal.skipping:  # else the params may be what is wrong
                    resume = journal.pause()
                    with clock("checkpoint"):
                        writer.flush()  # a checkpoint never knows of steps that their file does not
                        figures = observer.figures_at(step + 1)
                        save(built, prepared, checkpoints, state, figures, unseen=unseen)
                    resume()
            if journal.skipped_in_row >= run.guard.stop_after:
                raise ValueError(
                    folder.skipped_too_often(run, journal.skipped_in_row, checkpoints.latest())
                )
            if signal := signals.stop_requested():
                break
        journal.fetch()
        with clock("checkpoint"):
            figures = observer.figures_at(int(state.step))
            save(built, prepared, checkpoints, state, figures, unseen=unseen)
            checkpoints.wait()
        if signal := signal or signals.at_the_end():
            journal.tell_times(int(state.step))
            writer.event("interrupt", step=int(state.step))
            _page(run)
    if signal:
        console.say(folder.how_to_continue(run, int(state.step), signal, command))
        return EXIT[signal]

    # ------------------------------------------------ 5 evaluate, 6 report
    with console.phase(5, PHASES, "evaluate", "scoring the held-out text"):
        results = observer.results(state, began)
        checkpoints.add_metrics(run.steps, observer.figures)
        results["verdict"] = summary.verdict(run, results)
        summary.results(console, run, results)
    with console.phase(6, PHASES, "report", "writing the page"):
        journal.tell_times(run.steps)
        writer.flush()
        folder.write_results(run, results)
        page = _page(run)
    summary.farewell(console, run, results, page, command)
    return 0


def feed(run: Run, prepared: Prepared, step: int, mine=None, beside=None):
    """Batches from the place in the data where a run stands after that many steps: one integer.

    `mine`: the rows of each that this process needs; None = all. `beside`: gives a batch its routes
    and columns.
    """
    weights = {source.name: source.weight for source in prepared.sources}
    return batches(
        prepared,
        rows=run.rows,
        position=step * run.rows,
        seed=run.seed,
        stages=parse_stages(run.data.stages, weights, run.steps * run.rows),
        attend_across_documents=run.data.attend_across_documents,
        mine=mine,
        beside=beside,
    )


def _beside(built, prepared, console, clock, checkpoints, state):
    """What gives a batch its routes and columns; computes what is not in the cache.

    `state`: the first one, or None where a run is continued.
    """
    routed = columns.routed(built, prepared)
    if not built.run.method.columns:
        return routed if built.run.method.routes else None
    cache = process.cache_dir() / "data"
    with clock("columns"):
        found = columns.ready(
            built,
            prepared,
            checkpoints,
            # At the start an adapter adds nothing to its base.
            state and state.extras.get(BASE, state.params),
            cache=cache,
            writers=together.writers(cache),
            say=console.say,
            progress=_ticker(console),
        )
    return columns.joined(routed, found)


def _checkpoints(run, console):
    spec = run.checkpoint
    figure, side = spec.best()
    return Checkpoints(
        run.workdir / "checkpoints",
        keep=spec.keep,
        keep_best=figure,
        highest=side == "max",
        verify=spec.verify,
        say=console.warn,
    )


def _page(run):
    if cluster.process() == 0:
        report.write(run.workdir)
    return run.workdir / "report.html"


def _writer(run):
    quiet = cluster.process() > 0
    return Writer(run.workdir, run.log.tensorboard, run.log.wandb, run.config, quiet)


def _ticker(console):
    return lambda done, total, note: console.progress(done, total, note, unit="")


def main() -> int:
    run, flags = commandline.parse(sys.argv, __doc__)
    if where := cluster.place():
        process.hush_libraries()
    with Console(quiet=bool(where and where.process)) as console:
        if where:
            together.join(where, run, console)
        if flags.dry_run:
            return train(run, console, dry_run=True)
        with folder.claim(run):
            together.require_one_workdir(run)
            with restarts.counted(run):
                return _work(run, console)


def _work(run: Run, console: Console) -> int:
    if finished := cluster.broadcast(folder.finished(run)):
        if not folder.page_is_newest(run):  # stopped while it was written
            _page(run)
        console.say(finished)
        return 0
    console.log_to(run.workdir / "train.log")
    process.crash_folder(run.workdir)
    for note in process.notes:
        console.warn(note)
    return train(run, console, command=process.command())


if __name__ == "__main__":
    process.run(main, AGAIN, ROOM)
