"""The identity of processes. The kernel reuses a pid after its process ended; a pid with its start time is unique.

Signals go through pidfds, and only after the start time was compared, so no other process is ever signalled.

File descriptors: waiting for them without a thread, and moving them out of the way of a child's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

_LOWEST = 10


async def read_until(descriptor: int, *, until: bytes | None, within_s: float) -> bytes:
    """Read up to the byte `until`, the end, 4 KiB, or `within_s` seconds, whichever is first."""
    deadline = time.monotonic() + within_s
    text = b""
    while len(text) < 4096 and (until is None or not text.endswith(until)):
        if not await readable(descriptor, deadline - time.monotonic()):
            break
        # One byte at a time: the end that is looked for may be followed by nothing for a long time.
        some = os.read(descriptor, 1 if until else 4096)
        if not some:
            break
        text += some
    return text


async def readable(descriptor: int, within_s: float | None) -> bool:
    """Wait up to `within_s` seconds until reading would not block. A regular file never blocks."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    try:
        loop.add_reader(descriptor, ready.set)
    except PermissionError:  # epoll(7) takes no regular files
        return True
    try:
        await asyncio.wait_for(ready.wait(), within_s)
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(descriptor)
    return True


def high(descriptor: int) -> int:
    """The same file at a descriptor above those that have a meaning of their own in the child."""
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _LOWEST)
    finally:
        os.close(descriptor)


_PROC = Path("/proc")
_PROCESS_GROUP = 1 << 2  # PIDFD_SIGNAL_PROCESS_GROUP, Linux 6.9


@dataclass(frozen=True)
class ProcessId:
    """A process of this boot. `start`: clock ticks since boot (proc(5), starttime)."""

    pid: int
    start: int

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """The process with this pid now, or None."""
        fields = _stat(pid)
        return None if fields is None else cls(pid, int(fields[19]))

    @property
    def exists(self) -> bool:
        """Whether the process exists. True for a zombie."""
        return ProcessId.of(self.pid) == self

    @property
    def runs(self) -> bool:
        """Whether the process runs. False for a zombie, which has no memory, files or namespaces any more."""
        fields = _stat(self.pid)
        return fields is not None and int(fields[19]) == self.start and fields[0] not in ("Z", "X")

    @property
    def stopped(self) -> bool:
        """Whether every thread is stopped, or the process no longer runs."""
        if not self.runs:
            return True
        try:
            tasks = [int(task.name) for task in (_PROC / str(self.pid) / "task").iterdir()]
        except OSError:
            return not self.runs
        states = [_stat(self.pid, task) for task in tasks]
        return all(fields is None or fields[0] in ("T", "t", "Z", "X") for fields in states)

    def signal(self, number: int) -> bool:
        """Send a signal. Returns False if the process is gone."""
        return self._send(number, 0)

    def signal_group(self, number: int) -> bool:
        """Send a signal to the process group that this process leads, or to it alone if it leads none."""
        fields = _stat(self.pid)
        if fields is None or int(fields[2]) != self.pid:
            return self.signal(number)
        try:
            return self._send(number, _PROCESS_GROUP)
        except OSError:  # an older kernel
            if not self.exists:
                return False
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)
            return True

    def _send(self, number: int, flags: int) -> bool:
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            # Compared while the pidfd is open: it names whoever had the pid when it was opened.
            if not self.exists:
                return False
            signal.pidfd_send_signal(descriptor, number, None, flags)
        except ProcessLookupError:
            return False
        finally:
            os.close(descriptor)
        return True


def this_process() -> ProcessId:
    process = ProcessId.of(os.getpid())
    assert process is not None
    return process


def boot_id() -> str:
    """The id of this boot. It differs after each start of the machine."""
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip()


def descendants(pid: int) -> list[ProcessId]:
    """The process and all below it. All processes of a pid namespace are below its first one."""
    children: dict[int, list[int]] = {}
    found: dict[int, ProcessId] = {}
    for number in _pids():
        fields = _stat(number)
        if fields is not None:
            children.setdefault(int(fields[1]), []).append(number)
            found[number] = ProcessId(number, int(fields[19]))
    result, queue = [], [pid]
    while queue:
        one = queue.pop()
        if one in found:
            result.append(found[one])
            queue.extend(children.get(one, ()))
    return result


def children(parent: ProcessId) -> list[ProcessId]:
    try:
        pids = [int(pid) for pid in (_PROC / f"{parent.pid}/task/{parent.pid}/children").read_text().split()]
    except OSError:  # a kernel without CONFIG_PROC_CHILDREN, or the parent is gone
        pids = [process.pid for process in descendants(parent.pid)]
    found = [ProcessId.of(pid) for pid in pids if (fields := _stat(pid)) and int(fields[1]) == parent.pid]
    return sorted((one for one in found if one is not None), key=lambda process: (process.start, process.pid))


class Namespaces:
    """Namespaces of a sandbox, held open, because the kernel reuses the number of a namespace that is gone.

    So `members` never confuses a process of another sandbox with one of this. Until `close`, everything that is
    mounted inside stays mounted.
    """

    KINDS = ("pid", "mnt")

    def __init__(self) -> None:
        self._descriptors: dict[str, int] = {}

    @classmethod
    def of(cls, pid: int) -> Namespaces:
        """Open the namespaces of a process. One that it shares with this process, or that cannot be opened, is left
        out.
        """
        held = cls()
        for kind in cls.KINDS:
            with contextlib.suppress(OSError):
                descriptor = os.open(_PROC / str(pid) / "ns" / kind, os.O_RDONLY | os.O_CLOEXEC)
                if os.path.samestat(os.fstat(descriptor), (_PROC / "self/ns" / kind).stat()):
                    os.close(descriptor)
                else:
                    held._descriptors[kind] = descriptor
        return held

    @property
    def inodes(self) -> dict[str, int]:
        """Their numbers, by the names of /proc/PID/ns."""
        return {kind: os.fstat(descriptor).st_ino for kind, descriptor in self._descriptors.items()}

    def members(self, kind: str) -> list[int]:
        """The pids of running processes in the namespace of this kind. None if it is not held."""
        inode = self.inodes.get(kind)
        return [] if inode is None else in_namespace(kind, inode)

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


def in_namespace(kind: str, inode: int) -> list[int]:
    """The pids of running processes in this namespace (`pid`, `mnt`, …), as far as this user may see that.

    A zombie does not count: it has nothing but its entry until its parent reaps it.
    """
    found = []
    for pid in _pids():
        with contextlib.suppress(OSError):
            if str((_PROC / str(pid) / "ns" / kind).readlink()) == f"{kind}:[{inode}]":
                process = ProcessId.of(pid)
                if process is not None and process.runs:
                    found.append(pid)
    return found


def with_name(argv0: str, uid: int) -> list[ProcessId]:
    """Processes of this user that run under this name (argv[0]); those of all users where `uid` is 0."""
    found = []
    for pid in _pids():
        path = _PROC / str(pid)
        with contextlib.suppress(OSError):
            if (
                uid in (0, path.stat().st_uid)
                and (path / "cmdline").read_bytes().split(b"\0")[0] == argv0.encode()
            ):
                process = ProcessId.of(pid)
                if process is not None:
                    found.append(process)
    return found


def describe(pid: int) -> str:
    fields = _stat(pid, with_name=True)
    return f"{pid} ({fields[0]})" if fields else str(pid)


def _pids() -> list[int]:
    return [int(path.name) for path in _PROC.iterdir() if path.name.isdigit()]


def _stat(pid: int, task: int | None = None, *, with_name: bool = False) -> list[str] | None:
    """The fields of /proc/PID/stat from `state` on, so that index 0 is field 3 of proc(5)."""
    path = _PROC / str(pid) / "stat" if task is None else _PROC / str(pid) / "task" / str(task) / "stat"
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return None
    # The name may hold spaces and brackets.
    name, _, rest = text.rpartition(")")
    return [name.partition("(")[2]] if with_name else rest.split()
