"""The processes of one run, connected: who has come, what they tell each other, who is gone.

    fellows = Fellows(index, count, host, port)
    hellos = fellows.meet(facts, seconds=300, note=print)   # process 0: what each brought
    fellows.gather(value), fellows.broadcast(value), fellows.share(value)
    fellows.leave("error: ...", 1)

Process 0 listens, and every other process keeps one connection to it for the whole run. The kernel
closes that when a process dies, however it dies, so all know within a moment and end with a
sentence, whatever they are waiting for: a collective, a file, each other. A host that loses power
is found by the kernel's probes, within `PROBED_SECONDS`. JAX's own heartbeat takes longer, and ends
a process by an abort and a wall of text; it stays for processes that are frozen. Messages are lines
of JSON. Standard library only; nothing here knows of JAX.
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

CRASHED = 70  # exit code of a bug, by the custom of sysexits.h; launch/README.md has them all
LOST = 75  # exit code of those whose fellow has died: "try again", by the custom of sysexits.h
PROBED_SECONDS = 30  # until a host that no longer answers at all counts as gone
LAST_WORDS_SECONDS = 5.0  # that a failing process waits for the others to hear of it
HELLO_BYTES = 2**24  # at most
ALIKE_SECONDS = 0.5  # for several processes to find the same thing wrong
QUIET_SECONDS = 30.0  # after which a process says that it still waits for process 0
WALL_SECONDS = 1.0  # for XLA's own words about the loss of process 0, so that ours are the last


class NotTogether(ValueError):
    """Not all have come, or somebody of an earlier start is still there: another start may do."""

    code = LOST


class Fellows:
    """One end of the connections. `meet`, `gather` and so on: main thread, in one order on all.

    A daemon thread listens; when a fellow dies or fails it writes the sentence to stderr, hands it
    to `on_end` (for a log) and ends this process.
    """

    def __init__(self, index: int, count: int, host: str, port: int):
        self.index, self.count, self._place = index, count, (host, port)
        self.hosts: dict[int, str] = {}
        self.on_end: Callable[[str], None] = lambda text: None
        self.handlers: dict[str, Callable[[int, Any], None]] = {}  # of other kinds of messages
        self._links: dict[int, socket.socket] = {}
        self._inbox: dict[int, collections.deque] = {}
        self._gone: set[int] = set()  # said goodbye
        self._leaving = False
        self._verdict: dict[str, Any] = {}  # the end that process 0 told of
        self._news = threading.Condition()
        self._sending = threading.Lock()

    # Coming together.

    def meet(self, facts: Any, seconds: float, note: Callable[[str], None]) -> list[Any] | None:
        """Waits until all are there. On process 0 the facts of each, in order, elsewhere None.

        Raises `NotTogether` when the time is over, naming who has not come.
        """
        hello = {"process": self.index, "of": self.count, "host": socket.gethostname()}
        hello["facts"] = facts
        found = None
        if self.index == 0:
            found = self._call_the_roll(hello, seconds, note)
        else:
            self._answer(hello, seconds, note)
        for link in self._links.values():
            link.settimeout(None)
        threading.Thread(target=self._listen, daemon=True, name="fellows").start()
        return found

    def _call_the_roll(self, hello, seconds, note):
        end, found, asked = time.monotonic() + seconds, {0: hello}, {}
        with _listener(self._place[1]) as door, selectors.DefaultSelector() as ready:
            ready.register(door, selectors.EVENT_READ)
            while len(found) < self.count:
                missing = _names(sorted(set(range(self.count)) - set(found)))
                note(f"waiting for {missing} of {self.count}")
                if time.monotonic() > end:
                    self._refuse(
                        self._links.values(), _absent(missing, seconds, hello, found), NotTogether
                    )
                for key, _ in ready.select(timeout=0.5):
                    if key.fileobj is door:
                        link, _ = door.accept()
                        _keep_probing(link)
                        asked[link] = b""
                        ready.register(link, selectors.EVENT_READ)
                    else:
                        self._hear_hello(key.fileobj, asked, found, ready)
            for link in set(asked) - set(self._links.values()):
                link.close()
        self.hosts = {i: one["host"] for i, one in found.items()}
        for link in self._links.values():
            _send(link, {"hosts": self.hosts if self.count <= 64 else {0: hello["host"]}})
        return [found[i]["facts"] for i in range(self.count)]

    def _hear_hello(self, link, asked, found, ready):
        """Takes what has come over a new connection; strangers are closed without a word."""
        data = _receive(link)
        asked[link] += data
        if data and b"\n" not in asked[link] and len(asked[link]) < HELLO_BYTES:
            return
        ready.unregister(link)
        for i in [i for i, other in self._links.items() if other is link]:  # came, and died
            del found[i], self._links[i], self._inbox[i], asked[link]
            return
        try:
            said = json.loads(asked[link])
            i, of, host = said["process"], said["of"], said["host"]
        except (ValueError, KeyError, TypeError):
            del asked[link]
            link.close()
            return
        if of != self.count or i in found or not 0 < i < self.count:
            text = (
                f"process {i} of {of} on {host} does not belong here: this run has {self.count} "
                "processes"
                + (f", and {i} is already there on {found[i]['host']}" if i in found else "")
            )
            kind = NotTogether if i in found else ValueError
            self._refuse((link, *self._links.values()), text, kind)
        found[i], self._links[i], self._inbox[i] = said, link, collections.deque()
        ready.register(link, selectors.EVENT_READ)

    def _refuse(self, links, text, kind=ValueError):
        for link in links:
            _send(link, {"end": text, "code": getattr(kind, "code", 1)})
            link.close()
        raise kind(text)

    def _answer(self, hello, seconds, note):
        began, said, told = time.monotonic(), None, False
        end = began + seconds
        while said is None:
            try:
                link = socket.create_connection(self._place, timeout=10)
                said = self._introduce(link, hello, end)
            except (OSError, ValueError) as error:
                place = ":".join(map(str, self._place))
                note(f"waiting for process 0 at {place}")
                if not told and time.monotonic() > began + QUIET_SECONDS:
                    told = True  # on stderr: elsewhere than on process 0 the console is silent
                    print(f"{self.prefix()}waiting for process 0 at {place}", file=sys.stderr)
                if time.monotonic() > end:
                    raise NotTogether(
                        f"process 0 did not answer at {place} within {seconds:g} seconds "
                        f"({error}); start it there and open that port and the one before it, or "
                        "give it longer with JAXLM_JOIN_SECONDS"
                    ) from None
                time.sleep(0.2)
        if "end" in said:
            raise (NotTogether if said["code"] == LOST else ValueError)(said["end"])
        self.hosts = {int(i): name for i, name in said["hosts"].items()}

    def _introduce(self, link, hello, end):
        """What process 0 answers when all have come; it keeps the time for those that have."""
        try:
            _keep_probing(link)
            _send(link, hello)
            link.settimeout(max(end - time.monotonic(), 0) + 10)
            said = json.loads(_line(link))
            if "end" not in said:
                self._links[0], self._inbox[0] = link, collections.deque()
            return said
        finally:
            if not self._links:
                link.close()

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
            _send(self._links[i], message)

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
        with contextlib.suppress(Exception):
            self.on_end(words)
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
                    i, data = key.data, _receive(key.fileobj)
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
        with contextlib.suppress(Exception):
            self.on_end(told)
        if self.index == 0:
            self._outlast_the_others()
        self._exit(self.prefix() + told, message["code"])

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
                    if not _receive(key.fileobj):
                        ready.unregister(key.fileobj)


def _listener(port):
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, backlog=4096, dualstack_ipv6=both)
    except OSError as error:
        raise ValueError(
            f"process 0 cannot listen on port {port}, the one after the coordinator's: "
            f"{error.strerror}; choose another port in JAX_COORDINATOR_ADDRESS"
        ) from None


def _keep_probing(link):
    """Lets the kernel ask whether the other host is still there."""
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    every = PROBED_SECONDS // 6
    for name, value in (
        ("TCP_KEEPIDLE", every),
        ("TCP_KEEPINTVL", every),
        ("TCP_KEEPCNT", 5),
        ("TCP_USER_TIMEOUT", PROBED_SECONDS * 1000),
    ):
        if hasattr(socket, name):  # Linux has them all
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _send(link, message):
    with contextlib.suppress(OSError):  # it has gone: whoever listens learns of it
        link.sendall(json.dumps(message).encode() + b"\n")


def _receive(link):
    try:
        return link.recv(2**20)
    except OSError:
        return b""


def _line(link):
    data = b""
    while not data.endswith(b"\n"):
        if not (more := link.recv(1)):  # no byte of what comes after the line
            raise OSError("the connection was closed")
        data += more
    return data


def _absent(missing, seconds, hello, found):
    here = ", ".join(f"{i} on {found[i]['host']}" for i in sorted(found)[:8])
    return (
        f"{missing} of {hello['of']} did not come within {seconds:g} seconds; here: {here}"
        + (", ..." if len(found) > 8 else "")
        + ". All have to start with the address of process 0; JAXLM_JOIN_SECONDS gives them longer"
    )


def _names(missing):
    shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    return f"process{'es' if len(missing) > 1 else ''} {shown}"
