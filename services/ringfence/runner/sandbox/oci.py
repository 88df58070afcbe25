"""The OCI backend: a container of Docker or Podman without network, privileges or a writable root, by the engine's API.

The backend reads back what the engine made before the command starts: an engine that ignores a field must not run it.
The runtime (runc, crun, gVisor's runsc, Kata) is the engine's default, or the one that is configured.

When the runner dies, the container runs on until the next runner sweeps: an engine outlives its clients. Writable
mounts are refused, because the user of the container owns nothing outside.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ringfence.runner.sandbox.backend import (
    HOME,
    INSTANCE,
    NO_STREAMS,
    Destruction,
    ExitReason,
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
from ringfence.runner.sandbox.network import set_up_network
from ringfence.runner.sandbox.oci_client import Attachment, ContainerEngine, ContainerEngineError
from ringfence.runner.sandbox.processes import Namespaces, describe
from ringfence.runner.sandbox.records import SandboxRecord, SandboxRecords
from ringfence.runner.sandbox.root_filesystem import INSTANCE_BYTES, UID, default_environment
from ringfence.runner.sandbox.seccomp import oci_profile

_NAMESPACE_SIZE = 65536
_PROCESSES = 32768
_GONE_WITHIN_S = 30
_LABEL = "ringfence.run"
_LOWEST_PORT = "net.ipv4.ip_unprivileged_port_start"
_MASKED = ("/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/sched_debug", "/proc/scsi",
           "/proc/timer_list", "/proc/timer_stats", "/sys")  # fmt: skip


class OciBackend:
    """Sandboxes as containers of the engine at `socket`."""

    name = "oci"

    def __init__(self, state: Path, *, socket: Path | str, runtime: str | None = None) -> None:
        """`runtime` is a name that the engine knows, such as `runsc`; None is the engine's default."""
        self._records = SandboxRecords(state)
        self._state = state
        self._engine = ContainerEngine(Path(socket))
        self._runtime = runtime

    async def available(self) -> list[str]:
        try:
            return (await self._look())[1]
        except ContainerEngineError as error:
            return [f"{error.message}: start podman.socket or docker.socket, and let this user use it"]

    async def start(self, spec: SandboxSpec, streams: Streams = NO_STREAMS) -> OciSandbox:
        check_streams(streams)
        await asyncio.to_thread(check_mounts, spec.mounts, self._state)
        if spec.image is None:
            raise SandboxSpecError(
                "a container needs an image: name one that the engine has, best by its digest"
            )
        for mount in spec.mounts:
            if mount.writable:
                raise SandboxUnavailableError(
                    f"{mount.host} cannot be mounted writable: the user of a container owns nothing outside"
                ).with_remedy("mount it read-only, or use the backend bubblewrap")
        if self._records.exists(spec.run_id, self.name):
            raise SandboxSpecError(f"a sandbox of the run {spec.run_id} exists already")
        try:
            podman, reasons = await self._look()
        except ContainerEngineError as error:
            raise SandboxUnavailableError(error.message) from None
        if reasons:
            raise SandboxUnavailableError("; ".join(reasons))
        record = self._records.new(spec.run_id, self.name)
        self._records.write(record)
        try:
            return await self._start(spec, streams, record, podman)
        except BaseException as error:
            await self._destroy(record, Namespaces(), [])
            if isinstance(error, ContainerEngineError):
                raise SandboxUnavailableError(error.message) from None
            raise

    async def sweep(self) -> list[Destruction]:
        return [await self._destroy(record, Namespaces(), []) for record in self._records.orphaned(self.name)]

    async def _look(self) -> tuple[bool, list[str]]:
        """Whether the engine is Podman, and the problems that it has. Raises ContainerEngineError."""
        version, info = await self._engine.get("/version"), await self._engine.get("/info")
        podman = any("Podman" in part.get("Name", "") for part in version.get("Components") or ())
        options = [str(option) for option in info.get("SecurityOptions") or ()]
        reasons = []
        if not podman and not any("name=userns" in one or "name=rootless" in one for one in options):
            reasons.append(
                'Docker runs containers as this machine\'s root: set "userns-remap": "default" in daemon.json'
            )
        if not any("name=seccomp" in option for option in options):
            reasons.append("the engine has no seccomp: use one that was built with it")
        return podman, reasons

    async def _start(
        self, spec: SandboxSpec, streams: Streams, record: SandboxRecord, podman: bool
    ) -> OciSandbox:
        assert spec.image is not None
        name = record.name
        image = await self._engine.get(f"/images/{spec.image}/json")
        folder = self._folder(record)
        folder.mkdir(mode=0o700)
        # Docker takes the profile itself, Podman a file.
        profile = folder / "seccomp.json"
        profile.write_text(json.dumps(oci_profile()))
        body = _container(spec, str(image["Id"]), self._binds(spec, folder), self._runtime)
        body["HostConfig"]["SecurityOpt"].append(f"seccomp={profile if podman else profile.read_text()}")
        tmpfs, uid = body["HostConfig"]["Tmpfs"], _uid(spec)
        for path in {HOME, "/tmp", "/var/tmp", INSTANCE} & tmpfs.keys():
            # Podman gives it to the user of the container, and copies nothing of the image into it.
            tmpfs[path] += ",U,notmpcopyup" if podman else f",mode=0700,uid={uid},gid={uid}"
        info = await self._engine.get("/info")
        if podman and not any("name=rootless" in str(option) for option in info.get("SecurityOptions") or ()):
            # A mapping that no other container has: Podman takes it from the range of `containers` in /etc/subuid.
            body["HostConfig"]["UsernsMode"] = f"auto:size={_NAMESPACE_SIZE}"
        await self._engine.create(name, body)
        await self._check(name, spec, podman)
        attachment = await self._engine.attach(name)
        await self._engine.start(name)
        state = (await self._engine.get(f"/containers/{name}/json"))["State"]
        # Init listens only once it is told to start the command.
        await set_up_network(int(state["Pid"]), spec, opens_low_ports=False)
        return OciSandbox(self, spec, name, record, int(state["Pid"]), attachment, streams)

    def _folder(self, record: SandboxRecord) -> Path:
        return self._state / f"{record.run_id}.files"

    def _binds(self, spec: SandboxSpec, folder: Path) -> Iterator[dict[str, Any]]:
        """The mounts, as Docker's API has them. Checked when the container is made: paths with links are refused."""
        wanted = [(mount.host, mount.inside) for mount in spec.mounts]
        at_sockets = {inside for _, inside in sockets(spec)}
        wanted += sockets(spec)
        for host, inside in wanted:
            descriptor = open_host(host)
            try:
                mode = os.fstat(descriptor).st_mode
            finally:
                os.close(descriptor)
            if inside in at_sockets:
                if not stat.S_ISSOCK(mode):
                    raise SandboxSpecError(f"{host} is not a unix socket")
                if not mode & stat.S_IWOTH:
                    raise SandboxUnavailableError(
                        f"the user of the container may not connect to {host}"
                    ).with_remedy(f"chmod 666 {host}, and close the folder that it is in to others")
            elif not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                raise SandboxSpecError(f"{host} is neither a directory nor a file: only these are mounted")
            yield _bind(host, inside)
        empty = {False: folder / "empty-file", True: folder / "empty-folder"}
        empty[False].touch(mode=0o444)
        empty[True].mkdir(mode=0o555)
        for hidden, is_folder in (one for mount in spec.mounts for one in hidden_paths(mount)):
            yield _bind(empty[is_folder], hidden)
        for number, (inside, content) in enumerate(spec.files.items()):
            path = folder / f"{number}"
            path.write_bytes(content)
            path.chmod(0o444)
            yield _bind(path, inside)

    async def _check(self, name: str, spec: SandboxSpec, podman: bool) -> None:
        """Compare what the engine made with what was asked. Raises SandboxUnavailableError."""
        made = await (
            self._engine.podman_container(name) if podman else self._engine.get(f"/containers/{name}/json")
        )
        host = made["HostConfig"]
        limits, options = spec.limits, [str(option) for option in host.get("SecurityOpt") or ()]
        runtime = made.get("OCIRuntime") if podman else host.get("Runtime")
        wrong = [
            what
            for what, holds in (
                ("a read-only root", host.get("ReadonlyRootfs") is True),
                ("no network", host.get("NetworkMode") == "none"),
                (
                    "no capabilities",
                    host.get("CapDrop") and not host.get("CapAdd") and not made.get("EffectiveCaps"),
                ),
                ("no new privileges", any(option.startswith("no-new-privileges") for option in options)),
                ("the seccomp profile", any(option.startswith("seccomp=") for option in options)),
                ("no privileges", host.get("Privileged") is False),
                ("the memory limit", limits.memory_bytes in (None, host.get("Memory"))),
                ("the limit of processes", limits.pids in (None, host.get("PidsLimit"))),
                ("the processor limit", limits.cpus is None or host.get("NanoCpus") == _nano(limits.cpus)),
                (f"the runtime {self._runtime}", self._runtime in (None, runtime, Path(runtime or "").name)),
            )
            if not holds
        ]
        if wrong:
            raise SandboxUnavailableError(f"the engine does not provide {', '.join(wrong)}").with_remedy(
                "use another engine or runtime, or ask for less"
            )

    async def _destroy(
        self, record: SandboxRecord, namespaces: Namespaces, cgroups: list[Path]
    ) -> Destruction:
        deadline = time.monotonic() + _GONE_WITHIN_S
        container: list[str] = []
        while True:
            with contextlib.suppress(ContainerEngineError):
                await self._engine.unpause(record.name)
            try:
                await self._engine.remove(record.name)
                container = []
            except ContainerEngineError as error:
                container = [f"container {record.name}: {error.message}"]
            processes, mounts = namespaces.members("pid"), namespaces.members("mnt")
            groups = [str(path) for path in cgroups if path.exists()]
            if not (container or processes or mounts or groups) or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.05)
        files: list[str] = []
        if not (container or processes or mounts or groups):
            try:
                shutil.rmtree(self._folder(record), ignore_errors=True)
                self._records.delete(record)
            except OSError:
                files = [str(self._records.path(record))]
        return Destruction(
            record.run_id,
            (*container, *map(describe, processes)),
            tuple(f"of {describe(pid)}" for pid in mounts if pid not in processes),
            tuple(groups),
            tuple(files),
        )


class OciSandbox:
    """A started container."""

    def __init__(
        self,
        backend: OciBackend,
        spec: SandboxSpec,
        name: str,
        record: SandboxRecord,
        pid: int,
        attachment: Attachment,
        streams: Streams,
    ) -> None:
        self._backend = backend
        self._engine = backend._engine
        self._name = name
        self._record = record
        self._pid = pid
        self._namespaces, self._cgroups = Namespaces.of(pid), _control_groups(pid)
        # The caller may close its descriptors once the sandbox has started.
        self._descriptors = [None if one is None else os.dup(one) for one in
                             (streams.stdin, streams.stdout, streams.stderr)]  # fmt: skip
        self._feeding = asyncio.create_task(attachment.feed(self._descriptors[0]))
        self._collecting = asyncio.create_task(
            attachment.collect({1: self._descriptors[1], 2: self._descriptors[2]})
        )
        self._ended = asyncio.create_task(self._until_end())
        self._reason = ExitReason.COMMAND
        self._timer: asyncio.Task[None] | None = None
        if spec.limits.ttl_s is not None:
            self._timer = asyncio.create_task(self._time_out(spec.limits.ttl_s))
        self._destruction: Destruction | None = None

    @property
    def pid(self) -> int:
        return self._pid

    async def wait(self) -> SandboxExit:
        code = await asyncio.shield(self._ended)
        if self._reason is not ExitReason.COMMAND:
            return SandboxExit(137, self._reason)
        return SandboxExit(code, self._reason)

    def signal(self, number: int) -> None:
        self._background(self._engine.kill(self._name, number))

    async def freeze(self) -> None:
        await self._engine.pause(self._name)

    async def thaw(self) -> None:
        await self._engine.unpause(self._name)

    async def destroy(self) -> Destruction:
        if self._destruction is None:
            if not self._ended.done():
                self._reason = ExitReason.KILLED
            if self._timer is not None:
                self._timer.cancel()
            report = await self._backend._destroy(self._record, self._namespaces, self._cgroups)
            with contextlib.suppress(ContainerEngineError):
                await self._ended
            if not report.complete:
                return report
            self._namespaces.close()
            self._destruction = report
        return self._destruction

    def _background(self, call: Any) -> None:
        task = asyncio.create_task(call)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _until_end(self) -> int:
        try:
            return await self._engine.wait(self._name)
        except ContainerEngineError as error:
            if error.status != 404:
                raise
            return 137  # removed meanwhile
        finally:
            await self._collecting
            self._feeding.cancel()
            await asyncio.gather(self._feeding, return_exceptions=True)
            for descriptor in self._descriptors:
                if descriptor is not None:
                    os.close(descriptor)

    async def _time_out(self, ttl_s: float) -> None:
        await asyncio.sleep(ttl_s)
        if not self._ended.done():
            self._reason = ExitReason.TTL
            with contextlib.suppress(ContainerEngineError):
                await self._engine.kill(self._name, 9)


def _container(
    spec: SandboxSpec, image: str, binds: Iterator[dict[str, Any]], runtime: str | None
) -> dict[str, Any]:
    """The body of a container's creation (Docker's API 1.41)."""
    uid, limits = _uid(spec), spec.limits
    nofile = min(65536, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    flags = "rw,nosuid,nodev"
    return {
        "Image": image,
        "Entrypoint": [],
        "Cmd": [*spec.argv],
        "Env": [
            f"{name}={value}" for name, value in {**default_environment(uid), **spec.environment}.items()
        ],
        "User": f"{uid}:{uid}",
        "WorkingDir": spec.working_directory,
        "Hostname": "sandbox",
        "NetworkDisabled": True,
        "AttachStdin": True,
        "AttachStdout": True,
        "AttachStderr": True,
        "OpenStdin": True,
        "StdinOnce": True,
        "Labels": {_LABEL: spec.run_id},
        "HostConfig": {
            "NetworkMode": "none",
            "ReadonlyRootfs": True,
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges"],
            "IpcMode": "private",
            "CgroupnsMode": "private",
            "Init": True,
            "Mounts": [*binds],
            "Tmpfs": {
                "/tmp": f"{flags},size={spec.tmp_bytes}",
                "/var/tmp": f"{flags},size={spec.tmp_bytes}",
                "/run": f"{flags},size=65536,mode=0755",
                HOME: f"{flags},size={spec.home_bytes}",
                **(
                    {INSTANCE: f"{flags},size={INSTANCE_BYTES},mode=0700"} if spec.control is not None else {}
                ),
            },
            "ExtraHosts": [f"{name}:{address}" for name, address in spec.hosts.items()],
            "Sysctls": {_LOWEST_PORT: "0"} if spec.low_ports else {},
            "ShmSize": spec.shm_bytes,
            "MaskedPaths": [*_MASKED],
            "Ulimits": [
                # 1, not 0: see the launcher of bubblewrap.
                {"Name": "core", "Soft": 1, "Hard": 1},
                {"Name": "nofile", "Soft": min(1024, nofile), "Hard": nofile},
                {"Name": "nproc", "Soft": _PROCESSES, "Hard": _PROCESSES},
            ],
            "RestartPolicy": {"Name": "no"},
            # Docker keeps nothing of what the command writes; Podman has no driver of that name in Docker's API.
            "LogConfig": {"Type": "none"},
            **({"Runtime": runtime} if runtime else {}),
            **(
                {"Memory": limits.memory_bytes, "MemorySwap": limits.memory_bytes}
                if limits.memory_bytes
                else {}
            ),
            **({"NanoCpus": _nano(limits.cpus)} if limits.cpus else {}),
            **({"PidsLimit": limits.pids} if limits.pids else {}),
        },
    }


def _uid(spec: SandboxSpec) -> int:
    return 0 if spec.root_inside else UID


def _nano(cpus: float) -> int:
    return int(cpus * 1_000_000_000)


def _bind(host: Path, inside: str) -> dict[str, Any]:
    return {
        "Type": "bind",
        "Source": str(host),
        "Target": inside,
        "ReadOnly": True,
        "BindOptions": {"Propagation": "rprivate"},
    }


def _control_groups(pid: int) -> list[Path]:
    """The control groups of a container's first process, to see later that they are gone."""
    cgroups: list[Path] = []
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            folder = controllers.removeprefix("name=") or "."
            roots = (Path("/sys/fs/cgroup") / folder, Path("/sys/fs/cgroup/unified"))
            groups = [root / path.lstrip("/") for root in roots if path != "/"]
            cgroups += [group for group in groups if group.is_dir()]
    return cgroups
