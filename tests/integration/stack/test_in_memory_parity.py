"""`ringfence.testing` decides as the services do: the same stories, told to both, have the same outcomes and codes."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from ringfence import (
    Administrator,
    Agent,
    BackendSettings,
    InvalidCallError,
    IssuedCredential,
    PendingAction,
    PendingApproval,
    Permission,
    RequestDeniedError,
    RequestRule,
    RequestTimeoutError,
    RingfenceError,
    SigningKey,
    Sponsor,
    TokenRejectedError,
    TokenVerifier,
    VerbFloor,
)
from ringfence.messages.operations import ActionDecided
from ringfence.messages.topics import ACTION
from ringfence.testing import InMemoryRingfence, People
from tests.gateway.target import Target
from tests.support.stack import WITHIN_S, RunningStack, Seen, first_pending

Outcome = Any
Story = Callable[[RunningStack], Awaitable[Outcome]]
STORIES: dict[str, Story] = {}


def story(tell: Story) -> Story:
    STORIES[tell.__name__] = tell
    return tell


@dataclass
class InMemoryRealm(RunningStack):
    """The organisation of the integration tests, made by the same commands in an in-memory Ringfence."""

    ringfence: InMemoryRingfence = field(default_factory=InMemoryRingfence)

    def key(self, kind: str, id: str) -> SigningKey:
        return self.ringfence.key(f"{kind}/{id}")

    def as_operator(self) -> Administrator:
        return self.ringfence.administrator(People.OPERATOR)

    def administrator(self, who: str) -> Administrator:
        return self.ringfence.administrator(self.name(who))

    def sponsor(self, who: str = "sam") -> Sponsor:
        return Sponsor(self.ringfence.administrator(self.name(who)).connection)

    def as_agent(self) -> Agent:
        return self.ringfence.agent(self.agent)


# --- what stories are made of ---


@asynccontextmanager
async def verifier(realm: RunningStack, target: str | None = None) -> AsyncIterator[TokenVerifier]:
    """A resource server that introspects."""
    target = target or realm.target
    if isinstance(realm, InMemoryRealm):
        yield realm.ringfence.verifier(target)
        return
    audience = f"spiffe://{realm.settings.trust_domain}/target/{target}"
    async with TokenVerifier(realm.settings.issuer_url, audience, realm.key("target", target)) as made:
        yield made


def ask(realm: RunningStack, agent: Agent, *verbs: str, **options: Any) -> asyncio.Task[IssuedCredential]:
    given = {
        "task": realm.task,
        "target": realm.target,
        "verbs": verbs or ("read",),
        "resources": ["env/staging/web"],
        "reason": "a story",
        "timeout_s": WITHIN_S,
    }
    return asyncio.create_task(agent.request(**{**given, **options}))


async def outcome(realm: RunningStack, work: Awaitable[Any]) -> Outcome:
    """What something came to: its kind, or its error, code and reasons, without what differs from run to run."""
    try:
        result = await work
    except RequestDeniedError as error:
        return "denied", error.by, error.code, [(one.code, said(realm, one.side)) for one in error.reasons]
    except RequestTimeoutError as error:
        return "timeout", error.waiting_for
    except RingfenceError as error:
        reasons = getattr(error, "reasons", ())
        return type(error).__name__, error.code, [one.code for one in reasons]
    if isinstance(result, IssuedCredential):
        return (
            type(result).__name__,
            result.kind,
            result.token_type,
            [(p.verbs, p.resources) for p in result.scope],
            said(realm, result.sponsor),
            said(realm, result.on_behalf_of),
            result.delivery,
        )
    return "done"


def said(realm: RunningStack, text: str | None) -> str | None:
    return text and text.replace(realm.mark, "MARK")


def shown(realm: RunningStack, pending: PendingApproval) -> Outcome:
    """What a person is shown."""
    return (
        said(realm, pending.agent),
        pending.purpose,
        said(realm, pending.on_behalf_of),
        [(p.verbs, p.resources) for p in pending.scope],
        pending.ttl_s,
        pending.required,
        pending.mine,
        [one.code for one in pending.why_asked],
        pending.break_glass,
        [said(realm, one) for one in pending.delegators],
    )


async def until_refused(server: TokenVerifier, token: str) -> str:
    """The code of a refusal that comes once a revocation has arrived everywhere."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            try:
                await server.verify(token)
            except TokenRejectedError as error:
                return error.code
            await asyncio.sleep(0.02)


async def until_denied(realm: RunningStack, agent: Agent, **options: Any) -> Outcome:
    """The denial that comes once a change of records has arrived at policy."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            found = await outcome(realm, ask(realm, agent, **options))
            if found[0] == "denied":
                return found


async def with_otto(realm: RunningStack) -> None:
    """A second operator, of this realm."""
    async with realm.as_operator() as olga:
        for who in ("otto", "olaf"):
            name = realm.name(who)
            await olga.set_user(name, name=who, roles=["operator"], keys=[realm.key("user", name)])


# --- the stories ---


@story
async def a_credential_is_used_and_released(realm: RunningStack) -> Outcome:
    async with realm.as_agent() as agent, verifier(realm) as server:
        credential = await ask(realm, agent)
        token = await server.verify(credential.value)
        found = [
            token.allows("read", "env/staging/web"),
            token.allows("write", "env/staging/web"),
            token.allows("read", "env/staging/api"),
            said(realm, token.agent.rpartition("/")[2]),
            said(realm, token.sponsor.rpartition("/")[2]),
            token.task == realm.task,
        ]
        await agent.release(credential, timeout_s=WITHIN_S)
        return [*found, await outcome(realm, server.verify(credential.value))]


@story
async def a_sponsor_approves(realm: RunningStack) -> Outcome:
    async with realm.as_agent() as agent, realm.sponsor() as sam:
        asked = ask(realm, agent, "write")
        pending = await first_pending(sam)
        await sam.approve(pending, "go ahead")
        return shown(realm, pending), await outcome(realm, asked), await outcome(realm, sam.approve(pending))


@story
async def a_sponsor_denies(realm: RunningStack) -> Outcome:
    async with realm.as_agent() as agent, realm.sponsor() as sam:
        asked = ask(realm, agent, "read", "write")
        await sam.deny(await first_pending(sam), "not today")
        return await outcome(realm, asked)


@story
async def who_may_not_approve_cannot(realm: RunningStack) -> Outcome:
    async with realm.as_agent() as agent, realm.sponsor() as sam, realm.sponsor("maria") as maria:
        asked = ask(realm, agent, "write")
        pending = await first_pending(sam)
        async with asyncio.timeout(WITHIN_S):
            async for theirs in maria.watch(everyone=True):
                if theirs.request_id == pending.request_id:
                    break
        refused = await outcome(realm, maria.approve(theirs))
        await sam.deny(pending)
        return refused, shown(realm, theirs), await outcome(realm, asked)


@story
async def nobody_approves_in_time(realm: RunningStack) -> Outcome:
    waits: list[Any] = []
    async with realm.as_agent() as agent:
        found = await outcome(realm, ask(realm, agent, "write", timeout_s=2.0, on_pending=waits.append))
    return found, [one.required for one in waits], [[r.code for r in one.reasons] for one in waits]


@story
async def what_is_beyond_the_limits_is_denied(realm: RunningStack) -> Outcome:
    async with realm.as_agent() as agent:
        return [
            await outcome(realm, ask(realm, agent, "read", resources=["other/x"])),
            await outcome(realm, ask(realm, agent, "write", resources=["env/production/web"])),
            await outcome(realm, ask(realm, agent, "read", "write", resources=["env/production/**"])),
            await outcome(realm, ask(realm, agent, "destroy")),
            await outcome(realm, ask(realm, agent, target="no-such-target")),
            await outcome(realm, ask(realm, agent, task="3f0b6a52-0000-5000-8000-000000000000")),
            await outcome(realm, ask(realm, agent, ttl_s=86_400)),
        ]


@story
async def what_makes_no_request_is_not_sent(realm: RunningStack) -> Outcome:
    async with realm.as_agent() as agent:
        return [
            await outcome(realm, ask(realm, agent, target="No Target")),
            await outcome(realm, ask(realm, agent, resources=["env/[x"])),
            await outcome(realm, ask(realm, agent, reason="")),
            await outcome(realm, ask(realm, agent, resources="env/x")),
            await outcome(realm, ask(realm, agent, ttl_s=0)),
        ]


@story
async def the_life_is_shortened_to_what_the_target_allows(realm: RunningStack) -> Outcome:
    async with realm.as_operator() as olga:
        await olga.set_target(
            realm.target, description="a shop", backend=BackendSettings(kind="jwt"), max_ttl_s=120,
            verbs=[VerbFloor(verb="read"), VerbFloor(verb="write", floor="sponsor")],
            keys=[realm.key("target", realm.target)],
        )  # fmt: skip
    async with realm.as_agent() as agent, realm.sponsor() as sam:
        credential = await ask(realm, agent, ttl_s=600)
        asked = ask(realm, agent, "write", ttl_s=600)
        pending = await first_pending(sam)
        await sam.approve(pending)
        left_s = credential.expires_at - agent.connection.clock.now_ms() / 1000
        return (
            left_s <= 120,
            pending.ttl_s,
            [one.code for one in pending.why_asked],
            await outcome(realm, asked),
        )


@story
async def a_suspended_agent_loses_what_it_has_and_gets_nothing(realm: RunningStack) -> Outcome:
    async with realm.as_agent() as agent, verifier(realm) as server, realm.administrator("sam") as sam:
        credential = await ask(realm, agent)
        waiting = ask(realm, agent, "write")
        async with realm.sponsor() as approver:
            await first_pending(approver)
        await sam.suspend_agent(realm.agent, reason="odd")
        found = [
            await until_refused(server, credential.value),
            await outcome(realm, waiting),
            await until_denied(realm, agent),
        ]
        await sam.resume_agent(realm.agent, reason="fine")
        return [*found, await until_refused(server, credential.value)]


@story
async def a_narrower_ceiling_ends_what_is_beyond_it(realm: RunningStack) -> Outcome:
    async with realm.as_agent() as agent, verifier(realm) as server, realm.administrator("sam") as sam:
        credential = await ask(realm, agent)
        await sam.set_ceiling(realm.agent, [realm.permission(["read"], "env/production/*")])
        return await until_refused(server, credential.value), await until_denied(realm, agent)


@story
async def a_task_ends(realm: RunningStack) -> Outcome:
    async with realm.as_agent() as agent, verifier(realm) as server, realm.administrator("maria") as maria:
        credential = await ask(realm, agent)
        found = [await outcome(realm, maria.end_task(realm.task, reason="done"))]
        return [*found, await until_refused(server, credential.value), await until_denied(realm, agent)]


@story
async def a_disabled_user_takes_their_agent_with_them(realm: RunningStack) -> Outcome:
    async with realm.as_agent() as agent, verifier(realm) as server, realm.as_operator() as olga:
        credential = await ask(realm, agent)
        await olga.disable_user(realm.name("sam"), reason="left")
        return await until_refused(server, credential.value), await until_denied(realm, agent)


@story
async def revocations_end_what_they_name(realm: RunningStack) -> Outcome:
    found = []
    async with realm.as_agent() as agent, verifier(realm) as server:
        for name in ("lease_id", "agent_id", "task_id", "target_id", "sponsor", "user_id"):
            credential = await ask(realm, agent)
            named: dict[str, Any] = {
                "lease_id": credential.lease_id,
                "agent_id": realm.agent,
                "task_id": realm.task,
                "target_id": realm.target,
                "sponsor": realm.name("sam"),
                "user_id": realm.name("maria"),
            }
            by_operator = name in ("target_id", "user_id")
            async with realm.as_operator() if by_operator else realm.administrator("sam") as person:
                accepted = await person.revoke(reason="a story", **{name: named[name]})
            found.append((accepted.result, await until_refused(server, credential.value)))
    return found


@story
async def revocations_of_others_are_refused(realm: RunningStack) -> Outcome:
    async with realm.as_agent() as agent, realm.administrator("maria") as maria, realm.as_operator() as olga:
        await ask(realm, agent)
        return [
            await outcome(realm, maria.revoke(reason="a story", sponsor=realm.name("sam"))),
            await outcome(realm, olga.revoke(reason="a story", agent_id="no-such-agent")),
            await outcome(realm, olga.revoke(reason="x", lease_id="3f0b6a52-0000-5000-8000-000000000000")),
            await outcome(realm, agent.release("3f0b6a52-0000-5000-8000-000000000000", timeout_s=WITHIN_S)),
            await outcome(realm, olga.revoke(reason="nothing named")),
        ]


@story
async def a_part_of_a_task_is_handed_on(realm: RunningStack) -> Outcome:
    helper = f"helper-{realm.mark}"
    async with realm.administrator("sam") as sam:
        everything = [realm.permission(["read", "write"], "env/**")]
        await sam.register_agent(
            helper, description="helps", keys=[realm.key("agent", helper)], ceiling=everything
        )
    part = [realm.permission(["read"], "env/staging/*")]
    second = (
        realm.ringfence.agent(helper)
        if isinstance(realm, InMemoryRealm)
        else Agent.connect(realm.key("agent", helper), realm.settings)
    )
    async with realm.as_agent() as agent, second, verifier(realm) as server:
        task = await agent.delegate(task=realm.task, to=helper, purpose="look", scope=part, ends_in_s=600)
        credential = await ask(realm, second, task=task)
        token = await server.verify(credential.value)
        found = [
            await outcome(realm, ask(realm, second, "read", task=task, resources=["env/production/web"])),
            await outcome(realm, ask(realm, second, "read")),
            [said(realm, one.rpartition("/")[2]) for one in token.act],
            await outcome(
                realm,
                agent.delegate(
                    task=realm.task, to=helper, purpose="more", ends_in_s=600,
                    scope=[realm.permission(["read"], "other/**")],
                ),
            ),
            await outcome(
                realm,
                agent.delegate(task=realm.task, to="no-such-agent", purpose="p", scope=part, ends_in_s=60),
            ),
            await outcome(realm, agent.end_delegated(task, reason="enough")),
        ]  # fmt: skip
        return [*found, await until_refused(server, credential.value)]


@story
async def no_more_than_so_many_questions_wait(realm: RunningStack) -> Outcome:
    async with realm.as_agent() as agent:
        asked = [ask(realm, agent, "write", resources=[f"env/staging/w{number}"]) for number in range(21)]
        done, waiting = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        found = [await outcome(realm, one) for one in done]
        for one in waiting:
            one.cancel()
        return found, len(waiting)


@story
async def two_operators_break_the_glass(realm: RunningStack) -> Outcome:
    await with_otto(realm)
    async with (
        realm.as_agent() as agent,
        realm.administrator("sam") as sam,
        realm.sponsor("otto") as otto,
        realm.sponsor("olaf") as olaf,
    ):
        found = [await outcome(realm, ask(realm, agent, break_glass=True))]
        found.append(await outcome(realm, ask(realm, agent, resources=["other/x"], break_glass=True)))
        await sam.suspend_agent(realm.agent, reason="odd")
        found.append(await until_denied(realm, agent, break_glass=True))
        assert otto.pending() == olaf.pending() == []
        return found


@story
async def an_approval_is_for_what_was_shown(realm: RunningStack) -> Outcome:
    async with realm.as_agent() as agent, realm.sponsor() as sam, realm.administrator("sam") as commander:
        asked = ask(realm, agent, "write")
        pending = await first_pending(sam)
        await commander.set_ceiling(realm.agent, [realm.permission(["read", "write"], "env/staging/**")])
        directory = await sam.connection.current_directory()
        assert directory.agent(realm.agent) is not None
        stale = await outcome(realm, sam.approve(pending))
        asked.cancel()
        return stale


@story
async def a_token_is_bound_to_the_agents_key(realm: RunningStack) -> Outcome:
    target = f"bound-{realm.mark}"
    async with realm.as_operator() as olga:
        await olga.set_target(
            target, description="bound", verbs=[VerbFloor(verb="read")], keys=[realm.key("target", target)],
            backend=BackendSettings(kind="jwt", dpop="required"),  # type: ignore[call-arg]
        )  # fmt: skip
        everything = [realm.permission(["read", "write"], "env/**")]
        bound = Permission(target=target, verbs=("read",), resources=("env/**",))
        await olga.set_user(
            realm.name("maria"), name="Maria", keys=[realm.key("user", realm.name("maria"))],
            entitlements=[*everything, bound],
        )  # fmt: skip
    async with realm.administrator("sam") as sam:
        await sam.set_ceiling(realm.agent, [*everything, bound])
    async with realm.administrator("maria") as maria:
        task = await maria.assign_task(realm.agent, purpose="bound", scope=[bound], ends_in_s=600)
    url = "https://shop.example/x"
    async with realm.as_agent() as agent, verifier(realm, target) as server:
        credential = await ask(realm, agent, target=target, task=task)
        headers = credential.headers("GET", url)
        verified = await server.verify_request("GET", url, headers, verb="read", resource="env/staging/web")
        return [
            await outcome(realm, _nothing(credential)),
            verified.allows("read", "env/staging/web"),
            await outcome(realm, server.verify_request("GET", url, headers)),
            await outcome(realm, server.verify_request("POST", url, credential.headers("GET", url))),
            await outcome(realm, server.verify(credential.value)),
        ]


async def _nothing(result: Any) -> Any:
    return result


@story
async def the_registry_refuses_alike(realm: RunningStack) -> Outcome:
    mine = realm.key("agent", realm.agent)
    everything = [realm.permission(["read", "write"], "env/**")]
    async with realm.administrator("sam") as sam, realm.administrator("maria") as maria:
        return [
            await outcome(
                realm,
                sam.register_agent(f"twin-{realm.mark}", description="d", keys=[mine], ceiling=everything),
            ),
            await outcome(
                realm, sam.register_agent(realm.agent, description="d", keys=[mine], ceiling=everything)
            ),
            await outcome(realm, maria.suspend_agent(realm.agent, reason="not hers")),
            await outcome(realm, maria.set_ceiling(realm.agent, everything)),
            await outcome(
                realm, sam.assign_task("no-such-agent", purpose="p", scope=everything, ends_in_s=60)
            ),
            await outcome(
                realm,
                sam.assign_task(
                    realm.agent, purpose="p", scope=everything, ends_in_s=60, on_behalf_of=realm.name("maria")
                ),
            ),
            await outcome(
                realm, sam.assign_task(realm.agent, purpose="p", scope=everything, not_after=int(time.time()))
            ),
            await outcome(realm, sam.set_user(realm.name("eve"), name="Eve", roles=["operator"])),
        ]


# --- stories of requests through the gateway ---

REQUESTS = [
    RequestRule(method="GET", path="/env/{path*}", verb="read", resource="env/{path*}"),
    RequestRule(method="PUT", path="/env/{path*}", verb="write", resource="env/{path*}"),
    RequestRule(method="DELETE", path="/env/{path*}", verb="destroy", resource="env/{path*}"),
]
VERBS = [
    VerbFloor(verb="read"),
    VerbFloor(verb="write", floor="sponsor", ask="sponsor"),
    VerbFloor(verb="destroy", ask="sponsor"),
]
LABEL = {"X-Ringfence-Label": "table"}
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass
class GatewayPlace:
    """The gateway of a realm, and the server behind the realm's target."""

    realm: RunningStack
    socket: httpx.AsyncClient
    """By the socket of the task."""
    listener: httpx.AsyncClient
    arrived: Callable[[], list[Outcome]]
    """What came to the server."""
    recorded: Callable[[], list[ActionDecided]]
    news: Callable[[], Awaitable[None]]

    async def answer(self, sent: Awaitable[httpx.Response]) -> Outcome:
        """An answer, without what differs from run to run."""
        response = await sent
        headers = {name: value for name, value in response.headers.items() if name != "content-length"}
        headers |= {"dpop-nonce": "NONCE"} if "dpop-nonce" in headers else {}
        return response.status_code, headers, _UUID.sub("UUID", said(self.realm, response.text) or "")

    async def until(self, code: str) -> None:
        """Until a read is answered by this code: changes arrive at a gateway after they were accepted."""
        async with asyncio.timeout(WITHIN_S):
            while True:
                response = await self.socket.get(f"/{self.realm.target}/env/staging/web")
                if code == (response.text if response.is_success else response.json()["code"]):
                    return
                await asyncio.sleep(0.02)

    async def actions(self) -> Outcome:
        """What was recorded of the requests with a label, up to the one that the last call of this sends."""
        last = {"X-Ringfence-Label": "last"}
        await self.socket.get(f"/{self.realm.target}/last", headers=last)
        async with asyncio.timeout(WITHIN_S):
            while not any(one.label == "last" for one in self.recorded()):
                await self.news()
        return [
            (one.allowed, one.method, one.verb, one.resource, one.access, one.asked is not None,
             [(reason.code, said(self.realm, reason.side)) for reason in one.reasons])
            for one in self.recorded() if one.label == "table" and one.count is None
        ]  # fmt: skip


@asynccontextmanager
async def gateway_place(realm: RunningStack) -> AsyncIterator[GatewayPlace]:
    """The target of the realm with a map and a server, and the agent with a lease to read."""
    if isinstance(realm, InMemoryRealm):
        ringfence, requests = realm.ringfence, list[httpx.Request]()

        def respond(request: httpx.Request) -> httpx.Response:
            requests.append(request)
            return httpx.Response(200, headers={"Content-Type": "text/plain"}, content=b"ok")

        async def no_news() -> None:
            await asyncio.sleep(0)

        ringfence.target(realm.target, verbs=["read"], server=respond, url="http://127.0.0.1:9001")
        await _set_target(realm, "http://127.0.0.1:9001")
        async with (
            httpx.AsyncClient(
                transport=ringfence.gateway(task=realm.task), base_url="http://gateway"
            ) as socket,
            httpx.AsyncClient(transport=ringfence.gateway(), base_url=ringfence.gateway_url) as listener,
        ):
            yield GatewayPlace(
                realm, socket, listener,
                lambda: [_came(r.method, r.url.raw_path.decode(), r.headers, r.content) for r in requests],
                lambda: ringfence.actions(agent=realm.agent), no_news,
            )  # fmt: skip
        return
    transport = httpx.AsyncHTTPTransport(uds=str(realm.stack.sockets / f"{realm.task}.sock"))
    async with (
        Target().serving() as server,
        realm.seen(ACTION) as seen,
        httpx.AsyncClient(transport=transport, base_url="http://gateway") as socket,
        httpx.AsyncClient(base_url=realm.stack.door or "", trust_env=False) as listener,
    ):
        await _set_target(realm, f"http://127.0.0.1:{server.port}")
        yield GatewayPlace(
            realm, socket, listener,
            lambda: [_came(r.method, r.target, dict(r.headers), r.body) for r in server.requests],
            lambda: _decided(seen, realm.agent), seen.news,
        )  # fmt: skip


async def _set_target(realm: RunningStack, url: str) -> None:
    async with realm.as_operator() as olga:
        await olga.set_target(
            realm.target, description="a shop", verbs=VERBS, requests=REQUESTS,
            backend=BackendSettings(kind="jwt", url=url), keys=[realm.key("target", realm.target)],  # type: ignore[call-arg]
        )  # fmt: skip


def _came(method: str, target: str, headers: Mapping[str, str], body: bytes) -> Outcome:
    injected = dict(headers)["authorization"].partition(" ")[0]
    return method, target, sorted(dict(headers)), injected, body


def _decided(seen: Seen, agent_id: str) -> list[ActionDecided]:
    decided = (ActionDecided.model_validate_json(one.value) for one in seen.of(ACTION))
    return [one for one in decided if one.agent_id == agent_id]


async def first_action(sponsor: Sponsor) -> PendingAction:
    """The first single action that waits for this person."""
    async with asyncio.timeout(WITHIN_S):
        async for action in sponsor.watch_actions():
            return action
    raise AssertionError("the watch ended")


async def lease_to_read(realm: RunningStack, agent: Agent, place: GatewayPlace) -> IssuedCredential:
    credential = await ask(realm, agent, "read", delivery="gateway", resources=["env/staging/*"])
    if not isinstance(realm, InMemoryRealm):
        socket = realm.stack.sockets / f"{realm.task}.sock"
        async with asyncio.timeout(WITHIN_S):
            while not socket.exists():
                await asyncio.sleep(0.02)
    await place.until("ok")
    return credential


@story
async def the_gateway_answers_requests_on_the_socket_of_a_task(realm: RunningStack) -> Outcome:
    unknown = "3f0b6a52-0000-5000-8000-000000000000"
    shop, web = f"/{realm.target}", f"/{realm.target}/env/staging/web"
    table: list[tuple[str, str, dict[str, Any]]] = [
        ("GET", web, {}),
        (
            "GET",
            f"{web}?a=1&b=%20",
            {"headers": {"X-Own": "1", "Authorization": "Basic own", "Forwarded": "x"}},
        ),
        ("GET", f"{shop}/env/production/web", {}),
        ("PUT", web, {"content": b"x"}),
        ("DELETE", web, {}),
        ("POST", web, {"json": {}}),
        ("GET", f"{shop}/elsewhere", {}),
        ("GET", f"{shop}/env/staging/%2e%2e/x", {}),
        ("GET", f"{shop}/env//web", {}),
        ("GET", "/no-such-target/env/staging/web", {}),
        ("GET", "/", {}),
        ("GET", web, {"content": b"a body"}),
        ("DELETE", web, {"content": b"a body"}),
        ("GET", web, {"headers": {"X-HTTP-Method-Override": "PUT"}}),
        ("GET", web, {"headers": {"Expect": "a miracle"}}),
        ("GET", web, {"headers": {"Host": "127.1"}}),
        ("GET", web, {"headers": {"Authorization": "DPoP nonsense"}}),
        ("GET", web, {"headers": {"Authorization": f"DPoP {unknown}"}}),
        ("GET", web, {"headers": {"Authorization": f"DPoP {unknown}", "X-Ringfence-Handle": unknown}}),
    ]
    async with realm.as_agent() as agent, gateway_place(realm) as place:
        await lease_to_read(realm, agent, place)
        before = len(place.arrived())
        found = []
        for method, path, options in table:
            headers = {**LABEL, **options.pop("headers", {})}
            found.append(await place.answer(place.socket.request(method, path, headers=headers, **options)))
        statuses = [one[0] for one in found]
        assert statuses.count(200) == 2, statuses
        return found, place.arrived()[before:], await place.actions()


@story
async def the_gateway_answers_requests_at_its_listener(realm: RunningStack) -> Outcome:
    web = f"/{realm.target}/env/staging/web"
    async with realm.as_agent() as agent, gateway_place(realm) as place:
        credential = await lease_to_read(realm, agent, place)
        http, handle = place.listener, {"Authorization": f"DPoP {credential.lease_id}"}
        return [
            await place.answer(http.get(web)),
            await place.answer(http.get(web, headers=handle)),
            await place.answer(http.get(web, headers={**handle, "DPoP": "no proof"})),
            await place.answer(http.get(web, auth=credential.auth())),
            await place.answer(http.put(web, auth=credential.auth())),
            await place.answer(http.get(web, headers={"Host": "elsewhere.example"})),
        ]


@story
async def the_gateway_stops_forwarding_as_leases_end(realm: RunningStack) -> Outcome:
    web, found = f"/{realm.target}/env/staging/web", []
    async with realm.as_agent() as agent, gateway_place(realm) as place, realm.administrator("sam") as sam:
        for how in ("released", "revoked", "suspended"):
            credential = await lease_to_read(realm, agent, place)
            if how == "released":
                await agent.release(credential, timeout_s=WITHIN_S)
            elif how == "revoked":
                await sam.revoke(reason="a story", lease_id=credential.lease_id)
            else:
                await sam.suspend_agent(realm.agent, reason="odd")
            if how == "suspended":
                await place.until("agent_suspended")
                break
            await place.until("no_lease")
            named = {**LABEL, "Authorization": f"DPoP {credential.lease_id}"}
            found.append(await place.answer(place.socket.get(web, headers=LABEL)))
            found.append(await place.answer(place.socket.get(web, headers=named)))
        return found


@story
async def the_gateway_asks_a_sponsor_about_single_actions(realm: RunningStack) -> Outcome:
    web = f"/{realm.target}/env/staging/web"
    async with realm.as_agent() as agent, realm.sponsor() as sam, gateway_place(realm) as place:
        await lease_to_read(realm, agent, place)
        asked = ask(realm, agent, "write", delivery="gateway")
        await sam.approve(await first_pending(sam))
        credential = await asked
        named = {**LABEL, "Authorization": f"DPoP {credential.lease_id}"}
        before, found = len(place.arrived()), []
        for verdict in (sam.approve_action, sam.deny_action):
            waiting = asyncio.create_task(
                place.answer(place.socket.put(web, content=verdict.__name__, headers=named, timeout=WITHIN_S))
            )
            action = await first_action(sam)
            await verdict(action, "a comment")
            shown = [(one.name, one.value) for one in action.headers]
            found.append((await waiting, action.required, action.method, action.body_digest, shown))
        return found, place.arrived()[before:], await place.actions()


@pytest.fixture
async def in_memory() -> InMemoryRealm:
    ringfence = InMemoryRingfence()
    made = await InMemoryRealm(stack=None, settings=ringfence.settings, ringfence=ringfence).make()  # type: ignore[arg-type]
    assert isinstance(made, InMemoryRealm)
    return made


@pytest.mark.parametrize("name", STORIES)
async def test_both_come_to_the_same(name: str, realm: RunningStack, in_memory: InMemoryRealm) -> None:
    real = await STORIES[name](realm)
    assert await STORIES[name](in_memory) == real


async def test_a_difference_would_be_seen(realm: RunningStack, in_memory: InMemoryRealm) -> None:
    async with in_memory.administrator("sam") as sam:
        await sam.suspend_agent(in_memory.agent, reason="this one alone")
    real = await a_credential_is_used_and_released(realm)
    with pytest.raises(RequestDeniedError):
        assert await a_credential_is_used_and_released(in_memory) == real


def test_every_story_can_fail_to_be_sent() -> None:
    assert issubclass(InvalidCallError, RingfenceError)
    assert len(STORIES) >= 18
