"""The gateway as agents meet it: over TCP with a proof, or through their task's socket, with programs as they are."""

from __future__ import annotations

import asyncio
import stat
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from ringfence.client.agent.httpx_auth import DpopAuth
from ringfence.dev.processes import free_port
from ringfence.gateway.dataplane.plane import DataPlane
from ringfence.gateway.events.recorder import Recorder
from ringfence.gateway.settings import GatewaySettings
from ringfence.kernel.service.http import HttpServer
from ringfence.messages.registry import TaskEnd
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.gateway.agents import Sandbox, bridged
from tests.gateway.certificates import Certificates
from tests.gateway.raw import connected_unix
from tests.gateway.target import Target
from tests.support.benches.gateway_flows import action, gateway, handle, hub
from tests.support.benches.issuer_bench import IssuerBench, another, opened_desks
from tests.support.world import WITHIN_S, World


@dataclass
class Office:
    """A gateway that listens, and a target with TLS behind it."""

    desk: IssuerBench
    target: Target
    port: int
    sockets: Path
    ca: Path

    @property
    def at(self) -> str:
        return f"https://localhost:{self.target.port}"

    def of(self, desk: IssuerBench) -> Path:
        return self.sockets / f"{desk.task}.sock"


@pytest.fixture(scope="module")
async def office(
    kafka: Kafka, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Office]:
    folder = tmp_path_factory.mktemp("gw")
    certificates, port = Certificates(folder), free_port()
    own = {
        "listen": str(port), "sockets": folder / "tasks", "ca_file": folder / "gateway-ca.pem",
        "targets_ca_file": certificates.file,
    }  # fmt: skip
    async with (
        Target().serving(certificates.server("localhost")) as target,
        World.open(kafka.bootstrap, redis_server.url, paced=kafka.embedded) as world,
        opened_desks(world) as first,
        world.running("issuer", "revoker"),
        gateway(world, **own),
    ):
        found = Office(first, target, port, folder / "tasks", folder / "gateway-ca.pem")
        await hub(await another(first), host=f"localhost:{target.port}")
        yield found


@pytest.fixture
async def desk(office: Office) -> IssuerBench:
    """An agent and a task of the test's own."""
    desk = await another(office.desk)
    wide = (desk.scope("read")[0].model_copy(update={
        "target": "hub", "verbs": ("read", "write"), "resources": ("path/**",),
    }),)  # fmt: skip
    desk.sue = await desk.world.user(f"u-{uuid.uuid4().hex[:8]}", entitlements=wide)
    desk.bot = await desk.world.agent(f"b-{uuid.uuid4().hex[:8]}", sponsor=desk.sam, ceiling=wide)
    desk.task = await desk.world.task(desk.bot, by=desk.sue, scope=wide)
    return desk


async def sent(office: Office, desk: IssuerBench, lease: str, method: str, path: str) -> httpx.Response:
    """A request over TCP, by the path of its target, as an agent sends it that has a handle."""
    auth = DpopAuth(lease, desk.bot.key)
    async with httpx.AsyncClient(auth=auth, trust_env=False, timeout=WITHIN_S) as http:
        url = f"http://127.0.0.1:{office.port}/hub{path}"
        return await http.request(method, url, headers={"X-Forwarded-Host": "x"})


async def until_allowed(office: Office, desk: IssuerBench, lease: str) -> httpx.Response:
    """The lease is on its way to the gateway when the agent has its handle: at most a moment."""
    async with asyncio.timeout(WITHIN_S):
        while (answer := await sent(office, desk, lease, "GET", "/a/x")).status_code != 200:
            await asyncio.sleep(0.02)
    return answer


async def until_there(path: Path, *, gone: bool = False) -> None:
    async with asyncio.timeout(WITHIN_S):
        while path.exists() == gone:
            await asyncio.sleep(0.02)


async def test_over_tcp_with_a_proof(office: Office, desk: IssuerBench) -> None:
    lease = await handle(desk, "read")
    assert (await until_allowed(office, desk, lease)).text == "ok"
    (received,) = [one for one in office.target.requests if one.values("authorization")][-1:]
    assert received.target == "/a/x"
    assert received.values("authorization")[0].startswith("Bearer ey")
    assert not received.values("dpop")
    assert not received.values("x-forwarded-host")

    before = len(office.target.requests)
    refused = await sent(office, desk, lease, "PUT", "/a/x")
    assert (refused.status_code, refused.json()["code"]) == (403, "beyond_lease")
    assert refused.headers["content-type"] == "application/problem+json"
    assert f"--task {desk.task}" in refused.json()["ask"]
    odd = await sent(office, desk, lease, "GET", "/a//x")
    assert odd.status_code == 403
    assert len(office.target.requests) == before  # nothing of either reached it
    event = await action(desk.world, agent_id=desk.bot.name, allowed=False, verb="write")
    assert (event.target_id, event.task_id, event.access) == ("hub", desk.task, "write")


async def test_a_handle_that_somebody_else_found_is_worth_nothing(office: Office, desk: IssuerBench) -> None:
    lease = await handle(desk, "read")
    await until_allowed(office, desk, lease)
    thief = await another(desk)
    thief.bot = await desk.world.agent(f"thief-{uuid.uuid4().hex[:8]}", sponsor=desk.sam, ceiling=())
    before = len(office.target.requests)
    assert (await sent(office, thief, lease, "GET", "/a/x")).status_code in (401, 403)
    async with httpx.AsyncClient(trust_env=False) as http:
        bare = await http.get(
            f"http://127.0.0.1:{office.port}/hub/a/x", headers={"Authorization": f"DPoP {lease}"}
        )
    assert bare.status_code == 401
    assert len(office.target.requests) == before


async def test_malformed_request_is_audited_as_the_agents_action(office: Office, desk: IssuerBench) -> None:
    await handle(desk, "read")
    await until_there(office.of(desk))
    async with connected_unix(str(office.of(desk))) as raw:
        assert (await raw.ask(b"GET /hub/a HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n")).status == 400
    event = await action(desk.world, task_id=desk.task, allowed=False)
    assert (event.agent_id, event.count, event.reasons[0].code) == (desk.bot.name, 1, "malformed_http")


@pytest.mark.tools
async def test_curl_through_the_socket_of_its_task(office: Office, desk: IssuerBench, tmp_path: Path) -> None:
    """HTTPS_PROXY and the certificate in the gateway's file are all that the program knows."""
    assert not office.of(desk).exists()
    await handle(desk, "read")
    await until_there(office.of(desk))
    assert stat.S_IMODE(office.of(desk).stat().st_mode) == 0o600
    async with bridged(office.of(desk)) as port:
        sandbox = Sandbox(tmp_path, f"http://127.0.0.1:{port}", office.ca)
        seen = await sandbox.run("curl", "-sS", "--fail-with-body", f"{office.at}/a/y")
        assert (seen.code, seen.out) == (0, "ok"), seen.err
        assert office.target.requests[-1].target == "/a/y"
        refused = await sandbox.run("curl", "-sS", "-X", "PUT", "-d", "x", f"{office.at}/a/y")
        assert '"code":"beyond_lease"' in refused.out.replace(" ", "")
        elsewhere = await sandbox.run("curl", "-sS", "https://elsewhere.test/")
        assert elsewhere.code != 0
        assert (await action(desk.world, task_id=desk.task, allowed=False, target_id=None)).reasons

        await desk.world.accepted(
            desk.world.claims(TaskEnd, desk.sue, task_id=desk.task, reason="done"), desk.sue
        )
        await until_there(office.of(desk), gone=True)


async def test_ready_gateway_accepts_connections(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opens, listen, serve = asyncio.Event(), DataPlane.listen, HttpServer.serve

    async def listen_later(self: DataPlane, *args: Any, **options: Any) -> int:
        await opens.wait()
        return await listen(self, *args, **options)

    async def serve_later(self: HttpServer, *args: Any) -> None:
        await opens.wait()
        await serve(self, *args)

    monkeypatch.setattr(DataPlane, "listen", listen_later)
    monkeypatch.setattr(HttpServer, "serve", serve_later)
    ports = free_port(), free_port()
    world.seals["gateway"].save(tmp_path / "seal.json")
    settings = GatewaySettings(
        listen=str(ports[0]), authz=f"127.0.0.1:{ports[1]}", seal_key_file=tmp_path / "seal.json",
        spool=tmp_path / "spool", issuer=f"http://127.0.0.1:{free_port()}",
    )  # fmt: skip

    async def open_once_it_waits_for_nothing_else() -> None:
        last = {"the gateway does not listen for agents yet", "the gateway does not listen for proxies yet"}
        async with asyncio.timeout(WITHIN_S):
            while "gateway" not in world.runtimes or set(world.runtimes["gateway"].unready()) != last:
                await asyncio.sleep(0.02)
        opens.set()

    opening = asyncio.create_task(open_once_it_waits_for_nothing_else())
    async with world.running("gateway", own={"gateway": settings}):
        assert opens.is_set()
        for port in ports:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
    await opening


async def test_no_request_comes_in_any_more_when_the_spool_closes(
    kafka: Kafka, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its event could not be written, or would go into another file that has the number of the spool's."""
    port, listening = free_port(), list[bool]()
    close = Recorder.close

    async def close_after_a_look(recorder: Recorder) -> None:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            listening.append(True)
        except ConnectionRefusedError:
            listening.append(False)
        await close(recorder)

    monkeypatch.setattr(Recorder, "close", close_after_a_look)
    async with (
        World.open(kafka.bootstrap, redis_server.url, paced=kafka.embedded) as world,
        world.running("registry", "revoker"),
        gateway(world, listen=str(port)),
    ):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()
    assert listening == [False]
