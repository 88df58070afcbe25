"""Init's side of the control channel: a blocking socket until the command runs."""

from __future__ import annotations

import socket
from typing import TypeVar

from ringfence.runner.control.messages import MAX_FROM_RUNNER_BYTES, Message, decode, encode

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
