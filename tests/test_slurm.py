"""The SLURM launcher under real SLURM: accepted, refused, requeued after a loss and SIGTERM."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm_cluster

from launch.slurm import __main__ as slurm

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not slurm_cluster.USABLE, reason=slurm_cluster.REASON),
]
PROBE = """#!/bin/bash
echo "start $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_PROCID of $SLURM_NTASKS, $SLURM_LOCALID here"
case "${SLURM_RESTART_COUNT:-0}" in
  0) exit 75 ;;  # lost a fellow
  1) trap 'exit 143' TERM; touch "waits-$SLURM_PROCID"; sleep 60 & wait ;;
esac
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    with slurm_cluster.running(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--nodes=2", "--time=24:00:00", "--cpus_per_process=8"], "using 128 processors on nodes"),
        (["--nodes=2", "--process=node", "--gpus_per_node=4"], "on nodes n[1-2] in partition all"),
        (["--nodes=2", "--grace=600", "--process=node", "--gpus_per_node=0"], "to start at"),
        (["--nodes=3"], "Requested node configuration is not available"),
        (["--gpus_per_node=9"], "Requested node configuration is not available"),
        (["--partition=none"], "invalid partition specified"),
        (["--sbatch=--no-such-option"], "unrecognized option '--no-such-option'"),
    ],
)
def test_sbatch_reads_the_script(environment, options, says):
    p = slurm.parser()
    script = slurm.script(p, *p.split([*options, "--", "true"]))
    call = ["sbatch", "--test-only"]
    done = subprocess.run(call, input=script, env=environment, capture_output=True, text=True)
    assert says in done.stderr
    assert (done.returncode == 0) == ("to start at" in done.stderr)


def test_a_job_goes_on_after_a_loss_and_after_sigterm(environment, tmp_path):
    probe, log = tmp_path / "probe.sh", tmp_path / "job.log"
    probe.write_text(PROBE)
    probe.chmod(0o755)
    options = ["--nodes=2", "--gpus_per_node=2", f"--log={log}", f"--folder={tmp_path}"]
    call = [sys.executable, "-m", "launch.slurm", *options, "--", str(probe)]
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True)
    job = done.stdout.split()[-1]
    ask = lambda *call: subprocess.run(call, env=environment, capture_output=True, text=True).stdout
    state = lambda: ask("squeue", "-h", "-j", job, "-o", "%T").strip()
    text = lambda: log.read_text() if log.exists() else ""
    again = lambda: ask("scontrol", "update", f"job={job}", "StartTime=now")  # else minutes later

    wait_for(lambda: state() == "PENDING" and "start 2 follows" in text(), text)
    again()
    wait_for(lambda: len(list(tmp_path.glob("waits-*"))) == 4, text)
    ask("scancel", "--signal=TERM", job)  # to the steps, as --signal=TERM@... has it
    wait_for(lambda: state() == "PENDING" and "start 3 follows" in text(), text)
    assert "ended with code 75: start 2 follows" in text()
    assert "ended with code 143: start 3 follows" in text()
    again()
    wait_for(lambda: "JobState=COMPLETED" in ask("scontrol", "show", "job", job), text)
    said = text()
    for start in (1, 2, 3):
        for i in range(4):
            assert f"start {start}: {i} of 4, {i % 2} here" in said


def wait_for(condition, text):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, text()
        time.sleep(0.2)
