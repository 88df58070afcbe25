"""Typed input for whoever reads the terminal next, which is the command's standard input."""

from __future__ import annotations

import fcntl
import os
import termios

from tests.runner.probes.frame import Blocked


def reach() -> str:
    if not os.isatty(0):
        raise Blocked("there is no terminal")
    fcntl.ioctl(0, termios.TIOCSTI, b"x")
    return "typed"
