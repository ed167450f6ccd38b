"""Bits per character of the documents of some sources, and their MIN-K%, by `evals.stream`."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.data import sources
from jaxlm.data.documents import Document, Tally
from jaxlm.evals import stream
from jaxlm.evals.model import Model

HELD_OUT = 0.045  # of the built-in corpora, of which only these documents are read, as in training
MALFORMED = 0.01  # share of a source's rows that may be unreadable


def specs(text: str, key: str, glob: str) -> list[sources.SourceSpec]:
    """ "PATH, PATH" as sources, each named after its file or folder."""
    found = []
    for path in filter(None, map(str.strip, text.split(","))):
        plain = "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(path).name)
        name = (plain.split(".")[0] or "text").strip("-") or "text"
        names = [spec.name for spec in found]
        while name in names:
            name += "-2"
        found.append(sources.SourceSpec(name, path, text=key, glob=glob))
    if not found:
        raise ValueError("--compression names no file, folder or built-in corpus")
    return found


def read(spec: sources.SourceSpec, characters: int, say: Callable[[str], None]) -> list[Document]:
    """The first documents that hold at most `characters` together (0 = all); at least one.

    One that is too long is passed over while less than half of them is there.
    """
    tally, kept, total = Tally(), [], 0
    for document in sources.read(spec, tally, HELD_OUT):
        if document.split == "train":
            continue
        size = len(document.text)
        if kept and characters and total + size > characters:
            if 2 * total >= characters:
                break
            continue
        total += size
        kept.append(document)
    if tally.malformed > MALFORMED * tally.rows:
        raise ValueError(
            f"{spec.source}: {tally.malformed:,} of {tally.rows:,} rows are malformed. The first: "
            f"{'; '.join(tally.where)}. {sources.remedy(spec)}"
        )
    if tally.malformed:
        say(
            f"{spec.source}: {tally.malformed:,} of {tally.rows:,} rows, malformed, were left out. "
            f"The first: {tally.where[0]}"
        )
    if warning := sources.read_as_one_text(spec):
        say(warning)
    if not kept:
        raise ValueError(f"{spec.source} holds no text")
    return kept


def fitting(model: Model, window: int, stride: int) -> None:
    """Raises `ValueError` where the model cannot read such windows."""
    if window > model.length:
        raise ValueError(
            f"--window={window} is longer than the model's context of {model.length} tokens: give "
            f"--window={model.length}, whose figures compare with others of that window only"
        )
    stream.windows(0, window, stride)


def measure(
    model: Model, documents: list[Document], *, window: int, stride: int, percent: float
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The figures of a source, and one row a document, empty where `percent` is 0.

    The second looks at each document alone, after a bos (or eos, where there is none).
    """
    texts = [document.text for document in documents]
    encoded = model.texts.encode(texts)
    ids = [i for document in encoded for i in document]
    nats = stream.stream_nats(model.score, ids, window, stride)
    characters = sum(map(len, texts))
    figures = {
        "bits_per_character": stream.bits_per_character(nats, characters),
        "nats_per_token": float(nats.mean(dtype=np.float64)) if len(nats) else math.nan,
        "characters": characters,
        "tokens": len(ids),
        "documents": len(documents),
        "window": window,
        "stride": stride,
    }
    if not percent:
        return figures, []
    prefix = model.texts.prefix
    alone = [row if row[:1] == [prefix] else [prefix, *row] for row in encoded]
    rows = []
    found = stream.documents_nats(model.score, alone, model.length)
    for document, nats in zip(documents, found, strict=True):
        rows.append(
            {
                "name": document.name,
                "characters": len(document.text),
                "tokens": len(nats),
                "bits_per_character": stream.bits_per_character(nats, len(document.text)),
                f"min_{percent:g}%": stream.min_k(nats, percent),
            }
        )
    each = [row[f"min_{percent:g}%"] for row in rows if row["tokens"]]
    figures["min_k_percent"] = percent
    figures["min_k"] = float(np.mean(each)) if each else math.nan
    figures["min_k_lowest"] = float(np.min(each)) if each else math.nan
    return figures, rows
