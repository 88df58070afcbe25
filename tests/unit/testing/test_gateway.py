"""`ringfence.testing`: requests of an agent through the gateway in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from ringfence import (
    Agent,
    GatewayCredential,
    InvalidCallError,
    Permission,
    RequestDeniedError,
    RequestRule,
    TokenCredential,
)
from ringfence.testing import InMemoryRingfence, NothingPendingError, People

SCOPE = [Permission(target="forge", verbs=("read", "merge"), resources=("repos/a/**",))]
REQUESTS = [
    RequestRule(method="GET", path="/repos/{path*}", verb="read", resource="repos/{path*}"),
    RequestRule(method="PUT", path="/repos/{path*}", verb="merge", resource="repos/{path*}"),
    RequestRule(method="DELETE", path="/repos/{path*}", verb="delete", resource="repos/{path*}"),
]
LONG_S = 60.0


class Server:
    """Answers for the target, and keeps what arrived."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.respond: Callable[[httpx.Request], httpx.Response] = lambda request: httpx.Response(
            200, text="ok"
        )

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return self.respond(request)


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def broker(server: Server) -> InMemoryRingfence:
    made = InMemoryRingfence()
    made.target(
        "forge", verbs=["read", "merge", "delete"], requests=REQUESTS, ask={"merge": "sponsor"}, server=server
    )
    return made


@pytest.fixture
def agent(broker: InMemoryRingfence) -> Agent:
    return broker.agent("merge-bot")


@pytest.fixture
def task(broker: InMemoryRingfence, agent: Agent) -> str:
    return broker.task("merge-bot", SCOPE)


@pytest.fixture
async def credential(broker: InMemoryRingfence, task: str) -> GatewayCredential:
    return await lease(broker, task)


async def lease(broker: InMemoryRingfence, task: str, **more: Any) -> GatewayCredential:
    """A lease for the gateway, with the approvals that it needs."""
    given: dict[str, Any] = {
        "target": "forge", "verbs": ["read", "merge"], "resources": ["repos/a/**"], "reason": "a test",
    }  # fmt: skip
    broker.answer_all("approved")
    credential = await broker.agent("merge-bot").request(task=task, **{**given, **more})
    broker.answer_all(None)
    assert isinstance(credential, GatewayCredential)
    return credential


@pytest.fixture
async def http(broker: InMemoryRingfence, task: str) -> AsyncIterator[httpx.AsyncClient]:
    """By the socket of the task, with paths at the target."""
    async with httpx.AsyncClient(
        transport=broker.gateway(task=task), base_url="http://gateway/forge", timeout=LONG_S
    ) as client:
        yield client


# --- delivery ---


@pytest.mark.parametrize("delivery", [None, "gateway"])
async def test_request_at_mapped_target_gets_a_handle_that_works_at_the_gateway(
    broker: InMemoryRingfence, task: str, http: httpx.AsyncClient, server: Server, delivery: Any
) -> None:
    credential = await lease(broker, task, delivery=delivery)
    assert credential.delivery == "gateway"
    answer = await http.get("/repos/a/1", headers={"Authorization": f"DPoP {credential.handle}"})
    assert (answer.status_code, len(server.requests)) == (200, 1)


async def test_request_for_delivery_to_agent_at_mapped_target_is_denied(agent: Agent, task: str) -> None:
    with pytest.raises(RequestDeniedError) as denied:
        await agent.request(
            task=task,
            target="forge",
            verbs=["read"],
            resources=["repos/a/**"],
            reason="a test",
            delivery="agent",
        )
    assert (denied.value.by, [one.code for one in denied.value.reasons]) == (
        "policy",
        ["delivery_gateway_only"],
    )


async def test_request_takes_the_delivery_of_target_as_it_is_when_decided(
    broker: InMemoryRingfence, agent: Agent, task: str, server: Server
) -> None:
    named: dict[str, Any] = {
        "task": task, "target": "forge", "verbs": ["read"], "resources": ["repos/a/**"], "reason": "a test",
    }  # fmt: skip
    broker.target("forge", verbs=["read"], requests=REQUESTS[:1], delivery="agent", server=server)
    assert type(await agent.request(**named)) is TokenCredential
    assert type(await agent.request(**named, delivery="gateway")) is GatewayCredential
    broker.target("forge", verbs=["read"], requests=REQUESTS[:1], delivery="gateway", server=server)
    assert type(await agent.request(**named)) is GatewayCredential
    with pytest.raises(RequestDeniedError):
        await agent.request(**named, delivery="agent")


async def test_allowed_request_reaches_the_server_with_the_injected_credential(
    broker: InMemoryRingfence, credential: GatewayCredential, http: httpx.AsyncClient, server: Server
) -> None:
    answer = await http.get("/repos/a/1?page=2", headers={"Authorization": "Basic own", "X-Own": "1"})
    assert (answer.status_code, answer.text) == (200, "ok")
    (arrived,) = server.requests
    assert (arrived.method, str(arrived.url)) == ("GET", "https://forge.ringfence.test/repos/a/1?page=2")
    assert arrived.headers["X-Own"] == "1"
    scheme, _, token = arrived.headers["Authorization"].partition(" ")
    assert scheme == "Bearer"
    verified = await broker.verifier("forge").verify(token)
    assert verified.allows("read", "repos/a/1")
    (action,) = broker.actions()
    assert (action.allowed, action.verb, action.resource) == (True, "read", "repos/a/1")
    assert (action.agent_id, action.lease_id) == ("merge-bot", credential.handle)


async def test_listener_takes_a_handle_with_a_proof(
    broker: InMemoryRingfence, credential: GatewayCredential, server: Server
) -> None:
    async with httpx.AsyncClient(transport=broker.gateway(), base_url=broker.gateway_url) as http:
        answer = await http.get("/forge/repos/a/1", auth=credential.auth())
        by_host = await http.get("https://forge.ringfence.test/repos/a/1", auth=credential.auth())
        without = await http.get("/forge/repos/a/1")
        elsewhere = await http.get("https://elsewhere.example/forge/repos/a/1")
    assert [answer.status_code, by_host.status_code] == [200, 200]
    assert without.status_code == 401
    assert without.json()["code"] == "no_credentials"
    assert without.headers["WWW-Authenticate"].startswith("DPoP ")
    assert (elsewhere.status_code, elsewhere.json()["code"]) == (421, "host_unknown")


async def test_https_on_a_task_socket_goes_to_the_host_of_a_target(
    broker: InMemoryRingfence, credential: GatewayCredential, task: str, server: Server
) -> None:
    async with httpx.AsyncClient(transport=broker.gateway(task=task)) as http:
        assert (await http.get("https://forge.ringfence.test/repos/a/1")).status_code == 200
        unknown = await http.get("https://elsewhere.example/repos/a/1")
        with pytest.raises(httpx.ProxyError):
            await http.get("https://127.1/repos/a/1")
        with pytest.raises(httpx.UnsupportedProtocol):
            await http.get("ftp://forge.ringfence.test/repos/a/1")
    assert unknown.json()["code"] == "target_unknown"
    assert len(server.requests) == 1


async def test_each_request_is_recorded_also_when_refusals_repeat(
    broker: InMemoryRingfence, credential: GatewayCredential, http: httpx.AsyncClient, server: Server
) -> None:
    for _ in range(3):
        assert (await http.get("/repos/b/1")).json()["code"] == "beyond_scope"
        assert (await http.request("GET", "/repos/a/1", content=b"x")).json()["code"] == "body_refused"
    assert server.requests == []
    refusals = [(one.allowed, one.reasons[0].code) for one in broker.actions(agent="merge-bot")]
    assert refusals.count((False, "beyond_scope")) == 3
    recorded = [one for one in broker.actions() if one.reasons[0].code == "body_refused"]
    assert sum(one.count or 1 for one in recorded) == 3


async def test_a_secret_in_a_response_is_redacted(
    broker: InMemoryRingfence, credential: GatewayCredential, http: httpx.AsyncClient, server: Server
) -> None:
    server.respond = lambda request: httpx.Response(200, text=f"it was {request.headers['Authorization']}")
    answer = await http.get("/repos/a/1")
    assert answer.text.startswith("it was ")
    assert server.requests[0].headers["Authorization"].partition(" ")[2] not in answer.text


async def test_asgi_application_answers_and_streams(broker: InMemoryRingfence) -> None:
    async def upload(request: Request) -> JSONResponse:
        return JSONResponse({"bytes": len(await request.body())})

    async def lines(request: Request) -> StreamingResponse:
        return StreamingResponse(iter([b"one\n", b"two\n"]))

    app = Starlette(
        routes=[
            Route("/up/{name}", upload, methods=["POST"]),
            Route("/down/{name}", lines, methods=["GET", "HEAD"]),
        ]
    )
    rules = [
        RequestRule(method="POST", path="/up/{name}", verb="write", resource="{name}"),
        RequestRule(method="GET", path="/down/{name}", verb="read", resource="{name}"),
        RequestRule(method="HEAD", path="/down/{name}", verb="read", resource="{name}"),
    ]
    broker.target(
        "store", verbs=["read", "write"], requests=rules, server=app, url="https://store.example:8443"
    )
    task = broker.task("merge-bot", [Permission(target="store", verbs=("read", "write"), resources=("*",))])
    await lease(broker, task, target="store", verbs=["read", "write"], resources=["*"])

    async def body() -> AsyncIterator[bytes]:
        for _ in range(8):
            yield bytes(100_000)

    async with httpx.AsyncClient(transport=broker.gateway(task=task), timeout=LONG_S) as http:
        assert (await http.post("https://store.example:8443/up/x", content=body())).json() == {
            "bytes": 800_000
        }
        assert (await http.post("http://gateway/store/up/x", content=b"123")).json() == {"bytes": 3}
        async with http.stream("GET", "https://store.example:8443/down/x") as answer:
            assert b"".join([piece async for piece in answer.aiter_bytes()]) == b"one\ntwo\n"
        assert (await http.head("https://store.example:8443/down/x")).status_code == 200


async def test_request_raises_what_the_server_raises(
    broker: InMemoryRingfence, credential: GatewayCredential, http: httpx.AsyncClient, server: Server
) -> None:
    def fail(request: httpx.Request) -> httpx.Response:
        raise AssertionError("no such page")

    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("it is down")

    server.respond = fail
    with pytest.raises(AssertionError, match="no such page"):
        await http.get("/repos/a/1")
    server.respond = refuse
    answer = await http.get("/repos/a/1")
    assert (answer.status_code, answer.json()["code"]) == (502, "target_gone")
    broker.target("forge", verbs=["read"], requests=REQUESTS[:1], url="https://nowhere.example")
    answer = await http.get("/repos/a/1")
    assert (answer.status_code, answer.json()["code"]) == (502, "target_unreachable")


async def test_static_secret_of_the_test_is_injected(
    broker: InMemoryRingfence, agent: Agent, server: Server
) -> None:
    broker.target(
        "api", verbs=["read"], requests=REQUESTS[:1], kind="http", credential="s3cret-key", server=server,
        auth="header", header="X-Api-Key",
    )  # fmt: skip
    task = broker.task("merge-bot", [Permission(target="api", verbs=("read",), resources=("repos/**",))])
    await lease(broker, task, target="api", verbs=["read"], resources=["repos/**"])
    async with httpx.AsyncClient(transport=broker.gateway(task=task)) as http:
        assert (await http.get("http://gateway/api/repos/a")).status_code == 200
    assert server.requests[0].headers["X-Api-Key"] == "s3cret-key"


def test_blocking_client_without_an_event_loop(broker: InMemoryRingfence, agent: Agent, task: str) -> None:
    asyncio.run(lease(broker, task))
    broker.answer_all("approved")
    with httpx.Client(
        transport=broker.gateway(task=task), base_url="http://gateway/forge", timeout=LONG_S
    ) as http:
        assert http.get("/repos/a/1").text == "ok"
        assert http.get("/repos/b/1").status_code == 403
        assert http.put("/repos/a/1", content=b"x").status_code == 200


async def test_blocking_client_beside_an_event_loop_is_an_error(broker: InMemoryRingfence, task: str) -> None:
    with (
        httpx.Client(transport=broker.gateway(task=task)) as http,
        pytest.raises(InvalidCallError, match="AsyncClient"),
    ):
        http.get("http://gateway/forge/repos/a/1")


def test_server_of_another_kind_is_an_error(broker: InMemoryRingfence) -> None:
    with pytest.raises(InvalidCallError, match="server is"):
        broker.target("other", verbs=["read"], server="http://localhost")  # type: ignore[arg-type]
    with pytest.raises(InvalidCallError, match="is no URL of a target"):
        broker.target("other", verbs=["read"], server=Server(), url="localhost")


# --- approval of single actions ---


async def test_approved_action_is_forwarded_once(
    broker: InMemoryRingfence, credential: GatewayCredential, http: httpx.AsyncClient, server: Server
) -> None:
    asked = asyncio.create_task(http.put("/repos/a/1", content=b"merge it"))
    action = await broker.approve_action(comment="go ahead")
    assert (action.method, action.url, action.required) == (
        "PUT", "https://forge.ringfence.test/repos/a/1", "sponsor",
    )  # fmt: skip
    assert (await asked).status_code == 200
    assert server.requests[0].content == b"merge it"
    assert broker.pending_actions() == []
    (decided,) = broker.actions()
    assert decided.asked is not None
    with pytest.raises(NothingPendingError):
        await broker.deny_action(within_s=0.0)


async def test_denied_action_never_reaches_the_server(
    broker: InMemoryRingfence, credential: GatewayCredential, http: httpx.AsyncClient, server: Server
) -> None:
    asked = asyncio.create_task(http.put("/repos/a/1"))
    await broker.deny_action(by=People.SPONSOR, comment="not today")
    answer = await asked
    assert (answer.status_code, answer.json()["code"]) == (403, "approval_denied")
    broker.answer_all("denied")
    assert (await http.put("/repos/a/2")).json()["code"] == "approval_denied"
    broker.answer_all("approved")
    assert (await http.put("/repos/a/3")).status_code == 200
    assert [str(one.url.path) for one in server.requests] == ["/repos/a/3"]


async def test_of_several_actions_one_is_named(
    broker: InMemoryRingfence, credential: GatewayCredential, http: httpx.AsyncClient
) -> None:
    first = asyncio.create_task(http.put("/repos/a/1"))
    await until(lambda: len(broker.pending_actions()) == 1)
    second = asyncio.create_task(http.put("/repos/a/2"))
    await until(lambda: len(broker.pending_actions()) == 2)
    with pytest.raises(InvalidCallError, match="2 requests wait"):
        await broker.approve_action()
    await broker.approve_action(broker.pending_actions()[1])
    await broker.deny_action(broker.pending_actions()[0].request_id)
    assert [(await one).status_code for one in (first, second)] == [403, 200]


@pytest.mark.parametrize(
    ("by", "code"), [(timedelta(minutes=2), "approval_pending"), (timedelta(minutes=6), "approval_timeout")]
)
async def test_unanswered_action_times_out_as_the_clock_moves(
    broker: InMemoryRingfence,
    task: str,
    http: httpx.AsyncClient,
    by: timedelta,
    code: str,
) -> None:
    await lease(broker, task, ttl_s=1800)
    asked = asyncio.create_task(http.put("/repos/a/1"))
    await until(broker.pending_actions)
    await broker.advance(by)
    answer = await asked
    assert (answer.status_code, answer.json()["code"]) == (403, code)


async def test_client_that_gives_up_is_recorded(
    broker: InMemoryRingfence, credential: GatewayCredential, task: str
) -> None:
    async with httpx.AsyncClient(transport=broker.gateway(task=task), timeout=0.2) as http:
        with pytest.raises(httpx.ReadTimeout):
            await http.put("http://gateway/forge/repos/a/1")
    (decided,) = broker.actions()
    assert decided.reasons[0].code == "client_gone"


# --- the end of leases ---


async def test_lease_ends_by_its_deadline(
    broker: InMemoryRingfence, credential: GatewayCredential, http: httpx.AsyncClient, server: Server
) -> None:
    await broker.advance(credential.expires_at - broker.clock.now_ms() / 1000 + 1)
    assert (await http.get("/repos/a/1")).json()["code"] == "no_lease"
    assert server.requests == []
    assert [one.status for one in broker.leases()] == ["expired"]


async def test_revoked_lease_allows_nothing(
    broker: InMemoryRingfence, credential: GatewayCredential, http: httpx.AsyncClient, server: Server
) -> None:
    assert (await http.get("/repos/a/1")).status_code == 200
    assert await broker.revoke(lease=credential.lease_id) == 1
    answer = await http.get("/repos/a/1", headers={"Authorization": f"DPoP {credential.handle}"})
    assert answer.json()["code"] == "lease_ended"
    assert (await http.get("/repos/a/1")).json()["code"] == "no_lease"
    assert len(server.requests) == 1


@pytest.mark.parametrize("how", ["revoked", "expired"])
async def test_end_of_the_lease_ends_requests_in_progress(
    broker: InMemoryRingfence,
    credential: GatewayCredential,
    http: httpx.AsyncClient,
    server: Server,
    how: str,
) -> None:
    class Endless(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield b"first"
            await asyncio.Event().wait()

    server.respond = lambda request: httpx.Response(200, stream=Endless())
    waiting = asyncio.create_task(http.put("/repos/a/1"))
    await until(broker.pending_actions)
    async with http.stream("GET", "/repos/a/1") as answer:
        pieces = answer.aiter_bytes()
        assert await anext(pieces) == b"first"
        if how == "revoked":
            await broker.revoke(agent="merge-bot")
        else:
            await broker.advance(timedelta(hours=1))
        with pytest.raises(httpx.RemoteProtocolError):
            await anext(pieces)
    assert (await waiting).json()["code"] in ("lease_ended", "lease_cut")
    assert [one.status for one in broker.leases()] == [how]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(LONG_S):
        while not condition():
            await asyncio.sleep(0.005)
