"""The cache of prepared data: errors at its door, and several processes that build at a time."""

import errno
import os

import pytest

from jaxlm.data import cache as caching


def test_a_full_disk_is_said_and_leaves_nothing_behind(tmp_path):
    def build(folder):
        (folder / "half").write_text("half")
        raise RuntimeError("write() failed: No space left on device; writing half")

    with pytest.raises(ValueError, match=r"disk is full.*XDG_CACHE_HOME"):
        caching.cached(tmp_path / "records", "records of a", build, lambda *a: None)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def building(who, meanwhile=lambda: None):
    """A build of two files, between which something else happens."""

    def build(folder):
        (folder / "first").write_text(who)
        meanwhile()
        (folder / "second").write_text(who)
        return {"who": who}

    return build


def no_locks(*_):
    raise OSError(errno.ENOLCK, "no locks available")


@pytest.mark.parametrize("damaged", [False, True])
def test_without_locks_two_builds_are_never_mixed(tmp_path, monkeypatch, damaged):
    monkeypatch.setattr(caching.fcntl, "flock", no_locks)
    folder = tmp_path / "records"
    if damaged:
        folder.mkdir()
        (folder / "first").write_text("half")
    other = []

    def cached(build):
        return caching.cached(folder, "records of a", build, lambda *a: None)

    slow = cached(building("slow", lambda: other.append(cached(building("quick")))))
    assert slow.facts == other[0].facts == {"who": "quick"}
    assert [(folder / name).read_text() for name in ("first", "second")] == ["quick"] * 2
    assert caching.check(folder) == ({"who": "quick"}, "")
    assert not list(tmp_path.glob("*.building"))


@pytest.mark.parametrize("locks", [True, False])
def test_what_killed_builds_left_is_cleared_where_nobody_writes_it(tmp_path, monkeypatch, locks):
    if not locks:
        monkeypatch.setattr(caching.fcntl, "flock", no_locks)
    other, old = (tmp_path / f".records.{name}@far.building" for name in (1, 2))
    own = tmp_path / caching._own_name(tmp_path / "records", True)
    for left in (own, other, old):
        left.mkdir()
        (left / "first").write_text("half")
    for path in (old / "first", old):
        os.utime(path, (0, 0))
    caching.cached(tmp_path / "records", "records of a", building("new"), lambda *a: None)
    assert set(tmp_path.glob("*.building")) == ({other} if locks else {own, other})
