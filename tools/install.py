"""Makes .venv and installs jaxlm into it, saying what is going on.

    python tools/install.py [EXTRA ...]     for example: dev parity

Standard library only, run by the Python that the environment is to be made of. An installation
that was interrupted is begun anew; pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, PIP_NO_INDEX,
proxies) are its own affair and reach it unchanged.
"""

import collections
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jaxlm.host.console import Console

VENV = Path(".venv")
BROKEN = VENV / "incomplete"  # there while pip works
LOG = VENV / "install.log"


def main(extras: list[str]) -> int:
    python = VENV / "bin" / "python"
    with Console() as console:
        if BROKEN.exists() or not works(python):
            with console.phase(1, 2, "environment", f"making {VENV} with {sys.executable}"):
                if VENV.exists():
                    console.say(f"  {VENV} is not whole: begun anew")
                    shutil.rmtree(VENV)
                problem = make()
            if problem:
                return failed(console, problem)
        BROKEN.touch()
        what = "jaxlm and what it needs" + (f", for {', '.join(extras)}" if extras else "")
        with console.phase(2, 2, "packages", f"installing {what}"):
            problem = pip(console, python, extras)
        if problem:
            return failed(console, problem)
        BROKEN.unlink()
        done = [f"installed-{extra}" for extra in extras]
        for stamp in done if done and (VENV / "installed").exists() else ["installed", *done]:
            (VENV / stamp).touch()
    return 0


def works(python: Path) -> bool:
    """Whether the environment can run pip."""
    try:
        return (
            subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0
        )
    except OSError:
        return False


def make() -> str:
    """Makes the environment; returns what went wrong."""
    done = subprocess.run([sys.executable, "-m", "venv", VENV], capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    said = (done.stdout + done.stderr).strip()
    return f"{said}\n{sys.executable} could not make {VENV}; the lines above say why"


def pip(console: Console, python: Path, extras: list[str]) -> str:
    """Installs the package in place; returns what went wrong. pip's many lines become one."""
    target = ".[" + ",".join(extras) + "]" if extras else "."
    options = ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    # Settings that would send the packages elsewhere than into the environment.
    stray = ("PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT")
    env = {k: v for k, v in os.environ.items() if k not in stray}
    tail: collections.deque[str] = collections.deque(maxlen=12)
    with (
        open(LOG, "a", encoding="utf-8") as log,
        subprocess.Popen(
            [python, "-u", "-m", "pip", "install", *options, "--editable", target],
            env=env | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        found = 0
        for line in process.stdout:
            log.write(line)
            if not line.startswith("WARNING"):
                tail.append(line.rstrip())
            found = follow(console, line.strip(), found)
    if process.returncode == 0:
        return ""
    said = "\n".join(tail)
    return (
        f"{said}\npip could not install the packages; the lines above say why, and {LOG} has all. "
        "Behind a proxy set https_proxy; for an index or wheels of your own set PIP_INDEX_URL, or "
        "PIP_FIND_LINKS and PIP_NO_INDEX=1 (with a wheel of setuptools among them). Then run the "
        "same command again"
    )


def failed(console: Console, problem: str) -> int:
    """Prints what was said on the way, and the problem last."""
    *said, last = problem.split("\n")
    console.say("\n".join(said))
    console.error(last)
    return 1


def follow(console: Console, line: str, found: int) -> int:
    """Shows what a line of pip's says; returns the number of packages so far."""
    if match := re.match(r"(?:Collecting|Processing \S*/)\s*(\w+)", line):
        console.progress(found + 1, 0, "finding packages", unit="package", name=match[1])
        return found + 1
    if match := re.match(
        r"(?:Downloading|Using cached) (?:\S*/)?([\w.]+)-\S+ \(([\d.]+ [kMG]B)\)", line
    ):
        console.progress(found, 0, "downloading", unit="package", name=f"{match[1]}, {match[2]}")
    elif match := re.match(r"Installing collected packages: (.*)", line):
        console.note(f"unpacking {len(match[1].split(','))} packages")
    elif line.startswith("Successfully installed"):
        console.say(f"  {len(line.split()) - 2} packages installed")
    return found


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("stopped; the next run begins the installation anew", file=sys.stderr)
        sys.exit(130)
