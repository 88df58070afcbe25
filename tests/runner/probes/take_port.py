"""The place of the program that listens at the proxy's port: a second listener there gets what others send."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

from tests.runner.probes.frame import Blocked

ADDRESSES = (
    (socket.AF_INET, "127.0.0.1"),
    (socket.AF_INET, "0.0.0.0"),
    (socket.AF_INET6, "::ffff:127.0.0.1"),
    (socket.AF_INET6, "::"),
)


def taken(family: socket.AddressFamily, address: str, port: int) -> bool:
    with socket.socket(family) as server:
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            server.setsockopt(socket.SOL_SOCKET, option, 1)
        if family == socket.AF_INET6:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        server.bind((address, port))
        server.listen()
        server.setblocking(False)
        kept = []
        for _ in range(64):
            kept.append(socket.create_connection(("127.0.0.1", port), timeout=5))
            try:
                server.accept()[0].close()
                return True
            except BlockingIOError:
                continue
        return False


def reach() -> str:
    port = urlsplit(os.environ["HTTP_PROXY"]).port
    assert port
    for family, address in ADDRESSES:
        try:
            if taken(family, address, port):
                return address
        except OSError:
            continue
    raise Blocked("nobody's connections arrive")
