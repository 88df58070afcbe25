"""Certificates for hosts with an OpenSSH server (8.2 or newer): one user, named commands, until the deadline.

The host lets a certificate in only while its lease is announced there, and whoever announces asks `ssh_helper`, which
runs on the host: the KRL that it keeps for the server revokes every serial but those that are announced. So what is
undone, never announced, or forgotten with the host's state is refused alike, and no list of what was revoked has to be
kept anywhere. Its answer to an undo comes once the KRL is in its place and the sessions of the lease have ended.

Serial and key id follow from trust domain and lease. A certificate that is made again for the same lease is another key
with the same serial: both stay good, and both end with the lease.
"""

from __future__ import annotations

import json
from typing import ClassVar, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ringfence.backends.access import TargetAccess
from ringfence.backends.connection_pool import ConnectionCache
from ringfence.backends.ssh.certificates import for_lease, private_text
from ringfence.backends.ssh.privileges import allowed, plan
from ringfence.backends.ssh.server import SshServer
from ringfence.backends.target_settings import InexactError, TargetRefusedError, problem_of, settings_of
from ringfence.messages.credential import Credential
from ringfence.messages.lease import Lease
from ringfence.messages.registry import TargetState
from ringfence.model.target_settings import SshSettings


class SshBackend:
    """Makes certificates for keys that are known to the agent alone: the host is told the lease, and its user."""

    kind: ClassVar[str] = "ssh"
    enforced_by: ClassVar[Literal["target", "gateway"]] = "target"
    own_expiry: ClassVar[Literal["all", "logins", "none"]] = "logins"
    stateless: ClassVar[bool] = False

    def __init__(self, trust_domain: str, access: TargetAccess) -> None:
        self._domain = trust_domain
        self._access = access
        self._servers = ConnectionCache(access, SshServer)

    def name_of(self, lease_id: str) -> str:
        """A lease's name at hosts. It tells one trust domain's leases from another's at the same host."""
        return f"{self._domain}.{lease_id}"

    def revocability(self, target: TargetState) -> Literal["instant", "session", "ttl"]:
        """Sessions that are open are ended too."""
        return "session"

    def problem(self, lease: Lease, target: TargetState) -> str | None:
        """Why exactly this credential cannot be made, or None, as far as that can be said without the host."""
        return problem_of(plan, lease.scope, target, SshSettings, self._access)

    async def mint(self, lease: Lease, target: TargetState) -> Credential:
        """A new key and its certificate, with what a client needs to know of the host, as JSON.

        Raises TargetError, TargetRefusedError, AccessError, TargetSettingsError.
        """
        settings = settings_of(target, SshSettings)
        server = await self._servers.at(lease.target_id)
        try:
            wanted = plan(lease.scope)
            there = await server.ask("rights", domain=self._domain)
            granted = allowed(wanted, there["users"])
        except InexactError as error:
            raise TargetRefusedError(str(error)) from None
        await server.ask(
            "announce", domain=self._domain, lease=lease.lease_id, user=granted.user, deadline=lease.deadline
        )
        key = Ed25519PrivateKey.generate()
        certificate = for_lease(
            server.login.authority,
            key.public_key(),
            self.name_of(lease.lease_id),
            granted,
            run=there["run"],
            source_addresses=settings.source_address,
            began_s=lease.iat,
            deadline_s=lease.deadline,
        )
        value = {
            "url": f"ssh://{granted.user}@{_address(server, settings)}/",
            "host_keys": list(server.login.host_keys),
            "certificate": certificate,
            "private_key": private_text(key),
        }
        return Credential(kind=self.kind, value=json.dumps(value), expires_at=lease.deadline)

    async def undo(self, lease_id: str, *, target_id: str) -> None:
        """Have the host let nobody in any more for this lease, and end who is.

        Raises TargetError, TargetRefusedError, AccessError.
        """
        server = await self._servers.at(target_id)
        await server.ask("undo", domain=self._domain, lease=lease_id)

    async def existing(self, target_id: str) -> frozenset[str]:
        """The leases that are let in, or have sessions. Raises TargetError, AccessError."""
        server = await self._servers.at(target_id)
        return frozenset(await server.ask("standing", domain=self._domain))

    standing = existing

    async def close(self) -> None:
        """Disconnect from all targets."""
        await self._servers.close()


def _address(server: SshServer, settings: SshSettings) -> str:
    """`host:port` for agents: as the target's record says, else where Ringfence itself connects."""
    host, port = server.login.host, server.login.port
    return settings.address or (f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
