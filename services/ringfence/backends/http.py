"""Backend for static secrets of HTTP APIs (API key, password, bearer token), and protected calls to targets.

The backend mints nothing and hands out nothing. A lease is the right to have the gateway inject the secret, which the
gateway reads from a source of its own for each request. So a secret that is replaced at its source takes effect at
once, and no agent notices. For all backends, `CircuitBreaker` limits calls (circuit, bulkhead, deadline), so that a
target that is down or hangs delays no other; `ConnectionCache` keeps one server object for each target, and replaces
it when the target's secret changes.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Final, Generic, Literal, Protocol, TypeVar

from ringfence.backends.secret_sources import AccessError, TargetAccess
from ringfence.backends.target_settings import (
    CircuitOpenError,
    TargetError,
    TargetRefusedError,
    TargetSettingsError,
    settings_of,
)
from ringfence.messages.credential import Credential
from ringfence.messages.lease import Lease
from ringfence.messages.registry import TargetState
from ringfence.model.target_settings import HttpSettings

T = TypeVar("T")

FAILURES_TO_OPEN = 5
FIRST_OPEN_S = 0.5
_MOST_DOUBLINGS = 16


@dataclass(slots=True)
class _Target:
    slots: asyncio.Semaphore
    failures: int = 0
    open_until: float = 0.0
    probing: bool = field(default=False)
    """In a half-open circuit, one call at a time probes whether the target is back."""


class CircuitBreaker:
    """The calls of one process to all targets, with a circuit for each target."""

    def __init__(
        self,
        *,
        concurrency: int,
        deadline_s: float,
        longest_shut_s: float,
        seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
            concurrency: the most calls to one target at a time (bulkhead).
            deadline_s: how long one call may take, without its wait for a free slot.
            longest_shut_s: the longest time that a circuit stays open.
            seconds: a monotonic clock.
        """  # fmt: skip
        self._seconds = seconds
        self.concurrency = concurrency
        self._deadline_s = deadline_s
        self._max_open_s = longest_shut_s
        self._targets: dict[str, _Target] = {}

    async def call(self, target_id: str, work: Callable[[], Awaitable[T]]) -> T:
        """Call a target, and return the result of `work`.

        Raises CircuitOpenError at once while the circuit is open, TargetError after the deadline, and what `work`
        raises.
        """
        target = self._of(target_id)
        self._check_open(target, target_id)
        async with target.slots:
            probe = self._check_open(target, target_id)  # other calls may have failed while this one waited
            target.probing = target.probing or probe
            try:
                async with asyncio.timeout(self._deadline_s):
                    answer = await work()
            except TargetRefusedError:
                target.failures = 0
                raise
            except TimeoutError:
                self._failed(target)
                raise TargetError(
                    f"target {target_id} did not answer within {self._deadline_s:g} s"
                ) from None
            except Exception:
                self._failed(target)
                raise
            finally:
                if probe:
                    target.probing = False
            target.failures = 0
            return answer

    def open_for_ms(self, target_id: str) -> int:
        """How long the circuit of a target stays open, in ms; 0 if it is not open."""
        target = self._of(target_id)
        return max(0, int((target.open_until - self._seconds()) * 1000))

    shut_ms = open_for_ms  # its name in 0.1, which backends of others call

    def _of(self, target_id: str) -> _Target:
        if target_id not in self._targets:
            self._targets[target_id] = _Target(asyncio.Semaphore(self.concurrency))
        return self._targets[target_id]

    def _check_open(self, target: _Target, target_id: str) -> bool:
        """Raises CircuitOpenError if the circuit is open. True if this call is the probe of a half-open circuit."""
        if target.failures < FAILURES_TO_OPEN:
            return False
        left_s = target.open_until - self._seconds()
        if left_s > 0 or target.probing:
            retry_ms = int(max(left_s, FIRST_OPEN_S) * 1000)
            raise CircuitOpenError(f"target {target_id} failed {target.failures} times in a row", retry_ms)
        return True

    def _failed(self, target: _Target) -> None:
        target.failures += 1
        doublings = target.failures - FAILURES_TO_OPEN
        if doublings >= 0:
            open_s = min(self._max_open_s, FIRST_OPEN_S * 2 ** min(doublings, _MOST_DOUBLINGS))
            target.open_until = self._seconds() + open_s * random.uniform(0.5, 1.0)  # noqa: S311 - jitter


class Connected(Protocol):
    """What the cache keeps for a target."""

    async def close(self) -> None: ...


S = TypeVar("S", bound=Connected)


class ConnectionCache(Generic[S]):
    """Creates the server object of a target on first use, and again if the target's secret has changed.

    A new secret takes effect at once.
    """

    def __init__(self, access: TargetAccess, make: Callable[[str, str], S]) -> None:
        """`make` creates a server object from a target's id and secret.

        It raises AccessError if the secret is unusable.
        """
        self._access = access
        self._make = make
        self._known: dict[str, tuple[str, S]] = {}

    async def at(self, target_id: str) -> S:
        """Return the server object of a target. Raises AccessError."""
        rights = await self._access.read(target_id)
        cached = self._known.get(target_id)
        if cached is not None and cached[0] == rights:
            return cached[1]
        server = self._make(target_id, rights)
        self._known[target_id] = (rights, server)
        if cached is not None:
            await cached[1].close()
        return server

    async def close(self) -> None:
        servers = [server for _, server in self._known.values()]
        self._known.clear()
        for server in servers:
            await server.close()


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

    def problem(self, target_id: str) -> str | None:
        """Return why the secret of a target cannot be read here, None if it can. A secret in Vault is not fetched."""
        try:
            self._access.at_hand(target_id)
        except AccessError as error:
            return str(error)
        return None

    async def close(self) -> None:
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
