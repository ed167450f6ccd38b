"""Several processes stop at the same point, whichever of them was asked to.

Points are numbered: the ends of steps, and of the parts of an evaluation. The asked process tells
process 0, which stops the clocks: every listener answers with the last point that its own loop has
passed, whatever that loop is waiting for, and the loop may pass no other until process 0 has said
how far all go: one point beyond the furthest. Nobody waits for a step of somebody else, so this
cannot lock up, and no loop looks at more than a number at its points.
(JAX has such an agreement too, but its handler swallows SIGTERM for the whole life of the process,
also while data is prepared or a program compiled, where there is nothing to save.)
"""

import threading

from jaxlm.host.fellows import Fellows


class Stopping:
    """The agreement about one stop. `passed` is called by the loop, the rest by the listener."""

    def __init__(self, fellows: Fellows):
        self._fellows, self._others = fellows, fellows.count - 1
        self._name, self._until = "", None  # the signal; the last point
        self._point, self._frozen, self._told = 0, False, False
        self._answers: list[int] = []
        self._news = threading.Condition()
        fellows.handlers |= {"stop": self._begin, "freeze": self._freeze}
        fellows.handlers |= {"at": self._count, "until": self._thaw}

    def passed(self, point: int, asked: str) -> str:
        """At each point: `asked` is the signal that this process has got, or "". Returns the one
        that stops all at this point, or ""."""
        if asked and not self._told:
            self._told = True
            if self._fellows.index:
                self._fellows.post(0, "stop", asked)
            else:
                self._begin(0, asked)
        with self._news:
            self._news.wait_for(lambda: not self._frozen)
            self._point = point
            stop = self._until is not None and point >= self._until
        return self._name if stop else ""

    def _begin(self, i, name):
        """On process 0."""
        with self._news:
            if self._name:
                return  # a second process was asked too
            self._name, self._frozen = name, True
            self._answers = [self._point]
        self._fellows.post_all("freeze", name)

    def _freeze(self, i, name):
        with self._news:
            self._name, self._frozen = name, True
            point = self._point
        self._fellows.post(0, "at", point)

    def _count(self, i, point):
        """On process 0."""
        self._answers.append(point)
        if len(self._answers) == self._others + 1:
            until = max(self._answers) + 1
            self._fellows.post_all("until", until)
            self._thaw(0, until)

    def _thaw(self, i, until):
        with self._news:
            self._until, self._frozen = until, False
            self._news.notify_all()
