"""`ringfence demo`: what agents can do today, and the same with Ringfence, in a minute and on real services.

A `Narrator` reports each step as it happens. A step that fails raises `StoryError`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from ringfence.client.admin.administrator import Administrator
from ringfence.client.agent.agent import Agent
from ringfence.client.agent.credentials import IssuedCredential
from ringfence.client.approvals.history_comparison import PendingApproval
from ringfence.client.approvals.sponsor import Sponsor
from ringfence.client.errors import ApiError, RequestDeniedError
from ringfence.client.reports.read_api import ReadApi
from ringfence.client.settings import ClientSettings
from ringfence.dev.demo_target import PATIENCE_S, start_platform
from ringfence.dev.organisation import DEPLOY_STAGING, PLATFORM, READ_ALL, key_of, seed
from ringfence.dev.stack import Stack
from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.messages.codes import Code
from ringfence.messages.lease import Lease
from ringfence.messages.topics import LEASE

SHORT_TTL_S = 5
_REFUSED = "refused"
"""In the trail of a request: policy's final answer."""


class StoryError(RingfenceError):
    """Raised when a step of the demo fails."""

    code = Code.STORY_BROKEN


class Narrator(Protocol):
    """Prints the demo's steps."""

    def act(self, title: str) -> None: ...

    def step(self, step: str, text: str, **ids: Any) -> None:
        """Report a step. `step` is a stable name; `ids` are the ids of what it is about."""
        ...

    def waiting(self, text: str) -> None:
        """Report what is being waited for. It is called again and again; the last text counts."""
        ...


@dataclass(slots=True)
class DemoStory:
    """The connected clients of everybody in the demo."""

    stack: Stack
    settings: ClientSettings
    narrator: Narrator
    ask: Callable[[PendingApproval], Awaitable[bool]] | None
    """Interactive mode: returns whether the person at the keyboard approves."""
    _platform_url: str = ""

    async def tell(self) -> None:
        """Make a small organisation, and run act 0 and act 1, which a denial ends early.

        Raises StoryError, or the error of the part that failed.
        """
        folder, settings, domain = self.stack.trust, self.settings, self.settings.trust_domain
        server, self._platform_url, legacy_token = start_platform(self.stack)
        try:
            self.narrator.waiting("making a small organisation")
            await seed(folder, settings, self.stack.options.operator, platform_url=self._platform_url)
            async with AsyncExitStack() as stack:
                http = await stack.enter_async_context(
                    httpx.AsyncClient(base_url=self._platform_url, timeout=10, trust_env=False)
                )
                await self._bypass(http, legacy_token)
                maria = await stack.enter_async_context(
                    Administrator.connect(key_of(folder, domain, "user", "maria"), settings)
                )
                sam = await stack.enter_async_context(
                    Sponsor.connect(key_of(folder, domain, "user", "sam"), settings)
                )
                bot = await stack.enter_async_context(
                    Agent.connect(key_of(folder, domain, "agent", "deploy-bot"), settings)
                )
                ends = await stack.enter_async_context(_Ends(settings, bot))
                await self._task(http, maria, sam, bot, ends)
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            raise StoryError(f"the platform at {self._platform_url} does not answer: {reason}") from None
        finally:
            server.stop()

    # --- act 0 ---

    async def _bypass(self, http: httpx.AsyncClient, legacy_token: str) -> None:
        tell = self.narrator
        tell.act("Act 0: how it works today. The agent inherited the platform's admin token.")
        before = await _deployed(http, "production")
        tell.step(
            "bypass.asked",
            "Maria may only read production. She tells the agent: put build-421 on production.",
            user="maria",
            build=before,
        )
        answer = await http.put(
            "/env/production/web",
            json={"build": "build-421"},
            headers={"Authorization": f"Bearer {legacy_token}"},
        )
        after = await _deployed(http, "production")
        if after != "build-421":
            raise StoryError(
                f"the inherited token should have changed production; the platform said {answer.text}"
            )
        tell.step(
            "bypass.succeeded",
            f"Production runs {after}, was {before}. The platform's log says: by {answer.json()['by']}. "
            "Nobody can say which agent it was, or for whom.",
            build=after,
            by=answer.json()["by"],
        )
        withdrawn = await http.delete("/legacy-token", headers={"Authorization": f"Bearer {legacy_token}"})
        if withdrawn.status_code != 200:
            raise StoryError("the inherited token could not be withdrawn")
        tell.step("bypass.closed", "The inherited token is withdrawn. From here on the agent holds nothing.")

    # --- act 1 ---

    async def _task(
        self, http: httpx.AsyncClient, maria: Administrator, sam: Sponsor, bot: Agent, ends: _Ends
    ) -> None:
        tell = self.narrator
        tell.act("Act 1: deploy the staging build, with Ringfence.")
        task = await maria.assign_task(
            "deploy-bot",
            purpose="deploy build-421 to staging",
            scope=[DEPLOY_STAGING, READ_ALL],
            ends_in_s=900,
        )
        tell.step(
            "task.assigned",
            "Maria assigns deploy-bot a task, on her behalf: deploy and read on staging, for 15 minutes.",
            task=task,
            agent="deploy-bot",
            user="maria",
        )
        credential = await self._with_approval(task, sam, bot)
        if credential is None:
            return
        await self._use(http, credential)
        await self._reach_for_production(task, bot)
        await self._give_back(http, bot, ends, credential)
        await self._let_expire(http, task, bot, ends)
        await self._trace(
            credential.lease_id,
            until="released",
            text="Ali, the auditor, reads the story of the first credential back to the human.",
            lease=credential.lease_id,
        )

    async def _with_approval(self, task: str, sam: Sponsor, bot: Agent) -> IssuedCredential | None:
        """Request a credential. Returns None if the person at the keyboard denied it; the story ends then."""
        tell = self.narrator
        tell.step(
            "credential.requested",
            "deploy-bot signs a request: deploy on env/staging/web, for 300 s, reason 'roll out build-421'.",
            task=task,
            agent="deploy-bot",
        )
        request = asyncio.create_task(
            bot.request(
                task=task,
                target=PLATFORM,
                verbs=["deploy"],
                resources=["env/staging/web"],
                reason="roll out build-421",
                ttl_s=300,
                timeout_s=None if self.ask else PATIENCE_S,
            )
        )
        try:
            pending = await self._first_pending(sam, request)
            tell.step(
                "approval.requested",
                f"The platform wants the sponsor for 'deploy'. Sam sees what the agent signed: {pending.agent} for "
                f"{pending.on_behalf_of}, '{pending.reason}', digest {pending.digest[:16]}...",
                request=pending.request_id,
                digest=pending.digest,
                sponsor="sam",
            )
            if self.ask is not None and not await self.ask(pending):
                await self._denied(sam, pending, request)
                return None
            await sam.approve(pending, comment="build-421 passed its tests")
            tell.step(
                "approval.given",
                "Sam signs over the digest of exactly this request.",
                request=pending.request_id,
                sponsor="sam",
            )
            credential = await request
        finally:
            request.cancel()
        tell.step(
            "credential.issued",
            f"The issuer checked every signature and the rule itself. Lease {credential.lease_id}: the token is sealed "
            "to the gateway. The agent gets the lease's id alone, and no secret.",
            lease=credential.lease_id,
            request=credential.request_id,
            expires_at=credential.expires_at,
        )
        return credential

    async def _denied(
        self, sam: Sponsor, pending: PendingApproval, request: asyncio.Task[IssuedCredential]
    ) -> None:
        tell = self.narrator
        await sam.deny(pending, comment="not this build")
        tell.step(
            "approval.denied",
            "You said no: Sam signs a no over the digest of exactly this request.",
            request=pending.request_id,
            sponsor="sam",
        )
        try:
            async with asyncio.timeout(PATIENCE_S):
                await request
        except RequestDeniedError as denied:
            tell.step(
                "request.refused",
                "deploy-bot gets no credential, and the platform never heard of it: "
                + "; ".join(reason.message for reason in denied.reasons)
                + ".",
                request=denied.request_id,
                reasons=[reason.code for reason in denied.reasons],
            )
        else:
            raise StoryError("the denied request should have been refused")
        await self._trace(
            pending.request_id,
            until=_REFUSED,
            text="Ali, the auditor, reads who asked, for whom, and who said no.",
            request=pending.request_id,
        )

    async def _first_pending(self, sam: Sponsor, request: asyncio.Task[IssuedCredential]) -> PendingApproval:
        async def first() -> PendingApproval:
            async for pending in sam.watch():
                return pending
            raise StoryError("the sponsor saw no request")

        pending_task = asyncio.create_task(first())
        await asyncio.wait({pending_task, request}, return_when=asyncio.FIRST_COMPLETED, timeout=PATIENCE_S)
        if not pending_task.done():
            pending_task.cancel()
            if request.done():
                await request
            raise StoryError("no approval was asked for")
        return await pending_task

    async def _use(self, http: httpx.AsyncClient, credential: IssuedCredential) -> None:
        answer = await self._deploy(http, credential, "build-421")
        deployed = await _deployed(http, "staging")
        if answer.status_code != 200 or deployed != "build-421":
            raise StoryError(f"the platform should have accepted the credential; it said {answer.text}")
        body = answer.json()
        self.narrator.step(
            "credential.verified",
            "deploy-bot deploys through the gateway, which puts the token into the request. The platform verified it "
            f"by itself (JWKS, introspection) and runs {deployed} on staging. Its log says: by {body['by']}, on behalf "
            f"of {body['on_behalf_of']}, lease {body['lease']}.",
            lease=credential.lease_id,
            build=deployed,
        )

    async def _deploy(
        self, http: httpx.AsyncClient, credential: IssuedCredential, build: str
    ) -> httpx.Response:
        """Send a build to staging through the gateway. A gateway that has not read the new lease yet is asked again."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            answer = await http.put(
                f"{self.stack.door}/{PLATFORM}/env/staging/web",
                json={"build": build},
                auth=credential.auth(),
            )
            known = answer.status_code != 401 or answer.json().get("code") != Code.HANDLE_UNKNOWN
            if known or time.monotonic() > deadline:
                return answer
            await asyncio.sleep(0.1)

    async def _reach_for_production(self, task: str, bot: Agent) -> None:
        try:
            await bot.request(
                task=task,
                target=PLATFORM,
                verbs=["deploy"],
                resources=["env/production/web"],
                reason="production too, while we are at it",
                timeout_s=PATIENCE_S,
            )
        except RequestDeniedError as denied:
            sides = [reason.side for reason in denied.reasons if reason.side]
            self.narrator.step(
                "request.refused",
                "The same reach for production: denied. "
                + "; ".join(r.message for r in denied.reasons)
                + ".",
                request=denied.request_id,
                sides=sides,
                reasons=[reason.code for reason in denied.reasons],
            )
            return
        raise StoryError("the reach for production should have been denied")

    async def _give_back(
        self, http: httpx.AsyncClient, bot: Agent, ends: _Ends, credential: IssuedCredential
    ) -> None:
        await bot.release(credential, reason="deployed")
        end = await ends.of(credential.lease_id)
        again = await self._deploy(http, credential, "build-1")
        if end.claims.status != "released" or again.status_code != 403:
            raise StoryError(f"the released lease should be refused; the gateway said {again.text}")
        self.narrator.step(
            "credential.released",
            "deploy-bot gives it back. The token is not old, yet the gateway uses it no more, at once: "
            f"{again.json()['code']}.",
            lease=credential.lease_id,
        )

    async def _let_expire(self, http: httpx.AsyncClient, task: str, bot: Agent, ends: _Ends) -> None:
        credential = await bot.request(
            task=task,
            target=PLATFORM,
            verbs=["read"],
            resources=["env/staging/*"],
            reason="check the roll-out",
            ttl_s=SHORT_TTL_S,
            timeout_s=PATIENCE_S,
        )
        while (left_s := credential.expires_at - time.time()) > 0:
            self.narrator.waiting(
                f"a second lease, {SHORT_TTL_S} s, nobody gives it back: {left_s:.1f} s left"
            )
            await asyncio.sleep(min(0.1, left_s))
        end = await ends.of(credential.lease_id)
        late_ms = end.appended_at_ms - end.claims.deadline * 1000
        if end.claims.status != "expired":
            raise StoryError(f"the lease should have expired; it is {end.claims.status}")
        self.narrator.step(
            "lease.expired",
            f"A second lease of {SHORT_TTL_S} s ran out: revoked by itself {late_ms} ms after its deadline.",
            lease=credential.lease_id,
            late_ms=late_ms,
        )

    async def _trace(self, of: str, *, until: str, text: str, **ids: str) -> None:
        """Report the audit trail of a lease or request, once it contains `until`. Raises StoryError."""
        ali = key_of(self.stack.trust, self.settings.trust_domain, "user", "ali")
        async with ReadApi(ali, self.settings) as api:
            deadline = time.monotonic() + PATIENCE_S
            while until not in str(tree := await trace_of(api, of)):
                if time.monotonic() > deadline:
                    raise StoryError(f"the audit trail does not show that it was {until}")
                await asyncio.sleep(0.1)
        self.narrator.step("audit.traced", text, trace=tree, **ids)


@dataclass(frozen=True, slots=True)
class _End:
    claims: Lease
    appended_at_ms: int


class _Ends:
    """Verified terminal lease records, as they arrive."""

    def __init__(self, settings: ClientSettings, bot: Agent) -> None:
        self._trust = bot.connection.trust
        self._domain = settings.trust_domain
        self._ends: dict[str, _End] = {}
        self._changed = asyncio.Event()
        self._follower = Follower(settings, [LEASE], self._on_records, since_ms=None)

    async def __aenter__(self) -> _Ends:
        await self._follower.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._follower.stop()

    async def of(self, lease_id: str) -> _End:
        """Wait for the terminal record of a lease. Raises StoryError if none arrives."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while lease_id not in self._ends:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise StoryError(f"lease {lease_id} did not end") from None
        return self._ends[lease_id]

    def _on_records(self, records: Sequence[Received]) -> None:
        for record in records:
            try:
                find = self._trust.finder("revoker", at_s=record.appended_at_ms / 1000)
                claims = verify(parse(record.value), Lease, find, audience=self._domain).claims
            except InvalidMessageError:
                continue  # the issuer's records, which end no lease
            if claims.status in ("released", "revoked", "expired"):
                self._ends[claims.lease_id] = _End(claims, record.appended_at_ms)
                self._changed.set()


async def trace_of(api: ReadApi, id: str) -> Any:
    """Return the audit trail of a lease, request or run so far; None if audit has not reached it yet."""
    try:
        return await api.get("audit", "trace", id)
    except ApiError as error:
        if error.status == 404:
            return None
        raise


async def _deployed(http: httpx.AsyncClient, env: str) -> str:
    return str((await http.get(f"/env/{env}/web")).json()["build"])
