"""Backend for static secrets of HTTP APIs: an API key, a password, a bearer token.

Nothing is minted and nothing is handed out. A lease is the right to have the gateway inject the secret. The gateway
reads the secret from a source of its own for each request. A secret that is replaced at its source takes effect at
once, and no agent notices.
"""

from __future__ import annotations

import base64
import logging
import re
from collections.abc import Mapping
from typing import ClassVar, Final, Literal

from ringfence.backends.access import TargetAccess
from ringfence.backends.secret_sources import AccessError
from ringfence.backends.target_settings import TargetRefusedError, TargetSettingsError, settings_of
from ringfence.messages.credential import Credential
from ringfence.messages.lease import Lease
from ringfence.messages.registry import TargetState
from ringfence.model.target_settings import HttpSettings

log = logging.getLogger(__name__)

_SENDABLE: Final = re.compile(r"[!-~]([ -~]*[!-~])?")


def secret_header(target: TargetState) -> str | None:
    """Return the lower-case name of the target's own header for its secret, or None if it has none.

    Raises TargetSettingsError.
    """
    header = settings_of(target, HttpSettings).header if target.backend.kind == "http" else None
    return header.lower() if header is not None else None


class HttpBackend:
    """Issues leases for targets whose static secret only the gateway knows."""

    kind: ClassVar[str] = "http"
    enforced_by: ClassVar[Literal["target", "gateway"]] = "gateway"
    own_expiry: ClassVar[Literal["all", "logins", "none"]] = "all"
    stateless: ClassVar[bool] = True

    def revocability(self, target: TargetState) -> Literal["instant", "session", "ttl"]:
        """Return `instant`: after a revocation the gateway injects nothing."""
        return "instant"

    def problem(self, lease: Lease, target: TargetState) -> str | None:
        """Return a sentence for the agent if the gateway could not enforce the lease, else None.

        The cause is logged.
        """
        try:
            settings_of(target, HttpSettings)
        except TargetSettingsError as error:
            log.error("%s", error)
            return f"target {target.target_id} does not say how it takes its secret; ask an operator"
        if not target.requests:
            return (
                f"target {target.target_id} does not say which requests are which verb: the gateway would let nothing "
                "pass; ask an operator"
            )
        return None

    async def mint(self, lease: Lease, target: TargetState) -> Credential:
        """Raise TargetRefusedError, always: there is no credential to hand out."""
        raise TargetRefusedError(
            f"the secret that {target.target_id} takes is never handed out: the gateway injects it"
        )

    async def undo(self, lease_id: str, *, target_id: str) -> None:
        """Do nothing: after a revocation the gateway injects nothing."""

    async def existing(self, target_id: str) -> frozenset[str]:
        """Return an empty set: nothing is ever made at a target."""
        return frozenset()

    standing = existing

    async def close(self) -> None:
        """Do nothing: there is no connection."""


class StaticSecrets:
    """Static secrets that the gateway injects, read when needed. No other process can read these sources."""

    def __init__(self, access: TargetAccess) -> None:
        """`access` is the gateway's own. Each entry of its `RINGFENCE_BACKENDS_ACCESS` holds a secret, not a URL."""
        self._access = access
        self._settings: dict[str, tuple[TargetState, HttpSettings]] = {}
        """By target: its parsed settings, valid while its record is the same."""
        self._made: dict[str, tuple[HttpSettings, str, Mapping[str, str]]] = {}
        """By target: the headers, valid while settings and secret are the same."""

    async def headers(self, target: TargetState) -> dict[str, str]:
        """Return the headers that carry the current secret.

        The caller must drop headers of these names that the agent sent.

        Raises TargetSettingsError if the target's record is wrong, and AccessError if the secret is missing or cannot
        stand in a header. Neither message quotes the secret.
        """
        return _headers(target, self._settings_of(target), await self._access.read(target.target_id))

    def headers_at_hand(self, target: TargetState) -> Mapping[str, str] | None:
        """Return the same as `headers` if the secret needs no I/O to another service, else None.

        Raises as `headers` does.
        """
        settings, secret = self._settings_of(target), self._access.at_hand(target.target_id)
        if secret is None:
            return None
        cached = self._made.get(target.target_id)
        if cached is None or cached[0] is not settings or cached[1] != secret:
            made = _headers(target, settings, secret)
            cached = self._made[target.target_id] = settings, secret, made
        return cached[2]

    async def close(self) -> None:
        """Close all connections."""
        await self._access.close()

    def _settings_of(self, target: TargetState) -> HttpSettings:
        cached = self._settings.get(target.target_id)
        if cached is None or cached[0] is not target:
            cached = self._settings[target.target_id] = target, settings_of(target, HttpSettings)
        return cached[1]


def _headers(target: TargetState, settings: HttpSettings, secret: str) -> dict[str, str]:
    if settings.auth == "basic":
        pair = base64.b64encode(f"{settings.username}:{secret}".encode()).decode("ascii")
        return {"Authorization": f"Basic {pair}"}
    if not _SENDABLE.fullmatch(secret):
        raise AccessError(f"the secret of target {target.target_id} has characters that no header may have")
    if settings.header is not None:
        return {settings.header: f"{settings.scheme} {secret}" if settings.scheme else secret}
    return {"Authorization": f"{settings.scheme or 'Bearer'} {secret}"}
