"""Processes that meet, talk, stop together and end together: threads with real connections."""

import contextlib
import json
import random
import socket
import threading
import time

import pytest

from jaxlm.host import fellows
from jaxlm.host.fellows import LOST, Fellows
from jaxlm.host.stopping import Stopping

EVERY: list[Fellows] = []


class Ended(BaseException):
    """In place of the end of a process."""


class Process(Fellows):
    """A process of a test is a thread; its end is noted, and cuts its connections."""

    def __init__(self, index, count, port):
        super().__init__(index, count, "127.0.0.1", port)
        EVERY.append(self)
        self.ended, self.last = None, threading.Event()

    def _exit(self, text, code):
        if self.ended is None:
            self.ended = (text, code)
        self.die()
        self.last.set()
        raise Ended

    def _lost(self, i):
        if self.ended is None:  # the dead notice nothing
            super()._lost(i)

    def die(self):
        """As the kernel does it when a process is killed."""
        for link in self._links.values():
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(fellows, "WALL_SECONDS", 0.0)
    monkeypatch.setattr(fellows, "LAST_WORDS_SECONDS", 2.0)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)  # threads that end by Ended
    yield
    for process in EVERY:
        process.ended = process.ended or ("the test is over", 0)
        process.die()
    for thread in threading.enumerate():
        if thread.name == "fellows":
            thread.join(10)
    for link in [link for process in EVERY for link in process._links.values()]:
        link.close()
    EVERY.clear()


def free_port():
    with socket.create_server(("", 0)) as one:
        return one.getsockname()[1]


def on_all(processes, do):
    """`do(process)` in a thread each; the results, or what was raised."""
    results = [None] * len(processes)

    def one(i):
        try:
            results[i] = do(processes[i])
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=one, args=(i,), daemon=True) for i in range(len(processes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


def met(count):
    port = free_port()
    processes = [Process(i, count, port) for i in range(count)]
    facts = on_all(processes, lambda p: p.meet({"of": p.index}, 10, lambda text: None))
    assert facts == [[{"of": i} for i in range(count)]] + [None] * (count - 1)
    return processes


@pytest.mark.parametrize("count", [2, 5])
def test_what_one_knows_all_know(count):
    processes = met(count)
    for turn in range(3):
        values = [[i, turn] for i in range(count)]
        assert on_all(processes, lambda p: p.share((p.index, turn))) == [values] * count  # noqa: B023
    assert on_all(processes, lambda p: p.broadcast(p.index + 7)) == [7] * count
    assert on_all(processes, lambda p: p.gather(p.index))[0] == list(range(count))


def test_nobody_passes_a_barrier_before_the_last_has_come():
    processes = met(3)
    passed = []
    early = [
        threading.Thread(target=lambda p=p: passed.append(p.share(0)), daemon=True)
        for p in processes[:2]
    ]
    for thread in early:
        thread.start()
    time.sleep(0.1)
    assert not passed
    processes[2].share(0)
    for thread in early:
        thread.join(10)
    assert len(passed) == 2


@pytest.mark.parametrize("dead", [0, 1])
def test_when_one_dies_all_end_and_say_which(dead):
    processes = met(3)
    left = [p for p in processes if p.index != dead]
    waiting = threading.Thread(target=lambda: left[0].share(0), daemon=True)  # as in a collective
    waiting.start()
    processes[dead].ended = ("killed", 137)
    processes[dead].die()
    for process in left:
        assert process.last.wait(10)
        text, code = process.ended
        assert code == LOST
        assert f"process {dead} on {socket.gethostname()} has ended without a word" in text
        assert text.startswith(f"[process {process.index}] " if process.index else "process")


def test_a_bug_in_the_listening_thread_ends_all():
    processes = met(3)
    processes[0].handlers["step"] = lambda i, value: 1 / 0
    processes[1].post(0, "step", 7)
    for process in processes:
        assert process.last.wait(10)
        assert process.ended[1] == fellows.CRASHED


@pytest.mark.parametrize("guilty", [0, 2])
def test_an_error_of_one_ends_all_with_its_words_and_code(guilty):
    processes = met(3)
    heard = []
    for process in processes:
        process.on_end = [lambda *_: 1 / 0, lambda *told: heard.append(told)]
    assert processes[guilty].leave("error: the disk is full", 1)
    for process in processes:
        if process.index != guilty:
            assert process.last.wait(10)
            assert f"process {guilty} has ended: error: the disk is full" in process.ended[0]
            assert process.ended[1] == 1
    assert heard == [(f"process {guilty} has ended: error: the disk is full", 1)] * 2


def test_what_all_say_is_said_once():
    processes = met(3)
    spoken = on_all(processes, lambda p: p.leave("error: no such file", 1))
    assert spoken[0] is True
    assert [p.ended for p in processes] == [None] * 3
    assert spoken[1:] == [False, False]


def test_after_a_common_end_nobody_is_missed():
    processes = met(3)
    assert on_all(processes, lambda p: p.leave()) == [True] * 3
    for process in processes:
        process.die()
    time.sleep(0.1)
    assert [p.ended for p in processes] == [None] * 3


def test_who_does_not_come_is_named_on_all():
    port = free_port()
    here = [Process(i, 4, port) for i in (0, 2)]
    errors = on_all(here, lambda p: p.meet({}, 0.5, lambda text: None))
    assert "processes 1, 3 of 4 did not come within 0.5 seconds" in str(errors[0])
    assert f"0 on {socket.gethostname()}, 2 on " in str(errors[0])
    assert "JAXLM_JOIN_SECONDS" in str(errors[0])
    assert str(errors[1]) == str(errors[0])


def test_without_process_0_its_address_is_named():
    port = free_port()
    with pytest.raises(ValueError, match=rf"process 0 did not answer at 127.0.0.1:{port} within 0"):
        Process(1, 2, port).meet({}, 0, lambda text: None)


@pytest.mark.parametrize(("index", "count"), [(1, 3), (7, 2), (0, 2)])
def test_a_process_of_another_run_is_refused(index, count):
    port = free_port()
    first = Process(0, 2, port)
    hello = {"process": index, "of": count, "host": "elsewhere", "facts": {}}

    def come(p):
        if p is first:
            return p.meet({}, 10, lambda text: None)
        return knock(port, json.dumps(hello).encode() + b"\n")

    error, answer = on_all([first, None], come)
    assert f"process {index} of {count} on elsewhere does not belong here" in str(error)
    assert json.loads(answer)["end"] == str(error)


def knock(port, data):
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port)) as link:
                link.sendall(data)
                return link.recv(2**16)
        except ConnectionRefusedError:
            time.sleep(0.02)


def test_strangers_at_the_door_change_nothing():
    port = free_port()
    processes = [Process(i, 2, port) for i in range(2)]

    def come(p):
        if p is None:
            return knock(port, b"GET / HTTP/1.1\r\n\r\n")
        if p.index == 1:
            time.sleep(0.3)
        return p.meet({}, 10, lambda text: None)

    found = on_all([*processes, None], come)
    assert found == [[{}, {}], None, b""]


@pytest.mark.parametrize("seed", range(8))
def test_all_stop_at_the_same_point_wherever_each_of_them_is(seed):
    rng = random.Random(seed)
    processes = met(3)
    for process in processes:
        process.stopping = Stopping(process)
    asked = {rng.randrange(3): rng.randrange(1, 30), rng.randrange(3): rng.randrange(1, 30)}
    pauses = [rng.random() * 0.004 for _ in range(3)]
    reached = [0, 0, 0]

    def loop(process):
        i = process.index
        for step in range(1, 10_000):
            time.sleep(pauses[i])
            # A step needs all to have begun it; a loop may run a few steps ahead of its device.
            while min(reached) < step - 4:
                time.sleep(0.0005)
            name = process.stopping.passed(step, "SIGTERM" if step >= asked.get(i, 10**6) else "")
            reached[i] = step
            if name:
                return step, name
        return None

    stops = on_all(processes, loop)
    assert len(set(stops)) == 1, stops
    step, name = stops[0]
    assert name == "SIGTERM"
    assert step >= min(asked.values())
