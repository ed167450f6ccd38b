"""A run that gets no further is not started for ever; one that does, or is asked to stop, is."""

import re
import sys
import types

import pytest
import tiny

from jaxlm import restarts, train
from jaxlm.config import defaults, flatten


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
                raise how

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
