"""Reads of the services' HTTP APIs: for the person of a session, or for the console itself."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ringfence.client.errors import ApiError
from ringfence.client.reports.read_api import ReadApi, Service
from ringfence.client.settings import ClientSettings
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.api import MAX_API_TOKEN_S, ConsoleToken, api_audience
from ringfence.messages.base import Scope

if TYPE_CHECKING:
    import httpx


class SessionReads(ReadApi):
    """What the person of a session may see. Each call has a token of its own, which embeds their statement."""

    def __init__(
        self,
        key: SigningKey,
        settings: ClientSettings,
        clock: Clock,
        http: httpx.AsyncClient,
        statement: str | None,
    ) -> None:
        """`statement`: of the session; None: the console asks for itself, and is told next to nothing."""
        # Not the constructor of the base: connections are shared by all sessions.
        self.settings = settings
        self.key = key
        self._clock = clock
        self._http = http
        self._statement = statement

    async def close(self) -> None:
        """Nothing: the connections are not of one session."""

    async def trust(self) -> str:
        """The trust bundle, as the root signed it. Raises ApiError."""
        return str((await self.get("registry", "trust"))["trust"])

    async def passkey(self, credential_id: str, nonce: str, assertion: str) -> Any:
        """Whose passkey signed `nonce`: `{user_id, kid}`. Raises ApiError (404) if it is nobody's."""
        return await self.get("registry", "passkeys", credential_id, nonce=nonce, assertion=assertion)

    async def signed_record(self, kind: str, id: str) -> Any:
        """A record with its `record`, as the registry signed it. Raises ApiError."""
        return await self.get("registry", f"{kind}s", id, records=1)

    async def approvals(self, *, show: str, after: str | None, limit: int) -> dict[str, Any]:
        """A page of the requests that wait and that the person may see, the most urgent first.

        `show`: mine, others, all. Returns `{approvals, after, counts: {mine, others}}`; continue with `after`.
        """
        page: dict[str, Any] = await self.get("policy", "approvals", show=show, after=after, limit=limit)
        return page

    async def approval(self, request_id: str) -> dict[str, Any]:
        """One of them. Raises ApiError (404)."""
        view: dict[str, Any] = await self.get("policy", "approvals", request_id)
        return view

    async def evidence(self, request_id: str) -> dict[str, Any]:
        """The signed messages by which the sign page shows a request: `{trust, question, records}`."""
        view: dict[str, Any] = await self.get("policy", "approvals", request_id, "evidence")
        return view

    async def proposal_evidence(self, id: str) -> dict[str, Any]:
        """The signed messages by which the sign page shows a proposal: `{trust, records, commands}`."""
        view: dict[str, Any] = await self.get("registry", "proposals", id, "evidence")
        return view

    async def ceiling_report(self, agent_id: str, ceiling: Scope, people: Iterable[str]) -> str:
        """What policy knows of a proposed ceiling, signed (`CeilingReport`). Raises ApiError."""
        text = json.dumps([one.model_dump(mode="json") for one in ceiling], separators=(",", ":"))
        query = {"ceiling": text, "people": ",".join(sorted(people))}
        return str((await self.get("policy", "agents", agent_id, "ceiling-report", **query))["report"])

    async def action_approvals(self) -> list[dict[str, Any]]:
        """The single actions that wait and that the person may see, oldest first."""
        listed: list[dict[str, Any]] = (await self.get("policy", "action-approvals"))["actions"]
        return listed

    async def break_glass_use(self, request_id: str) -> Any:
        """One use of break glass. Raises ApiError (404)."""
        for use in await self.break_glass():
            if use["request_id"] == request_id:
                return use
        raise ApiError("there is no use of break glass of this request that you may see", status=404)

    def _token(self, service: Service) -> str:
        if self._statement is None:
            return super()._token(service)
        now_s = self._clock.now_ms() // 1000
        trust_domain = self.settings.trust_domain
        token = ConsoleToken(
            iss=self.key.id,
            aud=api_audience(trust_domain, service),
            iat=now_s,
            exp=now_s + MAX_API_TOKEN_S,
            jti=str(uuid.uuid4()),
            session=self._statement,
        )
        return sign(token, self.key)
