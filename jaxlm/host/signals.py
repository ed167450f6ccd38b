"""Ctrl-C, SIGTERM and SIGHUP as a flag that the loop looks at between steps.

    with Signals(print) as signals:
        for step in ...:
            ...
            if signals.stop_requested():  # "" or the name of the signal
                save and return

The first signal asks for a stop after the running step; a second Ctrl-C ends the process at once.
SIGHUP comes when a terminal or its connection is closed; where it is ignored (nohup) it stays so.
What takes longer than a step, an evaluation, calls `look_up` between its parts, which may raise
`Stopped`.
Of several processes one may have got it: all stop at the same point (`stopping`).
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from jaxlm.host import cluster

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}


def hangups_are_ignored(number: int) -> bool:
    """Whether this is SIGHUP, and whoever started this process wants it to go on (nohup)."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


class Stopped(Exception):
    """A signal asked to stop what is no step; the name of the signal."""


class Signals:
    """A context manager that handles these three while it is open. Main thread only."""

    def __init__(self, say: Callable[[str], None] = print):
        self._say = say
        self._requested = ""
        self._points = 0  # passed so far
        self._before: dict[int, Any] = {}

    def __enter__(self):
        for number in _NAMES:
            if not hangups_are_ignored(number):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind, value, traceback):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stop_requested(self) -> str:
        """The name of the signal that asked to stop at this point, or "".

        With several processes, call it at the same points on each: they agree on one.
        """
        self._points += 1
        return cluster.stop_at(self._points, self._requested)

    def look_up(self) -> None:
        """Such a point inside of something long. Raises `Stopped`."""
        if name := self.stop_requested():
            raise Stopped(name)

    def at_the_end(self) -> str:
        """The same after the last step, where all processes have come."""
        return cluster.first(cluster.share(self._requested))

    def _handle(self, number, frame):
        name = _NAMES[signal.Signals(number)]
        if self._requested and number == signal.SIGINT:
            self._say("Second Ctrl-C: ended at once, without saving.")
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130)  # sys.exit would wait for the thread that writes a checkpoint
        if not self._requested:
            self._requested = name
            hint = "; Ctrl-C again ends at once without saving" if name == "Ctrl-C" else ""
            self._say(f"{name}: saving after this step, then ending{hint}.")
