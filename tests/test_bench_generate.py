"""The benchmark of generation runs, on a toy shape and without torch."""

import math
import pathlib
import subprocess
import sys

import pytest

TOOL = pathlib.Path(__file__).resolve().parents[1] / "tools" / "bench_generate.py"


@pytest.mark.slow
def test_quick_prints_rates_for_each_batch():
    command = [sys.executable, TOOL, "--quick", "--dtypes=float32", "--torch="]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("float32  ")]
    found = [row for row in rows if row[1] in ("1", "2")]
    assert [row[1] for row in found] == ["1", "2"]
    for row in found:
        # Any: what a toy takes is less than the noise, and decoding is told by a difference.
        assert all(math.isfinite(float(number.replace(",", ""))) for number in row[2:])
        assert len(row) == 7
