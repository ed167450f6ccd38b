"""A .npy file [rows, ...] whose rows are written in any order, by real writes.

A memory map would be shorter, but a page of it that finds the disk full ends the process by SIGBUS,
without a word; a write raises `OSError`. The space is taken when the file is made, where the file
system can do that, so that a disk that is too small is known before anything is computed.
"""

import contextlib
import errno
import os
from pathlib import Path

import numpy as np

_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # take space ahead


class RowFile:
    """Makes the file, its rows zero, and writes into it; or goes on with one that is there."""

    def __init__(self, path: Path, dtype: np.dtype, shape: tuple[int, ...], *, there: bool = False):
        """`shape`: of the whole array. Raises `ValueError` where the file that is to be `there` is
        another one, `OSError` where it is none."""
        self._path, self._dtype, self._rows = path, dtype, shape[0]
        self._each = dtype.itemsize * int(np.prod(shape[1:], dtype=int))
        if there:
            found = np.load(path, mmap_mode="r")
            if (found.dtype, found.shape) != (dtype, shape):
                raise ValueError(f"{path} is {found.dtype} {found.shape}, not {dtype} {shape}")
            self._start = found.offset
            return
        descr = np.lib.format.dtype_to_descr(dtype)
        with open(path, "xb") as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": descr, "fortran_order": False, "shape": shape}
            )
            self._start = file.tell()
            size = self._start + self._rows * self._each
            file.truncate(size)
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except AttributeError:  # macOS
                pass
            except OSError as error:
                if error.errno not in _CANNOT:
                    raise

    @contextlib.contextmanager
    def open(self):
        """Yields `write(index of rows, their values)`; what was written is on the disk behind it.

        Negative indices count from the end. Any index may come more than once.
        """
        fd = os.open(self._path, os.O_WRONLY)

        def write(index, values: np.ndarray) -> None:
            place = np.asarray(index) % self._rows
            order = np.argsort(place, kind="stable")
            for run in np.split(order, np.flatnonzero(np.diff(place[order]) != 1) + 1):
                data = memoryview(values[run].astype(self._dtype).tobytes())
                at = self._start + int(place[run[0]]) * self._each
                while data:  # a disk that fills takes a part first
                    taken = os.pwrite(fd, data, at)
                    data, at = data[taken:], at + taken

        try:
            yield write
            os.fsync(fd)
        finally:
            os.close(fd)

    def sync(self) -> None:
        """Returns when all that was written so far is on the disk."""
        fd = os.open(self._path, os.O_WRONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
