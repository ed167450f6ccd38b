"""A run that gets no further is not started for ever; one that does, or is asked to stop, is."""

import contextlib
import re
import socket
import sys
import threading
import types

import pytest
import tiny

from jaxlm import restarts, train
from jaxlm.config import defaults, flatten
from jaxlm.host import cluster, fellows
from jaxlm.host.fellows import Fellows


@pytest.fixture
def start(tmp_path, monkeypatch):
    """One start after so many restarts of the launcher, which ends as `how` and may save first."""
    run = types.SimpleNamespace(workdir=tmp_path)

    def once(again, how=RuntimeError, save=None):
        monkeypatch.setenv(restarts.VARIABLE, str(again))
        with restarts.counted(run):
            if save is not None:
                folder = tmp_path / "checkpoints" / str(save)
                folder.mkdir(parents=True)
                (folder / "digest-0-of-1.json").touch()
            if how is not None:
                raise how()

    def crashes(again, **more):
        with pytest.raises(RuntimeError):
            once(again, **more)

    once.crashes = crashes
    return once


def test_starts_that_come_to_nothing_end_with_a_sentence(start, tmp_path):
    for again in range(restarts.MOST):
        start.crashes(again)
    for again in (3, 4):
        with pytest.raises(
            ValueError, match=r"3 starts in a row .* any further than the beginning"
        ):
            start(again)
    start.crashes(0)  # launched anew
    start.crashes(1)


def test_one_that_gets_further_goes_on(start):
    for again in range(12):
        start.crashes(again, save=10 * (again + 1) if again % 2 else None)
    for again in (12, 13, 14):
        start.crashes(again)
    with pytest.raises(ValueError, match=r"than the checkpoint of step 120.*checkpoint\.every"):
        start(15)


@pytest.mark.parametrize("how", [KeyboardInterrupt, None])
def test_one_that_was_asked_to_stop_counts_for_nothing(start, tmp_path, how):
    for again in (0, 1):
        start.crashes(again)
    try:
        start(2, how)
    except KeyboardInterrupt:
        assert how
    assert not (tmp_path / "starts.json").exists()
    start.crashes(3)


@pytest.fixture
def another(monkeypatch):
    """Makes this process the first of two; gives how the other one ends, which ends this one."""
    monkeypatch.setattr(fellows, "ALIKE_SECONDS", 0.0)
    monkeypatch.setattr(fellows, "LAST_WORDS_SECONDS", 0.1)
    ended, made = threading.Event(), []

    class Here(Fellows):
        def _exit(self, text, code):
            ended.set()

    def ends(code):
        with socket.create_server(("", 0)) as free:
            port = free.getsockname()[1]
        here, there = Here(0, 2, "localhost", port), Here(1, 2, "localhost", port)
        joins = threading.Thread(target=there.meet, args=({}, 10, lambda text: None))
        joins.start()
        here.meet({}, 10, lambda text: None)
        joins.join()
        made.extend((here, there))
        monkeypatch.setattr(cluster, "_fellows", here)

        def leave():
            there.leave("it is over", code)
            assert ended.wait(10)
            return RuntimeError("what a collective says of it")

        return leave

    yield ends
    links = [link for one in made for link in one._links.values()]
    for link in links:
        with contextlib.suppress(OSError):
            link.shutdown(socket.SHUT_RDWR)
    for thread in threading.enumerate():
        if thread.name == "fellows":
            thread.join(10)
    for link in links:
        link.close()


@pytest.mark.parametrize(
    ("code", "counts"), [(143, False), (130, False), (129, False), (70, True), (75, True)]
)
def test_the_stop_of_another_process_counts_for_nothing(start, another, tmp_path, code, counts):
    """It ends process 0 wherever that is, in a compilation for one."""
    leave = another(code)
    start.crashes(0, how=leave)
    assert (tmp_path / "starts.json").exists() == counts


def test_who_starts_by_hand_is_never_refused(start, monkeypatch):
    for again in [""] * 6:
        start.crashes(again)


def test_training_is_ended_so(monkeypatch, tmp_path):
    """The command itself, whose work crashes before it begins."""

    def crash(run, console):
        raise RuntimeError

    monkeypatch.setattr(train, "_work", crash)
    words = [f"--config={tiny.__file__}", f"--config.workdir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["train", *words])
    for again in range(restarts.MOST):
        monkeypatch.setenv(restarts.VARIABLE, str(again))
        with pytest.raises(RuntimeError):
            train.main()
    monkeypatch.setenv(restarts.VARIABLE, str(restarts.MOST))
    with pytest.raises(ValueError, match="3 starts in a row"):
        train.main()


def test_what_helps_where_memory_runs_out_are_keys():
    keys = re.findall(r"--config\.([\w.]+)", train.ROOM)
    assert keys
    assert set(keys) <= flatten(defaults().to_dict()).keys()
    assert "python -m jaxlm.plan" in train.ROOM
