"""Folders that are built once: complete or absent, never half there, and checked when found.

A folder is built under a temporary name and renamed, its manifest lists each file's size and
sha256, and a file lock makes a second process wait and then find the work done. The lock is the
operating system's, so it goes when its process does, however that ends.

Where a file system has no locks, several processes may build at a time, each in a folder of its
own; the first whole one stands. What killed builds left is cleared where nobody can be writing it:
by the holder of the lock what was of its host, and by anyone what is older than a week. A build
that can go on from a part is given what one that was killed on its host has left.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import socket
import time
import uuid
from collections.abc import Callable
from typing import NamedTuple

from jaxlm.data.documents import Progress

MANIFEST = "manifest.json"
STALE_SECONDS = 7 * 86400  # that nothing was written to a folder that is being built
CHECKED_BYTES = 2**26  # up to this size the content is checked too, at about 1 GB/s


class Found(NamedTuple):
    """A built folder."""

    folder: pathlib.Path
    facts: dict  # what `build` returned
    cached: bool
    note: str  # a sentence when a damaged folder was replaced


def cached(
    folder: pathlib.Path,
    what: str,
    build: Callable[[pathlib.Path], dict],
    progress: Progress,
    goes_on: bool = False,
    waits: bool = True,
) -> Found:
    """The folder, built by `build(temporary folder) -> facts` unless it is there and whole.

    `goes_on`: the temporary folder may hold what a build left that was killed or stopped; `build`
    judges what it is worth. `waits`: for another process that builds the same, and takes over its
    work; without it both build, and the first whole folder stands.
    """
    if (facts := check(folder)[0]) is not None:
        return Found(folder, facts, True, "")
    with _lock_file(folder) as lock:
        locked = _lock(lock, what, progress, waits)
        facts, trouble = check(folder)
        if facts is not None:
            return Found(folder, facts, True, "")
        note = (
            f"The prepared {what} was damaged ({trouble}) and was built again." if trouble else ""
        )
        left = _clear(folder, locked, goes_on)
        temporary = folder.parent / _own_name(folder, locked)
        if left:
            left.rename(temporary)
        else:
            temporary.mkdir()
        try:
            facts = build(temporary)
            _write_manifest(temporary, facts)
        except BaseException as error:
            if isinstance(error, Exception) or not goes_on:  # and not a Ctrl-C
                shutil.rmtree(temporary, ignore_errors=True)
            if _full(error):
                raise ValueError(
                    f"the disk is full: {folder.parent} cannot hold the prepared {what}; free some "
                    "space, or set XDG_CACHE_HOME to a folder on another disk"
                ) from None
            raise
        facts = _settle(temporary, folder, facts)
    return Found(folder, facts, False, note)


def _own_name(folder: pathlib.Path, locked: bool) -> str:
    """A name that no other process on any host builds under. Without the lock its end is another:
    who holds that may not take it for a dead one's."""
    own = f"{os.getpid()}-{uuid.uuid4().hex[:8]}@{socket.gethostname()}"
    return f".{folder.name}.{own}{'' if locked else '.unlocked'}.building"


def _clear(folder: pathlib.Path, locked: bool, keep: bool) -> pathlib.Path | None:
    """Removes what killed builds left, where nobody can be writing it; with `keep` the newest that
    was of this host stays, and is returned."""
    dead = {}
    for left in folder.parent.glob(f".{folder.name}.*building"):
        try:
            newest = max(path.stat().st_mtime for path in (left, *left.iterdir()))
        except OSError:  # its process has just renamed or removed it
            continue
        if locked and left.name.endswith(f"@{socket.gethostname()}.building"):
            dead[left] = newest
        elif time.time() - newest > STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    kept = max(dead, key=lambda left: dead[left], default=None) if keep else None
    for left in dead.keys() - {kept}:
        shutil.rmtree(left, ignore_errors=True)
    return kept


def left_bytes(folder: pathlib.Path) -> int:
    """What unfinished builds of a folder take on the disk."""
    size = 0
    for path in folder.parent.glob(f".{folder.name}.*building/*"):
        with contextlib.suppress(OSError):  # its process has just renamed or removed it
            size += path.stat().st_size
    return size


def _settle(temporary: pathlib.Path, folder: pathlib.Path, facts: dict) -> dict:
    """Renames; a whole folder that another process put there meanwhile stays. Returns the facts
    of the one that stands."""
    try:
        temporary.rename(folder)
        return facts
    except OSError:
        there, _ = check(folder)
    if there is not None:
        shutil.rmtree(temporary, ignore_errors=True)
        return there
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one
    temporary.rename(folder)
    return facts


def _full(error: BaseException) -> bool:
    """Whether that is a disk without room; ArrayRecord raises RuntimeError for it."""
    numbers = errno.ENOSPC, errno.EDQUOT
    return getattr(error, "errno", 0) in numbers or "No space left" in str(error)


def _lock_file(folder):
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return open(folder.parent / f".{folder.name}.lock", "w")
    except OSError as error:
        raise ValueError(
            f"prepared data cannot be kept in {folder.parent} ({error.strerror}); set "
            "XDG_CACHE_HOME to a folder that can be written"
        ) from None


def check(folder: pathlib.Path) -> tuple[dict | None, str]:
    """(facts, "") of a whole folder, (None, what is wrong) of a damaged, (None, "") of none."""
    if not folder.is_dir():
        return None, ""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, (size, digest) in manifest["files"].items():
            path = folder / name
            found = path.stat().st_size
            if found != size:
                return None, f"{name} has {found} bytes instead of {size}"
            if size <= CHECKED_BYTES and file_hash(path) != digest:
                return None, f"{name} has changed"
        return manifest["facts"], ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return None, f"{type(error).__name__}: {error}"


def file_hash(path: pathlib.Path) -> str:
    """sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_manifest(folder: pathlib.Path, facts: dict) -> None:
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    files = {
        name: (size, file_hash(folder / name) if size <= CHECKED_BYTES else "")
        for name, size in sizes.items()
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files, "facts": facts}, indent=1))


def _lock(lock, what: str, progress: Progress, waits: bool) -> bool:
    """Takes the lock, waiting for it if need be; whether this process has got it."""
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if not waits:
                return False
            progress(0, 0, f"{what}: another process is preparing it, waiting")
            time.sleep(0.2)
        except OSError:  # a file system without locks: the work may be done twice, never half
            return False
