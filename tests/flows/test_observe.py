"""One week of what agents do with a credential that they inherited, and what would have been blocked of it."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import os
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from ringfence.audit.settings import AuditSettings
from ringfence.client.agent.dpop import proof
from ringfence.dev.processes import free_port
from ringfence.gateway.proxies import HANDLE
from ringfence.kernel.service.http import HttpServer
from ringfence.messages.topics import ACTION, AUDIT
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.flows.test_cli import Shell
from tests.flows.test_gateway import own
from tests.gateway.raw import connected
from tests.support.benches.gateway_flows import HUB, Proxy, gateway, handle, hub, secret_in
from tests.support.benches.issuer_bench import IssuerBench, another, opened_desks
from tests.support.world import WITHIN_S, World

OLD = "Bearer what-all-of-them-share"
AT_ONCE = 16


@dataclass(frozen=True)
class Traffic:
    """So many requests of one kind. `path` has the number of the request in it."""

    count: int
    agent: str
    method: str
    path: str
    label: str | None = None


BLOCKED = (
    # The reviewer of pull requests looks into other repositories, and does what a comment tells it to.
    Traffic(160, "reviewer", "GET", "/other/{}"),
    Traffic(3, "reviewer", "PUT", "/.ci/run-{}.yml", "injected"),
    # The planning agent explores, and tidies up what is none of its business.
    Traffic(120, "planner", "GET", "/b/secrets/{}"),
    Traffic(40, "planner", "PUT", "/b/plans/{}"),
    Traffic(17, "planner", "DELETE", "/a/old/{}"),
)
ALLOWED = (
    Traffic(90, "reviewer", "GET", "/a/pulls/{}"),
    Traffic(30, "planner", "GET", "/a/plans/{}"),
    Traffic(20, "planner", "PUT", "/a/plans/{}"),
)


@dataclass
class Upstream:
    """A target that takes the old credential, and tokens of Ringfence."""

    port: int = field(default_factory=free_port)
    seen: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By credential, `old` or `new`, and method."""

    async def answer(self, request: Request) -> Response:
        authorization = request.headers.get("authorization", "")
        kind = "old" if authorization == OLD else "new" if authorization.count(".") == 2 else "none"
        self.seen[kind, request.method] += 1
        return PlainTextResponse(kind, status_code=401 if kind == "none" else 200)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        methods = ["GET", "PUT", "DELETE"]
        app = Starlette(routes=[Route("/{path:path}", self.answer, methods=methods)])
        server = HttpServer(app, "127.0.0.1", self.port)
        task = asyncio.create_task(server.run_until_stopped())
        try:
            async with asyncio.timeout(WITHIN_S):
                while not server.started:
                    await asyncio.sleep(0.01)
            yield
        finally:
            server.should_exit = True
            await task


@dataclass
class Front:
    """A proxy before the target: it asks the gateway, and sends on what it is told to."""

    proxy: Proxy
    upstream: Upstream
    http: httpx.AsyncClient
    at: str = f"https://{HUB}"
    """Where the target is, as its record says."""

    async def ask(
        self, desk: IssuerBench, lease: str, method: str, url: str, label: str | None = None
    ) -> httpx.Response:
        """What the gateway says of a request of an agent that shows its handle beside what it inherited."""
        nonce, told = None, {HANDLE: lease, **({"X-Ringfence-Label": label} if label else {})}
        while True:
            dpop = proof(desk.bot.key, method, url, access_token=lease, now_s=int(time.time()), nonce=nonce)
            answer = await self.proxy.ask(method, url, authorization=OLD, dpop=dpop, **told)
            if answer.status_code != 401 or nonce is not None:
                return answer
            nonce = answer.headers["DPoP-Nonce"]

    async def send(
        self, desk: IssuerBench, lease: str, method: str, path: str, label: str | None
    ) -> httpx.Response:
        """The same, and on to the target with what the gateway says."""
        answer = await self.ask(desk, lease, method, f"{self.at}{path}", label)
        if answer.status_code != 200:
            return answer
        url = f"http://127.0.0.1:{self.upstream.port}{path}"
        return await self.http.request(
            method, url, headers={"Authorization": answer.headers["Authorization"]}
        )


@dataclass
class Plane(Front):
    """The gateway's own data plane, which agents go through."""

    port: int = 0

    async def send(
        self, desk: IssuerBench, lease: str, method: str, path: str, label: str | None
    ) -> httpx.Response:
        """The answer to an agent that shows its handle beside what it inherited."""
        url, nonce = f"http://127.0.0.1:{self.port}/hub{path}", None
        told = {"Authorization": OLD, HANDLE: lease, **({"X-Ringfence-Label": label} if label else {})}
        while True:
            dpop = proof(desk.bot.key, method, url, access_token=lease, now_s=int(time.time()), nonce=nonce)
            answer = await self.http.request(method, url, headers={**told, "DPoP": dpop})
            if answer.status_code != 401 or nonce is not None:
                return answer
            nonce = answer.headers["DPoP-Nonce"]


@dataclass
class Week:
    """A gateway that only observes `hub`, beside one target that it does not, and who sends there."""

    first: IssuerBench
    front: Front
    agents: dict[str, IssuerBench] = field(default_factory=dict)
    leases: dict[str, str] = field(default_factory=dict)
    tried: int = 0
    """How many allowed requests were asked about before the week began."""

    async def hire(self, name: str, *verbs: str) -> None:
        """An agent with a lease that the gateway knows and has the credential of."""
        world, desk = self.first.world, await own(self.first)
        lease = await handle(desk, *verbs)
        self.agents[name], self.leases[name] = desk, lease
        async with asyncio.timeout(WITHIN_S):
            while True:
                known = await world.get("gateway", f"/v1/leases/{lease}", world.operator)
                if known.status_code == 200 and known.json()["usable"]:
                    break
                await asyncio.sleep(0.02)
        self.tried += 1
        assert (await self.front.ask(desk, lease, "GET", f"{self.front.at}/a/x")).status_code == 200

    async def replay(self, *traffic: Traffic) -> Counter[int | str]:
        """Send all of it; how often 200 came back, or which code."""
        turn, statuses = asyncio.Semaphore(AT_ONCE), Counter[int | str]()

        async def one(kind: Traffic, number: int) -> None:
            async with turn:
                answer = await self.front.send(
                    self.agents[kind.agent], self.leases[kind.agent], kind.method, kind.path.format(number), kind.label
                )  # fmt: skip
                statuses[200 if answer.status_code == 200 else answer.json()["code"]] += 1

        await asyncio.gather(*(one(kind, number) for kind in traffic for number in range(kind.count)))
        return statuses


@pytest.fixture
async def week(
    request: pytest.FixtureRequest,
    kafka: Kafka,
    redis_server: RedisServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Week]:
    """Behind a proxy that asks the gateway, or with the parameter "plane" behind the gateway's own data plane."""
    monkeypatch.setenv("RINGFENCE_BACKENDS_ACCESS", json.dumps({"partner": secret_in(tmp_path, "s")}))
    upstream, port = Upstream(), free_port()
    async with (
        World.open(kafka.bootstrap, redis_server.url, paced=kafka.embedded) as world,
        opened_desks(world) as first,
        world.running("issuer", "revoker", "audit", own={"audit": AuditSettings(linger_ms=10)}),
        gateway(world, observe=("hub",), listen=f"127.0.0.1:{port}", evaluation_timeout_ms=30_000) as proxy,
        upstream.running(),
        httpx.AsyncClient(trust_env=False, timeout=WITHIN_S) as http,
    ):
        if getattr(request, "param", "proxy") == "plane":
            front: Front = Plane(proxy, upstream, http, f"http://localhost:{upstream.port}", port)
        else:
            front = Front(proxy, upstream, http)
        await hub(await another(first), url=front.at)
        week = Week(first, front)
        await week.hire("reviewer", "read")
        await week.hire("planner", "read", "write")
        yield week


@pytest.fixture
def shell(
    week: Week, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Shell] | Any:
    """`ringfence` as olga the operator, sam the sponsor, and petra who sponsors nobody."""
    world = week.first.world
    for name in [name for name in os.environ if name.startswith("RINGFENCE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RINGFENCE_TRUST_DOMAIN", world.td)
    monkeypatch.setenv("RINGFENCE_AUDIT_URL", f"http://127.0.0.1:{world.ports['audit']}")
    world.operator.key.save(tmp_path / "olga.json")
    week.first.sam.key.save(tmp_path / "sam.json")
    gc.collect()
    gc.disable()  # as in test_cli: an engine must be dropped on the thread that made it
    yield Shell(tmp_path, capsys)
    gc.enable()


async def counted(shell: Shell, who: str, total: int, *options: str) -> Any:
    """The report, once audit has told of so many actions."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            said = await shell.json(who, "gateway", "stats", "--since", "7d", *options)
            if said["allowed"]["total"] + said["blocked"]["total"] >= total:
                return said
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("week", ["proxy", "plane"], indirect=True)
async def test_the_report_on_the_seed_week(week: Week, shell: Shell) -> None:
    upstream, world = week.front.upstream, week.first.world
    statuses = await week.replay(*BLOCKED, *ALLOWED)
    assert statuses == {200: 480}, "observing blocks nothing: nobody noticed"
    assert upstream.seen == {
        ("old", "GET"): 280, ("old", "PUT"): 43, ("old", "DELETE"): 17, ("new", "GET"): 120, ("new", "PUT"): 20,
    }, "what would be blocked went with the old credential, what is allowed with a new one"  # fmt: skip

    said = await counted(shell, "olga", 480 + week.tried)
    assert said["blocked"] == {"total": 340, "read": 280, "write": 60, "injected": 3}
    assert said["observed"] == said["blocked"], "all of it went through"
    assert said["allowed"] == {
        "total": 140 + week.tried, "read": 120 + week.tried, "write": 20, "injected": 0,
    }  # fmt: skip
    assert sum(said["by_reason"].values()) == 340
    assert said["by_reason"]["request_unmapped"] == 17
    reviewer, planner = (week.agents[name].bot.name for name in ("reviewer", "planner"))
    assert {(one["agent"], one["blocked"]["total"]) for one in said["by_agent"]} == {
        (reviewer, 163), (planner, 177),
    }  # fmt: skip
    (injected,) = [row for row in said["blocked_rows"] if row["injected"]]
    assert (injected["agent"], injected["target"], injected["access"], injected["injected"]) == (
        reviewer, "hub", "write", 3,
    )  # fmt: skip

    unmapped = said["unknown_destinations"]
    assert sum(one["count"] for one in unmapped) == 17
    assert {(one["method"], one["path"], one["target"]) for one in unmapped} == {
        ("DELETE", "/a/old/*", "hub")
    }
    assert {one["host"] for one in unmapped} != {None}

    text = await shell("olga", "gateway", "stats", "--since", "7d")
    for part in ("unknown destinations", "/a/old/*", "ringfence target add"):
        assert part in text
    assert "340 (280 reads, 60 writes) blocked" in text
    assert "340 (280 reads, 60 writes) of the blocked went through with what the agents inherited" in text
    assert "3 of the blocked came of input that was marked as injected" in text
    for part in (reviewer, planner, "beyond_scope", "request_unmapped"):
        assert part in text

    for topic in (ACTION, AUDIT):
        for record in await world.records(topic):
            assert b"what-all-of-them-share" not in record.value


async def test_blocked_counts_are_limited_to_what_a_person_may_see(week: Week, shell: Shell) -> None:
    world = week.first.world
    petra = await world.user("petra", roles=("sponsor",))
    petra.key.save(shell.folder / "petra.json")
    await week.replay(Traffic(2, "reviewer", "GET", "/other/{}"), Traffic(1, "planner", "PUT", "/b/{}"))
    reviewer = week.agents["reviewer"].bot.name
    assert (await counted(shell, "olga", 3 + week.tried))["blocked"]["total"] == 3
    assert (await counted(shell, "sam", 3 + week.tried))["blocked"]["total"] == 3, "they are all sam's"
    assert (await counted(shell, "sam", 3, "--agent", reviewer))["blocked"]["total"] == 2
    assert (await counted(shell, "sam", 0, "--target", "elsewhere"))["blocked"]["total"] == 0
    assert (await counted(shell, "petra", 0))["blocked"]["total"] == 0
    assert "no action in the last 7d that you may see" in await shell("petra", "gateway", "stats")
    told = await shell("olga", "gateway", "stats", "--since", "soon", status=2)
    assert "no duration" in told
    stranger = world.party("user", "nobody")
    stranger.key.save(shell.folder / "nobody.json")
    await shell("nobody", "gateway", "stats", status=1)


@pytest.mark.parametrize("week", ["plane"], indirect=True)
async def test_undecidable_requests_are_counted_by_reason(week: Week, shell: Shell) -> None:
    assert isinstance(week.front, Plane)
    async with connected(week.front.port) as raw:
        assert (await raw.ask(b"GET /hub/a HTTP/1.1\r\nHost: x y\r\n\r\n")).status == 400
    for _ in range(12):
        async with connected(week.front.port) as raw:
            assert (await raw.ask(b"GET /hub/a HTTP/1.1\r\nHost:\r\n folded\r\n\r\n")).status == 400
    said = await counted(shell, "olga", 13 + week.tried)
    assert said["by_reason"] == {"malformed_http": 12, "host_invalid": 1}
    assert said["blocked"] == {"total": 13, "read": 1, "write": 0, "injected": 0}
    nobody = [one for one in said["by_agent"] if one["agent"] is None]
    assert [one["blocked"]["total"] for one in nobody] == [13]
    records = await week.first.world.records(ACTION)
    assert len(records) < 13 + week.tried, "a flood takes less of the spool than it counts"


async def test_observe_mode_warns_in_readiness_metrics_and_audit(week: Week) -> None:
    world = week.first.world
    ready = (await world.get("gateway", "/readyz")).json()
    assert ready["status"] == "ready"
    assert "observe mode: at hub nothing is blocked" in ready["warnings"][0]
    assert "ringfence_gateway_observed_targets 1.0" in (await world.get("gateway", "/metrics")).text

    def finding(record: Any) -> bool:
        event = json.loads(record.value)
        return bool(event.get("status_code") == "observe_mode")

    event = json.loads((await world.consume_until(AUDIT, finding)).value)
    assert (event["severity"], event["is_alert"]) == ("High", True)
    assert event["unmapped"]["verified"]["by"] == world.key("gateway").id


async def test_a_target_that_is_not_named_blocks(week: Week) -> None:
    """Beside it in the same gateway, with the same old credential."""
    await hub(await another(week.first), "partner", "http", "partner.test.example", auth="bearer")
    at_partner, reviewer = "https://partner.test.example/a/x", week.agents["reviewer"]
    async with asyncio.timeout(WITHIN_S):
        while True:
            answer = await week.front.ask(reviewer, week.leases["reviewer"], "GET", at_partner)
            assert answer.status_code == 403
            if answer.json()["code"] != "target_unknown":  # the record is on its way
                break
            await asyncio.sleep(0.05)
    assert answer.json()["code"] == "handle_other_target"
    bare = await week.front.proxy.ask("GET", at_partner, authorization=OLD)
    assert (bare.status_code, bare.json()["code"]) == (401, "no_credentials")
    bare = await week.front.proxy.ask("GET", f"https://{HUB}/a/x", authorization=OLD)
    assert (bare.status_code, bare.headers["authorization"]) == (200, OLD)
    nowhere = await week.front.proxy.ask("GET", "https://nowhere.test.example/a/x", authorization=OLD)
    assert nowhere.status_code == 401


@pytest.mark.parametrize("week", ["plane"], indirect=True)
async def test_a_connect_to_an_unknown_host_is_on_the_list(week: Week, shell: Shell) -> None:
    """With a handle in the URL of the proxy, or with nothing: no proof comes with it, so nobody knows who sends it."""
    assert isinstance(week.front, Plane)
    user = base64.b64encode(f"{week.leases['reviewer']}:".encode()).decode()
    head = "CONNECT api.example:8443 HTTP/1.1\r\nHost: api.example:8443\r\n"
    shown = f"{head}Proxy-Authorization: Basic {user}\r\n\r\n".encode()
    for _ in range(3):
        async with connected(week.front.port) as raw:
            assert (await raw.ask(shown)).status in (401, 403)
    said = await counted(shell, "olga", 3 + week.tried)
    assert said["blocked"] == {"total": 3, "read": 0, "write": 0, "injected": 0}
    assert said["unknown_destinations"] == [
        {
            "scheme": "https", "host": "api.example", "port": 8443, "method": "CONNECT", "path": None, "target": None,
            "count": 3,
        }
    ]  # fmt: skip
    text = await shell("olga", "gateway", "stats")
    assert "3 (0 reads, 0 writes, 3 neither) blocked" in text
    assert "api.example" in text
