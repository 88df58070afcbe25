"""A service at an address: cloud metadata by IPv4, IPv6 or name, or something on the machine's loopback."""

from __future__ import annotations

import socket

from tests.runner.probes.frame import Blocked, canary, given


def reach() -> str:
    host, port = given["address"]
    with socket.create_connection((host, port), timeout=5) as connection:
        connection.sendall(b"GET /latest/meta-data/ HTTP/1.0\r\n\r\n")
        said = b""
        while some := connection.recv(4096):
            said += some
    if canary.encode() not in said:
        raise Blocked("somebody else answers")
    return said.decode()[:40]
