"""A fault campaign: runs that are killed, stopped and damaged at random, against one left alone.

    python tools/faults.py [--faults=50] [--seed=0] [--only=NAME] [--folder=DIR]

Each topology trains a toy recipe once undisturbed and once under faults, with a restart after each:
kill -9 of one process or of all, SIGTERM to one, a disk that is full (a limit on the size of files,
set from outside: no rights needed), and, between two starts, bytes flipped in the newest
checkpoint, a file of it truncated or deleted, its digest deleted, a half-written one left behind.
The last run wanders: each start has another number of processes and another mesh. Shown: every step
is there once, and the curve is that of the undisturbed run, bit for bit where the topology is the
same, and within 1e-5 where it wanders. The exit code is 0 if so. 15 minutes on 2 quiet cores.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from launch.local.run import free_port

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = 160
FLAGS = (
    f"--config.steps={STEPS}",
    "--config.log.every=2",
    "--config.log.tensorboard=False",
    "--config.checkpoint.every=8",
    "--config.checkpoint.keep=4",
    "--config.eval.every=0",
    "--config.eval.samples=",
    "--config.eval.characters=2000",
    "--config.model.layers=1",
)
# name -> processes, devices of each, mesh
TOPOLOGIES = {
    "1 process": (1, 1, "fsdp=1"),
    "1 process, 4 devices": (1, 4, "fsdp=2 tensor=2"),
    "2 processes": (2, 2, "fsdp=4"),
    "4 processes": (4, 1, "data=2 fsdp=2"),
}
WANDERING = "wandering"
SECONDS = 600  # until a start counts as hanging
END_SECONDS = 20.0  # the time in which the survivors of a death have to end


class Wrong(Exception):
    """Something was lost, or a process did not end."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="one topology, or 'wandering'")
    parser.add_argument("--folder", type=pathlib.Path, help="to work in; default: a temporary one")
    flags = parser.parse_args()
    names = [flags.only] if flags.only else [*TOPOLOGIES, WANDERING]
    with contextlib.ExitStack() as stack:
        home = flags.folder or stack.enter_context(tempfile.TemporaryDirectory())
        home = pathlib.Path(home).absolute()
        make_text(home)
        rows = []
        for i, name in enumerate(names):
            share = flags.faults // len(names) + (i < flags.faults % len(names))
            rows.append(campaign(home, name, share, random.Random(f"{flags.seed} {name}")))
            print(rows[-1], file=sys.stderr, flush=True)
    table(rows)
    return 0


def campaign(home, name, faults, rng):
    """The row of the table for one topology. Raises `Wrong`."""
    own = TOPOLOGIES.get(name, TOPOLOGIES["1 process"])
    expected = undisturbed(home, own)
    run = Disturbed(home, name.replace(" ", "-").replace(",", ""), rng)
    seen: collections.Counter[str] = collections.Counter()
    slowest = 0.0
    while sum(seen.values()) < faults:
        topology = own if name != WANDERING else rng.choice(list(TOPOLOGIES.values()))
        kind, seconds = run.live(topology)
        slowest = max(slowest, seconds)
        seen[kind] += 1
        if sum(seen.values()) < faults and rng.random() < 0.6 and (damage := run.damage()):
            seen[damage] += 1
    run.finish(own)
    steps, curve = run.curve()
    if steps != list(range(1, STEPS + 1)):
        raise Wrong(f"{name}: steps are missing or there twice")
    worst = max(abs(a - b) / abs(a) for a, b in zip(expected, curve, strict=True))
    if worst > (1e-5 if name == WANDERING else 0):
        raise Wrong(f"{name}: the curve differs by {worst:.1e}")
    said = f"within {worst:.0e}" if worst else "bit for bit"
    return {
        "run": name,
        "starts": run.starts,
        "faults": sum(seen.values()),
        "of them": ", ".join(f"{n} {kind}" for kind, n in sorted(seen.items())),
        "ended within": f"{slowest:.1f} s",
        "again": f"{run.again}",
        "curve": said,
    }


def undisturbed(home, topology):
    folder = home / ("alone-" + "-".join(map(str, topology)).replace(" ", "-").replace("=", ""))
    if not (folder / "results.json").exists():
        for process in start(home, folder, topology):
            if process.wait(SECONDS):
                raise Wrong(f"the undisturbed run failed: {tail(folder)}")
    return [line["loss"] for line in lines(folder)]


class Disturbed:
    """A run under faults: its folder, and what has happened to it."""

    def __init__(self, home, name, rng):
        self.home, self.folder, self.rng = home, home / f"disturbed-{name}", rng
        self.starts = self.again = 0  # starts; steps taken a second time
        self.bad: dict[pathlib.Path, int] = {}  # damaged folder -> when it was made
        shutil.rmtree(self.folder, ignore_errors=True)

    def live(self, topology):
        """Starts, waits for a random moment, does something bad: its name, and the seconds until
        all processes had ended."""
        processes = self._start(topology)
        before = last_step(self.folder)
        # Some moments are in the loop, some while it restores, compiles or begins.
        moment = min(before + self.rng.choice([0, 0, 3, 8, 12, 17, 25]), STEPS - 10)
        self._wait(processes, moment if moment > before else 0)
        time.sleep(self.rng.random() * 0.5)
        kinds = ["kill one", "kill all", "SIGTERM"] + ["full disk"] * (moment > before)
        if len(processes) == 1:
            kinds.remove("kill one")
        kind = self.rng.choice(kinds)
        victim = self.rng.choice(processes)
        began = time.monotonic()
        reached = last_step(self.folder)
        if kind == "full disk":
            limit = (self.folder / "metrics.jsonl").stat().st_size + 20_000
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        elif kind == "SIGTERM":
            victim.send_signal(signal.SIGTERM)
        else:
            for process in processes if kind == "kill all" else [victim]:
                process.kill()
        self._await_the_end(processes, kind)
        self.again += max(reached - self._newest(), 0)
        return kind, time.monotonic() - began if kind.startswith("kill") else 0.0

    def finish(self, topology):
        processes = self._start(topology)
        for process in processes:
            if process.wait(SECONDS):
                raise Wrong(f"the last start failed: {tail(self.folder)}")

    def curve(self):
        found = lines(self.folder)
        return [line["step"] for line in found], [line["loss"] for line in found]

    def damage(self):
        """Damages the newest checkpoint, if an older one is left to go on from: what was done."""
        folders = sorted(
            (p for p in (self.folder / "checkpoints").glob("*") if p.name.isdecimal()),
            key=lambda p: int(p.name),
        )
        good = [
            f
            for f in folders
            if self.bad.get(f) != f.stat().st_ctime_ns and any(f.glob("digest-0*"))
        ]
        if len(good) < 2:
            return ""
        kind = self.rng.choice(["flipped", "truncated", "deleted", "no digest", "half-written"])
        newest = good[-1]
        if kind == "half-written":
            shutil.copytree(newest, newest.with_name(f"{int(newest.name) + 1}"))
            for path in newest.with_name(f"{int(newest.name) + 1}").glob("digest*"):
                path.unlink()
            return kind
        data = [p for p in newest.rglob("*") if p.is_file() and p.parent.name == "d"]
        victim = self.rng.choice(sorted(data) or [newest / "commit_success.txt"])
        if kind == "flipped":
            content = bytearray(victim.read_bytes())
            at = self.rng.randrange(len(content))
            content[at] ^= 1 << self.rng.randrange(8)
            victim.write_bytes(content)
        elif kind == "truncated":
            os.truncate(victim, victim.stat().st_size // 2)
        elif kind == "deleted":
            victim.unlink()
        else:
            next(iter(sorted(newest.glob("digest*")))).unlink()
        self.bad[newest] = newest.stat().st_ctime_ns
        return kind

    def _start(self, topology):
        self.starts += 1
        self._said = self.home / f"{self.folder.name}.0.out"
        self._before = self._said.stat().st_size if self._said.exists() else 0
        return start(self.home, self.folder, topology)

    def _wait(self, processes, step):
        """Until that step is written, or, if it is 0, until the processes have met."""
        end = time.monotonic() + SECONDS
        while last_step(self.folder) < step if step else not self._met():
            if time.monotonic() > end:
                raise Wrong(f"no step {step} within {SECONDS} s: {tail(self.folder)}")
            if any(p.poll() is not None for p in processes):
                raise Wrong(f"a process ended by itself before step {step}: {tail(self.folder)}")
            time.sleep(0.05)

    def _met(self):
        said = self._said.read_bytes() if self._said.exists() else b""
        return b"[1/6]" in said[self._before :]

    def _await_the_end(self, processes, kind):
        seconds = END_SECONDS if kind.startswith("kill") else SECONDS
        end = time.monotonic() + seconds
        for process in processes:
            try:
                process.wait(max(end - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                raise Wrong(f"{kind}: a process went on for {seconds:g} s") from None
        wanted = {"SIGTERM": {143}, "full disk": {1}}.get(kind, {-9, 75})
        codes = {process.returncode for process in processes}
        if not codes <= wanted:
            raise Wrong(f"{kind}: ended with {sorted(codes)}, not {wanted}: {tail(self.folder)}")

    def _newest(self):
        """The step that the next start can go on from at best."""
        done = (self.folder / "checkpoints").glob("*/digest-0*")
        return max((int(p.parent.name) for p in done if p.parent.name.isdecimal()), default=0)


def start(home, folder, topology):
    """The processes of one start; what they say goes to files beside the work folder."""
    count, devices, mesh = topology
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("JAX", "XLA"))}
    keep |= {
        "JAX_PLATFORMS": "cpu",
        "JAXLM_TEST_TEXT": str(home / "text"),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    if count > 1:
        address = f"127.0.0.1:{free_port()}"
        keep |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    sizes = dict(part.split("=") for part in f"data=1 sequence=1 tensor=1 {mesh}".split())
    command = [sys.executable, "-m", "jaxlm.train", "--config=tests/tiny.py", *FLAGS]
    command += [f"--config.workdir={folder}"]
    command += [f"--config.mesh.{axis}={size}" for axis, size in sizes.items()]
    processes = []
    for i in range(count):
        with open(home / f"{folder.name}.{i}.out", "ab") as out:
            mine = keep | ({"JAX_PROCESS_ID": str(i)} if count > 1 else {})
            processes.append(subprocess.Popen(command, cwd=ROOT, env=mine, stdout=out, stderr=out))
    return processes


def make_text(home):
    """Two small corpora."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 7))) for _ in range(60)]
    for kind, end in (("code", "();\n"), ("prose", ". ")):
        (home / "text" / kind).mkdir(parents=True, exist_ok=True)
        for n in range(60):
            path = home / "text" / kind / f"{n}.txt"
            if not path.exists():
                path.write_text(end.join(" ".join(rng.choices(words, k=6)) for _ in range(12)))


def lines(folder):
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def last_step(folder):
    """Of the last whole line of metrics.jsonl; 0 if there is none."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        file.seek(max(path.stat().st_size - 4000, 0))
        whole = file.read().split(b"\n")[:-1]
    return json.loads(whole[-1])["step"] if whole else 0


def tail(folder):
    said = [
        p.read_text(errors="replace")[-1500:] for p in folder.parent.glob(f"{folder.name}.*.out")
    ]
    return "\n" + "\n--\n".join(said)


def table(rows):
    names = list(rows[0])
    widths = [max(len(str(row[n])) for row in [*rows, {n: n}]) for n in names]
    for row in [{n: n for n in names}, *rows]:
        print("  ".join(str(row[n]).ljust(w) for n, w in zip(names, widths, strict=True)).rstrip())
    print(
        f"{sum(row['faults'] for row in rows)} faults, {sum(row['starts'] for row in rows)} starts"
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Wrong as error:
        sys.exit(f"WRONG: {error}")
