"""What several processes see to before they train; threads stand for processes here."""

import pathlib
import threading
import types

import pytest

from jaxlm import together


class Processes:
    """In the place of `cluster`: each thread is the process that its name says."""

    def __init__(self, count):
        self.values, self.barrier = [None] * count, threading.Barrier(count, timeout=20)

    def several(self):
        return True

    def process(self):
        return int(threading.current_thread().name)

    def share(self, value=None):
        self.values[self.process()] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found

    def broadcast(self, value=None):
        return self.share(value)[0]


@pytest.fixture
def on_all(monkeypatch):
    """Runs `do(index)` for each host name in a thread; the results, or what was raised."""

    def run(hosts, do):
        monkeypatch.setattr(together, "cluster", Processes(len(hosts)))
        name = lambda: hosts[int(threading.current_thread().name)]
        monkeypatch.setattr(together.socket, "gethostname", name)
        results = [None] * len(hosts)

        def one(i):
            try:
                results[i] = do(i)
            except ValueError as error:
                results[i] = error

        threads = [threading.Thread(target=one, args=(i,), name=str(i)) for i in range(len(hosts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        return results

    return run


def test_one_folder_of_that_name_is_not_another(on_all, tmp_path):
    places = [tmp_path / name for name in ("shared", "shared", "own")]
    assert on_all("aab", lambda i: together.sees(places[i])) == [[True, True, False]] * 3
    assert not list(tmp_path.rglob(".seen*"))


def test_a_work_folder_that_is_not_shared_is_told_by_all(on_all, tmp_path):
    run = lambda i: types.SimpleNamespace(workdir=tmp_path / str(i // 2))
    same = on_all("ab", lambda i: together.require_one_workdir(run(i)))
    assert same == [None, None]
    errors = on_all("abc", lambda i: together.require_one_workdir(run(i)))
    assert all("process 2 on c does not see what process 0 wrote there" in str(e) for e in errors)


@pytest.mark.parametrize("shared", [True, False])
def test_data_is_prepared_once_for_each_cache(on_all, monkeypatch, tmp_path, shared):
    """Four processes on two hosts, with one cache or with one on each host."""
    hosts = "aabb"
    built, found = [], []

    def prepare(data, cache, progress):
        done = pathlib.Path(cache) / "done"
        (found if done.exists() else built).append(threading.current_thread().name)
        done.touch()
        return types.SimpleNamespace(hash="1234")

    monkeypatch.setattr(together, "prepare", prepare)
    cache = lambda i: tmp_path / ("one" if shared else hosts[i])
    for host in "ab":
        (tmp_path / host).mkdir()
    run, silent = types.SimpleNamespace(data=None), lambda *args: None
    prepared = on_all(hosts, lambda i: together.prepare_data(run, cache(i), silent).hash)
    assert prepared == ["1234"] * 4
    assert sorted(built) == (["0"] if shared else ["0", "2"])
    assert sorted(built + found) == ["0", "1", "2", "3"]


def test_other_data_on_another_host_is_told(on_all, monkeypatch, tmp_path):
    def prepare(data, cache, progress):
        return types.SimpleNamespace(hash=f"hash-{int(threading.current_thread().name) // 2}")

    monkeypatch.setattr(together, "prepare", prepare)
    run, silent = types.SimpleNamespace(data=None), lambda *args: None
    errors = on_all("aab", lambda i: together.prepare_data(run, tmp_path, silent))
    assert all(
        "process 2 on b has prepared other data than process 0 on a" in str(e) for e in errors
    )
    assert "hash-1, there hash-0" in str(errors[0])
