"""A program in a pseudo-terminal, for tests of what a person sees."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ESCAPES = re.compile(r"\x1b\[[0-9;?>=]*[A-Za-z]|\x1b[=>()][0-9A-Za-z]?|\x1b\][^\x07]*\x07")
"""Escape sequences of terminals."""
WITHIN_S = 60.0


class Terminal:
    """A program whose stdin, stdout and stderr are a terminal: `with Terminal([...]) as terminal`."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        folder: Path | None = None,
        width: int = 120,
        stdout: int | None = None,
        stderr: int | None = None,
    ) -> None:
        """`stdout`, `stderr`: another file in the place of the terminal."""
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
        self.seen = ""
        self._program = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs if stdout is None else stdout,
            stderr=theirs if stderr is None else stderr,
            env={"TERM": "xterm", **environment},
            cwd=folder,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._program.poll() is None:
            self._program.kill()
        self._program.wait()
        os.close(self._ours)

    def send(self, keys: str) -> None:
        """Type keys."""
        os.write(self._ours, keys.encode())

    def until(self, pattern: str) -> re.Match[str]:
        """Return the match once the terminal has got it, and forget what came before its end. Fails after a minute."""
        ends = time.monotonic() + WITHIN_S
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            assert time.monotonic() < ends, f"{pattern!r} did not come: {self.seen!r}"
            assert self._read(0.2), f"ended without {pattern!r}: {self.seen!r}"
        self.seen = self.seen[found.end() :]
        return found

    def to_the_end(self) -> tuple[int, str]:
        """Return the exit status, and all that the terminal got. Fails after a minute."""
        ends = time.monotonic() + WITHIN_S
        while self._read(0.2):
            assert time.monotonic() < ends, f"did not end: {self.seen!r}"
        return self._program.wait(WITHIN_S), self.seen

    def _read(self, seconds: float) -> bool:
        """Read what there is. Returns whether more can come."""
        if not select.select([self._ours], [], [], seconds)[0]:
            return True
        try:
            part = os.read(self._ours, 65_536)
        except OSError:  # the program has ended, and closed the terminal
            return False
        self.seen += part.decode(errors="replace")
        return bool(part)
