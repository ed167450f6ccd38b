"""The work folder of a run: who works in it, what stands in it, whether it may be continued."""

import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from jaxlm import __version__
from jaxlm import config as configs
from jaxlm.data import chat, tokenizer
from jaxlm.files import write_atomically
from jaxlm.hf import kept
from jaxlm.host import cluster
from jaxlm.specs import Run

VERSIONED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")


@contextlib.contextmanager
def claim(run: Run):
    """Holds the work folder for this process. Raises `ValueError` if it cannot be worked in.

    That is: it cannot be made, another process holds it, or another run stands in it.
    """
    try:
        run.workdir.mkdir(parents=True, exist_ok=True)
        lock = open(run.workdir / ".lock", "a")  # noqa: SIM115
    except OSError as e:
        raise ValueError(
            f"the work folder {run.workdir} cannot be written ({e.strerror}); choose another "
            "--config.workdir"
        ) from None
    with lock:
        try:
            if cluster.process() == 0:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is training in {run.workdir}; wait for it, or choose another "
                "--config.workdir"
            ) from None
        except OSError:
            pass  # a file system without locks
        _refuse_another_run(run)
        yield


def _refuse_another_run(run):
    found = read(run.workdir / "run.json")
    if not found:
        return
    began = configs.flatten(found.get("config", {}))
    if lines := configs.differences(began, run.config):
        shown = "\n  ".join(lines[:12] + ([f"and {len(lines) - 12} more"] if lines[12:] else []))
        length = (
            "A run's learning rate and its stages of data are laid out over all of its steps, so "
            "that with another number of them it is another run; "
        )
        raise ValueError(
            f"{run.workdir} holds a run with another config:\n  {shown}\n"
            + (length if any(line.startswith("steps:") for line in lines) else "")
            + f"choose another --config.workdir, or delete {run.workdir} to train anew there; to "
            f"go on from its params, choose another and set --config.init.checkpoint={run.workdir} "
            f"(and --config.seed={began.get('seed', 0) + 1}, or it reads the same data in the same "
            "order)"
        )


def finished(run: Run) -> str:
    """What to tell somebody who starts a finished run again; "" if it is not finished."""
    results = read(run.workdir / "results.json")
    if not results:
        return ""
    figures = ", ".join(f"{k} {v:.3f}" for k, v in results["bits_per_char"].items())
    said = f"bits per character {figures}" if figures else _losses(results)
    return (
        f"This run is finished: {results['steps']:,} steps, {said}.\n"
        f"  the page        {run.workdir / 'report.html'}\n"
        f"  sample from it  {python()} -m jaxlm.generate"
        f' --workdir="{run.workdir}" {asking(run)}\n'
        f"  train anew      add --config.workdir=SOME/OTHER/FOLDER, or delete {run.workdir}"
    )


def asking(run: Run) -> str:
    """The flags of jaxlm.generate for a first look at what a run has trained."""
    return '--chat --prompt="Hello"' if run.data.structured else '--prompt="def read"'


def _losses(results):
    found = {k: v for k, v in results.get("figures", {}).items() if k.startswith("loss/")}
    return ", ".join(f"held-out {k} {v:.3f}" for k, v in found.items()) or "nothing held out"


def page_is_newest(run: Run) -> bool:
    """Whether the page was written after the results."""
    try:
        page, results = (run.workdir / name for name in ("report.html", "results.json"))
        return page.stat().st_mtime >= results.stat().st_mtime
    except OSError:
        return False


def how_to_continue(run: Run, step: int, signal: str, command: str) -> str:
    """The last words of a run that was stopped."""
    return (
        f"Stopped by {signal} after step {step:,} of {run.steps:,}; everything is saved in "
        f"{run.workdir}.\nTo continue from there, run the same command again:\n  {command}"
    )


def skipped_too_often(run: Run, times: int, checkpoint: int | None) -> str:
    """Why a run ended whose updates had to be skipped, and what there is to go on from."""
    last = "none yet" if checkpoint is None else f"{run.workdir / 'checkpoints' / str(checkpoint)}"
    return (
        f"{times} updates in a row were skipped, since the loss, a gradient or the update was not "
        f"finite, or the loss far above its running mean; last good checkpoint: {last}. Look at "
        "the data of these steps, or start in another --config.workdir with a lower "
        "--config.optimizer.learning_rate, and from that checkpoint with --config.init.checkpoint"
    )


def write_run(built, prepared, flops: float, peak: tuple[float, str], command: str) -> None:
    """Writes run.json: what runs here, on what, made of what. The first start's date is kept."""
    run, path = built.run, built.run.workdir / "run.json"
    if cluster.process() != 0:
        return
    tokenizer.copy(prepared.tokenizer_folder, run.workdir / "tokenizer")
    if prepared.template:
        write_atomically(run.workdir / "tokenizer" / chat.FILE, prepared.template)
    if run.init.hf and not (run.workdir / "model.json").is_file():
        source = Path(run.init.hf).expanduser()
        kept.write(run.workdir, kept.of_hf(source, run.model))
    parts = built.parameters()
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write(
        path,
        {
            "name": run.name,
            "command": command,
            "config": configs.nest(run.config),
            "config_diff": run.changed,
            "commit": commit(),
            "versions": versions(),
            "python": platform.python_version(),
            "device": describe_device(),
            "devices": jax.device_count(),
            "mesh": dict(built.mesh.shape),
            "parameters": sum(parts.values()),
            "parameters_by_part": parts,
            "flops_per_step": flops,
            "flops_per_token": flops / run.tokens_per_step,
            "peak_flops": peak[0],
            "peak_is": peak[1],
            "started": read(path).get("started", now),
            "data_card": prepared.card,
            "data_hash": prepared.hash,
            "steps": run.steps,
            "expected": run.expect.figures(),
        },
    )


def write_results(run: Run, results: dict[str, Any]) -> None:
    """Writes results.json, whose presence says that the run is finished."""
    if cluster.process() == 0:
        write(run.workdir / "results.json", results)


def python() -> str:
    """How to call this Python, as short as it goes."""
    short = os.path.relpath(sys.executable)
    return shlex.quote(short if not short.startswith("..") else sys.executable)


def read(path: Path) -> dict[str, Any]:
    """A JSON object, or {} where there is none (or half of one)."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def write(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=1, default=str))


def commit() -> str:
    """The commit of the checkout that this code runs from, with a + if it was changed; or ""."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        say = lambda *args: subprocess.run(
            [*git, *args], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        return say("rev-parse", "--short=12", "HEAD") + (
            "+" if say("status", "--short", "-uno") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return ""


def versions() -> dict[str, str]:
    found = {"jaxlm": __version__}
    for name in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def describe_device() -> str:
    """The accelerator's name, or the processor's."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
