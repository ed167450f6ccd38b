"""A signal asks the loop to stop; a second Ctrl-C does not ask."""

import os
import signal
import subprocess
import sys

import pytest

from jaxlm.host.signals import Signals, Stopped


@pytest.mark.parametrize(
    ("number", "name"),
    [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP")],
)
def test_a_signal_is_seen_after_the_step(number, name):
    before, said = signal.getsignal(number), []
    with Signals(said.append) as signals:
        assert signals.stop_requested() == ""
        signals.look_up()
        assert not said
        os.kill(os.getpid(), number)
        assert signals.stop_requested() == name
        with pytest.raises(Stopped, match=name):
            signals.look_up()
        os.kill(os.getpid(), signal.SIGTERM)  # asking again changes nothing
        assert signals.stop_requested() == name
    assert len(said) == 1
    assert said[0].startswith(f"{name}: saving after this step")
    assert ("Ctrl-C again" in said[0]) == (name == "Ctrl-C")
    assert signal.getsignal(number) is before


def test_handlers_return_after_an_error():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(RuntimeError), Signals(lambda text: None):
        raise RuntimeError("a bug")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals(lambda text: None) as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.stop_requested() == ""
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


_STUBBORN = """
import os, signal, threading, time
from jaxlm.host.signals import Signals
threading.Thread(target=time.sleep, args=(60,)).start()  # as a save that is under way
with Signals():
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    print("not reached")
"""


def test_a_second_ctrl_c_ends_at_once():
    command = [sys.executable, "-c", _STUBBORN]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, env=environment, timeout=30, capture_output=True, text=True)
    first, second = done.stdout.splitlines()
    assert done.returncode == 130
    assert "saving after this step" in first
    assert "without saving" in second
