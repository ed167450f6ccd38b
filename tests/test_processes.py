"""Several real processes train as one: the same curve, through deaths, on other numbers of them."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import test_columns
import whole_runs

from jaxlm.generate import __main__ as generate
from jaxlm.host.fellows import LOST

ROOT = pathlib.Path(__file__).parents[1]
TRAIN = [sys.executable, "-m", "jaxlm.train", "--config=tests/tiny.py"]
FLAGS = (
    "--config.steps=60",
    "--config.log.every=5",
    "--config.eval.every=30",
    "--config.eval.samples=1",
    "--config.model.layers=1",  # half the time to compile
)
pytestmark = pytest.mark.slow


def start(home, name, *flags, **options):
    return command(home, *TRAIN, f"--config.workdir={home / name}", *flags, **options)


def command(home, *words, launcher=(), **env):
    return subprocess.Popen(
        [*launcher, *words],
        cwd=ROOT,
        env=whole_runs.environment(home, **env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def local(processes, devices, restarts=0):
    return [
        *(sys.executable, "-m", "launch.local"),
        *(f"--processes={processes}", f"--devices={devices}", f"--restarts={restarts}"),
    ]


def end(process, code, seconds=480):
    out, _ = process.communicate(timeout=seconds)
    assert process.returncode == code, out
    return out


def lines(home, name, file="metrics.jsonl"):
    path = home / name / file
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(home, name, step, process, seconds=480):
    limit = time.monotonic() + seconds
    while not any(line["step"] >= step for line in lines(home, name)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit
        time.sleep(0.02)


def children(process):
    """The processes that the launcher has started, in order."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return sorted(map(int, found.stdout.split()))


def flip(folder):
    """64 flipped bytes in the largest file."""
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(b ^ 255 for b in data[middle : middle + 64])
    path.write_bytes(data)


@pytest.fixture(scope="module")
def one(home):
    """The run of one process with four devices that the others are held against."""
    end(start(home, "one", *FLAGS, XLA_FLAGS="--xla_force_host_platform_device_count=4"), 0)


def test_two_processes_killed_stopped_and_continued_by_four_are_one(home, one):
    two = start(home, "many", *FLAGS, launcher=local(2, 2, restarts=1))
    wait_for_step(home, "many", 15, two)
    os.kill(children(two)[1], signal.SIGKILL)
    wait_for_step(home, "many", 35, two)  # they have started again by themselves
    os.kill(children(two)[1], signal.SIGTERM)
    out = end(two, 143)
    host = socket.gethostname()
    assert f"\nprocess 1 on {host} has ended without a word (killed" in out
    assert "launch.local: a process ended with code 137; starting all of them again, 1 of 1" in out
    assert "Stopped by SIGTERM after step" in out
    assert "Traceback" not in out
    stopped = max(line["step"] for line in lines(home, "many"))
    newest = home / "many" / "checkpoints" / str(stopped)
    assert sorted(p.name for p in newest.glob("digest*")) == [
        f"digest-{i}-of-2.json" for i in (0, 1)
    ]

    flip(newest)
    mesh = ("--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    out = end(start(home, "many", *FLAGS, *mesh, launcher=local(4, 1)), 0)
    assert f"Checkpoint {stopped} is skipped: the bytes of" in out
    assert re.search(r"continuing at step \d+ of 60", out)

    expected, found = lines(home, "one"), lines(home, "many")
    assert [line["step"] for line in found] == list(range(1, 61))
    for key in ("loss", "norm/grads", "weight", "learning_rate"):
        curves = [[line[key] for line in run] for run in (expected, found)]
        np.testing.assert_allclose(*curves, rtol=1e-5, err_msg=key)
    for a, b in zip(*(lines(home, n, "evals.jsonl") for n in ("one", "many")), strict=True):
        for key in a.keys() - {"seconds"}:
            np.testing.assert_allclose(a[key], b[key], rtol=1e-5, err_msg=key)
    assert lines(home, "one", "samples.jsonl") == lines(home, "many", "samples.jsonl")
    assert (home / "many" / "report.html").stat().st_size > 10_000


def test_four_processes_write_the_text_of_one(home, one, monkeypatch, capsys):
    (home / "asked.txt").write_text("the\nof it\n")
    flags = [f"--workdir={home / 'one'}", "--tokens=8", f"--prompts={home / 'asked.txt'}"]
    words = [sys.executable, "-m", "jaxlm.generate", *flags]
    four = end(command(home, *words, launcher=local(4, 1)), 0)
    monkeypatch.setattr(sys, "argv", ["jaxlm.generate", *flags])
    generate.main()
    text = capsys.readouterr().out
    assert "\nthe" in text
    assert [line for line in four.splitlines() if "loading JAX" not in line] == text.splitlines()


_BATTERY = """
import json, pathlib, sys, time
import jax
import test_battery as battery
import test_columns
from jaxlm import columns
from jaxlm.host import cluster
if where := cluster.place():
    cluster.join(where, {}, lambda text: None)
found = {}
home, *names = sys.argv[1:]
for name in names:
    of = battery.training(name, sharded=True)
    _, history = of.run(of.start(), of.batches())
    found[name] = [{k: v.tolist() for k, v in metrics.items()} for metrics in history]
    cluster.share()
if cluster.process() == 0:  # the disk is slow, and the others are early
    cached = columns.cached
    later = lambda fn: lambda at: (fn(at), time.sleep(1))[0]
    columns.cached = lambda *a, **k: cached(*a[:2], later(a[2]), *a[3:], **k)
found["column"] = test_columns.of_each_pair(pathlib.Path(home))
if cluster.process() == 0:
    print(json.dumps(found))
cluster.leave("", 0)
"""


def test_a_second_process_changes_nothing_in_the_battery(home):
    names = ["next_token + learnability", "dpo + follow + migu"]
    test_columns.write_pairs(home / "pairs")
    words = [sys.executable, "-c", _BATTERY, str(home / "pairs"), *names]
    path = {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}", "JAX_NUM_CPU_DEVICES": "8"}
    out = end(command(home, *words, **path), 0)
    one = json.loads(out.splitlines()[-1])
    shutil.rmtree(home / "pairs" / "cache")  # one process computes the column of both
    path["JAX_NUM_CPU_DEVICES"] = "4"
    out = end(command(home, *words, launcher=local(2, 0), **path), 0)
    two = json.loads(out.splitlines()[-1])
    for name in names:
        for a, b in zip(one[name], two[name], strict=True):
            assert a.keys() == b.keys()
            for key in a:
                np.testing.assert_allclose(a[key], b[key], rtol=1e-5, atol=2e-5, err_msg=key)
    np.testing.assert_allclose(one["column"], two["column"], rtol=1e-5)


def apart(home, name, count, code, flags=lambda i: (), **env):
    """Processes started by hand: what each said."""
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    address = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    processes = [
        start(home, name, *flags(i), JAX_PROCESS_ID=str(i), **address, **env) for i in range(count)
    ]
    return [end(process, code) for process in processes]


def test_processes_that_differ_are_named_with_both_values(home):
    first, second = apart(home, "differ", 2, 1, lambda i: [f"--config.seed={i + 5}"])
    host = socket.gethostname()
    seeds = f"--config.seed is 5 on process 0 ({host}), 6 on 1 ({host})"
    sentence = f"error: the processes do not agree: {seeds}"
    assert first.splitlines()[-1] == sentence
    assert sentence not in second  # said once
    assert not (home / "differ").exists()


def test_a_process_that_does_not_come_is_named(home):
    (out,) = apart(home, "missing", 1, LOST, JAXLM_JOIN_SECONDS="1")  # another start may do
    assert "error: process 1 of 2 did not come within 1 seconds" in out.splitlines()[-1]
    assert "Traceback" not in out
