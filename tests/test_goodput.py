"""Goodput: known answers for runs that went through, and for runs that were killed."""

import pytest

from jaxlm.goodput import AGAIN, DOWN, OTHER, STEPS, goodput, sentence


class Log:
    """Events as a run writes them, on a clock of its own."""

    def __init__(self):
        self.now, self.events = 1e9, []

    def start(self, step=0, kind="start", **took):
        self.events.append({"kind": kind, "step": step, "seconds": 0.0, "time": self.now})
        for name, seconds in (took or {"setup": 2.0, "data": 10.0, "compile": 8.0}).items():
            self.did(name, seconds, step)
        return self

    def did(self, kind, seconds, step=0):
        self.now += seconds
        self.events.append({"kind": kind, "step": step, "seconds": seconds, "time": self.now})
        return self

    def steps(self, first, last, every=10, seconds=1.0):
        """So many seconds a step, written down every few steps."""
        for step in range(first + every - 1, last + 1, every):
            self.did("train_step", every * seconds, step)
        return self

    def wait(self, seconds):
        self.now += seconds
        return self


def shares(found):
    return {part: round(found.share(part), 6) for part in found.parts if found.share(part)}


def test_a_run_that_went_through():
    log = Log().start().steps(1, 70).did("data_wait", 2, 70).did("evaluate", 5, 70)
    log.wait(1).did("checkpoint", 2, 70)
    found = goodput(log.events)
    assert found.seconds == 100
    assert shares(found) == {
        STEPS: 0.70,
        "waiting for data": 0.02,
        "compiling": 0.08,
        "evaluation": 0.05,
        "checkpoints": 0.02,
        "start-up": 0.12,
        OTHER: 0.01,
    }
    assert (found.starts, found.again) == (1, 0)


def test_a_kill_loses_the_steps_beyond_the_checkpoint():
    log = Log().start().steps(1, 50).wait(30)  # killed; the checkpoint is of step 40
    log.start(40, "resume", restore=1, compile=9).steps(41, 130)
    found = goodput(log.events)
    assert found.seconds == 20 + 50 + 30 + 10 + 90
    assert found.parts[STEPS] == {"train_step": 130.0}, "each step once"
    assert found.parts[AGAIN] == {"train_step": 10.0}
    assert sum(found.parts[DOWN].values()) == 30
    assert found.share() == 130 / 200
    assert (found.starts, found.again) == (2, 10)


def test_a_kill_between_two_fetches_splits_their_seconds():
    log = Log().start().steps(1, 20, every=10).start(15, "resume", restore=1).steps(16, 20, every=5)
    found = goodput(log.events)
    assert found.parts[STEPS] == {"train_step": pytest.approx(20.0)}
    assert found.parts[AGAIN] == {"train_step": pytest.approx(5.0)}


def test_two_interruptions_the_second_behind_the_first():
    log = Log().start().steps(1, 50).wait(7)
    log.start(40, "resume", restore=1).steps(41, 60).wait(11)
    # The checkpoint of step 40 turned out damaged: on from 30, so 31 to 40 are done again too.
    log.start(30, "resume", restore=1).steps(31, 80)
    found = goodput(log.events)
    assert found.parts[STEPS] == {"train_step": 80.0}
    assert found.parts[AGAIN] == {"train_step": 20.0 + 20.0}
    assert found.again == 40
    assert sum(found.parts[DOWN].values()) == 18
    assert found.seconds == log.now - 1e9


def test_a_start_from_nothing_makes_all_before_it_lost():
    found = goodput(Log().start().steps(1, 20).start().steps(1, 10).events)
    assert found.parts[AGAIN] == {"train_step": 20.0}
    assert found.parts[STEPS] == {"train_step": 10.0}


def test_parts_add_up_whatever_the_events_hold():
    log = Log().start().steps(1, 20)
    log.events += [{"kind": "warning", "text": "x"}, {"kind": "log", "seconds": None}, {}]
    log.events.append({"kind": "evaluate", "seconds": float("nan"), "time": "yesterday", "step": 3})
    log.wait(-500).start(10, "resume", compile=1)  # a machine whose clock is behind
    found = goodput(log.events)
    assert sum(found.share(part) for part in found.parts) == pytest.approx(1)
    assert min(s for kinds in found.parts.values() for s in kinds.values()) > 0


def test_no_start_no_figure():
    assert goodput([]) is None
    assert goodput([{"kind": "train_step", "seconds": 3.0, "time": 5.0, "step": 1}]) is None


def test_the_sentence():
    log = Log().start().steps(1, 50).wait(30).start(40, "resume", restore=1, compile=9)
    assert sentence(goodput(log.steps(41, 130).events)) == (
        "Goodput: 65.0% of 3.3 minutes, 2 starts, in steps that count; steps done again 5.0% "
        "(10 steps), compiling 8.5%, checkpoints 0.5%, start-up 6.0%, down 15.0%."
    )
