"""The sockets of init: the listening ones of proxy and relays, and the connection to the runner (control channel).

Proxy and relays listen before the command starts, so that its first connection finds them. The connection to the
runner is a blocking socket until the command runs.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from ringfence.runner.control.messages import MAX_FROM_RUNNER_BYTES, Message, Relay, decode, encode

M = TypeVar("M", bound=Message)


class RunnerConnection:
    """The connection to the runner. It ends when the runner ends."""

    def __init__(self, path: str) -> None:
        """Connect. Raises OSError."""
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(path)
        self._lines = self.socket.makefile("rb")

    def send(self, message: Message) -> None:
        """Raises OSError."""
        self.socket.sendall(encode(message))

    def receive(self, expected: type[M]) -> M:
        """Wait for the next message. Raises ControlMessageError, and ConnectionResetError at the runner's end."""
        line = self._lines.readline(MAX_FROM_RUNNER_BYTES)
        if not line:
            raise ConnectionResetError("the runner has ended")
        return decode(line, expected)


_LOOPBACK = "127.0.0.1"
_BACKLOG = 128


@dataclass(frozen=True)
class Listeners:
    """The listening sockets of the proxy and of the relays."""

    proxy: socket.socket
    relays: tuple[tuple[Relay, socket.socket], ...]

    @property
    def proxy_port(self) -> int:
        port: int = self.proxy.getsockname()[1]
        return port


def open_listeners(relays: Sequence[Relay]) -> Listeners:
    """Listen for the proxy at any port, and for each relay at its own address. Raises OSError."""
    # The proxy last: any port will do for it, but none that a relay has.
    listening = tuple((relay, _listen(relay.address, relay.port)) for relay in relays)
    return Listeners(_listen(_LOOPBACK, 0), listening)


def _listen(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.bind((address, port))
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"cannot listen at {address}:{port}: {error.strerror}") from None
    return listener
