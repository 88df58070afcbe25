"""Processes that end with the process that started them, however that ends."""

from __future__ import annotations

import shutil


def mortal(*argv: str) -> list[str]:
    """The command line of a program that the kernel kills when the calling thread ends (PR_SET_PDEATHSIG, prctl(2)).

    Start it from a thread that lives as long as it is needed. Without setpriv (util-linux) it is the same command line.
    """
    return ["setpriv", "--pdeathsig", "KILL", "--", *argv] if shutil.which("setpriv") else [*argv]
