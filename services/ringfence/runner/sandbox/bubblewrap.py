"""The bubblewrap backend: namespaces, an empty network, memory-backed file systems, a seccomp filter; no daemon.

bwrap reads all arguments but the command from a descriptor, and has an empty environment. So what is visible at
/proc/1 inside shows nothing of this machine. The order of a start:

    record → launcher (control groups, mounts, uid) → word of the runner → bwrap → mounts compared → command
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import secrets
import signal
import stat
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringfence.kernel.base.programs import find_program
from ringfence.runner.sandbox import machine, seccomp
from ringfence.runner.sandbox.backend import (
    HOME,
    INSTANCE,
    NO_STREAMS,
    Destruction,
    ExitReason,
    Mount,
    ResourceLimits,
    SandboxExit,
    SandboxSpec,
    SandboxSpecError,
    SandboxUnavailableError,
    Streams,
    check_mounts,
    check_streams,
    hidden_paths,
    open_host,
    sockets,
)
from ringfence.runner.sandbox.cgroups import (
    REMEDY,
    ControlGroup,
    Hierarchies,
    find_hierarchies,
    processes_limited_without_cgroup,
)
from ringfence.runner.sandbox.network import set_up_network
from ringfence.runner.sandbox.processes import (
    Namespaces,
    ProcessId,
    children,
    descendants,
    describe,
    high,
    read_until,
    readable,
    with_name,
)
from ringfence.runner.sandbox.records import SandboxRecord, SandboxRecords
from ringfence.runner.sandbox.root_filesystem import (
    INSTANCE_BYTES,
    UID,
    default_environment,
    made_files,
    proc_arguments,
    system_arguments,
)

_LAUNCHER = Path(__file__).with_name("launcher.py")
# The command's own error stream, while bwrap's is the runner's; a shell accepts descriptors of one digit alone.
_STDERR = 3
_SHELL = f'exec 2>&{_STDERR} {_STDERR}>&-; cd -- "$1" || exit 126; shift; unset PWD OLDPWD; exec "$@"'
# The last directory that bwrap makes, in the place where this machine has no directory of that name.
_READY = "/run/.sandbox-is-made"
# Uids that neither login names nor containers use (systemd, UIDS-GIDS.md): each run as root has one for itself.
_FIRST_UID, _UIDS = 1_879_048_192, 1 << 20
_STARTED_WITHIN_S = 30
_GONE_WITHIN_S = 15


class BubblewrapBackend:
    """Sandboxes by bwrap, as root and as an ordinary user."""

    name = "bubblewrap"

    def __init__(
        self,
        state: Path,
        *,
        program: str = "bwrap",
        cgroup_parent: Path | None = None,
        use_cgroups: bool = True,
    ) -> None:
        """`state` holds the records of started sandboxes. `cgroup_parent` is a version 2 group set aside for runs."""
        self._records = SandboxRecords(state)
        self._state = state
        self._program = program
        self._cgroup_parent = cgroup_parent
        self._use_cgroups = use_cgroups

    async def available(self) -> list[str]:
        reasons = await asyncio.to_thread(machine.bubblewrap_obstacles, self._program)
        filter_missing = seccomp.unavailable()
        return [*reasons, *([filter_missing] if filter_missing else [])]

    async def start(self, spec: SandboxSpec, streams: Streams = NO_STREAMS) -> BubblewrapSandbox:
        """Start a sandbox, see the interface. The calling thread must live as long as the sandbox: the kernel kills the
        sandbox when that thread ends.
        """
        check_streams(streams)
        await asyncio.to_thread(check_mounts, spec.mounts, self._state)
        if spec.image is not None:
            raise SandboxSpecError("bubblewrap shows this machine's programs and has no images").with_remedy(
                "leave the image out, or use the backend oci"
            )
        program = find_program(self._program)
        reasons = await self.available()
        if reasons or program is None:
            raise SandboxUnavailableError("; ".join(reasons) or f"{self._program} is not installed")
        if self._records.exists(spec.run_id, self.name):
            raise SandboxSpecError(f"a sandbox of the run {spec.run_id} exists already")
        try:
            record = self._records.new(spec.run_id, self.name)
            group = self._control_group(spec, record.name)
            record.cgroups = [str(path) for path in group.paths]
            record.uid = _FIRST_UID + secrets.randbelow(_UIDS) if os.geteuid() == 0 else None
            self._records.write(record)
        except OSError as error:
            raise SandboxUnavailableError(f"the record of the run cannot be written: {error}") from None
        start = _Start(spec, streams, program, self._records, record, group)
        try:
            return await start.carry_out()
        except BaseException:
            await start.undo()
            raise

    def _control_group(self, spec: SandboxSpec, name: str) -> ControlGroup:
        hierarchies = find_hierarchies(self._cgroup_parent) if self._use_cgroups else Hierarchies()
        group = ControlGroup(name, hierarchies)
        lacking = [controller for controller in group.lacking(spec.limits)
                   if controller != "pids" or not processes_limited_without_cgroup()]  # fmt: skip
        if lacking:
            raise SandboxUnavailableError(
                f"nothing here can enforce the limit of {' and '.join(lacking)}: no control group with that controller"
            ).with_remedy(REMEDY)
        return group

    async def sweep(self) -> list[Destruction]:
        reports = []
        for record in self._records.orphaned(self.name):
            if not record.of_this_boot:
                record.processes = []
            group = ControlGroup.recorded(record.cgroups)
            reports.append(await _remove(self._records, record, group, Namespaces()))
        return reports


class BubblewrapSandbox:
    """A sandbox that bwrap holds: bwrap outside, the reaper that is pid 1 inside, the command below it."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        init: ProcessId,
        command: ProcessId | None,
        namespaces: Namespaces,
        group: ControlGroup,
        records: SandboxRecords,
        record: SandboxRecord,
    ) -> None:
        self._process = process
        self._init = init
        self._command = command
        self._namespaces = namespaces
        self._group = group
        self._records = records
        self._record = record
        self._killed = False
        self._destruction: Destruction | None = None

    @property
    def pid(self) -> int:
        return self._init.pid

    @property
    def namespaces(self) -> dict[str, int]:
        """The inodes of its namespaces, by the names of /proc/PID/ns."""
        return self._namespaces.inodes

    async def wait(self) -> SandboxExit:
        code = await _ended(self._process)
        if code == -signal.SIGALRM:
            return SandboxExit(128 + signal.SIGKILL, ExitReason.TTL)
        if code < 0 or self._killed:
            return SandboxExit(128 + (-code if code < 0 else signal.SIGKILL), ExitReason.KILLED)
        return SandboxExit(code, ExitReason.COMMAND)

    def signal(self, number: int) -> None:
        if self._command is not None:
            self._command.signal_group(number)

    async def freeze(self) -> None:
        if self._group.can_freeze:
            await self._group.freeze()
            return
        # A stopped process cannot wake another one, so once all are stopped in one look, they stay so.
        for _ in range(1000):
            processes = self._all()
            if all(process.stopped for process in processes):
                return
            for process in processes:
                process.signal(signal.SIGSTOP)
            await asyncio.sleep(0.001)
        raise SandboxUnavailableError("the sandbox starts processes faster than they can be stopped")

    async def thaw(self) -> None:
        if self._group.can_freeze:
            await self._group.thaw()
            return
        for process in self._all():
            process.signal(signal.SIGCONT)

    async def destroy(self) -> Destruction:
        if self._destruction is None:
            if self._init.runs:
                self._killed = True
            self._init.signal(signal.SIGKILL)
            self._process.kill()
            # Frozen processes die only once they are thawed, which this does too.
            self._group.kill()
            await _ended(self._process)
            report = await _remove(self._records, self._record, self._group, self._namespaces)
            if not report.complete:
                return report
            self._namespaces.close()
            self._destruction = report
        return self._destruction

    def _all(self) -> list[ProcessId]:
        return descendants(self._init.pid) if self._init.runs else []


@dataclass(frozen=True)
class _OpenMount:
    """A mount with a descriptor of what is mounted, so that a path that changes meanwhile is noticed."""

    mount: Mount
    descriptor: int
    source: str
    directory: bool
    socket: bool

    def plan(self) -> dict[str, Any]:
        """The mount, as the launcher's plan has it."""
        return {
            "fd": self.descriptor,
            "host": str(self.mount.host),
            "directory": self.directory,
            "writable": self.mount.writable or self.socket,
        }

    def compare(self, init: ProcessId) -> None:
        """Compare inode and device. Raises SandboxUnavailableError if the sandbox shows another file than opened."""
        expected = os.fstat(self.descriptor)
        try:
            shown = os.lstat(f"/proc/{init.pid}/root{self.mount.inside}")
        except OSError as error:
            raise SandboxUnavailableError(
                f"{self.mount.inside} is not there inside: {error.strerror}"
            ) from None
        if (expected.st_dev, expected.st_ino) != (shown.st_dev, shown.st_ino):
            raise SandboxUnavailableError(f"{self.mount.host} was replaced while the sandbox was made")


class _Start:
    """One start of a sandbox. If it fails, it is undone."""

    def __init__(
        self,
        spec: SandboxSpec,
        streams: Streams,
        program: str,
        records: SandboxRecords,
        record: SandboxRecord,
        group: ControlGroup,
    ) -> None:
        self._spec = spec
        self._streams = streams
        self._program = program
        self._records = records
        self._record = record
        self._group = group
        self._as_root = record.uid is not None
        self._process: subprocess.Popen[bytes] | None = None
        self._namespaces = Namespaces()
        self._for_child: list[int] = []
        self._own: list[int] = []

    async def carry_out(self) -> BubblewrapSandbox:
        """Start the sandbox. Raises SandboxUnavailableError and SandboxSpecError."""
        try:
            return await self._carry_out()
        finally:
            for descriptor in (*self._for_child, *self._own):
                os.close(descriptor)

    async def undo(self) -> None:
        """Remove everything that a failed start created."""
        if self._process is not None:
            self._process.kill()
            self._group.kill()
            await _ended(self._process)
        await _remove(self._records, self._record, self._group, self._namespaces)
        self._namespaces.close()

    async def _carry_out(self) -> BubblewrapSandbox:
        spec, record = self._spec, self._record
        mounts = self._mounts()
        self._group.create(spec.limits)
        go, info, block, errors = (self._pipe(child_reads) for child_reads in (True, False, True, False))
        self._process = process = self._launch(mounts, go[0], info[1], block[0], errors[1])
        while self._for_child:
            os.close(self._for_child.pop())
        launched = ProcessId.of(process.pid)
        assert launched is not None  # nobody has waited for it yet
        record.processes = [launched]
        self._records.write(record)
        # A launcher that already failed takes no word: its reason follows below.
        with contextlib.suppress(BrokenPipeError):
            os.write(go[1], b"1")
        init = await self._started(info[0], errors[0])
        record.processes = [launched, init]
        self._records.write(record)
        await self._made(init, errors[0])
        for mount in mounts:
            mount.compare(init)
        await set_up_network(init.pid, spec)
        try:
            if spec.limits.pids is not None and self._group.lacking(ResourceLimits(pids=spec.limits.pids)):
                # The reaper counts too.
                bound = spec.limits.pids + 1
                resource.prlimit(init.pid, resource.RLIMIT_NPROC, (bound, bound))
            os.write(block[1], b"1")
        except OSError as error:
            raise SandboxUnavailableError(
                f"the sandbox ended before its command was started: {error}"
            ) from None
        command = await _first_child(init)
        return BubblewrapSandbox(process, init, command, self._namespaces, self._group, self._records, record)

    def _mounts(self) -> list[_OpenMount]:
        wanted = [(mount, False) for mount in self._spec.mounts]
        wanted += [(Mount(host, inside), True) for host, inside in sockets(self._spec)]
        opened: list[_OpenMount] = []
        for mount, is_socket in sorted(wanted, key=lambda one: one[0].inside):
            descriptor = high(open_host(mount.host))
            self._own.append(descriptor)
            mode = os.fstat(descriptor).st_mode
            if is_socket and not stat.S_ISSOCK(mode):
                raise SandboxSpecError(f"{mount.host} is not a unix socket")
            if not is_socket and not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                raise SandboxSpecError(
                    f"{mount.host} is neither a directory nor a file: only these are mounted"
                )
            source = f"{_staging()}/{len(opened)}" if self._as_root else str(mount.host)
            opened.append(_OpenMount(mount, descriptor, source, stat.S_ISDIR(mode), is_socket))
        return opened

    def _launch(
        self, mounts: list[_OpenMount], go: int, info: int, block: int, errors: int
    ) -> subprocess.Popen[bytes]:
        spec = self._spec
        null = high(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
        self._own.append(null)
        stdin, stdout, stderr = (
            null if stream is None else stream
            for stream in (self._streams.stdin, self._streams.stdout, self._streams.stderr)
        )
        self._for_child.append(command_stderr := high(os.dup(stderr)))
        arguments = "".join(f"{argument}\0" for argument in self._arguments(mounts, info, block))
        plan = {
            "cgroups": [str(path) for path in self._group.paths],
            "uid": self._record.uid,
            "staging": _staging() if self._as_root else None,
            "staged": [mount.plan() for mount in mounts] if self._as_root else [],
            "go": go,
            "stderr": [command_stderr, _STDERR],
            "ttl_s": spec.limits.ttl_s,
            "program": self._program,
            # The shell answers 127 and 126 for what it cannot run, on the command's own error stream.
            "argv": [
                # A name by which a sandbox is found whose pids nobody could record, outside and as its process 1.
                self._record.name, "--args", str(self._pass(arguments.encode(errors="surrogateescape"))), "--",
                "/bin/sh", "-c", _SHELL, "sh", spec.working_directory, *spec.argv,
            ],
        }  # fmt: skip
        handed_over = self._pass(json.dumps(plan).encode())
        staged = [mount.descriptor for mount in mounts] if self._as_root else []
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(_LAUNCHER), str(handed_over)],
            stdin=stdin,
            stdout=stdout,
            stderr=errors,
            # The error stream is at 2 already, and the command must not have it elsewhere.
            pass_fds=[*(one for one in self._for_child if one != errors), *staged],
            cwd="/",
            env={},
        )

    def _arguments(self, mounts: list[_OpenMount], info: int, block: int) -> list[str]:
        spec = self._spec
        uid = 0 if spec.root_inside else UID
        arguments = [
            "--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup",
            "--disable-userns", "--uid", str(uid), "--gid", str(uid), "--hostname", "sandbox",
            "--new-session", "--die-with-parent", "--cap-drop", "ALL", "--clearenv",
            "--info-fd", str(info), "--block-fd", str(block), "--seccomp", str(self._pass(seccomp.compiled_filter())),
            *system_arguments(),
            *proc_arguments(),
            "--dev", "/dev",
            "--size", str(spec.shm_bytes), "--perms", "1777", "--tmpfs", "/dev/shm", "--remount-ro", "/dev",
            "--size", str(spec.tmp_bytes), "--perms", "1777", "--tmpfs", "/tmp", "--symlink", "/tmp", "/var/tmp",
            "--dir", "/run", "--size", str(spec.home_bytes), "--perms", "0700", "--tmpfs", HOME,
        ]  # fmt: skip
        if spec.control is not None:
            arguments += ["--size", str(INSTANCE_BYTES), "--perms", "0700", "--tmpfs", INSTANCE]
        for path, content in {**made_files(uid, spec.hosts), **spec.files}.items():
            arguments += ["--perms", "0444", "--ro-bind-data", str(self._pass(content)), path]
        for mount in mounts:
            arguments += ["--bind" if mount.mount.writable else "--ro-bind", mount.source, mount.mount.inside]
        for path, is_folder in (one for mount in mounts for one in hidden_paths(mount.mount)):
            arguments += (
                ["--size", "4096", "--perms", "0555", "--tmpfs", path, "--remount-ro", path]
                if is_folder
                else ["--perms", "0444", "--ro-bind-data", str(self._pass(b"")), path]
            )
        for name, value in {**default_environment(uid), **spec.environment}.items():
            arguments += ["--setenv", name, value]
        return [*arguments, "--dir", _READY, "--remount-ro", "/", "--chdir", "/"]

    async def _started(self, info: int, errors: int) -> ProcessId:
        text = await read_until(info, until=b"}", within_s=_STARTED_WITHIN_S)
        if not text.endswith(b"}"):
            reason = (await read_until(errors, until=None, within_s=1)).decode(errors="replace").strip()
            raise SandboxUnavailableError(
                f"the sandbox could not be made: {reason or 'bwrap gave no reason'}"
            )
        fields = json.loads(text)
        pid = fields.pop("child-pid")
        self._namespaces = Namespaces.of(pid)
        # bwrap names them `pid-namespace`, `mnt-namespace`, …
        told = {kind: fields[f"{kind}-namespace"] for kind in Namespaces.KINDS}
        init = ProcessId.of(pid)
        if init is None or self._namespaces.inodes != told:
            raise SandboxUnavailableError("the sandbox ended before its command was started")
        return init

    async def _made(self, init: ProcessId, errors: int) -> None:
        """Wait until the new root is in place. bwrap reports its pid earlier, when it still has the machine's root."""
        deadline = time.monotonic() + _STARTED_WITHIN_S
        ready = Path(f"/proc/{init.pid}/root{_READY}")
        while not ready.is_dir():  # noqa: ASYNC240 - /proc and a tmpfs: nothing to wait for
            if not init.runs or time.monotonic() > deadline:
                reason = (await read_until(errors, until=None, within_s=1)).decode(errors="replace").strip()
                raise SandboxUnavailableError(
                    f"the sandbox could not be made: {reason or 'bwrap gave no reason'}"
                )
            await asyncio.sleep(0.001)

    def _pipe(self, child_reads: bool) -> tuple[int, int]:
        read, write = (high(end) for end in os.pipe2(os.O_CLOEXEC))
        self._for_child.append(read if child_reads else write)
        self._own.append(write if child_reads else read)
        return read, write

    def _pass(self, content: bytes) -> int:
        """A descriptor from which the child reads this."""
        descriptor = high(os.memfd_create("ringfence", os.MFD_CLOEXEC))
        self._for_child.append(descriptor)
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(content)
        os.lseek(descriptor, 0, os.SEEK_SET)
        return descriptor


async def _remove(
    records: SandboxRecords, record: SandboxRecord, group: ControlGroup, namespaces: Namespaces
) -> Destruction:
    """Remove all of a sandbox whose first processes have been killed, and report what remained."""
    usage = group.usage()
    deadline = time.monotonic() + _GONE_WITHIN_S
    while True:
        for process in (*record.processes, *with_name(record.name, os.geteuid())):
            if process.runs:
                process.signal(signal.SIGKILL)
        cgroups = await group.remove(within_s=1)
        processes = {
            process.pid
            for process in (*record.processes, *with_name(record.name, os.geteuid()))
            if process.runs
        }
        processes.update(namespaces.members("pid"))
        mounts = set(namespaces.members("mnt")) - processes
        if not (processes or mounts or cgroups) or time.monotonic() > deadline:
            break
        await asyncio.sleep(0.005)
    files: tuple[str, ...] = ()
    if not (processes or mounts or cgroups):
        try:
            records.delete(record)
        except OSError:
            files = (str(records.path(record)),)
    return Destruction(
        record.run_id,
        tuple(describe(pid) for pid in sorted(processes)),
        tuple(f"of {describe(pid)}" for pid in sorted(mounts)),
        tuple(cgroups),
        files,
        usage,
    )


async def _first_child(init: ProcessId) -> ProcessId | None:
    """Wait for the command, the reaper's first child: a signal before that would be lost. None: it has ended."""
    while init.runs:
        for command in children(init):
            return command
        await asyncio.sleep(0.0005)
    return None


async def _ended(process: subprocess.Popen[bytes]) -> int:
    """Wait for a child without a thread, and reap it. Several tasks of one loop may wait."""
    if process.poll() is None:
        descriptor = os.pidfd_open(process.pid)
        try:
            await readable(descriptor, None)
        finally:
            os.close(descriptor)
    return process.wait()


def _staging() -> str:
    """A directory that every user may search, on which the launcher mounts in a mount namespace of its own."""
    return next(path for path in ("/dev/shm", "/mnt", "/tmp") if Path(path).is_dir())
