"""Typed input for whoever reads the terminal next."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import termios


def reach() -> str:
    _, terminal = pty.openpty()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
            for character in b"x\n":
                fcntl.ioctl(terminal, termios.TIOCSTI, bytes([character]))
            os._exit(0 if select.select([terminal], [], [], 5)[0] and os.read(terminal, 10) == b"x\n" else 4)
        except OSError as error:
            os._exit(error.errno or 1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        raise OSError(status, os.strerror(status))
    return "typed"
