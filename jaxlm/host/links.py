"""Connections between processes: lines of JSON, over a TCP that notices when the other end is gone.

The kernel closes a connection when its process dies, however it dies; a host that loses power, or
its network, is found by the kernel's probes, within `PROBED_SECONDS`.
"""

import contextlib
import json
import socket

PROBED_SECONDS = 30  # until a host that no longer answers at all counts as gone


def listener(port: int) -> socket.socket:
    """Listens at all addresses of this host, of both kinds where it has IPv6. Raises `OSError`."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, backlog=4096, dualstack_ipv6=both)


def keep_probing(link):
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


def send(link, message):
    with contextlib.suppress(OSError):  # it has gone: whoever listens learns of it
        link.sendall(json.dumps(message).encode() + b"\n")


def receive(link):
    try:
        return link.recv(2**20)
    except OSError:
        return b""


def line(link):
    data = b""
    while not data.endswith(b"\n"):
        if not (more := link.recv(1)):  # no byte of what comes after the line
            raise OSError("the connection was closed")
        data += more
    return data
