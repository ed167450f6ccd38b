"""Several processes of one command on this machine, as if it were several hosts.

    python -m launch.local --processes=4 [--devices=2] [--restarts=3] [--dry_run] -- COMMAND ...

--devices is of each process: its part of the GPUs, or that many fake devices where there is a CPU
only. When one process dies the others end with a sentence; what has not ended after 15 seconds is
killed. Then all start again, up to --restarts times; not what has finished, was stopped, or names
something to mend (exit codes 0, 1, 2, 129, 130, 143). Sets environment variables and nothing else.
"""

import argparse
import ctypes
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

from launch import options

FINAL = {0, 1, 2, 129, 130, 143}  # done, said what is wrong, was asked to stop
PATIENCE = 15.0  # seconds for the others to end after one has
PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent dies


class Parser(argparse.ArgumentParser):
    """With a suggestion for an option that it does not know."""

    def error(self, message):
        super().error(message + options.meant(message, self))


def main() -> int:
    parser = Parser(
        prog="python -m launch.local",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--devices", type=int, default=0, help="of each process; 0: all it sees")
    parser.add_argument("--restarts", type=int, default=0)
    parser.add_argument("--dry_run", action="store_true", help="print what would be started")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    flags = parser.parse_args()
    if flags.command[:1] == ["--"]:
        del flags.command[0]
    if flags.processes < 1 or not flags.command:
        parser.error("at least one process, and a command")
    if min(flags.devices, flags.restarts) < 0:
        parser.error("--devices and --restarts are 0 or more")
    if not shutil.which(flags.command[0]):
        parser.error(f"there is no program {flags.command[0]}")
    for start in range(flags.restarts + 1):
        port = free_port()
        places = [environment(flags, i, port, start) for i in range(flags.processes)]
        if flags.dry_run:
            for place in places:
                set_ = " ".join(f"{name}={shlex.quote(value)}" for name, value in place.items())
                print(f"{set_} {shlex.join(flags.command)}")
            return 0
        code = together([start_one(flags.command, place) for place in places])
        if code in FINAL or start == flags.restarts:
            return code
        print(
            f"launch.local: a process ended with code {code}; starting all of them again, "
            f"{start + 1} of {flags.restarts}",
            file=sys.stderr,
            flush=True,
        )
    return code


def environment(flags, index: int, port: int, restarts: int) -> dict[str, str]:
    found = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(flags.processes),
        "JAX_PROCESS_ID": str(index),
    }
    if restarts:
        found["JAXLM_RESTARTS"] = str(restarts)  # jaxlm ends a run that gets no further
    if flags.devices and os.path.exists("/dev/nvidia0"):
        mine = range(index * flags.devices, (index + 1) * flags.devices)
        found["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, mine))
    elif flags.devices:
        count = f"--xla_force_host_platform_device_count={flags.devices}"
        found["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()
    return found


def start_one(command: list[str], place: dict[str, str]) -> subprocess.Popen:
    """In a group of its own, so that the terminal's Ctrl-C comes once; it dies with its parent."""

    def follow():
        os.setpgid(0, 0)
        ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGKILL)

    return subprocess.Popen(command, env=os.environ | place, preexec_fn=follow)


def together(processes: list[subprocess.Popen]) -> int:
    """Waits for all, and passes signals on; the code of the first that failed, or 0.

    A death by a signal counts as the shell counts it (137 is kill -9), and before what the others
    then ended with.
    """

    def pass_on(number, frame):
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    heard = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup asks
        heard.append(signal.SIGHUP)
    before = {n: signal.signal(n, pass_on) for n in heard}
    codes: list[int] = []
    end = float("inf")
    while left := [p for p in processes if p.poll() is None]:
        failed = any(p.returncode for p in processes if p.returncode is not None)
        end = min(end, time.monotonic() + PATIENCE if failed else end)
        if time.monotonic() > end:
            for process in left:
                process.kill()
        time.sleep(0.05)
    for number, handler in before.items():
        signal.signal(number, handler)
    codes = [p.returncode if p.returncode >= 0 else 128 - p.returncode for p in processes]
    return max((c for c in codes if c), key=lambda c: (c > 128 and c not in FINAL, c), default=0)


def free_port() -> int:
    """A free port whose next one is free too."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as one:
            port = one.getsockname()[1]
            try:
                socket.create_server(("127.0.0.1", port + 1)).close()
                return port
            except (OSError, OverflowError):
                continue
