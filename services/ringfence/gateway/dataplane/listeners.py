"""Opens the listeners that the settings configure, and keeps the sockets of tasks and runs, and the CA, up to date.

The sockets of runs: one for each run that goes on, `RUN.sock`, on which only that run's instance counts.

A run needs no lease for it: its instance asks for the first one there. The gateway does not know which runners share
its machine, so it opens one for every run of the runners that its settings name.

When a run is over, nobody listens at its socket any more, and its connections are dropped. The file of the socket is
removed later: once Kafka has all events of the run. Its runner waits for that before it reports what was blocked.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import ssl
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ringfence.gateway.contract import AgentApi, DecisionCore
from ringfence.gateway.dataplane.limits import Allowance
from ringfence.gateway.dataplane.plane import SERVER_SUFFIX, DataPlane, DataPlaneSettings, ListenError
from ringfence.gateway.dataplane.tls_listener import CertificateAuthority
from ringfence.gateway.events.spool import SpoolMark
from ringfence.gateway.events.task_history import RunEvents
from ringfence.gateway.hosts import AGENT_API
from ringfence.gateway.settings import GatewaySettings, host_and_port
from ringfence.gateway.wiring import Core
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import SettingsError
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.base.private_files import make_folders
from ringfence.kernel.service.runtime import Runtime
from ringfence.kernel.service.server_tls import ServerTls, trust
from ringfence.messages.run import Run
from ringfence.model.identity.runners import runner_issuer_of, runner_name
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.runs import RunTable

log = logging.getLogger(__name__)

PER_RUNNER: Final = 512
"""The most sockets for runs of one runner at a time, so that no runner takes those of the others."""
IN_TOTAL: Final = 2048


@dataclass(frozen=True, slots=True)
class RunSocketSettings:
    """Which runs have sockets, and how many."""

    runners: frozenset[str] = frozenset()
    """The names of the runners whose runs have sockets; empty for all."""
    per_runner: int = PER_RUNNER
    in_total: int = IN_TOTAL


@dataclass(slots=True)
class _ClosedSocket:
    """A socket of a run that is over, whose file waits for the events of the run."""

    path: Path
    mark: SpoolMark | None = None
    """The place in the spool after the last event of the run; None until all of them are there."""


class RunSockets:
    """Opens the sockets of runs that go on, and closes those of all others, at each `update`."""

    def __init__(
        self,
        plane: DataPlane,
        runs: RunTable,
        clock: Clock,
        *,
        trust_domain: str,
        is_active: Callable[[str], bool],
        events: RunEvents,
        settings: RunSocketSettings = RunSocketSettings(),
    ) -> None:
        """Args:
            plane: listens on the sockets.
            runs: the table of runs; to be fed after this is made.
            is_active: whether the task with this id is active.
            events: of runs, on their way to Kafka.
        """  # fmt: skip
        self._plane = plane
        self._runs = runs
        self._clock = clock
        self._trust_domain = trust_domain
        self._is_active = is_active
        self._events = events
        self._settings = settings
        self._started: dict[str, Run] = {}
        """Runs that had started when last heard of, in the order of their start."""
        self._sockets: dict[str, tuple[Path, str]] = {}
        """Path and runner of each socket, by run id."""
        self._closed: dict[str, _ClosedSocket] = {}
        """Sockets whose file is still to be removed, by run id."""
        self._count_of: Counter[str] = Counter()
        """The number of sockets, by runner."""
        runs.on_change(self._on_run)

    async def update(self, folder: Path) -> None:
        """Close the sockets of runs that no longer go on, and open those of runs that do now."""
        self._remove_files()
        now_s = self._clock.now_ms() / 1000
        self._started = {id: run for id, run in self._started.items() if now_s < run.deadline}
        for run_id in [id for id in self._sockets if not self._goes_on(id)]:
            path, runner = self._sockets.pop(run_id)
            self._count_of[runner] -= 1
            await self._plane.close_for_task(path, keep_file=True)
            self._closed[run_id] = _ClosedSocket(path)
            with contextlib.suppress(OSError):  # a runner that was killed left it
                path.with_suffix(SERVER_SUFFIX).unlink()
        for run_id, run in list(self._started.items()):
            if run_id not in self._sockets and self._goes_on(run_id) and self._has_room(run):
                await self._open(folder, run)

    def _remove_files(self) -> None:
        """Remove the files of closed sockets, where Kafka has all events of the run. Never waits."""
        for run_id, closed in list(self._closed.items()):
            if closed.mark is None and not self._plane.serves_run(run_id):
                # Not before: a connection may record something at its end.
                closed.mark = self._events.end_mark(run_id)
            if closed.mark is not None and self._events.is_published(closed.mark):
                del self._closed[run_id]
                with contextlib.suppress(OSError):
                    closed.path.unlink()

    def _goes_on(self, run_id: str) -> bool:
        run = self._started.get(run_id)
        return run is not None and self._runs.goes_on(run_id) and self._is_active(run.task_id)

    async def _open(self, folder: Path, run: Run) -> None:
        path = folder / f"{run.run_id}.sock"
        try:
            await self._plane.listen_for_task(path, run.task_id, run_id=run.run_id)
        except ListenError as error:
            # Tried again at the next update.
            log.error("run %s has no socket yet: %s", run.run_id, error, extra=rate_limited("socket"))
            return
        self._closed.pop(run.run_id, None)  # of a task that is active again: the file is the new socket's
        self._sockets[run.run_id] = path, run.iss
        self._count_of[run.iss] += 1

    def _has_room(self, run: Run) -> bool:
        """Whether one more socket may be open. If not, the run gets its own once that of another run is closed."""
        if (
            self._count_of[run.iss] < self._settings.per_runner
            and len(self._sockets) < self._settings.in_total
        ):
            return True
        log.warning(
            "run %s of %s waits for a socket: that runner has %d, and there are %d in total",
            run.run_id, run.iss, self._count_of[run.iss], len(self._sockets),
            extra=rate_limited("run", run.iss),
        )  # fmt: skip
        return False

    def _on_run(self, run: Run) -> None:
        issuer = runner_issuer_of(run.iss)
        name = runner_name(self._trust_domain, issuer) if issuer is not None else None
        runners = self._settings.runners
        if run.status == "started" and (not runners or name in runners):
            self._started[run.run_id] = run
        else:
            self._started.pop(run.run_id, None)


_UPDATE_EVERY_S: Final = 0.1
_OTHER_FILES: Final = 1024
"""Files that the process needs besides the connections of agents and those to targets."""


class Listeners:
    """The listeners of the embedded data plane, opened once the tables are complete."""

    def __init__(
        self,
        runtime: Runtime,
        core: Core,
        own: GatewaySettings,
        *,
        fast_path: bool = True,
        agent_api: AgentApi | None = None,
    ) -> None:
        """`fast_path`: see `DataPlaneSettings`; `agent_api`: see `DataPlane`.

        Raises SettingsError if a certificate or key cannot be used.
        """
        self._runtime = runtime
        self._core = core
        self._own = own
        self._tls = _tls_for_agents(own)
        allowance = Allowance(connections=own.connections)
        _raise_file_limit(2 * own.connections + IN_TOTAL + _OTHER_FILES)
        self._plane = DataPlane(
            DecisionCore(core.gate, core.targets.is_target_host, core.blocked.add, core.relays),
            authority=CertificateAuthority(runtime.key.id.rpartition("/")[2], (), runtime.clock),
            tls=_tls_for_targets(own),
            agent_api=agent_api,
            settings=DataPlaneSettings(allowance=allowance, fast_path=fast_path),
        )
        self._own_hosts = frozenset({AGENT_API}) if agent_api is not None else frozenset[str]()
        self._sockets: dict[str, Path] = {}
        """By task id."""
        self._run_sockets = RunSockets(
            self._plane,
            core.view.directory.runs,
            runtime.clock,
            trust_domain=runtime.settings.trust_domain,
            is_active=self._is_active,
            events=core.run_events,
            settings=RunSocketSettings(frozenset(own.runners)),
        )
        self._open = False

    async def run(self) -> None:
        """Listen, forever. Raises ListenError, and SettingsError if a file cannot be written."""
        await self._plane.start()
        self._update_ca()
        if self._own.sockets is not None:
            _prepare_socket_folder(self._own.sockets)
        if self._own.listen is not None:
            host, port = host_and_port(self._own.listen)
            names = self._own.names or (f"{host}:{port}", f"localhost:{port}")
            bound_port = await self._plane.listen(host, port, names=names, tls=self._tls, challenge=True)
            log.info("agents come in at %s:%d", host, bound_port)
        while True:
            self._update_ca()
            await self._update_task_sockets()
            if self._own.sockets is not None:
                await self._run_sockets.update(self._own.sockets)
            self._open = True
            await asyncio.sleep(_UPDATE_EVERY_S)

    def unready(self) -> str | None:
        """Why no agent can connect yet, or None. A gateway that is ready is also listening."""
        return None if self._open else "the gateway does not listen for agents yet"

    async def close(self) -> None:
        await self._plane.close()

    def _update_ca(self) -> None:
        """Certify the hosts of targets and of the agents' API, and write the CA's certificate for agents."""
        hosts = {host.strip("[]") for host in self._core.targets.hosts()} | self._own_hosts
        path = self._own.ca_file
        if self._plane.authority.set_hosts(hosts) and path is not None:
            try:
                self._plane.authority.write(path)
            except OSError as error:
                raise SettingsError(
                    f"RINGFENCE_GATEWAY_CA_FILE: {path} cannot be written: {error.strerror}"
                ) from None

    async def _update_task_sockets(self) -> None:
        """Open a socket for each active task that has leases for gateways, and close those of other tasks."""
        folder = self._own.sockets
        if folder is None:
            return
        for task_id in [task for task in self._sockets if not self._is_active(task)]:
            await self._plane.close_for_task(self._sockets.pop(task_id))
        for task_id in self._core.view.table.tasks() - self._sockets.keys():
            if not self._is_active(task_id):
                continue
            path = folder / f"{task_id}.sock"
            try:
                await self._plane.listen_for_task(path, task_id)
            except ListenError as error:
                # Tried again at the next update.
                log.error("task %s has no socket yet: %s", task_id, error, extra=rate_limited("socket"))
                continue
            self._sockets[task_id] = path

    def _is_active(self, task_id: str) -> bool:
        try:
            entry = self._core.view.directory.task(task_id)
        except ChainError:
            return False
        if entry is None or entry.state.status != "active":
            return False
        return entry.state.not_after * 1000 > self._runtime.clock.now_ms()


def _prepare_socket_folder(folder: Path) -> None:
    """Prepare a folder for sockets that other users cannot write to, and remove sockets that a gateway left there."""
    try:
        make_folders(folder)
        if folder.stat().st_mode & 0o022:
            raise SettingsError(f"RINGFENCE_GATEWAY_SOCKETS: others can write to {folder}; chmod go-w it")
        for path in folder.iterdir():
            if path.suffix in (".sock", ".new") and path.is_socket():
                path.unlink()
    except OSError as error:
        raise SettingsError(f"RINGFENCE_GATEWAY_SOCKETS: {folder}: {error.strerror}") from None


def _tls_for_agents(own: GatewaySettings) -> ssl.SSLContext | None:
    """Return the TLS of `listen`. An agent may show a certificate, and may do without one."""
    if own.tls_cert_file is None:
        return None
    return ServerTls(
        "RINGFENCE_GATEWAY_TLS",
        own.tls_cert_file,
        own.tls_key_file,
        own.tls_client_ca_file,
        client_required=False,
    ).context


def _tls_for_targets(own: GatewaySettings) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if own.targets_ca_file is not None:
        trust(context, own.targets_ca_file, "RINGFENCE_GATEWAY_TARGETS_CA_FILE")
    return context


def _raise_file_limit(count: int) -> None:
    """Raise the limit of open files: each connection takes one. Connections beyond the limit are dropped."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    new_limit = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < new_limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (new_limit, hard))
    if new_limit < count:
        log.warning("%d open files are allowed, %d would be needed: raise ulimit -n", new_limit, count)
