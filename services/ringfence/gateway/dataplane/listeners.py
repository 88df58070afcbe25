"""Opens the listeners that the settings configure, and keeps the sockets of tasks and runs, and the CA, up to date."""

from __future__ import annotations

import asyncio
import logging
import resource
import ssl
from pathlib import Path
from typing import Final

from ringfence.gateway.contract import AgentApi, DecisionCore
from ringfence.gateway.dataplane.limits import Allowance
from ringfence.gateway.dataplane.plane import DataPlane, DataPlaneSettings, ListenError
from ringfence.gateway.dataplane.run_sockets import IN_TOTAL, RunSockets, RunSocketSettings
from ringfence.gateway.dataplane.tls_listener import CertificateAuthority
from ringfence.gateway.hosts import AGENT_API
from ringfence.gateway.settings import GatewaySettings, host_and_port
from ringfence.gateway.wiring import Core
from ringfence.kernel.base.errors import SettingsError
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.base.private_files import make_folders
from ringfence.kernel.service.runtime import Runtime
from ringfence.model.records.command_chain import ChainError

log = logging.getLogger(__name__)

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
        """Stop listening."""
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
    if own.tls_cert_file is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(own.tls_cert_file, own.tls_key_file)
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"RINGFENCE_GATEWAY_TLS_CERT_FILE: {_pem_error(error)}") from None
    if own.tls_client_ca_file is not None:
        context.verify_mode = ssl.CERT_OPTIONAL
        _trust(context, own.tls_client_ca_file, "RINGFENCE_GATEWAY_TLS_CLIENT_CA_FILE")
    return context


def _tls_for_targets(own: GatewaySettings) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if own.targets_ca_file is not None:
        _trust(context, own.targets_ca_file, "RINGFENCE_GATEWAY_TARGETS_CA_FILE")
    return context


def _trust(context: ssl.SSLContext, path: Path, setting: str) -> None:
    try:
        context.load_verify_locations(path)
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"{setting}: {_pem_error(error)}") from None


def _pem_error(error: OSError) -> str:
    """The error of a PEM file, without any of its contents."""
    if isinstance(error, ssl.SSLError):
        return f"no usable PEM ({error.reason or 'unreadable'})"
    return f"cannot be read: {error.strerror}"


def _raise_file_limit(count: int) -> None:
    """Raise the limit of open files: each connection takes one. Connections beyond the limit are dropped."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    new_limit = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < new_limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (new_limit, hard))
    if new_limit < count:
        log.warning("%d open files are allowed, %d would be needed: raise ulimit -n", new_limit, count)
