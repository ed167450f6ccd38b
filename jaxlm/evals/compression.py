"""Bits per character on held-out documents, next to general-purpose compressors.

The model's figure is the sum of -log2 p over the tokens of each document and its end, over its
characters (https://arxiv.org/abs/2404.09937, where windows overlap too). A document is read in
windows of the training length that overlap: each window scores only the tokens that the one before
did not, so that all but the first have at least `length - stride` tokens before them; between
documents the context resets. Every token is scored once, the tail included. Differs from the
paper: windows are as long as the model was trained on, and documents never share a context.
"""

import bz2
import dataclasses
import gzip
import lzma
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rows:
    """Windows of documents packed into rows; N rows of L positions."""

    batch: dict[str, np.ndarray]  # tokens, targets, weights, segments, positions, each [N, L]
    document_NL: np.ndarray  # which document each target belongs to
    offset_NL: np.ndarray  # which token of it

    def __len__(self):
        return len(self.document_NL)


def windows(documents: Sequence[Sequence[int]], length: int, stride: int) -> Rows:
    """Cuts documents, each [bos, tokens..., eos], into packed rows of overlapping windows."""
    pieces = []  # document, start of the window, first target it scores, one past the last
    for d, ids in enumerate(documents):
        targets = len(ids) - 1
        ends = [min(length, targets)]
        while ends[-1] < targets:
            ends.append(min(ends[-1] + stride, targets))
        for first, end in zip([0, *ends], ends, strict=False):
            pieces.append((d, max(0, end - length), first, end))
    rows = _best_fit([end - start for _, start, _, end in pieces], length)
    return _fill(documents, pieces, rows, length)


def _best_fit(sizes, length):
    """Row of each piece: longest first, into the fullest row that still has room."""
    rooms: list[list[int]] = [[] for _ in range(length + 1)]  # free positions -> rows
    row_of, count = [0] * len(sizes), 0
    for piece in sorted(range(len(sizes)), key=lambda p: -sizes[p]):
        size = sizes[piece]
        room = next((r for r in range(size, length + 1) if rooms[r]), None)
        if room is None:
            room, row, count = length, count, count + 1
        else:
            row = rooms[room].pop()
        row_of[piece] = row
        rooms[room - size].append(row)
    return row_of


def _fill(documents, pieces, row_of, length):
    count = max(row_of, default=-1) + 1
    zeros = lambda kind: np.zeros((count, length), kind)
    names = ("tokens", "targets", "segments", "positions")
    batch = {name: zeros(np.int32) for name in names} | {"weights": zeros(np.float32)}
    document_NL, offset_NL = zeros(np.int32), zeros(np.int32)
    used, segments = [0] * count, [0] * count
    for (d, start, first, end), row in zip(pieces, row_of, strict=True):
        ids, at, size = documents[d], used[row], end - start
        here = (row, slice(at, at + size))
        used[row] += size
        segments[row] += 1
        batch["tokens"][here] = ids[start:end]
        batch["targets"][here] = ids[start + 1 : end + 1]
        batch["segments"][here] = segments[row]
        batch["positions"][here] = np.arange(size)
        batch["weights"][here] = np.arange(start, end) >= first
        document_NL[here] = d
        offset_NL[here] = np.arange(start, end)
    return Rows(batch, document_NL, offset_NL)


def token_bits(rows: Rows, nats: Callable, batch: int, tick=lambda done, total: None):
    """Bits of every scored target, one array a document (in its order).

    `nats(batch) -> [B, L]` scores a dict of numpy arrays with exactly `batch` rows; the last one is
    filled up with rows of padding, which weigh nothing.
    """
    found = []
    for i in range(0, len(rows), batch):
        part = {k: v[i : i + batch] for k, v in rows.batch.items()}
        short = batch - len(part["tokens"])
        part = {k: np.pad(v, ((0, short), (0, 0))) for k, v in part.items()}
        found.append(np.asarray(nats(part))[: batch - short])
        tick(min(i + batch, len(rows)), len(rows))
    nats_NL = np.concatenate(found) if found else np.zeros((0, 0))
    scored = rows.batch["weights"] > 0
    document, offset = rows.document_NL[scored], rows.offset_NL[scored]
    bits = nats_NL[scored].astype(np.float64) / math.log(2)
    order = np.lexsort((offset, document))
    cuts = np.searchsorted(document[order], np.arange(1, document.max(initial=0) + 1))
    return np.split(bits[order], cuts)


COMPRESSORS: dict[str, Callable[[bytes], int]] = {
    "gzip": lambda data: len(gzip.compress(data, 9, mtime=0)),
    "bz2": lambda data: len(bz2.compress(data, 9)),
    "xz": lambda data: len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
}


def compressors(texts: Sequence[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Bits per character of each compressor: of all texts as one stream, and file by file."""
    data = [text.encode() for text in texts]
    characters = max(sum(map(len, texts)), 1)
    joined = b"".join(data)
    stream = {n: 8 * size(joined) / characters for n, size in COMPRESSORS.items()}
    files = {n: 8 * sum(map(size, data)) / characters for n, size in COMPRESSORS.items()}
    return stream, files


def primed_xz(texts: Sequence[str], seen: Iterable[str]) -> float:
    """Bits per character of xz on the texts, after it has read what the model was trained on.

    The size of (seen + texts) less the size of (seen), with a dictionary that holds it all.
    """
    before, after = "".join(seen).encode(), "".join(texts).encode()
    window = min(max(2 ** (len(before) + len(after)).bit_length(), 2**16), 2**30)
    preset = 9 | lzma.PRESET_EXTREME
    filters = [{"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": window}]
    size = lambda data: len(lzma.compress(data, lzma.FORMAT_RAW, filters=filters))
    return 8 * (size(before + after) - size(before)) / max(sum(map(len, texts)), 1)
