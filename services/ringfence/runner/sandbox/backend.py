"""The interface of a sandbox backend: the specification of a sandbox, the sandbox itself, and the report of its end.

A backend provides everything that a specification asks for, or raises SandboxUnavailableError. It never starts a
command with less.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Protocol

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.text import visible
from ringfence.messages.codes import Code
from ringfence.runner.sandbox.mount_points import (
    KERNEL_KINDS,
    MountPoint,
    Place,
    Survey,
    mount_points,
    place_of,
    shown_by,
    survey,
)

HOME = "/home/agent"
"""The home directory inside: empty at start, in memory."""
SOCKET = "/run/ringfence/gateway.sock"
"""Where the specification's socket stands inside."""
CONTROL = "/run/ringfence/control.sock"
"""Where the specification's control socket stands inside."""
INSTANCE = "/run/ringfence/instance"
"""A folder in memory that the sandbox's user alone can read; there where a control socket is."""

_RUN_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_HOST = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_][a-z0-9_-]{0,62})*")
_OWN_NAMES = frozenset({"localhost", "sandbox"})
# What the backend itself puts there. A mount below /tmp or the home directory is fine.
_TAKEN_INSIDE = (
    *("/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/libx32"),
    *("/newroot", "/oldroot", "/proc", "/run", "/sbin", "/sys", "/usr", "/var"),
)
# Sockets of services, devices and the kernel's own files: a mount of these would be a way out.
_REFUSED_HOST = ("/dev", "/proc", "/run", "/sys", "/var/run")


class SandboxUnavailableError(RingfenceError):
    """Raised if this machine or backend cannot provide what was asked. Nothing has been started."""

    code = Code.SANDBOX_UNAVAILABLE


class SandboxSpecError(RingfenceError):
    """Raised if a specification contradicts itself, or asks for something that no sandbox may have."""

    code = Code.SANDBOX_SPEC_INVALID


@dataclass(frozen=True)
class Mount:
    """A host file or directory that the command sees at `inside`. Set-user-id bits and devices in it do not count."""

    host: Path
    inside: str
    writable: bool = False
    hidden: tuple[str, ...] = ()
    """Relative paths below it at which the command sees an empty file or folder."""
    installed: bool = False
    """A folder of this installation of Ringfence, in which no program listens: its content is not surveyed."""


@dataclass(frozen=True)
class ResourceLimits:
    """Upper bounds of one run; None sets no bound."""

    memory_bytes: int | None = None
    """Of all processes together, with what they wrote to memory-backed file systems."""
    cpus: float | None = None
    """Processor time a second of wall time."""
    pids: int | None = None
    """Processes and threads."""
    ttl_s: float | None = None
    """Wall time until the sandbox is killed."""


@dataclass(frozen=True)
class Streams:
    """Descriptors of this process that become the command's; None is /dev/null.

    The command can open a regular file given here again, with whatever access its owner has. Directories and block
    devices are refused, because a directory leads to the whole file system that it is on.
    """

    stdin: int | None = None
    stdout: int | None = None
    stderr: int | None = None


NO_STREAMS = Streams()


@dataclass(frozen=True)
class SandboxSpec:
    """The specification of a sandbox: the command, and everything that it may see and use. It has nothing else."""

    run_id: str
    """Lower-case letters, digits and hyphens; unique on this machine."""
    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    """Besides it the command has HOME, PATH, LANG and USER, which may be set here too."""
    mounts: tuple[Mount, ...] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Read-only files by their path inside, such as a CA bundle."""
    socket: Path | None = None
    """The unix socket that is the only way out; it stands at `SOCKET`."""
    control: Path | None = None
    """The unix socket at which the runner waits for its init; it stands at `CONTROL`. With it there is `INSTANCE`."""
    hosts: Mapping[str, str] = field(default_factory=dict)
    """Loopback addresses by host name, for /etc/hosts: what listens there is inside."""
    low_ports: bool = False
    """Ports below 1024 may be listened at inside, without a privilege."""
    addresses: tuple[str, ...] = ()
    """IP addresses that the loopback interface inside has besides its own: what is there is inside."""
    limits: ResourceLimits = ResourceLimits()
    working_directory: str = HOME
    home_bytes: int = 1 << 30
    tmp_bytes: int = 1 << 30
    shm_bytes: int = 64 << 20
    image: str | None = None
    """For backends with images. bubblewrap shows the machine's own /usr, and refuses an image."""
    root_inside: bool = False
    """The command has uid 0 of its user namespace, without a capability, instead of an ordinary uid."""

    def __post_init__(self) -> None:
        """Raises SandboxSpecError."""
        if not _RUN_ID.fullmatch(self.run_id):
            raise SandboxSpecError(
                f"the run id {self.run_id!r} is not 1 to 63 lower-case letters, digits and hyphens"
            )
        if not self.argv or not self.argv[0]:
            raise SandboxSpecError("there is no command to run")
        for name, value in self.environment.items():
            if not _NAME.fullmatch(name):
                raise SandboxSpecError(f"{name!r} is no name of an environment variable")
            _without_nul(value, f"the environment variable {name}")
        for argument in self.argv:
            _without_nul(argument, "an argument of the command")
        for name, address in self.hosts.items():
            if not _HOST.fullmatch(name) or name in _OWN_NAMES or is_address(name):
                raise SandboxSpecError(f"{name!r} is no host name in lower case that /etc/hosts may have")
            if not _is_loopback(address):
                raise SandboxSpecError(
                    f"{name} has the address {address!r}, and has to have one of 127.0.0.0/8"
                )
        for address in self.addresses:
            if not is_host_address(address):
                raise SandboxSpecError(f"{address!r} is no IP address that a machine could have")
        _inside(self.working_directory)
        for path in (*self.files, *(mount.inside for mount in self.mounts)):
            _inside(path)
        seen = [mount.inside for mount in self.mounts]
        if len(set(seen)) < len(seen):
            raise SandboxSpecError("two mounts have the same path inside")
        for mount in self.mounts:
            _check_mount(mount)
        limits = self.limits
        for what, number, least in (
            ("memory_bytes", limits.memory_bytes, 4 << 20),
            ("cpus", limits.cpus, 0.01),
            ("pids", limits.pids, 4),
            ("ttl_s", limits.ttl_s, 0.001),
            ("home_bytes", self.home_bytes, 1),
            ("tmp_bytes", self.tmp_bytes, 1),
            ("shm_bytes", self.shm_bytes, 1),
        ):
            if number is not None and not number >= least:
                raise SandboxSpecError(f"{what} is {number}, and has to be at least {least}")


class ExitReason(StrEnum):
    """Why a sandbox ended."""

    COMMAND = "command"
    TTL = "ttl"
    """Its time was over."""
    KILLED = "killed"
    """Somebody outside killed it: `destroy`, or whoever may signal the processes of this user."""


@dataclass(frozen=True)
class SandboxExit:
    """The end of the command. `code` is a shell's exit code: 128 plus the signal's number after a signal."""

    code: int
    reason: ExitReason


@dataclass(frozen=True)
class ResourceUsage:
    """The resources that a run used, by its control groups. None: not counted on this machine."""

    cpu_s: float | None = None
    memory_peak_bytes: int | None = None
    memory_kills: int | None = None
    """How many processes the kernel ended because the memory limit was reached."""


@dataclass(frozen=True)
class Destruction:
    """The remains of a sandbox after its destruction. A field is empty if nothing of its kind is left."""

    run_id: str
    processes: tuple[str, ...] = ()
    mounts: tuple[str, ...] = ()
    cgroups: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    usage: ResourceUsage = ResourceUsage()

    @property
    def remained(self) -> tuple[str, ...]:
        """All remains, each with its kind."""
        return (
            *(f"process {one}" for one in self.processes),
            *(f"mount {one}" for one in self.mounts),
            *(f"cgroup {one}" for one in self.cgroups),
            *(f"file {one}" for one in self.files),
        )

    @property
    def complete(self) -> bool:
        return not self.remained


class Sandbox(Protocol):
    """A started sandbox. Whoever started it calls `destroy` once it has ended, or to end it."""

    @property
    def pid(self) -> int: ...

    async def wait(self) -> SandboxExit: ...

    def signal(self, number: int) -> None:
        """Send a signal to the command's process group. Has no effect if the command has ended."""
        ...

    async def freeze(self) -> None:
        """Freeze all processes. Raises SandboxUnavailableError if some could not be frozen."""
        ...

    async def thaw(self) -> None: ...

    async def destroy(self) -> Destruction:
        """Kill and remove everything of the sandbox. Returns what remained. Idempotent."""
        ...


class SandboxBackend(Protocol):
    """A kind of sandbox."""

    name: str

    async def available(self) -> list[str]:
        """The reasons why this machine cannot provide a sandbox of this kind, each with its remedy; empty if it can."""
        ...

    async def start(self, spec: SandboxSpec, streams: Streams = NO_STREAMS) -> Sandbox:
        """Start a sandbox. Its record is written before anything of it exists.

        Raises SandboxUnavailableError if the specification cannot be met.
        """
        ...

    async def sweep(self) -> list[Destruction]:
        """Destroy the sandboxes of dead runners. Those of living runners stay."""
        ...


def check_streams(streams: Streams) -> None:
    """Check streams. Raises SandboxSpecError for a descriptor that gives access to host files or devices."""
    for name in ("stdin", "stdout", "stderr"):
        descriptor = getattr(streams, name)
        if descriptor is None:
            continue
        mode = os.fstat(descriptor).st_mode
        if not (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)):
            raise SandboxSpecError(
                f"{name} is a directory or a device: give a pipe, a terminal, a socket or a file"
            )


def check_mounts(mounts: tuple[Mount, ...], state: Path) -> None:
    """Check mounts. Raises SandboxSpecError for one that contains the runner's records, a socket or a named pipe.

    Mounts below a folder count too. A socket that a program outside creates there later is not noticed.
    """
    if not mounts:
        return
    points = mount_points()
    records = place_of(state, points)
    never = [place_of(Path(path), points) for path in _REFUSED_HOST]
    for mount in mounts:
        for shown in shown_by(mount.host, points):
            _check_shown(mount.host, shown, never, place_of(Path("/"), points))
            if shown.place.shows(records) or records.shows(shown.place):
                raise SandboxSpecError(f"{shown.path} shows the runner's own records: mount another folder")
        if not mount.installed:
            survey_mount(mount)


def _check_shown(host: Path, shown: MountPoint, never: Sequence[Place], everything: Place) -> None:
    """Raises SandboxSpecError if a mount is, or has below it, one of what is never mounted."""
    if (
        shown.kind in KERNEL_KINDS
        or shown.place == everything
        or any(one.shows(shown.place) for one in never)
    ):
        raise SandboxSpecError(
            f"{host} shows {shown.path}, which holds devices, sockets of services or the kernel's files: that is never "
            "mounted"
        ).with_remedy("mount a folder without it")


def survey_mount(mount: Mount) -> Survey:
    """Survey what a mount shows. Raises SandboxSpecError if not all of it can be listed.

    Also raises it if there is a socket or a named pipe: through either, a program outside can be asked to act.
    """
    folder = open_host(mount.host)
    try:
        if not stat.S_ISDIR(os.fstat(folder).st_mode):
            return Survey()
        found = survey(folder, dict.fromkeys(mount.hidden))
    finally:
        os.close(folder)
    if found.cut_off is not None:
        raise SandboxSpecError(f"{mount.host} cannot be mounted: {found.cut_off}").with_remedy(
            "mount a smaller folder, or hide a large one below it: --hide PATH, in a pool hide"
        )
    for path, reason in found.unlisted.items():
        raise SandboxSpecError(f"{mount.host / path} cannot be listed: {visible(reason)}").with_remedy(
            "let the runner's user list it, or hide it: --hide PATH, in a pool hide"
        )
    for path in found.endpoints:
        raise SandboxSpecError(
            f"{mount.host / path} is a socket or a named pipe, by which the run could have a program outside act"
        ).with_remedy("remove it, or hide it: --hide PATH, in a pool hide")
    return found


def hidden_paths(mount: Mount) -> list[tuple[str, bool]]:
    """Return the paths inside that a mount hides, and whether each is a folder. Raises SandboxSpecError."""
    found = []
    for path in mount.hidden:
        descriptor = open_host(mount.host / path)
        try:
            found.append((f"{mount.inside}/{path}", stat.S_ISDIR(os.fstat(descriptor).st_mode)))
        finally:
            os.close(descriptor)
    return found


def open_host(path: Path, *, directory: bool | None = None) -> int:
    """Open a host path for mounting, without following any symbolic link, and return an O_PATH descriptor.

    An earlier run with write access to a directory above could have created a link in the path.
    Raises SandboxSpecError.
    """
    descriptor = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in path.parts[1:]:
            below = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = below
            if stat.S_ISLNK(os.fstat(descriptor).st_mode):
                raise SandboxSpecError(f"{path} leads through a symbolic link, {part!r}").with_remedy(
                    f"name the path that it leads to: {os.path.realpath(path)}"
                )
        return descriptor
    except OSError as error:
        os.close(descriptor)
        raise SandboxSpecError(f"{path} cannot be mounted: {error.strerror}") from None
    except SandboxSpecError:
        os.close(descriptor)
        raise


def sockets(spec: SandboxSpec) -> list[tuple[Path, str]]:
    """The unix sockets of a specification, each with its path inside."""
    wanted = ((spec.socket, SOCKET), (spec.control, CONTROL))
    return [(host, inside) for host, inside in wanted if host is not None]


def is_address(text: str) -> bool:
    """Tell if a text is an IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_host_address(text: str) -> bool:
    """Whether a text is the usual form of an address that a machine of a network can have: none of loopback, either."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    odd = address.is_loopback or address.is_multicast or address.is_unspecified or address.is_link_local
    mapped = isinstance(address, ipaddress.IPv6Address) and (address.ipv4_mapped or address.scope_id)
    return str(address) == text and not odd and not mapped


def _is_loopback(text: str) -> bool:
    try:
        return ipaddress.IPv4Address(text).is_loopback
    except ValueError:
        return False


def _without_nul(text: str, what: str) -> None:
    if "\0" in text:
        raise SandboxSpecError(f"{what} holds a NUL character")


def _inside(path: str) -> None:
    _without_nul(path, "a path inside")
    pure = PurePosixPath(path)
    if not pure.is_absolute() or ".." in pure.parts or str(pure) != path or path.startswith("//"):
        raise SandboxSpecError(f"{path!r} is no absolute path without '.', '..' and doubled slashes")


def _check_mount(mount: Mount) -> None:
    host = str(mount.host)
    if os.path.normpath(host) != host or not mount.host.is_absolute() or host.startswith("//"):
        raise SandboxSpecError(
            f"the mount {host!r} is no absolute path without '.', '..' and doubled slashes"
        )
    if mount.host == Path("/") or _is_below(host, _REFUSED_HOST):
        raise SandboxSpecError(
            f"{host} holds devices, sockets of services or the kernel's files: it is never mounted"
        )
    if mount.inside in ("/", HOME, "/home", "/tmp") or _is_below(mount.inside, _TAKEN_INSIDE):
        raise SandboxSpecError(
            f"{mount.inside} is taken inside the sandbox: mount below {HOME}, /tmp or a new directory"
        )
    for path in mount.hidden:
        if (
            path in ("", ".")
            or os.path.normpath(path) != path
            or path.startswith(("/", "../"))
            or path == ".."
        ):
            raise SandboxSpecError(f"{path!r}, which is to be hidden, is no relative path below {host}")


def _is_below(path: str, folders: tuple[str, ...]) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in folders)
