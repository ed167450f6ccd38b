"""The benchmark of the training step runs, on toy shapes and without torch."""

import pathlib
import subprocess
import sys

import pytest

TOOL = pathlib.Path(__file__).resolve().parents[1] / "tools" / "bench_train.py"

pytestmark = pytest.mark.slow


def test_quick_prints_rates_and_ratios():
    command = [sys.executable, TOOL, "--quick", "--dtypes=float32", "--variant=attention=xla"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if " 1.00 float32" in line]
    assert len(rows) == 1
    assert rows[0][0] == "float32"
    assert float(rows[0][1].replace(",", "")) > 0
    assert "float32, attention=xla" in done.stdout.split("tokens/s")[1]


def test_a_worker_that_fails_is_named():
    command = [sys.executable, TOOL, "--quick", "--dtypes=float32", "--torch=/bin/false"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "torch float32 ended with code" in done.stderr
