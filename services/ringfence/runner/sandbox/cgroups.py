"""Control groups: limits of memory, processor and processes, freezing, killing and counting, on versions 2 and 1.

A limit counts only if the kernel enforces it for the whole sandbox. Of resource limits, only RLIMIT_NPROC qualifies
(`processes_limited_without_cgroup`): memory limits of single processes add up, and a processor affinity can be changed
from inside.

Version 2 is described in the kernel's admin-guide/cgroup-v2.rst, version 1 in admin-guide/cgroup-v1/. On a machine with
both, each controller is used where it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path

from ringfence.runner.sandbox.backend import ResourceLimits, ResourceUsage, SandboxUnavailableError
from ringfence.runner.sandbox.processes import ProcessId

PREFIX = "ringfence-"
_PERIOD_US = 100_000
_NEEDED = ("cpu", "memory", "pids")
REMEDY = (
    "let a user's service manager delegate a control group: systemd-run --user --scope -p Delegate=yes COMMAND; "
    "in a container, mount /sys/fs/cgroup writable; or run without the limit"
)


@dataclass(frozen=True)
class Hierarchies:
    """The control groups below which this process may make others."""

    unified: Path | None = None
    """The group of version 2."""
    unified_controllers: frozenset[str] = frozenset()
    """What children of `unified` can limit."""
    legacy: dict[str, Path] = field(default_factory=dict)
    """The group of version 1, by controller."""

    @property
    def controllers(self) -> frozenset[str]:
        return self.unified_controllers | self.legacy.keys()


def processes_limited_without_cgroup() -> bool:
    """Whether RLIMIT_NPROC bounds a whole sandbox: Linux 5.14 counts processes for each user namespace, and nobody
    inside can raise a hard limit. It does not hold for uid 0 of the machine, which no sandbox runs as.
    """
    release = platform.release().split(".")
    return (int(release[0]), int("".join(filter(str.isdigit, release[1].split("-")[0])))) >= (5, 14)


def find_hierarchies(parent: Path | None = None, *, proc: Path = Path("/proc/self")) -> Hierarchies:
    """Find control groups that this process may use. `parent`: a version 2 group that was set aside for it.

    Enables controllers for the children of the group that is found. If this process is alone in a delegated group,
    it moves to a child of it, because version 2 limits no group that has both processes and limited children.
    """
    own = _own_groups(proc)
    mounts = _mounts(proc)
    legacy: dict[str, Path] = {}
    unified: Path | None = None
    enabled: frozenset[str] = frozenset()
    for point, controllers in mounts:
        if controllers is None:
            for candidate in _candidates(point, own.get(""), parent):
                enabled = _enable(candidate)
                # A group that limits nothing still freezes, kills and counts.
                unified = candidate if enabled or unified is None else unified
                if enabled:
                    break
        else:
            for controller in controllers:
                if controller in (*_NEEDED, "freezer", "cpuacct"):
                    for candidate in _candidates(point, own.get(controller), None):
                        legacy.setdefault(controller, candidate)
    return Hierarchies(unified, enabled, legacy)


def find_mounted(*, proc: Path = Path("/proc/self")) -> dict[str, int]:
    """The mounted controllers of the machine, with their version, also those that this process may not use."""
    found: dict[str, int] = {}
    for point, controllers in _mounts(proc):
        if controllers is None:
            with contextlib.suppress(OSError):
                found.update(dict.fromkeys((point / "cgroup.controllers").read_text().split(), 2))
        else:
            found.update(dict.fromkeys((one for one in controllers if one in (*_NEEDED, "freezer")), 1))
    return found


class ControlGroup:
    """The control groups of one sandbox: one directory on version 2, and one for each controller on version 1."""

    def __init__(self, name: str, hierarchies: Hierarchies) -> None:
        """Nothing is created before `create`, so that the paths can be recorded first."""
        self._unified = hierarchies.unified / name if hierarchies.unified else None
        self._unified_controllers = hierarchies.unified_controllers
        self._legacy = {controller: folder / name for controller, folder in hierarchies.legacy.items()}

    @property
    def paths(self) -> list[Path]:
        return [*([self._unified] if self._unified else []), *dict.fromkeys(self._legacy.values())]

    def lacking(self, limits: ResourceLimits) -> list[str]:
        """The controllers that these limits need and that this machine lacks."""
        wanted = {"memory": limits.memory_bytes, "cpu": limits.cpus, "pids": limits.pids}
        has = self._unified_controllers | self._legacy.keys()
        return [
            controller for controller, limit in wanted.items() if limit is not None and controller not in has
        ]

    def create(self, limits: ResourceLimits) -> None:
        """Create the groups, and set the limits that have a controller here.

        Raises SandboxUnavailableError if the kernel refuses a limit. Then no group remains.
        """
        made: list[Path] = []
        try:
            for path in self.paths:
                path.mkdir()
                made.append(path)
            self._limit(limits)
        except OSError as error:
            for path in made:
                with contextlib.suppress(OSError):
                    path.rmdir()
            # What is there is somebody else's: it must not be removed as ours.
            self._unified, self._legacy = None, {}
            raise SandboxUnavailableError(
                f"the control group {error.filename} cannot be made: {error.strerror}"
            ).with_remedy(REMEDY) from None

    def _limit(self, limits: ResourceLimits) -> None:
        memory, unified = limits.memory_bytes, self._unified
        if memory is not None:
            if "memory" in self._legacy:
                group = self._legacy["memory"]
                _write(group / "memory.limit_in_bytes", memory)
                if (group / "memory.memsw.limit_in_bytes").exists():
                    _write(group / "memory.memsw.limit_in_bytes", memory)
            elif unified:
                _write(unified / "memory.max", memory)
                # All processes go together: a sandbox that lost one of them would be in an unknown state.
                _write(unified / "memory.oom.group", 1)
        if "memory" in self._legacy:
            _write_if_there(self._legacy["memory"] / "memory.swappiness", 0)
        elif unified and "memory" in self._unified_controllers:
            _write_if_there(unified / "memory.swap.max", 0)
            _write_if_there(unified / "memory.zswap.max", 0)
        if limits.cpus is not None:
            quota = math.ceil(limits.cpus * _PERIOD_US)
            if "cpu" in self._legacy:
                _write(self._legacy["cpu"] / "cpu.cfs_period_us", _PERIOD_US)
                _write(self._legacy["cpu"] / "cpu.cfs_quota_us", quota)
            elif unified:
                _write(unified / "cpu.max", f"{quota} {_PERIOD_US}")
        if limits.pids is not None:
            folder = self._legacy.get("pids", unified)
            if folder and ("pids" in self._legacy or "pids" in self._unified_controllers):
                _write(folder / "pids.max", limits.pids)

    @property
    def can_freeze(self) -> bool:
        return "freezer" in self._legacy or bool(self._unified and (self._unified / "cgroup.freeze").exists())

    async def freeze(self, *, within_s: float = 10) -> None:
        """Freeze all processes. Raises SandboxUnavailableError if the kernel does not report that in time."""
        await self._set_frozen(True, within_s)

    async def thaw(self, *, within_s: float = 10) -> None:
        await self._set_frozen(False, within_s)

    async def _set_frozen(self, frozen: bool, within_s: float) -> None:
        freezer = self._legacy.get("freezer")
        deadline = time.monotonic() + within_s
        if freezer:
            _write(freezer / "freezer.state", "FROZEN" if frozen else "THAWED")
        elif self._unified:
            _write(self._unified / "cgroup.freeze", int(frozen))
        while True:
            if freezer:
                reached = (freezer / "freezer.state").read_text().strip() == (
                    "FROZEN" if frozen else "THAWED"
                )
            else:
                assert self._unified is not None
                events = (self._unified / "cgroup.events").read_text().split()
                reached = f"frozen {int(frozen)}" in " ".join(events)
            if reached:
                return
            if time.monotonic() > deadline:
                raise SandboxUnavailableError(
                    "the kernel did not freeze all processes of the sandbox in time"
                )
            await asyncio.sleep(0.01)

    def processes(self) -> list[int]:
        found: set[int] = set()
        for path in self.paths:
            with contextlib.suppress(OSError):
                found.update(int(pid) for pid in (path / "cgroup.procs").read_text().split() if pid != "0")
        return sorted(found)

    def kill(self) -> None:
        """Send SIGKILL to all processes in the groups, frozen ones included."""
        if self._unified:
            with contextlib.suppress(OSError):
                _write(self._unified / "cgroup.kill", 1)  # Linux 5.14
        for pid in self.processes():
            process = ProcessId.of(pid)
            # Asked again once its start time is known: a process that is here now is ours.
            if process is not None and pid in self.processes():
                process.signal(9)
        for path, value in ((self._legacy.get("freezer"), "THAWED"), (self._unified, "0")):
            if path:
                _write_if_there(path / ("freezer.state" if value == "THAWED" else "cgroup.freeze"), value)

    async def remove(self, *, within_s: float = 10) -> list[str]:
        """Kill all processes and remove the groups, also groups below them. Returns what remained."""
        deadline = time.monotonic() + within_s
        while True:
            self.kill()
            left = [path for path in self.paths if not _removed(path)]
            if not left or time.monotonic() > deadline:
                return [str(path) for path in left]
            await asyncio.sleep(0.01)

    def usage(self) -> ResourceUsage:
        """The usage so far. Call it before `remove`."""
        unified, memory = self._unified, self._legacy.get("memory")
        cpu_s = peak = kills = None
        if "cpuacct" in self._legacy:
            cpu_ns = _number(self._legacy["cpuacct"] / "cpuacct.usage")
            cpu_s = None if cpu_ns is None else cpu_ns / 1e9
        elif unified:
            cpu_us = _keyed(unified / "cpu.stat", "usage_usec")
            cpu_s = None if cpu_us is None else cpu_us / 1e6
        if memory:
            peak = _number(memory / "memory.max_usage_in_bytes")
            kills = _keyed(memory / "memory.oom_control", "oom_kill")
        elif unified:
            peak = _number(unified / "memory.peak")
            kills = _keyed(unified / "memory.events", "oom_kill")
        return ResourceUsage(cpu_s, peak, kills)

    @classmethod
    def recorded(cls, paths: list[str]) -> ControlGroup:
        group = cls("", Hierarchies())
        for path in map(Path, paths):
            if path.name.startswith(PREFIX):
                if (path / "cgroup.controllers").exists():
                    group._unified = path
                else:
                    group._legacy["freezer" if (path / "freezer.state").exists() else str(path)] = path
        return group


def _own_groups(proc: Path) -> dict[str, str]:
    """This process's group by controller; that of version 2 has the key ''."""
    groups = {}
    with contextlib.suppress(OSError):
        for line in (proc / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            groups.update(dict.fromkeys(controllers.split(","), path))
    return groups


def _mounts(proc: Path) -> list[tuple[Path, list[str] | None]]:
    """Where control groups are mounted, with the controllers of version 1; None: version 2."""
    found: list[tuple[Path, list[str] | None]] = []
    with contextlib.suppress(OSError):
        for line in (proc / "mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            kind, _, options = after.split(" ", 2)
            point = Path(before.split(" ")[4])
            if kind == "cgroup2":
                found.append((point, None))
            elif kind == "cgroup":
                found.append((point, options.split(",")))
    return found


def _candidates(point: Path, own: str | None, parent: Path | None) -> list[Path]:
    """Groups below which this process may make others: what was set aside, its own, and for root the topmost."""
    folders = [parent] if parent else [point / (own or "/").lstrip("/"), point]
    return [folder for folder in folders if folder.is_dir() and os.access(folder, os.W_OK) and
            os.access(folder / "cgroup.procs", os.W_OK)]  # fmt: skip


def _enable(group: Path) -> frozenset[str]:
    """Let the children of a version 2 group have limits, and return which."""
    control = group / "cgroup.subtree_control"

    def have() -> frozenset[str]:
        try:
            return frozenset(control.read_text().split()) & frozenset(_NEEDED)
        except OSError:
            return frozenset()

    try:
        offered = set((group / "cgroup.controllers").read_text().split()) & set(_NEEDED)
    except OSError:
        return frozenset()
    missing = " ".join(f"+{controller}" for controller in sorted(offered - have()))
    if not missing:
        return have()
    try:
        _write(control, missing)
    except OSError:
        with contextlib.suppress(OSError):
            if (group / "cgroup.procs").read_text().split() == [str(os.getpid())]:
                leaf = group / f"{PREFIX}runner"
                leaf.mkdir(exist_ok=True)
                _write(leaf / "cgroup.procs", os.getpid())
                _write(control, missing)
    return have()


def _removed(path: Path) -> bool:
    """Remove a group and those below it; True if it is gone."""
    if not path.exists():
        return True
    with contextlib.suppress(OSError):
        for below in sorted((one for one in path.rglob("*") if one.is_dir()), reverse=True):
            below.rmdir()
        path.rmdir()
    return not path.exists()


def _write(path: Path, value: object) -> None:
    # Without O_CREAT: a name that this kernel does not have is an error.
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, str(value).encode())
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(descriptor)


def _write_if_there(path: Path, value: object) -> None:
    with contextlib.suppress(OSError):
        _write(path, value)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _keyed(path: Path, key: str) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    return None
