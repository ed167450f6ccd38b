"""Results as files: lm-eval's own names and structure, each appearing whole or not at all."""

import datetime
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.files import write_atomically
from jaxlm.folder import versions


def stamp() -> str:
    """The time as lm-eval writes it into the names of its files."""
    return datetime.datetime.now().isoformat().replace(":", "-")


def require_folder(folder: Path) -> None:
    """Raises `ValueError` where nothing can be written into such a folder."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "cannot be written into" if there.is_dir() else "is no folder"
        raise ValueError(f"the results cannot go to {folder}: {there} {what}")


def tasks(folder: Path, results: dict[str, Any], about: dict[str, Any], *, samples: bool) -> Path:
    """`results_TIME.json`, and on request `samples_TASK_TIME.jsonl` for each task."""
    folder.mkdir(parents=True, exist_ok=True)
    when, found = stamp(), results.get("samples") or {}
    if samples:
        for task, rows in found.items():
            name = "".join(c if c.isalnum() or c == "_" else "_" for c in task)
            lines = "".join(_json(_sample(row)) + "\n" for row in rows)
            write_atomically(folder / f"samples_{name}_{when}.jsonl", lines)
    hashes = {
        task: _hash("".join(r["doc_hash"] + r["prompt_hash"] + r["target_hash"] for r in rows))
        for task, rows in found.items()
    }
    whole = {k: v for k, v in results.items() if k != "samples"} | {"task_hashes": hashes} | about
    path = folder / f"results_{when}.json"
    write_atomically(path, _json(whole | {"jaxlm_versions": versions()}, indent=2))
    return path


def corpora(
    folder: Path, figures: dict[str, dict], rows: dict[str, list[dict]], about: dict[str, Any]
) -> Path:
    """`compression_TIME.json`, and `documents_SOURCE_TIME.jsonl` for each source with rows."""
    apart = {f"documents_{name}": some for name, some in rows.items()}
    return _figures(folder, "compression", figures, apart, about)


def lengths(
    folder: Path, figures: list[dict], rows: list[dict[str, Any]], about: dict[str, Any]
) -> Path:
    """`lengths_TIME.json`, and `answers_TIME.jsonl` where there are rows."""
    return _figures(folder, "lengths", figures, {"answers": rows}, about)


def _figures(folder, kind, figures, rows, about):
    """Figures with what they are of, and next to them files of rows, but for empty ones."""
    folder.mkdir(parents=True, exist_ok=True)
    when = stamp()
    for name, some in rows.items():
        if some:
            lines = "".join(_json(row) + "\n" for row in some)
            write_atomically(folder / f"{name}_{when}.jsonl", lines)
    path = folder / f"{kind}_{when}.json"
    whole = {kind: figures} | about | {"jaxlm_versions": versions()}
    write_atomically(path, _json(whole, indent=2))
    return path


def _sample(row):
    """As lm-eval writes one: the arguments by number, the answers as strings."""
    arguments = {
        f"gen_args_{i}": {f"arg_{j}": value for j, value in enumerate(args)}
        for i, args in enumerate(row["arguments"])
    }
    strings = {key: _as_strings(row[key]) for key in ("resps", "filtered_resps")}
    return row | strings | {"arguments": arguments, "target": str(row["target"])}


def _as_strings(value):
    return [_as_strings(v) for v in value] if isinstance(value, list | tuple) else str(value)


def _hash(text):
    return hashlib.sha256(text.encode()).hexdigest()


def _json(value, indent=None):
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, default=_plain)


def _finite(value):
    """NaN and infinity are no JSON."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    value = value.item() if isinstance(value, np.generic) else value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value):
    return sorted(value) if isinstance(value, set | frozenset) else str(value)
