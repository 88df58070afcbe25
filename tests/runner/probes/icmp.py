"""An echo request."""

from __future__ import annotations

import socket


def reach() -> str:
    try:
        return _echo(socket.SOCK_RAW)
    except OSError:
        return _echo(socket.SOCK_DGRAM)


def _echo(kind: int) -> str:
    with socket.socket(socket.AF_INET, kind, socket.IPPROTO_ICMP) as client:
        client.settimeout(5)
        client.sendto(b"\x08\0\xe5\xca\x12\x34\0\1", ("169.254.169.254", 0))
        return client.recv(512).hex()
