"""Files that commands write: each whole or not at all, and on a file system."""

import os
import re
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """The file appears whole or not at all, also after a crash of the machine."""
    half = path.with_name(path.name + ".tmp")
    try:
        with half.open("w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)


def local(name: str, said: str) -> Path:
    """The path that somebody names. Raises `ValueError` for an address, such as that of a bucket,
    which as a path would be a folder `gs:` here. `said`: what names it, for the message."""
    if found := re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", name):
        raise ValueError(
            f"{said}={name!r} is an address, and files are written to file systems only; mount it "
            f"(a bucket with gcsfuse or the like) and name its folder, or leave out {found[0]}"
        )
    return Path(name).expanduser()
