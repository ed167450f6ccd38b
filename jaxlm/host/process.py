"""What a command does before JAX is imported, and how it ends when something goes wrong.

    from jaxlm.host import process
    process.start(__name__)      # the first lines of a command; nothing happens in an import
    import jax ...
    if __name__ == "__main__":
        process.run(main)

What the user has set in the environment is never changed; JAXLM_HUGE_PAGES=0, JAXLM_VERBOSE=1 and
JAXLM_COMPILER_FLAGS=0 switch the larger liberties off.
"""

import contextlib
import datetime
import errno
import hashlib
import logging
import os
import select
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from jaxlm.host import cluster, exhausted, flags, gpu_memory, hardware, hugepages
from jaxlm.host.fellows import CRASHED
from jaxlm.host.hardware import unused_accelerator
from jaxlm.host.signals import hangups_are_ignored

__all__ = [
    "began",
    "cache_dir",
    "command",
    "crash_folder",
    "notes",
    "run",
    "start",
    "unused_accelerator",
]

HERE = Path(__file__).resolve().parents[1]  # our own package

QUIET = {
    "TF_CPP_MIN_LOG_LEVEL": "2",  # errors only, of XLA and libtpu
    "TPU_MIN_LOG_LEVEL": "2",
    "TPU_STDERR_LOG_LEVEL": "2",
    "GRPC_VERBOSITY": "ERROR",
    "GLOG_minloglevel": "2",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # "PyTorch was not found": on purpose
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "true",  # its default, said aloud, spares a warning at each fork
}

AGAIN = "the same command starts from the beginning"
ROOM = "take less at a time, or more devices"

notes: list[str] = []  # what `start` could not do, for the console to warn of
_crashes: list[Path] = []  # where to write the traceback of a crash
_loading = threading.Event()  # set when the imports are over


class Terminated(BaseException):
    """SIGTERM or SIGHUP, where nobody else handles it; its number."""


def _terminate(number, frame):
    raise Terminated(number)


def start(name: str) -> None:
    """Prepares this process, if `name` is "__main__": memory, quiet libraries, caches."""
    if name != "__main__":
        return
    _flush()
    hugepages.use()
    _say_loading()
    if os.environ.get("JAXLM_VERBOSE", "0") in ("", "0"):
        _quiet()
    os.environ.setdefault("JAX_TRACEBACK_FILTERING", "off")  # tracebacks go to a file: whole ones
    hardware.avoid_absent_tpu()
    gpu_memory.use()
    notes.extend(flags.use(cache_dir() / "flags"))
    _keep_compiled_programs()


def run(main: Callable[[], int | None], again: str = AGAIN, room: str = ROOM) -> NoReturn:
    """Calls `main` and exits with its code; whatever it raises becomes one line and a code.

    `again`: what the same command does after Ctrl-C, SIGTERM or SIGHUP. `room`: what helps where it
    takes more than a device's memory.

    A `ValueError` that our own code raises is the user's to mend, and so is a full or read-only
    disk, or a device whose memory is too small: code 1, nothing that another start would cure. Any
    other exception is a bug, or a machine that failed: its traceback goes to `crash-<time>.log`,
    which is named.
    """
    _loading.set()
    failed = True
    try:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if not hangups_are_ignored(number):
                signal.signal(number, _terminate)
        code = main() or 0
        cluster.leave("", 0)
        failed = False
    except KeyboardInterrupt:
        _leave(_last_words(f"stopped by Ctrl-C; {again}", 128 + signal.SIGINT))
    except Terminated as by:
        (number,) = by.args
        _leave(_last_words(f"stopped by {signal.Signals(number).name}; {again}", 128 + number))
    except SystemExit as error:
        code = _last_words(error.code, 1) if isinstance(error.code, str) else error.code or 0
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            code = 128 + signal.SIGPIPE  # `... | head`: nobody is left to talk to
        elif _is_for_users(error):
            code = _last_words(f"error: {_sentence(error)}", getattr(error, "code", 1))
        elif exhausted.ran_out(error):
            code = _last_words(f"error: {exhausted.sentence(error, room)}", 1)
        else:
            cluster.suspect()
            said = str(error).strip().split("\n")[0][:300]
            where = _write_crash(error)
            code = _last_words(f"crashed: {type(error).__name__}: {said}\n{where}", CRASHED)
    _flush()
    if failed and cluster.several():
        _leave(code)  # at its end JAX would wait for the others, for minutes
    sys.exit(code)


def crash_folder(path: Path | str) -> None:
    """From now on a crash is written there."""
    _crashes.insert(0, Path(path))


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/jaxlm`, by default `~/.cache/jaxlm`. Not created."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return Path(home if os.path.isabs(home) else os.path.expanduser("~/.cache")) / "jaxlm"


def began() -> float:
    """When this process started, in unix seconds; where the system does not tell, now."""
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        ticks = int(after_name[19])  # after the machine started
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        return time.time() - max(age, 0.0)
    return time.time()


def command() -> str:
    """The command that started this process, as it can be typed again."""
    return shlex.join(getattr(sys, "orig_argv", None) or [sys.executable, *sys.argv])


def hush_libraries() -> None:
    """What C++ code prints to stdout is dropped from now on (gloo: a line for each connection)."""
    if sys.stdout is None or os.environ.get("JAXLM_VERBOSE", "0") not in ("", "0"):
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        kept = os.dup(sys.stdout.fileno())
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        old = sys.stdout
        sys.stdout = open(  # noqa: SIM115
            kept, "w", buffering=1, encoding=old.encoding, errors=old.errors
        )


# Noise.


def _quiet():
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MPLCONFIGDIR", str(cache_dir() / "matplotlib"))  # not in the home folder
    logging.getLogger("jax._src.xla_bridge").addFilter(
        lambda record: "may be present" not in record.getMessage()  # `unused_accelerator` says it
    )
    with contextlib.suppress(ImportError):
        from absl import logging as absl_logging

        # A filter, since parsing absl's flags sets the level anew.
        absl_logging.get_absl_logger().addFilter(lambda r: r.levelno >= logging.ERROR)


def _say_loading():
    """Importing the libraries takes a while on a cold disk: says so from the fourth second on."""
    ranks = ("JAX_PROCESS_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "JOB_COMPLETION_INDEX")
    rank = next((os.environ[name] for name in ranks if name in os.environ), "0")
    if rank != "0" or sys.stdout is None:
        return
    began = time.monotonic()

    def talk():
        while not _loading.wait(4):
            with contextlib.suppress(OSError, ValueError):
                print(f"  ... loading JAX, {time.monotonic() - began:.0f} s", flush=True)

    threading.Thread(target=talk, daemon=True, name="loading").start()


# Compiled programs.


def _keep_compiled_programs():
    """Turns JAX's compilation cache on, for the smallest programs too.

    One folder for each kind of processor: JAX's key does not hold the instruction set, and a home
    folder may be shared by several machines.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = cache_dir() / "xla" / _processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        notes.append(f"compiled programs are not kept: {folder}: {error.strerror or error}")
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def _processor():
    """A short name for the processor and what it can do."""
    about = [os.uname().machine]
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        about += [line for line in first if line.startswith(("model name", "flags", "Features"))]
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:12]


# The end.


def _is_for_users(error):
    if isinstance(error, OSError) and error.errno in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EROFS,
        errno.EACCES,
    ):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    if not isinstance(error, ValueError) or not frames:
        return False
    raised = (frames[-1].line or "raise").startswith("raise")  # not int("x"), or a bad unpacking
    return raised and HERE in Path(frames[-1].filename).resolve().parents


def _sentence(error):
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return error.strerror if isinstance(error, OSError) else str(error)


def _write_crash(error):
    """Writes the traceback where it can be written, and says where that was."""
    text = f"{command()}\n\n{''.join(traceback.format_exception(error))}"
    name = f"crash-{datetime.datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.log"
    for folder in (*_crashes, cache_dir(), Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
            return f"the full traceback is in {folder / name}"
    return text


def _leave(code) -> NoReturn:
    """Ends at once: the interpreter's own end would wait for XLA's threads, or crash on them."""
    _flush()
    os._exit(code)


def _last_words(text, code):
    _flush()
    if not cluster.leave(text, code):
        return code  # process 0 says the same
    text = cluster.prefix() + text
    with contextlib.suppress(OSError, ValueError, AttributeError):
        encoding = sys.stderr.encoding or "utf-8"
        print(text.encode(encoding, "replace").decode(encoding), file=sys.stderr, flush=True)
    return code


def _flush():
    """Flushes stdout; if its reader has gone, keeps Python from complaining about that at exit."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, sys.stdout.fileno())


def _reader_has_gone():
    """Whether stdout is a pipe that nobody reads any more."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        poll = select.poll()
        poll.register(sys.stdout, 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    return False
