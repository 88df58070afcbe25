"""Backend for hosts with an OpenSSH server (8.2 or newer): certificates for one user and named commands, until the
deadline.

The host accepts a certificate only while its lease is announced there, to `host_helper`, which runs on the host. The
helper keeps a KRL for the server that revokes every serial except the announced ones. So the host refuses a lease that
was undone, never announced, or forgotten with the host's state, and nobody keeps a list of revoked ones. The helper
answers an undo after the KRL is in place and the sessions of the lease have ended.

Serial and key id follow from trust domain and lease. A second mint for the same lease makes another key with the same
serial. Both stay valid, and both end with the lease.
"""

from __future__ import annotations

import json
from typing import ClassVar, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ringfence.backends.access import TargetAccess
from ringfence.backends.http import ConnectionCache
from ringfence.backends.ssh.certificates import CertificateTerms, allowed, for_lease, plan, private_text
from ringfence.backends.ssh.server import SshServer
from ringfence.backends.target_settings import InexactError, TargetRefusedError, problem_of, settings_of
from ringfence.messages.credential import Credential
from ringfence.messages.lease import Lease
from ringfence.messages.registry import TargetState
from ringfence.model.target_settings import SshSettings


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
        """Disconnect from all targets."""
        await self._servers.close()


def _address(server: SshServer, settings: SshSettings) -> str:
    """Return `host:port` for agents: from the target's record, else where Ringfence itself connects."""
    host, port = server.login.host, server.login.port
    return settings.address or (f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
