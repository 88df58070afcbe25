"""What the probes of whole runs look for, planted on this machine's loopback interface."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

LOOPBACK = "127.0.0.1"
_WITHIN_S = 10

_REUSABLE = """
import socket, sys
server = socket.socket()
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
server.bind(("127.0.0.1", int(sys.argv[1])))
server.listen(128)
print(server.getsockname()[1], flush=True)
sys.stdin.read()
"""


class Server:
    """Answers each connection with a thread of its own."""

    def __init__(self, answer: Callable[[socket.socket], None], host: str = LOOPBACK) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._answer = answer
        self._listener = socket.create_server((host, 0), family=family)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        # It wakes the thread that accepts, which closing alone does not.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._one, args=(peer,), daemon=True).start()

    def _one(self, peer: socket.socket) -> None:
        with contextlib.suppress(OSError), peer:
            peer.settimeout(_WITHIN_S)
            self._answer(peer)


def head_of(peer: socket.socket) -> str:
    """The head of a request."""
    said = b""
    while b"\r\n\r\n" not in said:
        some = peer.recv(4096)
        if not some:
            break
        said += some
    return said.decode("latin-1")


def answer_http(peer: socket.socket, body: str) -> None:
    peer.sendall(
        f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()
    )


def always(body: str) -> Callable[[socket.socket], None]:
    """Answer whatever is asked, as a service does that believes everybody on its machine."""

    def answer(peer: socket.socket) -> None:
        head_of(peer)
        answer_http(peer, body)

    return answer


def by_host(hidden: str, body: str, otherwise: str) -> Callable[[socket.socket], None]:
    """Answer by the name that is asked for, as the servers of a content delivery network do."""

    def answer(peer: socket.socket) -> None:
        asked = [line for line in head_of(peer).lower().split("\r\n") if line.startswith("host:")]
        answer_http(peer, body if any(hidden in line for line in asked) else otherwise)

    return answer


def over_tls(
    context: ssl.SSLContext, answer: Callable[[socket.socket], None]
) -> Callable[[socket.socket], None]:
    def answer_inside(peer: socket.socket) -> None:
        with context.wrap_socket(peer, server_side=True) as inside:
            answer(inside)

    return answer_inside


def proxy(peer: socket.socket) -> None:
    """A forward proxy that leads everywhere, as the one of an office does."""
    head = head_of(peer)
    method, asked, _ = head.split("\r\n", 1)[0].split(" ", 2)
    connecting = method == "CONNECT"
    authority = asked if connecting else urlsplit(asked).netloc
    host, _, port = authority.rpartition("@")[2].rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=_WITHIN_S) as onward:
        if connecting:
            peer.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            onward.sendall(head.replace(asked, urlsplit(asked).path or "/", 1).encode("latin-1"))
        back = threading.Thread(target=_pump, args=(onward, peer), daemon=True)
        back.start()
        _pump(peer, onward)
        back.join(_WITHIN_S)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while some := source.recv(65536):
            sink.sendall(some)
        sink.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def reusable_listener() -> Iterator[int]:
    """A program that listens at a port and lets others of its user do so as well. Yields the port."""
    process = subprocess.Popen(
        [sys.executable, "-c", _REUSABLE, "0"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()
