"""A unix socket that belongs to somebody else: of another run or task, or of the runner's control channel."""

from __future__ import annotations

import socket

from tests.runner.probes.frame import Blocked, given


def reach() -> str:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(given["path"])
        if given.get("send"):
            client.sendall(bytes.fromhex(given["send"]))
            if not client.recv(4096).startswith(b"HTTP/1.1 200"):
                raise Blocked("somebody else answers")
    return "connected"
