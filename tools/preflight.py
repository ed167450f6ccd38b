"""Whether this machine can run jaxlm, before anything is installed: Python, venv, disk, memory.

    python tools/preflight.py [folder of an existing environment]

Says what is missing and the remedy, and exits with 1, or prints one line and exits with 0. Written
in the Python that versions 2.7 to 3.x have in common, since an old one must run it to be told so.
"""

# ruff: noqa: UP010, UP024, UP031, RUF005
from __future__ import print_function

import os
import platform
import sys
import tempfile

OLDEST, NEWEST = (3, 11), (3, 13)  # tested; newer ones are only warned of
DISK_GB = 3.0  # .venv with the test tools, and runs; without the test tools 0.5 less
UNPACK_GB = 0.7  # in the temporary folder, while pip works
MEMORY_GB = 3.0


def main(argv):
    problems = list(filter(None, [python(), existing(argv[1:]), modules(), machine()]))
    if not problems:
        problems = list(filter(None, [disk(".", DISK_GB), disk(tempfile.gettempdir(), UNPACK_GB)]))
    if problems:
        for problem in problems:
            print("preflight: " + problem, file=sys.stderr)
        return 1
    for warning in filter(None, [newer(), memory()]):
        print("preflight: warning: " + warning)
    print(
        "preflight: Python %s, %.0f GB of disk and %.1f GB of memory free: fine"
        % (platform.python_version(), free_disk_gb("."), free_memory_gb() or 0)
    )
    return 0


def python():
    if sys.version_info[:2] >= OLDEST:
        if sys.maxsize > 2**32:
            return None
        return "%s is a 32-bit Python, and JAX exists for 64 bits only" % sys.executable
    return (
        "jaxlm needs Python %d.%d or newer, and %s is %s. Install one (Debian, Ubuntu: "
        "sudo apt install python3 python3-venv; Fedora: sudo dnf install python3.13; macOS: "
        "brew install python@3.13; without rights: pyenv or uv), or name one that you have: "
        "make PYTHON=/path/to/python3.13"
        % (OLDEST + (sys.executable or "this Python", platform.python_version()))
    )


def newer():
    if sys.version_info[:2] > NEWEST:
        return (
            "Python %s is newer than what jaxlm is tested on (up to %d.%d); if a package has no "
            "wheel for it, use an older one: make PYTHON=python%d.%d"
            % ((platform.python_version(),) + NEWEST + NEWEST)
        )


def existing(folders):
    """An environment that another Python made than the one asked for now."""
    for folder in folders:
        try:
            with open(os.path.join(folder, "pyvenv.cfg")) as file:
                fields = dict(line.split("=", 1) for line in file if "=" in line)
        except (OSError, IOError):
            continue
        made = {key.strip(): value.strip() for key, value in fields.items()}.get("version", "")
        if made and made != platform.python_version():
            return (
                "%s was made with Python %s, and PYTHON=%s is %s; run make clean first, or leave "
                "PYTHON away" % (folder, made, sys.executable, platform.python_version())
            )


def modules():
    try:
        import ensurepip
        import venv

        assert ensurepip, venv
    except ImportError as error:
        if sys.version_info[:2] < OLDEST:
            return None
        return (
            "this Python cannot make environments (%s). Debian, Ubuntu: "
            "sudo apt install python%d.%d-venv" % ((error,) + sys.version_info[:2])
        )


def machine():
    if sys.platform.startswith("linux") and "musl" in str(build_triplet()):
        return "JAX has no wheels for musl systems such as Alpine; use a glibc image (python:3.12)"
    if sys.platform == "darwin" and platform.machine() == "x86_64":
        return "JAX has no wheels for x86_64 Pythons on a Mac; use an arm64 one"
    if sys.platform == "win32":
        return "JAX's packages for training have no Windows wheels; use WSL2"


def build_triplet():
    import sysconfig

    return sysconfig.get_config_var("SOABI") or ""


def disk(folder, needed_gb):
    free = free_disk_gb(folder)
    if free < needed_gb:
        return "%s has %.1f GB of disk free, and %.1f GB are needed; make room%s" % (
            os.path.abspath(folder),
            free,
            needed_gb,
            "" if folder == "." else ", or set TMPDIR to a folder on a larger disk",
        )


def free_disk_gb(folder):
    if not hasattr(os, "statvfs"):
        return float("inf")
    about = os.statvfs(folder)
    return about.f_bavail * about.f_frsize / 1e9


def memory():
    free = free_memory_gb()
    if free is not None and free < MEMORY_GB:
        return (
            "%.1f GB of memory are free, and quickstart takes up to %.1f; if it is killed, close "
            "other programs or use --config.batch=8" % (free, MEMORY_GB)
        )


def free_memory_gb():
    """What is available, within the limits of a container; None where it cannot be told."""
    found = []
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    found.append(int(line.split()[1]) * 1024 / 1e9)
    except (OSError, IOError):
        pass
    try:
        limit, used = [number("/sys/fs/cgroup/memory." + name) for name in ("max", "current")]
        found.append((limit - used) / 1e9)
    except (OSError, IOError, ValueError):  # no limit reads "max"
        pass
    return min(found) if found else None


def number(path):
    with open(path) as file:
        return int(file.read())


if __name__ == "__main__":
    sys.exit(main(sys.argv))
