"""Rows on disk: ArrayRecord files that are read row by row in any order.

group_size:1, since Grain asks for single rows and a group is decompressed whole.
"""

import hashlib
import pathlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from jaxlm.data import pack

ROWS_PER_FILE = 2**20
# A random read costs 10–20 µs a row, from memory nothing: at 128 tokens a row that is half of all.
IN_MEMORY_BYTES = 2**26


class Writer:
    """Writes rows to numbered files in a folder; `hash` is of their content and order."""

    def __init__(self, folder: pathlib.Path, dtype: np.dtype, prefix: str = ""):
        self._folder, self._prefix, self.dtype = folder, prefix, dtype
        self._file = None
        self._digest = hashlib.sha256()
        self.rows, self.names = 0, []

    def write(self, rows: pack.Rows) -> None:
        self.append(pack.to_bytes(rows, self.dtype))

    def append(self, stored: Iterable[bytes]) -> None:
        """Rows that are bytes already."""
        from array_record.python.array_record_module import ArrayRecordWriter

        for record in stored:
            if self._file is None or self.rows % ROWS_PER_FILE == 0:
                self.close()
                self.names.append(f"{self._prefix}{len(self.names):05}.array_record")
                path = str(self._folder / self.names[-1])
                self._file = ArrayRecordWriter(path, "group_size:1,uncompressed")
            self._file.write(record)
            self._digest.update(record)
            self.rows += 1

    def close(self) -> None:
        if self._file:
            self._file.close()
        self._file = None

    @property
    def hash(self) -> str:
        return self._digest.hexdigest()


class Reader:
    """Random access to the rows of some files; small files are read whole, once."""

    def __init__(self, files: Sequence[pathlib.Path]):
        self._files = list(files)
        self._opened: list[Callable[[list[int]], list[bytes]] | None] = [None] * len(files)

    def read(self, rows: Sequence[int]) -> list[bytes]:
        """The records of the rows, in that order; one call a file."""
        found: list[bytes] = [b""] * len(rows)
        for file in {row // ROWS_PER_FILE for row in rows}:
            at = [i for i, row in enumerate(rows) if row // ROWS_PER_FILE == file]
            records = self._open(file)([rows[i] % ROWS_PER_FILE for i in at])
            for i, record in zip(at, records, strict=True):
                found[i] = record
        return found

    def _open(self, file: int) -> Callable[[list[int]], list[bytes]]:
        """File number -> (rows of that file -> records)."""
        from array_record.python.array_record_module import ArrayRecordReader

        if (read := self._opened[file]) is None:
            reader = ArrayRecordReader(str(self._files[file]))
            if self._files[file].stat().st_size <= IN_MEMORY_BYTES:
                records = reader.read_all()
                read = lambda rows: [records[row] for row in rows]
            else:
                read = reader.read
            self._opened[file] = read
        return read
