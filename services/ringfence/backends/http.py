"""Static secrets of HTTP APIs that know nothing better: an API key, a password, a bearer token.

Nothing is made and nothing is handed out. A lease is the right to have the gateway inject the secret, which the gateway
reads from a source of its own, each time: a secret that is replaced at its source counts at once, and no agent notices.
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
    """The name, in lower case, of the header of its own that a target takes its secret in; None where it has none.

    Raises TargetSettingsError.
    """
    header = settings_of(target, HttpSettings).header if target.backend.kind == "http" else None
    return header.lower() if header is not None else None


class HttpBackend:
    """Leases for targets whose static secret only the gateway has."""

    kind: ClassVar[str] = "http"
    enforced_by: ClassVar[Literal["target", "gateway"]] = "gateway"
    own_expiry: ClassVar[Literal["all", "logins", "none"]] = "all"
    stateless: ClassVar[bool] = True

    def revocability(self, target: TargetState) -> Literal["instant", "session", "ttl"]:
        """From the cut on the gateway injects nothing."""
        return "instant"

    def problem(self, lease: Lease, target: TargetState) -> str | None:
        """What an agent is told where the gateway could not enforce the lease. What it is, is logged."""
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
        """Always raises TargetRefusedError: there is nothing that could be handed out."""
        raise TargetRefusedError(
            f"the secret that {target.target_id} takes is never handed out: the gateway injects it"
        )

    async def undo(self, lease_id: str, *, target_id: str) -> None:
        """Nothing: the gateway injects nothing from the cut on."""

    async def existing(self, target_id: str) -> frozenset[str]:
        """Nothing: there is never anything at a target."""
        return frozenset()

    standing = existing

    async def close(self) -> None:
        """There is nothing to close."""


class StaticSecrets:
    """What the gateway injects, read when it is needed. No other process has these sources."""

    def __init__(self, access: TargetAccess) -> None:
        """`access`: the gateway's own; of its `RINGFENCE_BACKENDS_ACCESS` each place holds a secret, not a URL."""
        self._access = access
        self._settings: dict[str, tuple[TargetState, HttpSettings]] = {}
        """By target: what its record says, as long as it is the same one."""
        self._made: dict[str, tuple[HttpSettings, str, Mapping[str, str]]] = {}
        """By target: what was made of it and the secret, as long as both are the same."""

    async def headers(self, target: TargetState) -> dict[str, str]:
        """The headers that carry the secret that is there now. None of the agent's of these names may stay.

        Raises TargetSettingsError where the target's record is wrong, AccessError where there is no secret, or one
        that cannot stand in a header; neither quotes it.
        """
        return _headers(target, self._settings_of(target), await self._access.read(target.target_id))

    def headers_at_hand(self, target: TargetState) -> Mapping[str, str] | None:
        """The same where nobody has to be asked for the secret; else None. Raises as `headers` does."""
        settings, secret = self._settings_of(target), self._access.at_hand(target.target_id)
        if secret is None:
            return None
        known = self._made.get(target.target_id)
        if known is None or known[0] is not settings or known[1] != secret:
            made = _headers(target, settings, secret)
            known = self._made[target.target_id] = settings, secret, made
        return known[2]

    async def close(self) -> None:
        """Let go of connections."""
        await self._access.close()

    def _settings_of(self, target: TargetState) -> HttpSettings:
        known = self._settings.get(target.target_id)
        if known is None or known[0] is not target:
            known = self._settings[target.target_id] = target, settings_of(target, HttpSettings)
        return known[1]


def _headers(target: TargetState, settings: HttpSettings, secret: str) -> dict[str, str]:
    if settings.auth == "basic":
        pair = base64.b64encode(f"{settings.username}:{secret}".encode()).decode("ascii")
        return {"Authorization": f"Basic {pair}"}
    if not _SENDABLE.fullmatch(secret):
        raise AccessError(f"the secret of target {target.target_id} has characters that no header may have")
    if settings.header is not None:
        return {settings.header: f"{settings.scheme} {secret}" if settings.scheme else secret}
    return {"Authorization": f"{settings.scheme or 'Bearer'} {secret}"}
