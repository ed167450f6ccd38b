"""The benchmark of loading runs, on a small folder and without torch."""

import pathlib
import subprocess
import sys

import pytest

TOOL = pathlib.Path(__file__).resolve().parents[1] / "tools" / "bench_load.py"


@pytest.mark.slow
def test_it_prints_seconds_and_memory_of_each_way():
    command = [sys.executable, TOOL, "--gb=0.01", "--turns=1", "--ways=jaxlm,convert"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()[2:]}
    assert rows.keys() == {"jaxlm", "convert"}
    assert all(float(row[0]) > 0 and float(row[2]) > 0 for row in rows.values())
