"""Child processes that cannot outlive the stack that started them.

`spawn` returns a `Child` in a process group of its own. So Ctrl-C in a terminal reaches the parent alone, and the
parent ends its children in the order it wants. The child stays in the parent's session: Linux shares processors out
among sessions (autogroup, sched(7)), and `stand_back` works only within one. On Linux the kernel kills the child when
the parent dies, however it dies. Elsewhere a parent ended by SIGKILL leaves its children behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import queue
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Final

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.private_files import make_folders, open_private
from ringfence.kernel.base.text import Lines
from ringfence.messages.codes import Code

LOOPBACK = "127.0.0.1"
MOST_PATIENCE = 10
"""The most times its limit that a start may take, however busy the machine is."""
_LOWEST_PORT, _PORTS = 20_000, 12_000
_RESERVED_AT_MOST = 200
_reserved: deque[int] = deque()
_reservations: int | None = None
"""A file whose byte N is locked by the process that was given port N."""
_next_port = itertools.count(random.randrange(_PORTS))  # noqa: S311 - so that processes do not begin with the same

# How long to wait between two checks of a condition: longer and longer, or the checks take what the start needs.
# The pause itself waits for the end of the child.
_LOOK_AGAIN_S, _LONGEST_PAUSE_S = 0.01, 0.25

# Runs in the child, before its program, in place of Popen's `preexec_fn`, which may deadlock in a parent that
# has threads. Arms PR_SET_PDEATHSIG (1, see prctl(2)); it survives exec. A parent that died before that is
# noticed by the changed parent id.
_LAUNCH = """
import ctypes, os, signal, sys
if ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0) != 0:
    sys.exit("prctl(PR_SET_PDEATHSIG) failed: " + os.strerror(ctypes.get_errno()))
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone already")
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"cannot run {sys.argv[2]}: {error.strerror}")
"""


class StackError(RingfenceError):
    """Raised when a part of the local stack is missing, cannot start, or ended by itself.

    The message names the remedy.
    """

    code = Code.STACK_FAILED


class Patience:
    """A time limit for the start of processes that excludes their wait for a processor.

    So the limit holds on a machine with ten times more work than it can do, and still ends a start that hangs. That
    wait is known on Linux (run delay, schedstat of proc(5)); elsewhere all time counts.
    """

    def __init__(
        self,
        limit_s: float,
        pids: Callable[[], Iterable[int]],
        *,
        clock: Callable[[], float] = time.monotonic,
        delays: Callable[[Iterable[int]], Mapping[int, float]] | None = None,
    ) -> None:
        """Args:
            limit_s: the time limit.
            pids: the processes whose wait does not count.
            clock: a monotonic clock in seconds.
            delays: returns how long each thread of some processes has waited for a processor so far, in seconds.
        """  # fmt: skip
        self.limit_s = limit_s
        self._pids = pids
        self._clock = clock
        self._delays = delays or run_delays
        self._begun_s = clock()
        self._before = self._delays(pids())
        self.delayed_s = 0.0

    @property
    def over(self) -> bool:
        """Return whether the time is over: `limit_s` without waits, or in any case `MOST_PATIENCE` times as long."""
        now = self._delays(self._pids())
        waited = [delay_s - self._before.get(thread, 0.0) for thread, delay_s in now.items()]
        self.delayed_s = max(self.delayed_s, *waited, 0.0)
        passed_s = self._clock() - self._begun_s
        return passed_s - self.delayed_s > self.limit_s or passed_s > self.limit_s * MOST_PATIENCE

    @property
    def spent(self) -> str:
        """Return the limit as text for error messages."""
        waited = f", besides {self.delayed_s:.0f} s of waiting for a processor" if self.delayed_s >= 1 else ""
        return f"{self.limit_s:g} s{waited}"


def run_delays(pids: Iterable[int]) -> dict[int, float]:
    """Return how long each thread of these processes was ready to run and waited for a processor, in seconds."""
    delays: dict[int, float] = {}
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError, IndexError, ValueError):
                delays[int(task.parent.name)] = int(task.read_text().split()[1]) / 1e9
    return delays


class Child:
    """One child process, made by `spawn`. Do not share it between threads."""

    def __init__(self, name: str, popen: subprocess.Popen[bytes], log_path: Path) -> None:
        self.name = name
        self.log_path = log_path
        self._popen = popen

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def alive(self) -> bool:
        return self._popen.poll() is None

    @property
    def returncode(self) -> int | None:
        """Return the exit status, negative for the signal that ended it; None while it runs."""
        return self._popen.poll()

    def log_tail(self, lines: int = 10) -> str:
        """Return the last lines of its output, for error messages."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - 16_384))
                text = log.read().decode(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Wait for its end, and return the exit status; None if it still runs after `timeout_s`."""
        try:
            return self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def wait_until(
        self,
        ready: Callable[[], bool],
        timeout_s: float,
        condition: str,
        *,
        beside: Callable[[], Iterable[int]] = tuple,
        why: Callable[[], str | None] = lambda: None,
        patience: Patience | None = None,
    ) -> None:
        """Return as soon as `ready()` is true.

        Raises StackError, with the end of its log, if the child ends first or `timeout_s` runs out. `condition`
        names in the message what was awaited ("answers on port 9092"); `why` returns the known obstacle. Waits for a
        processor by the child, this process, or the processes in `beside` do not count.
        """
        patience = patience or Patience(timeout_s, lambda: (self.pid, os.getpid(), *beside()))
        pause_s = _LOOK_AGAIN_S
        while not ready():
            status = self.wait(pause_s)
            pause_s = min(pause_s * 1.5, _LONGEST_PAUSE_S)
            if status is not None:
                raise StackError(
                    self._with_log(f"{self.name} ended with status {status} before it {condition}.")
                )
            if patience.over:
                if ready():
                    return
                reason = f" It says: {obstacle}." if (obstacle := why()) else ""
                raise StackError(
                    self._with_log(
                        f"{self.name} runs, but took more than {patience.spent} until it {condition}.{reason}"
                    )
                )

    def terminate(self) -> None:
        """Send SIGTERM without waiting, e.g. so that several children end concurrently before `stop`."""
        if self.alive:
            self._popen.terminate()

    def stop(self, grace_s: float = 5.0) -> int:
        """Send SIGTERM; after `grace_s` seconds send SIGKILL to its whole process group.

        Returns its exit status. For a process that has ended already it only returns that.
        """
        if self.alive:
            self._popen.terminate()
            if self.wait(grace_s) is None:
                self.kill()
        return self._popen.wait()

    def stand_back(self, thread: str) -> None:
        """Give one of its threads only the processor time that the other processes leave.

        It works on Linux, where threads have names and an idle scheduling class (SCHED_IDLE, sched(7)); elsewhere it
        does nothing.
        """
        for tid in self._threads(thread):
            with contextlib.suppress(OSError):
                os.sched_setscheduler(tid, os.SCHED_IDLE, os.sched_param(0))

    def lengthen_pauses(self, thread: str, seconds: int) -> None:
        """Let each timed pause of one of its threads last up to so many seconds longer.

        It works on Linux, by the thread's timer slack (PR_SET_TIMERSLACK, proc_pid_timerslack_ns(5)); elsewhere it does
        nothing.
        """
        for tid in self._threads(thread):
            with contextlib.suppress(OSError):
                Path(f"/proc/{tid}/timerslack_ns").write_text(str(seconds * 1_000_000_000))

    def _threads(self, name: str) -> Iterator[int]:
        """The ids of its threads of that name, where the system tells (Linux)."""
        for comm in Path(f"/proc/{self.pid}/task").glob("*/comm"):
            with contextlib.suppress(OSError):
                if comm.read_text().strip() == name:
                    yield int(comm.parent.name)

    def kill(self) -> int:
        """Send SIGKILL at once to its whole process group. Returns its exit status."""
        if self.alive:  # not reaped yet, so the number of the group cannot belong to anyone else
            os.killpg(self._popen.pid, signal.SIGKILL)
        return self._popen.wait()

    def _with_log(self, sentence: str) -> Lines:
        tail = self.log_tail()
        hint = f"{sentence} Its log is {self.log_path}"
        return Lines([f"{hint} and ends with:", *tail.split("\n")] if tail else [f"{hint} (empty)."])


PRIVATE: Final = 0o077
"""The umask of a child whose files are for its user alone."""


def spawn(
    name: str,
    argv: Sequence[str],
    *,
    log_path: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    umask: int = -1,
) -> Child:
    """Start `argv` in its own process group, without input, and append all output to `log_path` (mode 0600).

    `env` is the whole environment of the child. None passes the parent's on, and `umask` -1 the parent's umask. Any
    thread may call it. Raises StackError if the program is missing.
    """
    path = env.get("PATH") if env is not None else None
    if shutil.which(argv[0], path=path) is None:
        raise StackError(
            f"{name} cannot start: there is no program {argv[0]}. Install it, or put it on PATH."
        )
    make_folders(log_path.parent)
    command = list(argv)
    if sys.platform == "linux":
        command = [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), *argv]

    def popen() -> subprocess.Popen[bytes]:
        log = open_private(log_path, os.O_WRONLY | os.O_APPEND)
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=cwd,
                process_group=0,
                umask=umask,
            )
        finally:
            os.close(log)

    return Child(name, _forker.run(popen), log_path)


class _Forker:
    """Runs every fork on one thread that lives as long as the process.

    PR_SET_PDEATHSIG fires when the *thread* that forked ends (prctl(2)): a child started from a worker of a
    thread pool would die with that worker, in the middle of a healthy stack.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def run(self, popen: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        result: Future[subprocess.Popen[bytes]] = Future()

        def job() -> None:
            try:
                result.set_result(popen())
            except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
                result.set_exception(error)

        with self._lock:
            # Dead in a process that was itself forked: threads are not inherited.
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="ringfence-forker", daemon=True)
                self._thread.start()
            self._jobs.put(job)
        return result.result()

    def _work(self) -> None:
        while True:
            self._jobs.get()()


_forker = _Forker()


def port_is_free(port: int) -> bool:
    """Return whether a server could listen on this loopback port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """Return a loopback port that nobody listens on.

    It is below the range for outgoing connections (32768 and up on Linux). There, a client that keeps trying to reach a
    restarting server could be given the server's own port and take it. Whoever was given a port may not listen on it
    yet. So each call returns the next one, and other processes of this user skip reserved ports.
    """
    for _ in range(_PORTS):
        port = _LOWEST_PORT + next(_next_port) % _PORTS
        if _reserve(port) and port_is_free(port):
            return port
    raise StackError(
        f"No free port between {_LOWEST_PORT} and {_LOWEST_PORT + _PORTS} on {LOOPBACK}: "
        "end some servers and try again."
    )


def _reserve(port: int) -> bool:
    """Reserve a port against other processes of this user, until enough others were given after it, or this process
    ends.
    """
    global _reservations
    if _reservations is None:
        path = Path(tempfile.gettempdir(), f"ringfence-ports-{os.getuid()}")
        _reservations = open_private(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.lockf(_reservations, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
    except OSError:
        return False
    _reserved.append(port)
    if len(_reserved) > _RESERVED_AT_MOST:
        fcntl.lockf(_reservations, fcntl.LOCK_UN, 1, _reserved.popleft())
    return True


def claim_port(port: int, server: str, option: str) -> int:
    """Return `port` where it is free, or any free port where it is 0.

    Raises StackError, which names `server` and the `option` that selects another port.
    """
    if port == 0:
        return free_port()
    if not port_is_free(port):
        raise StackError(
            f"{server} cannot start: port {port} is in use. End what listens there, or choose another by {option}."
        )
    return port


class EmbeddedServer:
    """One server with data of its own on a loopback port. `start` and `stop` block; both may be called again.

    Its data is in a folder of its own inside `data_dir`, emptied at start and at stop unless `keep`, or unless that
    call says otherwise. `port` 0 takes a free port, once, for the life of this object.
    """

    grace_s: float
    """How long a stop waits before it kills the server."""

    def __init__(self, store: Path, port: int, log_path: Path, *, keep: bool) -> None:
        """`log_path`: its output is appended there."""
        self.port = port
        self.child: Child | None = None
        self._store = store
        self._log_path = log_path
        self._keep = keep

    def start(self, *, resume: bool = False) -> None:
        """Start the server, with `resume` on the data that it finds. Returns once it answers.

        Raises StackError if the package is missing, the port is in use or the server does not start.
        """
        if self.child is not None and self.child.alive:
            return
        self._clear(self._keep or resume)
        self._launch()

    def stop(self, *, keep: bool = False) -> None:
        """Stop the server and delete its data, unless it is kept."""
        kept = self._keep or keep
        if self.child is not None:
            # Without the data there is nothing to write, which can take seconds.
            self.child.stop(self.grace_s) if kept else self.child.kill()
            self.child = None
        self._clear(kept)

    def restart(self) -> None:
        """Shut down the server and start it again on the same port, with the data that it keeps."""
        if self.child is not None:
            self.child.stop(self.grace_s)
        self._launch()

    def _launch(self) -> None:
        """Start the process, set `child`, and wait until it answers. Raises as `start`."""
        raise NotImplementedError

    def _clear(self, keep: bool) -> None:
        if not keep:
            shutil.rmtree(self._store, ignore_errors=True)
