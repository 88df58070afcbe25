"""Backends: one for each kind of credential. The issuer mints credentials with them, and the revoker removes
them at their targets.

Enters: a lease and its target's verified record, from issuer (`problem`, `mint`); ids of leases, from revoker
(`undo`, `existing`) and issuer (`undo`); questions of policy and gateway about revocability, enforcement and
static secrets.
Leaves: a `Credential`, rights and sessions at targets made or removed; TargetError, TargetRefusedError.
Imports: `model`, `kernel`, `messages` and the drivers of targets; not `client` and `rego` beside it.
Other packages add a backend by the entry point `ringfence.backends` (`all_backends`).
Read first: this module (`Backend`, the interface), `jwt.py` (the pure token), `postgres/backend.py` (a role
for each lease).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import ClassVar, Literal, Protocol

from ringfence.backends.http import CircuitBreaker, HttpBackend, StaticSecrets
from ringfence.backends.jwt import JwtBackend, TokenKey, TokenKeyError, TokenKeys
from ringfence.backends.mysql import MysqlBackend
from ringfence.backends.postgres.backend import PostgresBackend
from ringfence.backends.redis import RedisBackend
from ringfence.backends.secret_sources import AccessError, BackendSettings, SecretSource, TargetAccess
from ringfence.backends.ssh.backend import SshBackend
from ringfence.backends.target_settings import (
    BackendError,
    CircuitOpenError,
    TargetError,
    TargetRefusedError,
)
from ringfence.messages.credential import Credential
from ringfence.messages.lease import Lease
from ringfence.messages.registry import TargetState
from ringfence.model.target_settings import ENTRY_POINTS, TokenAlgorithm

log = logging.getLogger(__name__)

# Names of 0.1 that backends of others import: they stay.
Caller = CircuitBreaker
TargetShutError = CircuitOpenError

Revocability = Literal["instant", "session", "ttl"]
"""How a credential can be revoked before its end. `instant`: the target introspects it, or only the gateway can use it.
`session`: live sessions are ended too. `ttl`: not at all.
"""

OwnExpiry = Literal["all", "logins", "none"]
"""What the target itself ends at the deadline, even if Ringfence were down. `all`: the credential allows nothing any
more. `logins`: no new logins, but sessions go on. `none`: nothing, until the lease is undone.
"""


EnforcedBy = Literal["target", "gateway"]
"""Who refuses requests beyond the scope. `target`: the target, because the credential allows no more. `gateway`: the
target knows no scopes, so nothing is minted or handed out: the lease is the right to have the gateway inject the
secret.
"""


class Backend(Protocol):
    """The interface of a backend, for one kind of credential. Other packages may implement it.

    Common parameters:
        lease: the lease that a credential is for: its scope, its deadline, who holds it.
        target: the verified record of the target, with the settings of this backend.
        lease_id, target_id: their ids.
    """

    kind: ClassVar[str]
    """The `backend.kind` of targets, and the `kind` of credentials."""
    enforced_by: ClassVar[EnforcedBy]
    own_expiry: ClassVar[OwnExpiry]
    stateless: ClassVar[bool]
    """A pure token: minting it leaves nothing at the target, so nothing has to be undone at its end."""

    def revocability(self, target: TargetState) -> Revocability:
        """How a credential for this target can be revoked. Policy gets it as input, and decides who may hold one."""
        ...

    def problem(self, lease: Lease, target: TargetState) -> str | None:
        """The reason if no credential can allow exactly what the lease says, else None. No network I/O."""
        ...

    async def mint(self, lease: Lease, target: TargetState) -> Credential:
        """Mint the credential of a lease. A second call for the same lease returns an equivalent one, and the first
        stays valid.
        """
        ...

    async def undo(self, lease_id: str, *, target_id: str) -> None:
        """Remove everything that was made for a lease at its target, live sessions included, as far as possible.

        It gets only the two ids, because a lease that nobody remembers has to be undone too. If nothing is there, it
        succeeds. A failure is retried.
        """
        ...

    async def existing(self, target_id: str) -> frozenset[str]:
        """Return the ids of the leases for which something exists at the target now, whoever made it and whenever."""
        ...

    async def standing(self, target_id: str) -> frozenset[str]:
        """The name of `existing` in 0.1: a backend needs one of the two. Call `existing_of`."""
        ...

    async def close(self) -> None:
        """Close all connections."""
        ...


async def existing_of(backend: Backend, target_id: str) -> frozenset[str]:
    """Return the leases for which something exists at the target now, from a backend that defines `existing` or
    `standing`.
    """
    existing = backend.existing if hasattr(backend, "existing") else backend.standing
    return await existing(target_id)


_DECLARED = ("kind", "revocability", "enforced_by", "own_expiry", "stateless")


@dataclass(frozen=True, slots=True)
class BackendContext:
    """Context from which backends are created.

    Only the issuer has token keys: the revoker only undoes, and policy only asks for revocability.
    """

    trust_domain: str
    issuer_url: str
    token_keys: TokenKeys | None = None
    access: TargetAccess = field(default_factory=lambda: TargetAccess({}))


Material = BackendContext  # its name in 0.1, which backends of others import


def built_in(material: BackendContext) -> dict[str, Backend]:
    """The backends that come with Ringfence, by kind. `material`: what they are made from."""
    backends: tuple[Backend, ...] = (
        HttpBackend(),
        JwtBackend(material.trust_domain, material.issuer_url, material.token_keys),
        MysqlBackend(material.trust_domain, material.access),
        PostgresBackend(material.trust_domain, material.access),
        RedisBackend(material.trust_domain, material.access),
        SshBackend(material.trust_domain, material.access),
    )
    return {backend.kind: backend for backend in backends}


def all_backends(material: BackendContext) -> dict[str, Backend]:
    """All backends, by kind: the built-in ones, and those of other installed packages.

    Raises BackendError for a backend that cannot be loaded, or whose kind is taken. Nothing starts without it: what
    minted a credential has to be there to undo it.
    """
    backends = built_in(material)
    for point in entry_points(group=ENTRY_POINTS):
        where = f"backend {point.name} ({point.value})"
        try:
            backend: Backend = point.load()(material)
        except Exception as error:
            raise BackendError(
                f"{where} cannot be loaded: {type(error).__name__}; repair or remove its package"
            ) from error
        missing = [name for name in _DECLARED if not hasattr(backend, name)]
        if missing:
            raise BackendError(f"{where} does not say its {', '.join(missing)}; get a version that does")
        if backend.kind != point.name or backend.kind in backends:
            raise BackendError(f"{where} calls itself {backend.kind!a}, which is not its name or is taken")
        backends[backend.kind] = backend
        log.info("%s comes from another package", where)
    return backends


__all__ = [
    "AccessError",
    "Backend",
    "BackendContext",
    "BackendError",
    "BackendSettings",
    "Caller",
    "CircuitBreaker",
    "CircuitOpenError",
    "EnforcedBy",
    "HttpBackend",
    "JwtBackend",
    "Material",
    "MysqlBackend",
    "OwnExpiry",
    "PostgresBackend",
    "RedisBackend",
    "Revocability",
    "SecretSource",
    "SshBackend",
    "StaticSecrets",
    "TargetAccess",
    "TargetError",
    "TargetRefusedError",
    "TargetShutError",
    "TokenAlgorithm",
    "TokenKey",
    "TokenKeyError",
    "TokenKeys",
    "all_backends",
    "built_in",
]
