"""Huge pages for a program that has not begun yet: the same process starts over, once.

Large arrays are bound by page faults on 4 kB pages. glibc (2.35 and later) asks the kernel for 2 MB
ones, where the kernel gives them on request only, if GLIBC_TUNABLES says so when the process
begins. Faster by 1.2 to 1.55 times on CPUs, and changes no bit of the results.
JAXLM_HUGE_PAGES=0 switches it off; a setting of the user's in GLIBC_TUNABLES stays as it is.
"""

import contextlib
import os
import sys
import threading
from pathlib import Path

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TUNABLE = "glibc.malloc.hugetlb"
GUARD = "JAXLM_STARTED"  # holds the process that has started over, so that it happens once


def use() -> None:
    """Starts this process over with huge pages, if that helps and can lose nothing."""
    argv = getattr(sys, "orig_argv", [])
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if (
        os.environ.get("JAXLM_HUGE_PAGES") == "0"
        or TUNABLE in tunables
        or os.environ.get(GUARD) == str(os.getpid())
        or not _is_plain_command(argv)
        or not _huge_pages_on_request()
    ):
        return
    environment = dict(os.environ)
    environment["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, f"{TUNABLE}=1"]))
    environment[GUARD] = str(os.getpid())
    with contextlib.suppress(OSError):  # then it runs without
        os.execve(sys.executable, argv, environment)  # the same process id: signals find it


def _huge_pages_on_request():
    """Whether the kernel gives huge pages to who asks, and this C library can ask (glibc 2.35)."""
    try:
        library, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        new_enough = tuple(int(n) for n in version.split(".")[:2]) >= (2, 35)
        return library == "glibc" and new_enough and "[madvise]" in SETTING.read_text()
    except (OSError, ValueError, AttributeError):
        return False


def _is_plain_command(argv):
    """Whether this is `python [-X ...] -m module ...` and nothing else has a hand in the process.

    Under a debugger, a profiler, coverage, with a script on stdin or threads running, starting
    over could lose something.
    """
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    watched = sys.gettrace() or sys.getprofile() or {"pdb", "coverage", "pydevd"} & set(sys.modules)
    monitoring = getattr(sys, "monitoring", None)  # Python 3.12
    monitored = monitoring and any(map(monitoring.get_tool, range(6)))
    alone = threading.active_count() == 1 and "jax" not in sys.modules
    if spec is None or sys.flags.inspect or watched or monitored or not alone or not sys.executable:
        return False
    rest = list(argv[1:])
    while rest:
        option = rest.pop(0)
        if option == "-m":
            return bool(rest) and rest[0] in (spec.name, spec.name.removesuffix(".__main__"))
        if option in ("-X", "-W", "--check-hash-based-pycs"):
            rest = rest[1:]
        elif not option.startswith(("-X", "-W")) and (option[:1] != "-" or "m" in option):
            return False  # a script, stdin, or options run together as in -Im
    return False
