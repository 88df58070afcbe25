"""Starts the command's process, and protects init from it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import stat
from collections.abc import Mapping, Sequence
from typing import Final

FORWARDED: Final = (
    signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH,
    signal.SIGTSTP, signal.SIGCONT,
)  # fmt: skip
"""Signals to init that the command's process group gets instead."""
NOT_FOUND: Final = 127
NOT_EXECUTABLE: Final = 126
SIGNALLED: Final = 128

_PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 4, 36  # prctl(2)
# Python ignores these; a command expects their defaults.
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)


class StartError(Exception):
    """Raised if the command cannot be run."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


def prepare() -> None:
    """Make this process undumpable, so that others of its uid cannot read it, and a subreaper. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value in ((_PR_SET_DUMPABLE, 0), (_PR_SET_CHILD_SUBREAPER, 1)):
        if libc.prctl(option, value, 0, 0, 0) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    # Python would answer with a traceback. What comes before the command runs ends init.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def block_signals() -> None:
    """Block signals from here on, so that none is lost before init forwards them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, (*FORWARDED, signal.SIGCHLD))


def unblock_signals() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*FORWARDED, signal.SIGCHLD))


def start(argv: Sequence[str], environment: Mapping[str, str], folder: str) -> int:
    """Start the command in a process group of its own, with the streams of init. Returns its pid.

    Raises StartError. The command inherits no other descriptor of init: all close on execve(2).
    """
    try:
        os.chdir(folder)
    except OSError as error:
        raise StartError(NOT_EXECUTABLE, f"{folder}: {error.strerror}") from None
    program = _find(argv[0], environment.get("PATH", os.defpath))
    try:
        try:
            return _spawn(program, argv, environment)
        except OSError as error:
            if error.errno != errno.ENOEXEC:
                raise
            # A script without `#!` is one for the shell, as POSIX has it for execvp.
            return _spawn("/bin/sh", ["/bin/sh", program, *argv[1:]], environment)
    except OSError as error:
        code = NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
        raise StartError(code, f"{argv[0]}: {error.strerror}") from None
    finally:
        # The folder may be on a mount that the command wants to remove.
        os.chdir("/")


def _spawn(program: str, argv: Sequence[str], environment: Mapping[str, str]) -> int:
    return os.posix_spawn(
        program,
        list(argv),
        dict(environment),
        setpgroup=0,
        setsigmask=(),
        setsigdef=(*_IGNORED_BY_PYTHON, *FORWARDED),
    )


def _find(name: str, path: str) -> str:
    """Find the file that a shell would run. Raises StartError."""
    if "/" in name:
        return name
    found_other = False
    for folder in path.split(os.pathsep):
        candidate = f"{folder or '.'}/{name}"
        with contextlib.suppress(OSError):
            if stat.S_ISREG(os.stat(candidate).st_mode):  # noqa: PTH116 - pathlib is slow to import
                if os.access(candidate, os.X_OK):
                    return candidate
                found_other = True
    if found_other:
        raise StartError(NOT_EXECUTABLE, f"{name}: {os.strerror(errno.EACCES)}")
    raise StartError(NOT_FOUND, f"{name}: not found")


def release_streams() -> None:
    """Close init's copies of the streams, so that readers see the end when the command closes its own."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for number in (0, 1, 2):
        os.dup2(null, number)


def exit_code(status: int) -> int:
    """The exit code that a shell reports for a status of waitpid(2)."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else SIGNALLED - code
