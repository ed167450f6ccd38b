"""Several processes stop after the same step, whichever of them was asked to.

The asked one tells process 0, which stops the clocks: every listener answers with the last step
that its own loop has finished, whatever that loop is waiting for, and the loop may finish no other
until process 0 has said how far all go: one step beyond the furthest. Nobody waits for a step of
somebody else, so this cannot lock up, and no loop looks at more than a number between its steps.
(JAX has such an agreement too, but its handler swallows SIGTERM for the whole life of the process,
also while data is prepared or a program compiled, where there is nothing to save.)
"""

import threading

from jaxlm.host.fellows import Fellows


class Stopping:
    """The agreement about one stop. `finished` is called by the loop, the rest by the listener."""

    def __init__(self, fellows: Fellows):
        self._fellows, self._others = fellows, fellows.count - 1
        self._name, self._until = "", None  # the signal; the last step
        self._step, self._frozen, self._told = 0, False, False
        self._answers: list[int] = []
        self._news = threading.Condition()
        fellows.handlers |= {"stop": self._begin, "freeze": self._freeze}
        fellows.handlers |= {"at": self._count, "until": self._thaw}

    def finished(self, step: int, asked: str) -> str:
        """After each step: `asked` is the signal that this process has got, or "". Returns the one
        that stops all after this step, or ""."""
        if asked and not self._told:
            self._told = True
            if self._fellows.index:
                self._fellows.post(0, "stop", asked)
            else:
                self._begin(0, asked)
        with self._news:
            self._news.wait_for(lambda: not self._frozen)
            self._step = step
            stop = self._until is not None and step >= self._until
        return self._name if stop else ""

    def _begin(self, i, name):
        """On process 0."""
        with self._news:
            if self._name:
                return  # a second process was asked too
            self._name, self._frozen = name, True
            self._answers = [self._step]
        self._fellows.post_all("freeze", name)

    def _freeze(self, i, name):
        with self._news:
            self._name, self._frozen = name, True
            step = self._step
        self._fellows.post(0, "at", step)

    def _count(self, i, step):
        """On process 0."""
        self._answers.append(step)
        if len(self._answers) == self._others + 1:
            until = max(self._answers) + 1
            self._fellows.post_all("until", until)
            self._thaw(0, until)

    def _thaw(self, i, until):
        with self._news:
            self._until, self._frozen = until, False
            self._news.notify_all()
