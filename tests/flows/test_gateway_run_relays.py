"""Byte relays of runs to targets whose protocol is not HTTP: to one address, while the run has a lease there."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ringfence.client.agent.agent import Agent
from ringfence.client.agent.credentials import RedisCredential
from ringfence.gateway.dataplane import plane, run_relays
from ringfence.gateway.dataplane.exchange import Timeouts
from ringfence.gateway.dataplane.limits import Allowance
from ringfence.kernel.crypto.jws import sign
from ringfence.messages.lease import Lease, RevocationRequest
from ringfence.messages.operations import Destination, RelayEnded
from ringfence.messages.registry import AgentSuspend, BackendSettings, TaskEnd, VerbFloor
from ringfence.messages.topics import ACTION, LEASE, REVOCATION_REQUEST
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.gateway.raw import Raw, connected_unix
from tests.gateway.target import Reader, Target, Writer
from tests.support.benches.gateway_flows import action, gateway
from tests.support.benches.run_bench import RunBench, RunInside, run_bench, until_there
from tests.support.benches.sdk_clients import client
from tests.support.servers.redis_target import ValkeyTarget, valkey_target
from tests.support.world import WITHIN_S, scope

VERBS = (VerbFloor(verb="read"), VerbFloor(verb="write"))


async def echo(reader: Reader, writer: Writer) -> None:
    """A server that speaks first, as SSH does, and then sends back what it gets."""
    writer.write(b"hello\n")
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


@dataclass
class Yard:
    """A bench with a real Valkey, a server that echoes, and one that is to be an SSH host with forwarding."""

    bench: RunBench
    cache: ValkeyTarget
    echo: Target
    jump: Target
    elsewhere: Target = field(default_factory=lambda: Target(script=echo))
    """It listens, and is no target."""


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder with a short path, as those of sockets are short."""
    with tempfile.TemporaryDirectory(prefix="rf-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
async def yard(
    kafka: Kafka, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Yard]:
    folder = tmp_path_factory.mktemp("relays")
    async with (
        valkey_target("cache", folder) as cache,
        Target(script=echo).serving() as echoes,
        Target(script=echo).serving() as jump,
        Target(script=echo).serving() as elsewhere,
    ):

        def raw(kind: str, address: str, *verbs: str) -> dict[str, Any]:
            backend = BackendSettings.model_validate({"kind": kind, "address": address})
            return {"backend": backend, "verbs": tuple(VerbFloor(verb=verb) for verb in verbs)}

        targets = {
            "cache": raw("redis", cache.address, "read", "write"),
            "echo": raw("postgres", f"localhost:{echoes.port}", "read"),
            "jump": raw("ssh", f"localhost:{jump.port}", "read", "forward"),
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RINGFENCE_BACKENDS_ACCESS", json.dumps(cache.places()))
            async with run_bench(kafka, redis_server, folder / "bench", targets=targets) as bench:
                yield Yard(bench, cache, echoes, jump, elsewhere)


@dataclass
class Relayed:
    """The answer to a CONNECT, and the connection."""

    raw: Raw
    status: int
    code: str | None

    async def line(self, sent: bytes = b"") -> bytes:
        if sent:
            await self.raw.send(sent)
        return await asyncio.wait_for(self.raw.reader.readline(), WITHIN_S)

    async def cut(self) -> bool:
        """Whether the connection ends, with nothing more to come."""
        try:
            return await asyncio.wait_for(self.raw.reader.read(), WITHIN_S) == b""
        except ConnectionError:
            return True


@asynccontextmanager
async def connect(socket: Path, place: str, handle: str | None = None) -> AsyncIterator[Relayed]:
    shown = f"X-Ringfence-Handle: {handle}\r\n" if handle is not None else ""
    async with connected_unix(str(socket)) as raw:
        await raw.send(f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n{shown}\r\n".encode())
        head = await asyncio.wait_for(raw.reader.readuntil(b"\r\n\r\n"), WITHIN_S)
        status, code = int(head.split(b" ", 2)[1]), None
        if status != 200:
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            code = json.loads(await raw.reader.readexactly(length))["code"]
        yield Relayed(raw, status, code)


async def refused(socket: Path, place: str, handle: str | None = None) -> tuple[int, str | None]:
    async with connect(socket, place, handle) as relayed:
        return relayed.status, relayed.code


async def raw_lease(yard: Yard, run: RunInside, target: str, kind: str, **fields: Any) -> str:
    """A lease of the run at a target whose credential it has itself, as the issuer signs it."""
    world = yard.bench.world
    handle = await run.lease()
    record = await world.consume_until(LEASE, lambda r: r.key == handle)
    given = {
        "lease_id": str(uuid.uuid4()), "request_id": str(uuid.uuid4()), "jti": str(uuid.uuid4()), "target_id": target,
        "backend": kind, "delivery": "agent", "scope": scope(target, ("read",), ("a",)),
        "deadline": int(time.time()) + 600, "epoch": None,
    }  # fmt: skip
    lease = world.opened(record, Lease, "issuer").model_copy(update={**given, **fields})
    await world.send(LEASE, lease.lease_id, sign(lease, world.key("issuer")))
    return lease.lease_id


async def opened(yard: Yard, run: RunInside, target: Target | None = None) -> Any:
    """A relay to the echoing target, once the gateway has heard of the lease."""
    place = f"localhost:{(target or yard.echo).port}"
    async with asyncio.timeout(WITHIN_S):
        while (await refused(run.socket, place))[0] != 200:
            await asyncio.sleep(0.02)
    return connect(run.socket, place)


async def ends_of(yard: Yard, run_id: str, number: int) -> list[RelayEnded]:
    """The ends of so many relays of a run."""
    found: dict[str, RelayEnded] = {}

    def is_last(record: Any) -> bool:
        if b'"sent_bytes"' in record.value and run_id.encode() in record.value:
            event = RelayEnded.model_validate_json(record.value)
            found[event.action_id] = event
        return len(found) >= number

    await yard.bench.world.consume_until(ACTION, is_last)
    return list(found.values())


async def moved(yard: Yard, address: str) -> None:
    """The record of the echoing target leads there from now on."""
    backend = BackendSettings.model_validate({"kind": "postgres", "address": address})
    await yard.bench.world.target("echo", backend=backend, verbs=(VerbFloor(verb="read"),))


async def run_of(yard: Yard, **options: Any) -> RunInside:
    agent = await yard.bench.agent(**options)
    return yard.bench.run(agent, await yard.bench.task(agent))


async def revoked(yard: Yard, lease_id: str) -> None:
    world, sam = yard.bench.world, yard.bench.yard.sam
    claims = world.claims(RevocationRequest, sam, kind="revocation", lease_id=lease_id, reason="a test")
    await world.send(REVOCATION_REQUEST, sam.name, sign(claims, sam.key))


# --- what goes well ---------------------------------------------------------------------------------------------------


async def test_a_run_speaks_redis_to_its_target_until_its_lease_is_revoked(yard: Yard) -> None:
    run = await run_of(yard)
    async with run.started():
        assert await refused(run.socket, yard.cache.address) == (403, "no_lease")
        credential = await run.lease_of(target="cache", resources=["**"], delivery="agent", verbs=["read"])
        assert isinstance(credential, RedisCredential)
        user, _, secret = credential.value.partition("://")[2].partition("@")[0].partition(":")
        async with asyncio.timeout(WITHIN_S):
            while (await refused(run.socket, yard.cache.address))[0] != 200:
                await asyncio.sleep(0.02)
        async with connect(run.socket, yard.cache.address) as relayed:
            assert await relayed.line(f"AUTH {user} {secret}\r\n".encode()) == b"+OK\r\n"
            assert await relayed.line(b"GET a\r\n") == b"$-1\r\n"
            assert (await relayed.line(b"SET a b\r\n")).startswith(b"-NOPERM")
            event = await action(
                yard.bench.world, allowed=True, method="CONNECT", lease_id=credential.lease_id
            )
            assert (event.agent_id, event.task_id, event.target_id) == (
                run.live.agent.name, run.live.task, "cache",
            )  # fmt: skip
            assert (event.verb, event.access, event.destination) == (None, None, None)
            assert event.run_id == run.live.id
            await revoked(yard, credential.lease_id)
            assert await relayed.cut()
        before, ended = await ends_of(yard, run.live.id, 2)
        assert (before.action_id, before.reason) == (event.action_id, None), (
            "that was to see whether it is there"
        )
        assert (ended.run_id, ended.lease_id, ended.target_id) == (run.live.id, credential.lease_id, "cache")
        assert (ended.agent_id, ended.task_id) == (event.agent_id, event.task_id)
        assert ended.reason is not None
        assert ended.reason.code == "lease_cut"
        assert await refused(run.socket, yard.cache.address) == (403, "no_lease")


async def test_bytes_pass_both_ways_uninterpreted_and_the_end_of_one_side_is_the_end_of_the_other(
    yard: Yard,
) -> None:
    run = await run_of(yard)
    async with run.started():
        await raw_lease(yard, run, "echo", "postgres")
        async with await opened(yard, run) as relayed:
            assert await relayed.line() == b"hello\n", "the target may speak first"
            sent = b"GET / HTTP/1.1\r\n\r\n" + bytes(range(256)) * 4096
            await relayed.raw.send(sent)
            got = await asyncio.wait_for(relayed.raw.reader.readexactly(len(sent)), WITHIN_S)
            assert got == sent
            assert yard.echo.open == 1
        async with asyncio.timeout(WITHIN_S):
            while yard.echo.open:
                await asyncio.sleep(0.01)
        # `opened` has opened a relay before, and left it.
        ended = [event for event in await ends_of(yard, run.live.id, 2) if event.sent_bytes]
        assert [(one.sent_bytes, one.received_bytes, one.reason) for one in ended] == [
            (len(sent), len(sent) + len(b"hello\n"), None)
        ]
        assert (ended[0].destination.host, ended[0].destination.port) == ("localhost", yard.echo.port)
        # The name is that of the record, in whatever case.
        assert (await refused(run.socket, f"LOCALHOST:{yard.echo.port}"))[0] == 200


# --- what ends a relay ------------------------------------------------------------------------------------------------


async def of_task(yard: Yard, run: RunInside, lease_id: str) -> None:
    claims = yard.bench.world.claims(TaskEnd, yard.bench.user, task_id=run.live.task, reason="done")
    await yard.bench.world.accepted(claims, yard.bench.user)


async def of_agent(yard: Yard, run: RunInside, lease_id: str) -> None:
    await yard.bench.yard.command(run.live.agent, AgentSuspend, reason="odd")


async def of_run(yard: Yard, run: RunInside, lease_id: str) -> None:
    await run.live.say("ended")


async def lost(yard: Yard, run: RunInside, lease_id: str) -> None:
    await run.live.say("lost")


async def of_lease(yard: Yard, run: RunInside, lease_id: str) -> None:
    await run.caller().post(run.release(lease_id))


@pytest.mark.parametrize("end", [of_task, of_agent, of_run, lost, of_lease])
async def test_an_idle_relay_ends_with_lease_run_task_and_agent(yard: Yard, end: Any) -> None:
    run = await run_of(yard)
    async with run.started():
        credential = await run.lease_of(target="cache", resources=["**"], delivery="agent", verbs=["read"])
        async with asyncio.timeout(WITHIN_S):
            while (await refused(run.socket, yard.cache.address))[0] != 200:
                await asyncio.sleep(0.02)
        async with connect(run.socket, yard.cache.address) as relayed:
            await end(yard, run, credential.lease_id)
            assert await relayed.cut()
        if end in (of_task, of_run, lost):
            await until_there(run.socket, gone=True)
        else:
            assert (await refused(run.socket, yard.cache.address))[0] == 403


async def test_a_relay_ends_at_the_deadline_of_the_lease(yard: Yard) -> None:
    run = await run_of(yard)
    async with run.started():
        deadline = int(time.time()) + 3
        await raw_lease(yard, run, "echo", "postgres", deadline=deadline)
        async with await opened(yard, run) as relayed:
            assert await relayed.line() == b"hello\n"
            assert await relayed.cut()
            assert time.time() >= deadline
        assert await refused(run.socket, f"localhost:{yard.echo.port}") == (403, "no_lease")


async def test_the_end_of_any_lease_of_the_run_there_ends_the_relay(yard: Yard) -> None:
    """The gateway cannot see which credential is used on it."""
    run = await run_of(yard)
    async with run.started():
        first = await raw_lease(yard, run, "echo", "postgres")
        second = await raw_lease(yard, run, "echo", "postgres")
        async with await opened(yard, run) as relayed:
            assert await relayed.line() == b"hello\n"
            await known(yard, second)
            async with connect(run.socket, f"localhost:{yard.echo.port}") as of_both:
                assert of_both.status == 200
                await revoked(yard, second)
                assert await of_both.line() == b"hello\n"
                assert await of_both.cut()
        assert (await refused(run.socket, f"localhost:{yard.echo.port}"))[0] == 200
        await revoked(yard, first)
        async with asyncio.timeout(WITHIN_S):
            while await refused(run.socket, f"localhost:{yard.echo.port}") != (403, "no_lease"):
                await asyncio.sleep(0.02)


async def known(yard: Yard, lease_id: str) -> None:
    """Wait until the gateway under test has read of a lease."""
    world = yard.bench.world
    async with asyncio.timeout(WITHIN_S):
        while (await world.get("gateway", f"/v1/leases/{lease_id}", world.operator)).status_code != 200:
            await asyncio.sleep(0.02)


async def test_once_its_target_has_moved_not_one_more_byte_passes(yard: Yard) -> None:
    run = await run_of(yard)
    async with run.started(), Target(script=echo).serving() as server:
        await moved(yard, f"localhost:{server.port}")
        try:
            await raw_lease(yard, run, "echo", "postgres")
            async with await opened(yard, run, server) as relayed:
                assert await relayed.line() == b"hello\n"
                await moved(yard, f"localhost:{yard.echo.port}")
                async with asyncio.timeout(WITHIN_S):
                    while (await refused(run.socket, f"localhost:{server.port}"))[1] != "target_unknown":
                        await asyncio.sleep(0.02)
                before = sum(map(len, server.raw))
                await relayed.raw.send(b"more\n")
                assert await relayed.cut()
                assert sum(map(len, server.raw)) == before
        finally:
            await moved(yard, f"localhost:{yard.echo.port}")


# --- what is refused --------------------------------------------------------------------------------------------------


async def test_a_relay_leads_to_the_address_of_the_record_alone(yard: Yard) -> None:
    run = await run_of(yard)
    async with run.started():
        await raw_lease(yard, run, "echo", "postgres")
        async with await opened(yard, run):
            pass
        port = yard.echo.port
        for place, expected in {
            f"127.0.0.1:{port}": (403, "target_unknown"),
            f"[::1]:{port}": (403, "target_unknown"),
            f"localhost:{yard.elsewhere.port or 1}": (403, "target_unknown"),
            f"localhost:{yard.jump.port}": (403, "forward_not_relayed"),
            yard.cache.address: (403, "no_lease"),
            f"localhost.:{port}": (400, "host_invalid"),
            f"x@localhost:{port}": (400, "host_invalid"),
            f"localhost:0{port}": (400, "host_invalid"),
            f"127.1:{port}": (400, "host_invalid"),
            "localhost": (400, "connect_refused"),
        }.items():
            assert await refused(run.socket, place) == expected, place
        to = Destination(scheme="https", host="localhost", port=yard.jump.port)
        event = await action(yard.bench.world, allowed=False, task_id=run.live.task, destination=to)
        assert (event.agent_id, event.method) == (run.live.agent.name, "CONNECT")
        assert [reason.code for reason in event.reasons] == ["forward_not_relayed"]


async def test_no_relay_leads_to_ssh_with_forwarding_whatever_lease_there_is(yard: Yard) -> None:
    run = await run_of(yard)
    async with run.started():
        lease_id = await raw_lease(yard, run, "jump", "ssh")
        await known(yard, lease_id)
        before = len(yard.jump.raw)
        assert await refused(run.socket, f"localhost:{yard.jump.port}") == (403, "forward_not_relayed")
        assert len(yard.jump.raw) == before


async def test_only_the_run_that_has_the_lease_has_a_relay_and_on_its_own_socket(yard: Yard) -> None:
    agent = await yard.bench.agent(has_key=True)
    task = await yard.bench.task(agent)
    run, beside = yard.bench.run(agent, task), yard.bench.run(agent, task)
    place = f"localhost:{yard.echo.port}"
    async with run.started(), beside.started():
        mine = await raw_lease(yard, run, "echo", "postgres")
        await (await opened(yard, run)).__aenter__()
        assert await refused(beside.socket, place) == (403, "no_lease")
        assert await refused(beside.socket, place, mine) == (403, "socket_other_run")
        # Nor does a lease of the agent's own key, or one for gateways, or one by another key than the run's.
        agents = await raw_lease(
            yard, beside, "echo", "postgres", instance=None, key_thumbprint=agent.key.kid
        )
        injected = await raw_lease(yard, beside, "echo", "postgres", delivery="gateway")
        for lease_id in (agents, injected):
            await known(yard, lease_id)
        assert await refused(beside.socket, place) == (403, "no_lease")
        assert await refused(beside.socket, place, agents) == (403, "socket_other_run")
        other = await raw_lease(yard, beside, "echo", "postgres", key_thumbprint=agent.key.kid)
        await known(yard, other)
        assert await refused(beside.socket, place) == (403, "run_mismatch")
        # A task's socket and a listener relay nothing.
        async with Agent.connect(agent.key, settings=client(yard.bench.world)) as sdk:
            await sdk.request(
                task=task, target="hub", verbs=["read"], resources=["path/**"], reason="x", delivery="gateway",
                timeout_s=WITHIN_S,
            )  # fmt: skip
        socket = yard.bench.task_socket(task)
        await until_there(socket)
        assert await refused(socket, place) == (403, "target_unknown")


async def test_a_run_has_so_many_relays_at_a_time(yard: Yard) -> None:
    agent = await yard.bench.agent()
    task, place = await yard.bench.task(agent), f"localhost:{yard.echo.port}"
    run, beside = yard.bench.run(agent, task), yard.bench.run(agent, task)
    async with run.started(), beside.started(), AsyncExitStack() as held:
        relays: list[Relayed] = []
        for one in (run, beside):  # together as many as the agent may have requests in progress
            await raw_lease(yard, one, "echo", "postgres")
            first = await held.enter_async_context(await opened(yard, one))
            more = [connect(one.socket, place) for _ in range(run_relays.PER_RUN - 1)]
            relays = [first, *[await held.enter_async_context(each) for each in more]]
            assert {relayed.status for relayed in relays} == {200}
            assert await refused(one.socket, place) == (429, "relays_limit")
        assert Allowance().concurrent_each <= 2 * run_relays.PER_RUN
        assert (await run.get()).status_code == 200, "requests have places of their own"
        relays[0].raw.writer.transport.abort()
        async with asyncio.timeout(WITHIN_S):
            while (await refused(beside.socket, place))[0] != 200:
                await asyncio.sleep(0.02)


async def test_a_relay_on_which_nothing_happens_ends(
    yard: Yard, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = partial(plane.DataPlaneSettings, timeouts=Timeouts(stream_s=0.5))
    monkeypatch.setattr("ringfence.gateway.dataplane.listeners.DataPlaneSettings", quick)
    run = await run_of(yard)
    sockets = short_path / "s"
    async with run.started():
        await run.lease_of(target="cache", resources=["**"], delivery="agent", verbs=["read"])
        async with gateway(yard.bench.world, sockets=sockets, spool=short_path / "spool"):
            socket, place = sockets / run.socket.name, yard.cache.address
            await until_there(socket)
            async with asyncio.timeout(WITHIN_S):
                while (await refused(socket, place))[0] != 200:
                    await asyncio.sleep(0.02)
            async with connect(socket, place) as silent, connect(socket, place) as relayed:
                assert await relayed.line(b"PING\r\n") == b"+PONG\r\n"
                assert await relayed.cut()
                assert await silent.cut(), "Valkey says nothing before it is asked"


async def test_a_target_that_is_away_is_told(yard: Yard) -> None:
    run, nowhere = await run_of(yard), "localhost:1"
    async with run.started():
        await raw_lease(yard, run, "echo", "postgres")
        async with await opened(yard, run):
            pass
        await moved(yard, nowhere)
        try:
            async with asyncio.timeout(WITHIN_S):
                while await refused(run.socket, nowhere) != (502, "target_unreachable"):
                    await asyncio.sleep(0.02)
        finally:
            await moved(yard, f"localhost:{yard.echo.port}")
