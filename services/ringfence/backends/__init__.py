"""Kinds of credentials, one file each: the issuer makes them, the revoker undoes them at their target."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import ClassVar, Literal, Protocol

from ringfence.backends.access import BackendSettings, TargetAccess
from ringfence.backends.circuit_breaker import CircuitBreaker
from ringfence.backends.http import HttpBackend, StaticSecrets
from ringfence.backends.jwt import JwtBackend
from ringfence.backends.postgres.backend import PostgresBackend
from ringfence.backends.redis import RedisBackend
from ringfence.backends.secret_sources import AccessError, SecretSource
from ringfence.backends.ssh.backend import SshBackend
from ringfence.backends.target_settings import (
    BackendError,
    CircuitOpenError,
    TargetError,
    TargetRefusedError,
)
from ringfence.backends.token_keys import TokenKey, TokenKeyError, TokenKeys
from ringfence.messages.credential import Credential
from ringfence.messages.lease import Lease
from ringfence.messages.registry import TargetState
from ringfence.model.target_settings import ENTRY_POINTS, TokenAlgorithm

log = logging.getLogger(__name__)

# Names of 0.1 that backends of others import: they stay.
Caller = CircuitBreaker
TargetShutError = CircuitOpenError

Revocability = Literal["instant", "session", "ttl"]
"""How far a credential can be recalled before its end. `instant`: the target asks introspection, or only the gateway
can use it. `session`: live sessions are ended too. `ttl`: not at all."""

OwnExpiry = Literal["all", "logins", "none"]
"""What ends at the deadline by the target itself, were Ringfence gone. `all`: the credential is good for nothing more.
`logins`: nobody can log in any more, and sessions last. `none`: nothing, until the lease is undone."""


EnforcedBy = Literal["target", "gateway"]
"""Who refuses what is beyond the scope. `target`: it does, as the credential is good for no more. `gateway`: the target
knows no scopes, so nothing is made or handed out: the lease is the right to have the gateway inject the secret."""


class Backend(Protocol):
    """One kind of credential."""

    kind: ClassVar[str]
    """What `backend.kind` of a target says, and `kind` of the credential."""
    enforced_by: ClassVar[EnforcedBy]
    own_expiry: ClassVar[OwnExpiry]
    stateless: ClassVar[bool]
    """A pure token: making it leaves nothing at the target, so nothing is there to undo when its time is over."""

    def revocability(self, target: TargetState) -> Revocability:
        """How far a credential for this target can be recalled: policy is told, and decides who may hold it."""
        ...

    def problem(self, lease: Lease, target: TargetState) -> str | None:
        """Why a credential that allows exactly what the lease says cannot be made, or None. No I/O over a network."""
        ...

    async def mint(self, lease: Lease, target: TargetState) -> Credential:
        """The credential of a lease. Again for the same lease: one that means the same, and the others stay good."""
        ...

    async def undo(self, lease_id: str, *, target_id: str) -> None:
        """Take everything back that was made for a lease at its target, live sessions too, as far as it can be.

        The two ids are all that it is given: a lease that nobody remembers must be undone as well. Undoing what is gone
        is success; what fails is tried again.
        """
        ...

    async def existing(self, target_id: str) -> frozenset[str]:
        """The leases for which something exists at the target now, whoever made it and whenever."""
        ...

    async def standing(self, target_id: str) -> frozenset[str]:
        """The name of `existing` in 0.1: a backend needs one of the two. Call `existing_of`."""
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...


async def existing_of(backend: Backend, target_id: str) -> frozenset[str]:
    """The leases for which something exists at the target now, from a backend that defines `existing` or `standing`."""
    existing = backend.existing if hasattr(backend, "existing") else backend.standing
    return await existing(target_id)


_DECLARED = ("kind", "revocability", "enforced_by", "own_expiry", "stateless")


@dataclass(frozen=True, slots=True)
class BackendContext:
    """What backends are made of. Only the issuer has keys: a revoker undoes, and policy asks what can be recalled."""

    trust_domain: str
    issuer_url: str
    token_keys: TokenKeys | None = None
    access: TargetAccess = field(default_factory=lambda: TargetAccess({}))


Material = BackendContext  # its name in 0.1, which backends of others import


def built_in(material: BackendContext) -> dict[str, Backend]:
    """Those that come with Ringfence, by name."""
    backends: tuple[Backend, ...] = (
        HttpBackend(),
        JwtBackend(material.trust_domain, material.issuer_url, material.token_keys),
        PostgresBackend(material.trust_domain, material.access),
        RedisBackend(material.trust_domain, material.access),
        SshBackend(material.trust_domain, material.access),
    )
    return {backend.kind: backend for backend in backends}


def all_backends(material: BackendContext) -> dict[str, Backend]:
    """All kinds that there are, by name: the built-in ones, and those that other installed packages bring.

    Raises BackendError for one that cannot be loaded, or has a name that is taken: what made credentials must be there
    to undo them, so nothing starts without it.
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
