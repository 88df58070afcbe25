"""Backend for hosts with an OpenSSH server (8.2 or newer): certificates for one user and named commands, until the
deadline.

The host accepts a certificate only while its lease is announced there, to `host_helper`, which runs on the host. The
helper keeps a KRL for the server that revokes every serial except the announced ones. So the host refuses a lease that
was undone, never announced, or forgotten with the host's state, and nobody keeps a list of revoked ones. The helper
answers an undo after the KRL is in place and the sessions of the lease have ended.

Serial and key id follow from trust domain and lease. A second mint for the same lease makes another key with the same
serial. Both stay valid, and both end with the lease.

Ringfence's own SSH connections to hosts, and to the helper program there.

The host is known by its key. Ringfence logs in with a certificate that it signs for itself, valid for a few minutes.
The connection stays open, and many requests share it concurrently.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import itertools
import json
import logging
import re
import time
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal
from urllib.parse import urlsplit

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from ringfence.backends.http import ConnectionCache
from ringfence.backends.secret_sources import AccessError, TargetAccess
from ringfence.backends.ssh.certificates import (
    CertificateTerms,
    allowed,
    for_lease,
    for_ringfence,
    plan,
    private_text,
)
from ringfence.backends.ssh.host_helper import PROTOCOL
from ringfence.backends.target_settings import (
    InexactError,
    TargetError,
    TargetRefusedError,
    problem_of,
    settings_of,
)
from ringfence.messages.credential import Credential
from ringfence.messages.lease import Lease
from ringfence.messages.registry import TargetState
from ringfence.model.target_settings import SshSettings

log = logging.getLogger(__name__)

_CONNECT_S: Final = 4.0
_ANSWER_S: Final = 5.0
_COMPLAINT_S: Final = 1.0
_ALIVE_EVERY_S: Final = 15
_USER: Final = re.compile(r"[a-z_][a-z0-9_-]{0,31}")


@dataclass(frozen=True, slots=True)
class SshLogin:
    """Ringfence's own login at a host, and the key that signs its certificates.

    As text: `ssh://user@host:port` on the first line, the host's public keys on the next lines in the format of its
    `.pub` files, then the authority's private key in the format of `ssh-keygen`.
    """

    host: str
    port: int
    user: str
    host_keys: tuple[str, ...]
    authority: Ed25519PrivateKey

    @classmethod
    def parse(cls, text: str) -> SshLogin:
        """Parse the text. Raises ValueError, which quotes no value."""
        public, dashes, private = text.partition("-----BEGIN")
        url, *lines = public.strip().splitlines() or [""]
        try:
            parts = urlsplit(url.strip())
            port = parts.port or 22
        except ValueError:
            raise ValueError("their first line is no URL") from None
        if parts.scheme != "ssh" or not parts.hostname or not _USER.fullmatch(parts.username or ""):
            raise ValueError("their first line is no ssh://user@host:port")
        if parts.password or parts.path.strip("/") or parts.query:
            raise ValueError("their first line says more than ssh://user@host:port")
        keys = tuple(" ".join(line.split()[:2]) for line in lines if line.strip())
        if not keys:
            raise ValueError("they have no public key of the host")
        try:
            for key in keys:
                load_ssh_public_key(key.encode())
        except (ValueError, UnsupportedAlgorithm):
            raise ValueError("a public key of the host is none") from None
        return cls(parts.hostname, port, parts.username or "", keys, _authority(dashes + private))


def _authority(text: str) -> Ed25519PrivateKey:
    try:
        key = load_ssh_private_key((text.strip() + "\n").encode(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ValueError("they have no private key of an authority, without a passphrase") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError("the key of the authority is not Ed25519")
    return key


class ConnectionLostError(Exception):
    """Raised when a connection ended before an answer, or could not be opened. Gives the cause as far as known."""


class SshConnection:
    """One connection, and the helper at its other end."""

    def __init__(self, connection: Any, process: Any) -> None:
        self._connection = connection
        self._process = process
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reader = asyncio.create_task(self._read(), name="answers by ssh")

    @property
    def is_open(self) -> bool:
        return not self._reader.done()

    async def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return the answer. Raises ConnectionLostError, TimeoutError."""
        id, waiting = next(self._ids), asyncio.get_running_loop().create_future()
        self._waiting[id] = waiting
        try:
            async with asyncio.timeout(_ANSWER_S):
                self._process.stdin.write(json.dumps({"id": id, **request}) + "\n")
                answer: dict[str, Any] = await waiting
                return answer
        except OSError as error:  # a TimeoutError too
            raise ConnectionLostError from error
        finally:
            self._waiting.pop(id, None)
            if not waiting.done() or waiting.cancelled():
                self.abort()  # it hangs: the next caller must not wait for it

    def abort(self) -> None:
        """Close the connection at once."""
        self._connection.abort()
        self._reader.cancel()

    async def closed(self) -> None:
        """Return once the connection is fully closed."""
        await asyncio.gather(self._reader, self._connection.wait_closed(), return_exceptions=True)

    async def _read(self) -> None:
        try:
            while line := await self._process.stdout.readline():
                answer = json.loads(line)
                waiting = self._waiting.get(answer["id"])
                if waiting is not None and not waiting.done():
                    waiting.set_result(answer)
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing more comes from there
            log.info("a connection by ssh ended: %s", type(error).__name__)
        finally:
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(ConnectionLostError())
            self._connection.abort()


class SshServer:
    """One host, as the current secret names it."""

    def __init__(self, target_id: str, rights: str) -> None:
        """Raises AccessError if the login is unusable."""
        self._target_id = target_id
        try:
            self.login = SshLogin.parse(rights)
        except ValueError as error:
            raise AccessError(f"the rights at target {target_id} are wrong: {error}") from None
        self._link: SshConnection | None = None
        self._connecting = asyncio.Lock()

    async def ask(self, what: str, **more: Any) -> Any:
        """Ask the helper on the host, and return its answer.

        The request may be sent twice. Raises TargetError, TargetRefusedError.
        """
        for _ in range(2):
            link, is_new = await self._connect_once()
            try:
                answer = await link.ask({"do": what, **more})
            except ConnectionLostError:
                if is_new:
                    break
                continue  # it may have been dead since it was last used
            if "refused" in answer:
                raise TargetRefusedError(
                    f"target {self._target_id} refuses: {_reply_text(answer['refused'])}"
                )
            if "failed" in answer:
                raise TargetError(f"target {self._target_id} fails: {_reply_text(answer['failed'])}")
            return answer.get("answer")
        raise TargetError(f"target {self._target_id} does not answer (connection lost)")

    async def close(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.abort()
            await link.closed()

    async def _connect_once(self) -> tuple[SshConnection, bool]:
        async with self._connecting:
            if self._link is not None and self._link.is_open:
                return self._link, False
            try:
                async with asyncio.timeout(_CONNECT_S):
                    self._link = await self._connect()
            except (OSError, ConnectionLostError, ValueError) as error:  # a TimeoutError too
                reason = str(error) if isinstance(error, ConnectionLostError) else type(error).__name__
                raise TargetError(f"target {self._target_id} does not answer ({reason})") from None
            return self._link, True

    async def _connect(self) -> SshConnection:
        # Half a second and 16 MB, spent only with such targets.
        asyncssh: Any = await asyncio.to_thread(importlib.import_module, "asyncssh")
        login, key = self.login, Ed25519PrivateKey.generate()
        certificate = for_ringfence(login.authority, key.public_key(), login.user, int(time.time()))
        own = (asyncssh.import_private_key(private_text(key)), asyncssh.import_certificate(certificate))
        trusted = [asyncssh.import_public_key(line) for line in login.host_keys]
        try:
            connection = await asyncssh.connect(
                login.host,
                login.port,
                username=login.user,
                client_keys=[own],
                known_hosts=(trusted, [], []),
                config=None,
                agent_path=None,
                preferred_auth=["publickey"],
                keepalive_interval=_ALIVE_EVERY_S,
            )
        except asyncssh.Error as error:
            raise ConnectionLostError(type(error).__name__) from None
        with contextlib.ExitStack() as undo:
            undo.callback(connection.abort)
            try:
                process = await connection.create_process(
                    "serve"
                )  # the host runs what its configuration says
                hello = await process.stdout.readline()
            except asyncssh.Error as error:
                raise ConnectionLostError(type(error).__name__) from None
            if _hello(hello) != PROTOCOL:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_COMPLAINT_S):
                        log.warning(
                            "target %s: %s", self._target_id, _reply_text(await process.stderr.readline())
                        )
                raise ConnectionLostError("no ringfence-ssh-helper there, or another version's")
            undo.pop_all()
        return SshConnection(connection, process)


def _hello(line: str) -> object:
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        return json.loads(line).get("ringfence")
    return None


def _reply_text(text: object) -> str:
    """Return the host's text as one line without control characters."""
    return ascii(str(text))[1:-1][:300]


class SshBackend:
    """Mints certificates for keys that only the agent knows: the host learns the lease and its user."""

    kind: ClassVar[str] = "ssh"
    enforced_by: ClassVar[Literal["target", "gateway"]] = "target"
    own_expiry: ClassVar[Literal["all", "logins", "none"]] = "logins"
    stateless: ClassVar[bool] = False

    def __init__(self, trust_domain: str, access: TargetAccess) -> None:
        self._domain = trust_domain
        self._access = access
        self._servers = ConnectionCache(access, SshServer)

    def name_of(self, lease_id: str) -> str:
        """Return the name of a lease at hosts. It also separates trust domains that share a host."""
        return f"{self._domain}.{lease_id}"

    def revocability(self, target: TargetState) -> Literal["instant", "session", "ttl"]:
        """Return `session`: open sessions are ended too."""
        return "session"

    def problem(self, lease: Lease, target: TargetState) -> str | None:
        """Return the reason why exactly this credential cannot be made, as far as it shows without the host, or
        None.
        """
        return problem_of(plan, lease.scope, target, SshSettings, self._access)

    async def mint(self, lease: Lease, target: TargetState) -> Credential:
        """Return a new key and its certificate, with what a client needs to know about the host, as JSON.

        Raises TargetError, TargetRefusedError, AccessError, TargetSettingsError.
        """
        settings = settings_of(target, SshSettings)
        server = await self._servers.at(lease.target_id)
        try:
            command_plan = plan(lease.scope)
            host_rights = await server.ask("rights", domain=self._domain)
            granted = allowed(command_plan, host_rights["users"])
        except InexactError as error:
            raise TargetRefusedError(str(error)) from None
        await server.ask(
            "announce", domain=self._domain, lease=lease.lease_id, user=granted.user, deadline=lease.deadline
        )
        key = Ed25519PrivateKey.generate()
        certificate = for_lease(
            server.login.authority,
            key.public_key(),
            CertificateTerms(
                self.name_of(lease.lease_id),
                granted,
                run=host_rights["run"],
                source_addresses=settings.source_address,
                began_s=lease.iat,
                deadline_s=lease.deadline,
            ),
        )
        value = {
            "url": f"ssh://{granted.user}@{_address(server, settings)}/",
            "host_keys": list(server.login.host_keys),
            "certificate": certificate,
            "private_key": private_text(key),
        }
        return Credential(kind=self.kind, value=json.dumps(value), expires_at=lease.deadline)

    async def undo(self, lease_id: str, *, target_id: str) -> None:
        """Make the host refuse logins for this lease, and end its sessions.

        Raises TargetError, TargetRefusedError, AccessError.
        """
        server = await self._servers.at(target_id)
        await server.ask("undo", domain=self._domain, lease=lease_id)

    async def existing(self, target_id: str) -> frozenset[str]:
        """Return the leases that may log in, or have sessions. Raises TargetError, AccessError."""
        server = await self._servers.at(target_id)
        return frozenset(await server.ask("standing", domain=self._domain))

    standing = existing

    async def close(self) -> None:
        await self._servers.close()


def _address(server: SshServer, settings: SshSettings) -> str:
    """Return `host:port` for agents: from the target's record, else where Ringfence itself connects."""
    host, port = server.login.host, server.login.port
    return settings.address or (f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
