"""Contestants of a benchmark, each in a process of its own, that take turns and never run at once.

A tool starts itself once for each contestant with `--worker=<its job as JSON>`, and that process
calls `serve`: it reads a request a line and answers each with a line of JSON. All run on the
processor with our memory settings (`host/hugepages.py`). Stands apart from JAX, which a worker on
torch does not import.
"""

import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from jaxlm.host.hugepages import TUNABLES  # noqa: E402  (imports no JAX)

Json = dict[str, Any]


class Worker:
    """A contestant's process; it rests until asked for a turn."""

    def __init__(self, name: str, tool: str, python: str, job: Json, *flags: str):
        """`tool`: the file of the benchmark; `flags`: of its command line."""
        self.name, self.turns = name, []
        tunables = ":".join(f"{name}={value}" for name, value in TUNABLES.items())
        environment = dict(os.environ, JAX_PLATFORMS="cpu", GLIBC_TUNABLES=tunables)
        command = [python, tool, f"--worker={json.dumps(job)}", *flags]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)
        self.ready = self._read()

    def turn(self, request: Any = None) -> Json:
        """What the worker answers, and how long it took."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        self.turns.append(self._read())
        return self.turns[-1]

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _read(self):
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{self.name} ended with code {self.process.wait()}; see above")


def serve(about: Json, answer: Callable[[Any], Json]) -> None:
    """The worker's side: says what it is, then answers each request, with seconds of wall and of
    processor."""
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        found = answer(json.loads(line))
        turn = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(json.dumps({**turn, **found}), flush=True)
