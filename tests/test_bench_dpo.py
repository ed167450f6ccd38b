"""The benchmark of preferences runs, on a toy shape and without TRL."""

import pathlib
import subprocess
import sys

import pytest

TOOL = pathlib.Path(__file__).resolve().parents[1] / "tools" / "bench_dpo.py"


@pytest.mark.slow
def test_quick_prints_rates_and_memory():
    command = [sys.executable, TOOL, "--quick", "--trl=", "--kinds=precomputed"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    name = "DPO, precomputed"
    (row,) = (line for line in done.stdout.split("ms/step")[1].splitlines() if name in line)
    pairs, tokens, cpu, peak = (float(x.replace(",", "")) for x in row[33:].split()[:4])
    assert tokens == pytest.approx(32 * pairs, rel=0.1)
    assert cpu > 0
    assert peak > 50
