"""One credential at a time for one purpose: requested when it is first needed, and again before it ends.

What adapters of HTTP clients share: the present credential's `httpx.Auth`, and where it may be sent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

import httpx

from ringfence.client.agent.agent import Agent, OnPending
from ringfence.client.agent.credentials import IssuedCredential
from ringfence.client.arguments import texts
from ringfence.client.errors import CredentialUseError, InvalidCallError
from ringfence.kernel.base.errors import RingfenceError
from ringfence.messages.credential import Delivery

_PORTS: Final = {"http": 80, "https": 443}


class PresentedAuth:
    """Keeps one `httpx.Auth` for each credential: it remembers the nonces of servers."""

    def __init__(self, origin: str | None) -> None:
        """Raises InvalidCallError if `origin` is no http(s) origin."""
        self._origin = None if origin is None else _origin(origin)
        if origin is not None and self._origin is None:
            raise InvalidCallError(
                f"origin is no http or https origin: {origin!r}; write https://shop.example"
            )
        self._of: tuple[str, httpx.Auth] | None = None

    def check(self, url: str) -> None:
        """Raises CredentialUseError if a request goes elsewhere than to the origin."""
        if self._origin is not None and _origin(url) != self._origin:
            scheme, host, port = self._origin
            raise CredentialUseError(
                f"this credential goes to {scheme}://{host}:{port} alone, and the request goes elsewhere"
            )

    def auth_of(self, credential: IssuedCredential) -> httpx.Auth:
        """The auth of a credential, the same one each time. Raises CredentialUseError for one of another kind."""
        of = self._of
        if of is None or of[0] != credential.lease_id:
            of = self._of = credential.lease_id, credential.auth()
        return of[1]


def _origin(url: str) -> tuple[str, str, int] | None:
    try:
        parsed = httpx.URL(url)
        port = parsed.port or _PORTS.get(parsed.scheme)
    except httpx.InvalidURL:
        return None
    return (parsed.scheme, parsed.host, port) if parsed.host and port and parsed.scheme in _PORTS else None


log = logging.getLogger(__name__)

REFRESH_BEFORE_S: Final = 30
"""How long before its end a credential is replaced, by default; at most half of its life before."""


class CredentialSource:
    """Requests credentials for one purpose, and releases them at its end.

    Each credential is a new request, which policy decides: a source renews nothing. A credential that was replaced
    stays valid until its end, at most `refresh_before_s` later, because a call may still use it.

    ```python
    async with CredentialSource(
        agent, task=task_id, target="shop", verbs=["read"], resources=["orders/*"], reason="count orders"
    ) as source:
        credential = await source.current()
    ```
    """

    def __init__(
        self,
        agent: Agent,
        *,
        task: str,
        target: str,
        verbs: Sequence[str],
        resources: Sequence[str],
        reason: str,
        ttl_s: int = 300,
        timeout_s: float | None = 60.0,
        on_pending: OnPending | None = None,
        delivery: Delivery | None = None,
        refresh_before_s: float = REFRESH_BEFORE_S,
    ) -> None:
        """The arguments of `Agent.request`; and `refresh_before_s`, how long before its end a credential is replaced.

        Raises InvalidCallError if `verbs` or `resources` is no list.
        """
        self.agent = agent
        self.target = target
        self._task = task
        self._verbs, self._resources = texts("verbs", verbs), texts("resources", resources)
        self._reason = reason
        self._ttl_s = ttl_s
        self._timeout_s = timeout_s
        self._on_pending = on_pending
        self._delivery = delivery
        self._refresh_before_ms = refresh_before_s * 1000
        self._current: IssuedCredential | None = None
        self._replace_at_ms: dict[str, float] = {}
        """Of the present credential, by its lease: from when on nothing new begins with it."""
        self._replaced: list[IssuedCredential] = []
        self._one_request = asyncio.Lock()

    async def current(self) -> IssuedCredential:
        """The current credential; a new one if there is none, or if it ends soon. Raises as `Agent.request`."""
        async with self._one_request:
            if self._current is None or not self.is_fresh(self._current.lease_id):
                await self._replace()
            assert self._current is not None
            return self._current

    async def renew(self) -> IssuedCredential:
        """A new credential, whatever is left of the present one: for when that was revoked. Raises as `current`."""
        async with self._one_request:
            await self._replace()
            assert self._current is not None
            return self._current

    def is_fresh(self, lease_id: str) -> bool:
        """Whether something new may begin with this credential: it is held here, and does not end soon."""
        return self._now_ms() < self._replace_at_ms.get(lease_id, 0)

    async def close(self) -> None:
        """Wipe and release all that is held. It may be used again, and requests anew then. Idempotent."""
        held = [*self._replaced, *([self._current] if self._current else [])]
        self._current, self._replaced = None, []
        self._replace_at_ms.clear()
        for credential in held:
            credential.wipe()
            await self._release(credential)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def _replace(self) -> None:
        credential = await self.agent.request(
            task=self._task,
            target=self.target,
            verbs=self._verbs,
            resources=self._resources,
            reason=self._reason,
            ttl_s=self._ttl_s,
            timeout_s=self._timeout_s,
            on_pending=self._on_pending,
            delivery=self._delivery,
        )
        now_ms, end_ms = self._now_ms(), credential.expires_at * 1000
        if self._current is not None:
            self._replaced.append(self._current)
            del self._replace_at_ms[self._current.lease_id]
        self._replaced = [one for one in self._replaced if one.expires_at * 1000 > now_ms]
        self._current = credential
        before_ms = min(self._refresh_before_ms, max(0, end_ms - now_ms) / 2)
        self._replace_at_ms[credential.lease_id] = end_ms - before_ms

    async def _release(self, credential: IssuedCredential) -> None:
        """Release, and only log a failure: the lease ends at its deadline anyway."""
        if credential.expires_at * 1000 <= self._now_ms():
            return
        try:
            await self.agent.release(credential)
        except RingfenceError as error:
            log.warning("lease %s was not released and ends at its deadline: %s", credential.lease_id, error)

    def _now_ms(self) -> int:
        return self.agent.connection.clock.now_ms()
