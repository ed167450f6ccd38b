"""Documents as token ids -> rows of one length. Pure functions; all else reads and writes them.

Every document becomes [bos] ids [eos]; documents stand one after the other in one stream, and row
r holds the tokens r*L to r*L + L of it, so the last token of a row is the first of the next. Hence
each token is a target exactly once, but for bos, which is never one: nothing in the document
before can tell that another one begins. A document that goes on in the next row is there
read from position 0 on, as a new segment. Only the last row of a source is padded.

N rows, L length; T tokens of the stream.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Rows(NamedTuple):
    """Packed rows, L + 1 tokens each."""

    tokens: np.ndarray  # [N, L+1] int
    start: np.ndarray  # [N, L+1] bool, the first token of a document
    target: np.ndarray  # [N, L+1] bool, to be predicted
    real: np.ndarray  # [N, L+1] bool, not padding


class Stream(NamedTuple):
    """Tokens waiting for enough others to fill a row."""

    tokens: np.ndarray  # [T] int32
    start: np.ndarray  # [T] bool


EMPTY = Stream(np.zeros(0, np.int32), np.zeros(0, bool))


def pack(
    documents: Iterable[list[int]],
    length: int,
    bos: int,
    eos: int,
    *,
    before: Stream = EMPTY,
    last: bool = True,
) -> tuple[Rows, Stream]:
    """(rows, what is left over); call it chunk by chunk with `before` the last one's leftover."""
    stream = _appended(before, documents, bos, eos)
    count = max(0, (len(stream.tokens) - 1) // length)
    left = Stream(*(part[count * length :] for part in stream))
    padded = last and len(left.tokens) > 1
    total = (count + padded) * length + 1
    index_NL = np.arange(count + padded)[:, None] * length + np.arange(length + 1)
    real_T = np.arange(total) < len(stream.tokens)
    tokens_T, start_T = (np.zeros(total, part.dtype) for part in stream)
    used = min(total, len(stream.tokens))
    tokens_T[:used], start_T[:used] = stream.tokens[:used], stream.start[:used]
    real_NL, start_NL = real_T[index_NL], start_T[index_NL]
    rows = Rows(tokens_T[index_NL], start_NL, real_NL & ~start_NL, real_NL)
    return rows, (EMPTY if last else left)


def _appended(before: Stream, documents: Iterable[list[int]], bos: int, eos: int) -> Stream:
    tokens, starts, at = [before.tokens], [], len(before.tokens)
    for ids in documents:
        tokens.append(np.asarray([bos, *ids, eos], np.int32))
        starts.append(at)
        at += len(ids) + 2
    start = np.zeros(at, bool)
    start[: len(before.start)] = before.start
    start[starts] = True
    return Stream(np.concatenate(tokens), start)


def to_bytes(rows: Rows, dtype: np.dtype) -> list[bytes]:
    """One record a row: the tokens as `dtype`, then the three flags, a bit each per token."""
    flags = np.packbits(np.stack([rows.start, rows.target, rows.real], axis=1), axis=-1)
    tokens = np.ascontiguousarray(rows.tokens, dtype)
    return [tokens[n].tobytes() + flags[n].tobytes() for n in range(len(tokens))]


def record_bytes(length: int, dtype: np.dtype) -> int:
    """The size of every record."""
    return (length + 1) * dtype.itemsize + 3 * -(-(length + 1) // 8)


def from_bytes(records: list[bytes], length: int, dtype: np.dtype) -> Rows:
    """The inverse of `to_bytes`."""
    raw = np.frombuffer(b"".join(records), np.uint8).reshape(
        len(records), record_bytes(length, dtype)
    )
    middle = (length + 1) * dtype.itemsize
    tokens = np.ascontiguousarray(raw[:, :middle]).view(dtype).astype(np.int32)
    flags = raw[:, middle:].reshape(len(records), 3, -1)
    bits = np.unpackbits(flags, axis=-1, count=length + 1).astype(bool)
    return Rows(tokens, *(bits[:, i] for i in range(3)))


def to_batch(rows: Rows, attend_across_documents: bool) -> dict[str, np.ndarray]:
    """tokens, targets, weights, segments and positions as `jaxlm.contract` describes them.

    With `attend_across_documents` a row is one segment with running positions, so a document sees
    the ones before it. The border is still no target: the loss then means the same either way.
    """
    start_BL, real_BL = rows.start[:, :-1], rows.real[:, :-1]
    if attend_across_documents:
        start_BL = np.zeros_like(start_BL)
    index_BL = np.broadcast_to(np.arange(start_BL.shape[1], dtype=np.int32), start_BL.shape)
    first_BL = np.maximum.accumulate(np.where(start_BL, index_BL, 0), axis=1)
    segments_BL = np.cumsum(start_BL, axis=1, dtype=np.int32) + ~start_BL[:, :1]
    return {
        "tokens": np.ascontiguousarray(rows.tokens[:, :-1]),
        "targets": np.ascontiguousarray(rows.tokens[:, 1:]),
        "weights": rows.target[:, 1:].astype(np.float32),
        "segments": (segments_BL * real_BL).astype(np.int32),
        "positions": ((index_BL - first_BL) * real_BL).astype(np.int32),
    }
