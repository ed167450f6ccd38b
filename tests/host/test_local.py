"""The launcher of several processes on one machine, with shell commands for processes."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from launch.local import run

ROOT = pathlib.Path(__file__).parents[2]


def launch(*flags, script, wait=True):
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.local", *flags, "bash", "-c", script],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"XLA_FLAGS": ""},
    )
    return (*process.communicate(timeout=60), process.returncode) if wait else process


def test_a_dry_run_prints_each_process_with_its_variables():
    out, err, code = launch("--processes=3", "--devices=2", "--dry_run", script="exit 7")
    assert (err, code) == ("", 0)
    lines = out.splitlines()
    ports = {line.split()[0] for line in lines}
    assert len(lines) == 3
    assert len(ports) == 1
    for i, line in enumerate(lines):
        assert f"JAX_NUM_PROCESSES=3 JAX_PROCESS_ID={i} XLA_FLAGS=" in line
        assert line.endswith("bash -c 'exit 7'")


def test_all_run_and_what_they_say_is_passed_through():
    script = 'echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES"'
    out, err, code = launch("--processes=3", script=script)
    assert sorted(out.splitlines()) == ["0 of 3", "1 of 3", "2 of 3"]
    assert (err, code) == ("", 0)


def test_a_death_starts_all_again(tmp_path):
    """Process 1 is killed in its first life; the others end with the code for a lost fellow."""
    script = f'cd {tmp_path}; touch "$JAX_PROCESS_ID-$$"; \
        [ $JAX_PROCESS_ID = 1 ] && [ $(ls | grep -c 1-) = 1 ] && kill -9 $$; \
        [ $(ls | grep -c "$JAX_PROCESS_ID-") = 2 ] || {{ sleep 0.2; exit 75; }}'
    _, err, code = launch("--processes=2", "--restarts=3", script=script)
    assert code == 0
    assert err.splitlines() == [
        "launch.local: a process ended with code 137; starting all of them again, 1 of 3"
    ]
    assert len(list(tmp_path.iterdir())) == 4


def test_what_starting_again_cannot_mend_is_not_started_again():
    assert launch("--processes=2", "--restarts=3", script="exit $JAX_PROCESS_ID") == ("", "", 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--", "echo", "hi"], ""),
        (["nosuchprogram"], "there is no program nosuchprogram"),
        (["--"], "at least one process, and a command"),
        (["--devices=-1", "echo"], "--devices and --restarts are 0 or more"),
        (["--restart=3", "echo"], "--restart=3; did you mean --restarts?"),
        (["--dry-run", "echo"], "--dry-run; did you mean --dry_run?"),
    ],
)
def test_what_is_started_is_looked_at_first(words, said, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["run.py", "--processes=1", *words])
    if not said:
        assert run.main() == 0
        assert capfd.readouterr().out == "hi\n"
        return
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert ended.value.code == 2
    assert said in capfd.readouterr().err


def test_restarts_come_to_an_end():
    script = 'echo "restarts: $JAXLM_RESTARTS"; exit 75'
    out, err, code = launch("--processes=1", "--restarts=2", script=script)
    assert code == 75
    assert out.splitlines() == ["restarts: ", "restarts: 1", "restarts: 2"]
    assert err.count("starting all of them again") == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_all_and_waits_for_them(tmp_path, number):
    name, code = number.name.removeprefix("SIG"), 128 + number
    script = f'trap "sleep 0.2; echo saved; exit {code}" {name}; touch {tmp_path}/$JAX_PROCESS_ID; \
        while :; do sleep 0.1; done'
    process = launch("--processes=2", "--restarts=3", script=script, wait=False)
    end = time.monotonic() + 20
    while len(list(tmp_path.iterdir())) < 2:
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (out, err, process.returncode) == ("saved\nsaved\n", "", code)
