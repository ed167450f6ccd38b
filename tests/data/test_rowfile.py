"""Rows written in any order are those of a plain .npy file; a full disk is an error, not an end."""

import errno
import os

import numpy as np
import pytest

from jaxlm.data import rowfile
from jaxlm.data.rowfile import RowFile


def test_rows_come_back_where_they_belong(tmp_path):
    rows = np.random.default_rng(0).normal(size=(10, 3, 2)).astype(np.float16)
    file = RowFile(tmp_path / "x.npy", rows.dtype, rows.shape)
    with file.open() as write:
        write([2, 3, 4], rows[2:5])
        write([-1, -2, -3], rows[[9, 8, 7]])
        write([6, 0, 5, 6], rows[[6, 0, 5, 6]])
    rows[1] = 0  # which nobody wrote
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), rows)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy", mmap_mode="r")[-3], rows[7])


def test_numbers_without_a_dimension(tmp_path):
    with RowFile(tmp_path / "x.npy", np.dtype(np.int32), (3,)).open() as write:
        write([1, 2], np.array([5, 6], np.int32))
    assert np.load(tmp_path / "x.npy").tolist() == [0, 5, 6]


def test_a_disk_without_room_is_known_before(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rowfile.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        RowFile(tmp_path / "x.npy", np.dtype(np.float32), (4, 2))


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_cannot_take_space_ahead_serves_too(tmp_path, monkeypatch, number):
    def cannot(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(rowfile.os, "posix_fallocate", cannot)
    with RowFile(tmp_path / "x.npy", np.dtype(np.float32), (2, 2)).open() as write:
        write([1], np.ones((1, 2), np.float32))
    assert np.load(tmp_path / "x.npy").tolist() == [[0, 0], [1, 1]]


def test_a_write_that_is_taken_in_parts_is_whole(tmp_path, monkeypatch):
    whole = os.pwrite
    monkeypatch.setattr(rowfile.os, "pwrite", lambda fd, data, at: whole(fd, data[:3], at))
    with RowFile(tmp_path / "x.npy", np.dtype(np.int64), (2, 2)).open() as write:
        write([0, 1], np.array([[1, 2], [3, 4]]))
    assert np.load(tmp_path / "x.npy").tolist() == [[1, 2], [3, 4]]


def test_a_file_that_is_there_is_gone_on_with(tmp_path):
    kind = np.dtype(np.float16)
    with RowFile(tmp_path / "x.npy", kind, (3, 2)).open() as write:
        write([0], np.ones((1, 2)))
    again = RowFile(tmp_path / "x.npy", kind, (3, 2), there=True)
    with again.open() as write:
        write([2], np.full((1, 2), 2.0))
        again.sync()
    assert np.load(tmp_path / "x.npy").tolist() == [[1, 1], [0, 0], [2, 2]]
    with pytest.raises(ValueError, match=r"is float16 .* not float16"):
        RowFile(tmp_path / "x.npy", kind, (4, 2), there=True)
    with pytest.raises(FileNotFoundError):
        RowFile(tmp_path / "y.npy", kind, (4, 2), there=True)
