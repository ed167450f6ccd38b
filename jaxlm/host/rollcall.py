"""The processes of one run find each other: process 0 calls the roll, every other one answers.

    met = rollcall.call(hello, port, seconds=300, note=print)          # process 0
    met = rollcall.answer(hello, (host, port), seconds=300, note=print)  # each other

A hello says who comes: {"process": 3, "of": 4, "host": "vm-3", "facts": ...}. Process 0 keeps the
time for all that have come. Both raise `NotTogether` with the same sentence where somebody does not
come, and `ValueError` where somebody comes who does not belong to the run.
"""

import errno
import json
import os
import selectors
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxlm.host import links

LOST = 75  # exit code of those whose fellow has died: "try again", by the custom of sysexits.h
HELLO_BYTES = 2**24  # at most
QUIET_SECONDS = 30.0  # after which a process says that it still waits for process 0
SHOWN = 64  # processes up to which all learn the hosts of all

Hello = dict[str, Any]
Note = Callable[[str], None]


class NotTogether(ValueError):
    """Not all have come, or somebody of another start is still there: another start may do."""

    code = LOST


class Met(NamedTuple):
    """All are there."""

    links: dict[int, socket.socket]  # to every other process; elsewhere than on process 0, to it
    hosts: dict[int, str]  # of all, or of process 0 alone
    facts: list[Any] | None  # of all, in order; known to process 0


def call(hello: Hello, port: int, seconds: float, note: Note) -> Met:
    """Waits at this port until all are there."""
    roll, end = _Roll(hello), time.monotonic() + seconds
    with door_at(port) as door, roll.ready:
        roll.ready.register(door, selectors.EVENT_READ)
        while missing := roll.missing():
            note(f"waiting for {_names(missing)} of {hello['of']}")
            if time.monotonic() > end:
                roll.refuse(roll.links.values(), _absent(missing, seconds, roll.found), NotTogether)
            for key, _ in roll.ready.select(timeout=0.5):
                if key.fileobj is door:
                    roll.open(door.accept()[0])
                else:
                    roll.hear(key.fileobj)
        for link in set(roll.asked) - set(roll.links.values()):
            link.close()
    hosts = {i: one["host"] for i, one in roll.found.items()}
    for link in roll.links.values():
        links.send(link, {"hosts": hosts if hello["of"] <= SHOWN else {0: hello["host"]}})
    return Met(roll.links, hosts, [roll.found[i]["facts"] for i in range(hello["of"])])


def door_at(port: int) -> socket.socket:
    """Listens there. Raises `NotTogether` if somebody else does, `ValueError` if it may not be."""
    try:
        return links.listener(port)
    except OSError as error:
        kind = NotTogether if error.errno == errno.EADDRINUSE else ValueError
        raise kind(
            f"process 0 cannot listen on port {port} of {socket.gethostname()}: "
            f"{os.strerror(error.errno or 0)}; the coordinator's port and the one after it have to "
            "be free: if another start has not ended, wait for it, else choose another port in "
            "JAX_COORDINATOR_ADDRESS=HOST:PORT"
        ) from None


class _Roll:
    """Who has come so far. `ready`: the selector of all connections."""

    def __init__(self, hello: Hello):
        self.of, self.found = hello["of"], {0: hello}
        self.links: dict[int, socket.socket] = {}
        self.asked: dict[Any, bytes] = {}  # connection -> what came over it
        self.ready = selectors.DefaultSelector()

    def missing(self) -> list[int]:
        return sorted(set(range(self.of)) - set(self.found))

    def open(self, link):
        links.keep_probing(link)
        self.asked[link] = b""
        self.ready.register(link, selectors.EVENT_READ)

    def hear(self, link):
        """Takes what has come over a new connection; strangers are closed without a word."""
        data = links.receive(link)
        self.asked[link] += data
        if data and b"\n" not in self.asked[link] and len(self.asked[link]) < HELLO_BYTES:
            return
        self.ready.unregister(link)
        for i in [i for i, other in self.links.items() if other is link]:  # came, and died
            del self.found[i], self.links[i], self.asked[link]
            return
        try:
            said = json.loads(self.asked[link])
            i, of, host = said["process"], said["of"], said["host"]
        except (ValueError, KeyError, TypeError):
            del self.asked[link]
            link.close()
            return
        there = i in self.found
        if of != self.of or there or not 0 < i < self.of:
            text = (
                f"process {i} of {of} on {host} does not belong here: this run has {self.of} "
                "processes"
                + (f", and {i} is already there on {self.found[i]['host']}" if there else "")
            )
            self.refuse((link, *self.links.values()), text, NotTogether if there else ValueError)
        self.found[i], self.links[i] = said, link
        self.ready.register(link, selectors.EVENT_READ)

    def refuse(self, some, text, kind):
        for link in some:
            links.send(link, {"end": text, "code": getattr(kind, "code", 1)})
            link.close()
        raise kind(text)


def answer(hello: Hello, place: tuple[str, int], seconds: float, note: Note) -> Met:
    """Comes to process 0, and waits until it says that all are there."""
    link, said = _come(hello, place, seconds, note)
    if "end" in said:
        link.close()
        raise (NotTogether if said["code"] == LOST else ValueError)(said["end"])
    return Met({0: link}, {int(i): name for i, name in said["hosts"].items()}, None)


def _come(hello, place, seconds, note):
    """Asks until process 0 is there: the connection to it, and what it answers."""
    began, told, where = time.monotonic(), False, ":".join(map(str, place))
    while True:
        try:
            return _introduce(place, hello, began + seconds)
        except (OSError, ValueError) as error:
            note(f"waiting for process 0 at {where}")
            if not told and time.monotonic() > began + QUIET_SECONDS:
                told = True  # on stderr: elsewhere than on process 0 the console is silent
                text = f"[process {hello['process']}] waiting for process 0 at {where}"
                print(text, file=sys.stderr)
            if time.monotonic() > began + seconds:
                raise NotTogether(
                    f"process 0 did not answer at {where} within {seconds:g} seconds "
                    f"({error}); start it there and open that port and the one before it, or "
                    "give it longer with JAXLM_JOIN_SECONDS"
                ) from None
            time.sleep(0.2)


def _introduce(place, hello, end):
    """The connection to process 0, and what it answers when all have come."""
    link = socket.create_connection(place, timeout=10)
    try:
        links.keep_probing(link)
        links.send(link, hello)
        link.settimeout(max(end - time.monotonic(), 0) + 10)
        return link, json.loads(links.line(link))
    except BaseException:
        link.close()
        raise


def _absent(missing, seconds, found):
    here = ", ".join(f"{i} on {found[i]['host']}" for i in sorted(found)[:8])
    return (
        f"{_names(missing)} of {found[0]['of']} did not come within {seconds:g} seconds; "
        f"here: {here}"
        + (", ..." if len(found) > 8 else "")
        + ". All have to start with the address of process 0; JAXLM_JOIN_SECONDS gives them longer"
    )


def _names(missing):
    shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    return f"process{'es' if len(missing) > 1 else ''} {shown}"
