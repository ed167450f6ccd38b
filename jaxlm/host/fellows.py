"""The processes of one run, connected: who has come, what they tell each other, who is gone.

    fellows = Fellows(index, count, host, port)
    hellos = fellows.meet(facts, seconds=300, note=print)   # process 0: what each brought
    fellows.gather(value), fellows.broadcast(value), fellows.share(value)
    fellows.leave("error: ...", 1)

Every process keeps one connection to process 0 for the whole run (`rollcall` makes them). It ends
with the process (`links`), so all know of a death within a moment and end with a sentence, whatever
they are waiting for: a collective, a file, each other. JAX's own heartbeat takes longer, and ends a
process by an abort and a wall of text; it stays for processes that are frozen. Standard library
only; nothing here knows of JAX.
"""

import collections
import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from jaxlm.host import links, rollcall
from jaxlm.host.rollcall import LOST

CRASHED = 70  # exit code of a bug, by the custom of sysexits.h; launch/README.md has them all
LAST_WORDS_SECONDS = 5.0  # that a failing process waits for the others to hear of it
ALIKE_SECONDS = 0.5  # for several processes to find the same thing wrong
WALL_SECONDS = 1.0  # for XLA's own words about the loss of process 0, so that ours are the last


class Fellows:
    """One end of the connections. `meet`, `gather` and so on: main thread, in one order on all.

    A daemon thread listens; when a fellow dies or fails it writes the sentence to stderr, hands it
    and the code to each of `on_end` (a log, for one) and ends this process.
    """

    def __init__(self, index: int, count: int, host: str, port: int):
        self.index, self.count, self._place = index, count, (host, port)
        self.hosts: dict[int, str] = {}
        self.on_end: list[Callable[[str, int], None]] = []
        self.handlers: dict[str, Callable[[int, Any], None]] = {}  # of other kinds of messages
        self._links: dict[int, socket.socket] = {}
        self._inbox: dict[int, collections.deque] = {}
        self._gone: set[int] = set()  # said goodbye
        self._leaving = False
        self._verdict: dict[str, Any] = {}  # the end that process 0 told of
        self._news = threading.Condition()
        self._sending = threading.Lock()

    def meet(self, facts: Any, seconds: float, note: Callable[[str], None]) -> list[Any] | None:
        """Waits until all are there. On process 0 the facts of each, in order, elsewhere None.

        Raises `NotTogether` when the time is over, naming who has not come.
        """
        hello = {"process": self.index, "of": self.count, "host": socket.gethostname()}
        hello["facts"] = facts
        if self.index == 0:
            met = rollcall.call(hello, self._place[1], seconds, note)
        else:
            met = rollcall.answer(hello, self._place, seconds, note)
        self._links, self.hosts = met.links, met.hosts
        self._inbox = {i: collections.deque() for i in met.links}
        for link in met.links.values():
            link.settimeout(None)
        threading.Thread(target=self._listen, daemon=True, name="fellows").start()
        return met.facts

    # Talking.

    def gather(self, value: Any) -> list[Any] | None:
        """The values of all on process 0; None elsewhere."""
        if self.index:
            self._send(0, {"value": value})
            return None
        return [value] + [self._take(i) for i in range(1, self.count)]

    def broadcast(self, value: Any = None) -> Any:
        """The value of process 0, on all."""
        if self.index:
            return self._take(0)
        value = json.loads(json.dumps(value))  # the same on all, tuples as lists
        self.post_all("value", value)
        return value

    def share(self, value: Any) -> list[Any]:
        """The values of all, on all. Nobody returns before everybody has called: a barrier."""
        return self.broadcast(self.gather(value))

    def _take(self, i):
        with self._news:
            self._news.wait_for(lambda: self._inbox[i] or i in self._gone)
            if not self._inbox[i]:
                raise RuntimeError(f"process {i} has ended while process {self.index} waits for it")
            return self._inbox[i].popleft()

    def post(self, i: int, kind: str, value: Any) -> None:
        """A message for the handler of its kind, from any thread. To or from process 0."""
        self._send(i, {kind: value})

    def post_all(self, kind: str, value: Any) -> None:
        """The same to all others, from process 0."""
        for i in list(self._links):
            self.post(i, kind, value)

    def _send(self, i, message):
        with self._sending:
            links.send(self._links[i], message)

    # Parting.

    def leave(self, words: str = "", code: int = 0) -> bool:
        """Tells the others that this process ends, and how; with a code of 0 waits for them first.

        Returns whether to say the words: not if process 0 fails with the same ones.
        """
        if code == 0:
            self.share("end")
        with self._news:
            self._leaving = True
        for i in list(self._links):
            self._send(i, {"end": words, "code": code, "by": self.index} if code else {"bye": 1})
        if code == 0:
            return True
        if self.index == 0:
            self._await(lambda: len(self._gone) == self.count - 1)
        else:
            self._await(lambda: self._verdict or self._gone)
        return not (self._verdict.get("by") == 0 and self._verdict["end"] == words)

    def fail(self, words: str, code: int = 1) -> NoReturn:
        """Ends this process and all others; from any thread."""
        speak = self.leave(words, code)
        self._tell(words, code)
        self._exit(self.prefix() + words if speak else "", code)

    def wait_for_a_verdict(self, seconds: float = 2.0) -> None:
        """Call when something failed that the loss of a fellow may explain: it ends the process."""
        time.sleep(seconds)

    def _await(self, condition):
        with self._news:
            self._news.wait_for(condition, timeout=LAST_WORDS_SECONDS)

    def _listen(self):
        try:
            self._hear_all()
        except Exception as error:  # else nobody would watch over the others any more
            self.fail(f"crashed: {type(error).__name__}: {error}", CRASHED)

    def _hear_all(self):
        buffers = dict.fromkeys(self._links, b"")
        with selectors.DefaultSelector() as ready:
            for i, link in self._links.items():
                ready.register(link, selectors.EVENT_READ, i)
            while ready.get_map():
                for key, _ in ready.select():
                    i, data = key.data, links.receive(key.fileobj)
                    *lines, buffers[i] = (buffers[i] + data).split(b"\n")
                    for line in lines:
                        self._hear(i, json.loads(line))
                    if not data:
                        ready.unregister(key.fileobj)
                        self._lost(i)

    def _hear(self, i, message):
        if "end" in message:
            self._end(message)
            return
        ((kind, value),) = message.items()
        if kind in self.handlers:
            self.handlers[kind](i, value)
            return
        with self._news:
            if kind == "bye":
                self._gone.add(i)
            else:
                self._inbox[i].append(value)
            self._news.notify_all()

    def _lost(self, i):
        with self._news:
            known = i in self._gone or self._leaving
            self._gone.add(i)
            self._news.notify_all()
        if not known:
            where = f" on {self.hosts[i]}" if i in self.hosts else ""
            words = (
                f"process {i}{where} has ended without a word (killed, out of memory, or its host "
                "is gone), so all end; start them again to go on from the last checkpoint"
            )
            self._end({"end": words, "code": LOST, "by": i}, wall=i == 0)

    def _end(self, message, wall=False):
        """A fellow has failed or died: tells the others, says so, and ends this process."""
        with self._news:
            if self.index:
                self._verdict = message
                self._news.notify_all()
            # What is wrong for one is often wrong for all: this one may be about to say it itself.
            alike = message["code"] != LOST
            if self._news.wait_for(lambda: self._leaving, timeout=ALIKE_SECONDS if alike else 0):
                return
            self._verdict = message
        if self.index == 0:
            for i in self._links:
                self._send(i, message)
        if wall:
            time.sleep(WALL_SECONDS)
        by, words = message.get("by"), message["end"]
        told = words if message["code"] == LOST else f"process {by} has ended: {words}"
        self._tell(told, message["code"])
        if self.index == 0:
            self._outlast_the_others()
        self._exit(self.prefix() + told, message["code"])

    def _tell(self, words, code):
        for tell in self.on_end:
            with contextlib.suppress(Exception):
                tell(words, code)

    def prefix(self) -> str:
        """What stands before the errors of this process: nothing for process 0."""
        host = f" on {socket.gethostname()}" if len(set(self.hosts.values())) > 1 else ""
        return f"[process {self.index}{host}] " if self.index else ""

    def _exit(self, text, code) -> NoReturn:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        with contextlib.suppress(OSError):
            os.write(2, (text + "\n").encode("utf-8", "replace") if text else b"")
        os._exit(code)

    def _outlast_the_others(self):
        """The end of process 0 is the end of JAX's service, at which the others would abort."""
        end = time.monotonic() + LAST_WORDS_SECONDS
        with selectors.DefaultSelector() as ready:
            for i, link in self._links.items():
                if i not in self._gone:
                    ready.register(link, selectors.EVENT_READ)
            while ready.get_map() and (left := end - time.monotonic()) > 0:
                for key, _ in ready.select(left):
                    if not links.receive(key.fileobj):
                        ready.unregister(key.fileobj)
