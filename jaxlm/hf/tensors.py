"""Safetensors files, read by mapping them into memory and written tensor by tensor.

The format (github.com/huggingface/safetensors): 8 bytes with the length of a JSON header, the
header with dtype, shape and place of each tensor, then their bytes. The library's own reader for
numpy copies a tensor at a tenth of the speed and its writer wants all tensors of a file at once;
here a tensor is a view of the file, of which only what is read comes into memory, and is written
wherever its place is.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
LONGEST_HEADER = 100 * 2**20  # bytes, as in the library
ALIGNMENT = 64  # of the first byte behind the header, so that tensors may be read where they are


class Spec(NamedTuple):
    """What a tensor is, and where it lies."""

    shape: tuple[int, ...]
    code: str  # its dtype as the file says it
    file: Path
    start: int  # byte of the file
    end: int


def specs(file: Path) -> dict[str, Spec]:
    """The tensors of a file by name. Raises `ValueError` for a file that is not whole."""
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > LONGEST_HEADER:
            raise ValueError(f"{file} is no safetensors file: it does not begin with a header")
        if size < 8 + length:
            raise _cut_off(file, size, f"header alone takes {8 + length:,}")
        try:
            header = json.loads(f.read(length))
            header.pop("__metadata__", None)
            found = {name: _spec(file, 8 + length, entry) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{file} is no safetensors file: its header is unreadable") from None
    whole = max((spec.end for spec in found.values()), default=8 + length)
    if size < whole:
        raise _cut_off(file, size, f"header says {whole:,}")
    for name, spec in found.items():
        wanted = math.prod(spec.shape) * DTYPES[spec.code].itemsize if spec.code in DTYPES else None
        if wanted is not None and spec.end - spec.start != wanted:
            raise ValueError(f"{file} is damaged: the bytes of {name} do not fit its shape")
    return found


def _spec(file, base, entry):
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end or not isinstance(entry["dtype"], str):
        raise ValueError
    return Spec(tuple(map(int, entry["shape"])), entry["dtype"], file, base + begin, base + end)


def _cut_off(file, size, told):
    return ValueError(
        f"{file} is cut off: it has {size:,} bytes, and its {told}; copy or download it again"
    )


def view(spec: Spec) -> np.ndarray:
    """The tensor as a read-only view of its file."""
    if spec.end == spec.start:
        return np.zeros(spec.shape, DTYPES[spec.code])
    mapped = np.memmap(
        spec.file, np.uint8, mode="r", offset=spec.start, shape=(spec.end - spec.start,)
    )
    return mapped.view(DTYPES[spec.code]).reshape(spec.shape)


class Writer:
    """Tensors into one or several files of a folder, in any order.

    with Writer(folder, {"a.weight": (shape, dtype), ...}, shard_bytes) as writer:
        writer.put("a.weight", array)

    One file is `model.safetensors`; several are numbered, with an index next to them.
    """

    def __init__(
        self,
        folder: Path,
        layout: Mapping[str, tuple[tuple[int, ...], np.dtype]],
        shard_bytes: int,
    ):
        sizes = {n: math.prod(shape) * dtype.itemsize for n, (shape, dtype) in layout.items()}
        shards = _split(sizes, shard_bytes)
        count = len(shards)
        self._places: dict[str, tuple[int, int]] = {}  # file descriptor, byte
        self._missing, self._files, self._layout = set(layout), [], dict(layout)
        names = {}
        for i, shard in enumerate(shards, 1):
            single = "model.safetensors"
            file = single if count == 1 else f"model-{i:05}-of-{count:05}.safetensors"
            names |= dict.fromkeys(shard, file)
            self._begin(folder / file, shard, sizes)
        if count > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": names}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))

    def _begin(self, path, shard, sizes):
        header: dict = {"__metadata__": {"format": "pt"}}  # whose absence transformers refuses
        at = 0
        for name in shard:
            shape, dtype = self._layout[name]
            header[name] = {
                "dtype": CODES[dtype],
                "shape": list(shape),
                "data_offsets": [at, at + sizes[name]],
            }
            at += sizes[name]
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        out = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o666)
        self._files.append(out)
        _write(out, len(text).to_bytes(8, "little") + text, 0)
        os.ftruncate(out, 8 + len(text) + at)
        for name in shard:
            self._places[name] = out, 8 + len(text) + header[name]["data_offsets"][0]

    def put(self, name: str, array: np.ndarray) -> None:
        shape, dtype = self._layout[name]
        if (array.shape, array.dtype) != (shape, dtype) or name not in self._missing:
            raise AssertionError(f"{name} {array.shape} {array.dtype} is not what was announced")
        _write(
            self._places[name][0],
            np.ascontiguousarray(array).reshape(-1).view(np.uint8),
            *self._places[name][1:],
        )
        self._missing.discard(name)

    def __enter__(self):
        return self

    def __exit__(self, kind, value, traceback):
        for file in self._files:
            if kind is None:
                os.fsync(file)
            os.close(file)
        if kind is None and self._missing:
            raise AssertionError(f"never written: {sorted(self._missing)[:5]}")


def _split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in their order, in groups of at most that many bytes (or of one name)."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _write(out: int, data, at: int) -> None:
    left = memoryview(data)
    while left:
        done = os.pwrite(out, left[: 2**30], at)
        left, at = left[done:], at + done


def names_of(found: Iterable[str], limit: int = 12) -> str:
    """Names for a message: the first ones, and how many more."""
    ordered = sorted(found)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more
