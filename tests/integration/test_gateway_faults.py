"""The gateway as a process, while Kafka, Redis, a target, an agent or itself fails: closed each time."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import random
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ringfence.cli.commands.dev import client_settings
from ringfence.client.agent.agent import Agent
from ringfence.dev.stack import Stack, StackOptions
from ringfence.messages.base import Permission
from ringfence.messages.lease import TERMINAL
from ringfence.messages.operations import ActionDecided
from ringfence.messages.registry import BackendSettings, RequestRule, VerbFloor
from ringfence.messages.topics import ACTION, LEASE
from tests.gateway.raw import Raw, connected_unix
from tests.support.http_client import plain_client
from tests.support.stack import WITHIN_S, RunningStack, Seen

GRACE_S = 3.0
RULES = tuple(
    RequestRule(method=method, path="/{path*}", verb="read", resource="path/{path*}")
    for method in ("GET", "PUT")
)
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_LARGE = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n"


def get(path: str, *lines: str, method: str = "GET") -> bytes:
    head = [f"{method} /TARGET/{path} HTTP/1.1", "Host: gateway", *lines]
    return "\r\n".join([*head, "", ""]).encode()


UPGRADE = (
    "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
    f"Sec-WebSocket-Key: {base64.b64encode(b'0123456789abcdef').decode()}",
)  # fmt: skip
_ACCEPTED = (
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Accept: BACScCJPNqyz+UBoqMH89VmURoA=\r\n\r\n"
)


@dataclass
class Shop:
    """A target that does as the path says, and counts. It knows its connections by that path."""

    port: int = 0
    heads: list[bytes] = field(default_factory=list)
    writers: dict[str, asyncio.StreamWriter] = field(default_factory=dict)
    taken: int = 0
    """Bytes of uploads."""
    ended: set[str] = field(default_factory=set)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[Shop]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for writer in self.writers.values():
                writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = ""
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.heads.append(head)
                path = head.split(b" ", 2)[1].decode()
                self.writers[path] = writer
                await self._answer(path, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.ended.add(path)
            writer.transport.abort()

    async def _answer(self, path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        match path.rpartition("/")[2]:
            case "events":
                writer.write(_HEAD + b"6\r\nfirst\n\r\n")
                await reader.read()
            case "socket":
                writer.write(_ACCEPTED + b"\x81\x05first")
                while await reader.read(65536):
                    pass
            case "download":
                writer.write(_LARGE)
                while True:
                    writer.write(b"x" * 65536)
                    await writer.drain()
            case "upload":
                while data := await reader.read(65536):
                    self.taken += len(data)
            case "hangs":
                await reader.read()
            case _:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


@pytest.fixture(scope="module")
def own_stack() -> Iterator[Stack]:
    """A stack with a broker and a Redis of its own: they are stopped."""
    with tempfile.TemporaryDirectory(prefix="ringfence-faults-") as folder:
        options = StackOptions(
            Path(folder) / "s", topic_prefix=f"faults{random.randrange(10**6)}",
            environment={"RINGFENCE_GRACE_S": str(GRACE_S)},
        )  # fmt: skip
        with Stack(options) as running:
            yield running


@dataclass
class Place:
    """An agent with a task at a shop behind the gateway, through the task's socket."""

    realm: RunningStack
    agent: Agent
    shop: Shop

    @property
    def socket(self) -> Path:
        return self.realm.stack.sockets / f"{self.realm.task}.sock"

    def request(self, path: str, *lines: str, method: str = "GET") -> bytes:
        return get(path, *lines, method=method).replace(b"TARGET", self.realm.target.encode())

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[Raw]:
        async with connected_unix(str(self.socket)) as raw:
            yield raw

    async def status(self, path: str = "a") -> int:
        """The status of a request of its own connection."""
        async with self.connected() as raw:
            return (await raw.ask(self.request(path))).status

    async def until(self, status: int, path: str = "a") -> None:
        async with asyncio.timeout(WITHIN_S):
            while await self.status(path) != status:
                await asyncio.sleep(0.05)

    async def leased(self) -> str:
        """A new lease for all there is at the shop, once requests go by it."""
        given = await self.agent.request(
            task=self.realm.task, target=self.realm.target, verbs=["read"], resources=["path/**"], reason="to use",
            delivery="gateway", timeout_s=WITHIN_S,
        )  # fmt: skip
        async with asyncio.timeout(WITHIN_S):
            while not self.socket.exists():
                await asyncio.sleep(0.02)
        await self.until(200)
        return given.lease_id

    async def unconfirmed(self) -> float:
        """How many cuts the revoker counts that a live gateway gave no word on within its grace."""
        async with plain_client(trust_env=False, timeout=WITHIN_S) as http:
            said = (await http.get(f"{self.realm.stack.url('revoker')}/metrics")).text
        (line,) = [one for one in said.splitlines() if one.startswith("ringfence_cuts_unconfirmed_total ")]
        return float(line.split()[1])

    async def until_grace_is_over(self, before: float) -> None:
        """Wait until the revoker takes the last cut for complete without the gateway's word."""
        async with asyncio.timeout(WITHIN_S):
            while await self.unconfirmed() == before:
                await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def stopped(pid: int) -> AsyncIterator[None]:
    """The process stands still meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.fixture
async def place(own_stack: Stack) -> AsyncIterator[Place]:
    async with place_in(own_stack) as made:
        yield made


@contextlib.asynccontextmanager
async def place_in(stack: Stack) -> AsyncIterator[Place]:
    """A place in a stack, of names of its own."""
    realm = RunningStack(stack, client_settings(stack.environment()))
    scope = [Permission(target=realm.target, verbs=("read",), resources=("path/**",))]
    async with Shop().serving() as shop:
        async with realm.as_operator() as olga:
            for who in ("sam", "maria"):
                key = realm.key("user", realm.name(who))
                await olga.set_user(
                    realm.name(who), name=who, roles=["sponsor"] if who == "sam" else [], keys=[key],
                    entitlements=scope,
                )  # fmt: skip
            backend = {"kind": "jwt", "url": f"http://127.0.0.1:{shop.port}"}
            await olga.set_target(
                realm.target, description="a shop", backend=BackendSettings.model_validate(backend),
                verbs=[VerbFloor(verb="read")], requests=RULES, keys=[],
            )  # fmt: skip
        async with realm.administrator("sam") as sam:
            key = realm.key("agent", realm.agent)
            await sam.register_agent(realm.agent, description="a bot", keys=[key], ceiling=scope)
        async with realm.administrator("maria") as maria:
            realm.task = await maria.assign_task(realm.agent, purpose="a test", scope=scope, ends_in_s=3600)
        async with realm.as_agent() as agent:
            yield Place(realm, agent, shop)


async def ended(place: Place, seen: Seen, lease_id: str) -> None:
    """Wait until the lease is over, by the word of everybody who has one."""

    def over() -> bool:
        return any(one.status in TERMINAL for one in place.realm.leases(place.agent, seen, lease_id))

    await seen.until(over, f"the end of lease {lease_id}")


def decided(seen: Seen) -> list[ActionDecided]:
    return [ActionDecided.model_validate_json(record.value) for record in seen.of(ACTION)]


@dataclass
class Open:
    """Everything that can be under way at once."""

    events: Raw
    socket: Raw
    download: Raw
    upload: Raw
    sending: asyncio.Task[None]

    async def are_cut(self) -> None:
        """Wait until the gateway closed each of them; whatever still comes meanwhile is read and forgotten."""
        async with asyncio.timeout(WITHIN_S):
            for raw in (self.events, self.socket, self.download):
                with contextlib.suppress(ConnectionError):
                    while await raw.reader.read(65536):
                        pass
            with contextlib.suppress(ConnectionError):
                await self.sending


@contextlib.asynccontextmanager
async def under_way(place: Place) -> AsyncIterator[Open]:
    """Server-sent events, a WebSocket, a large download and a large upload, each with something that came through."""
    async with contextlib.AsyncExitStack() as stack:
        events, socket, download, upload = [
            await stack.enter_async_context(place.connected()) for _ in range(4)
        ]
        await events.send(place.request("events"))
        await events.reader.readuntil(b"first\n\r\n")
        await socket.send(place.request("socket", *UPGRADE))
        await socket.reader.readuntil(b"first")
        await download.send(place.request("download"))
        await download.reader.readexactly(1_000_000)
        await upload.send(place.request("upload", "Content-Length: 1000000000000", method="PUT"))

        async def send() -> None:
            while True:
                await upload.send(b"y" * 65536)
                await asyncio.sleep(0.001)

        sending = asyncio.create_task(send())
        try:
            async with asyncio.timeout(WITHIN_S):
                while place.shop.taken < 1_000_000:
                    await asyncio.sleep(0.01)
            yield Open(events, socket, download, upload, sending)
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)


async def none_is_left(place: Place) -> None:
    """Wait until the target sees all of what was under way closed."""
    async with asyncio.timeout(WITHIN_S):
        while not {f"/{one}" for one in ("events", "socket", "download", "upload")} <= place.shop.ended:
            await asyncio.sleep(0.01)


@pytest.mark.timeout(180)
async def test_a_cut_ends_whatever_is_under_way(place: Place) -> None:
    lease = await place.leased()
    async with place.realm.seen(LEASE) as seen, under_way(place) as streams:
        await place.agent.release(lease)
        await streams.are_cut()
        await none_is_left(place)
        await ended(place, seen, lease)
    assert await place.status() == 403


@pytest.mark.timeout(180)
async def test_without_redis_it_goes_on(place: Place) -> None:
    await place.leased()
    async with stopped(place.realm.stack.children()["redis"]):
        for _ in range(int(3 * GRACE_S / 0.25)):
            assert await place.status() == 200
            await asyncio.sleep(0.25)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("number", range(3))
async def test_paused_past_its_grace_and_woken_it_lets_nothing_pass_that_was_cut(
    place: Place, number: int
) -> None:
    """What waits in its sockets when it wakes is decided by what is so by then, and nothing that was open goes on."""
    lease = await place.leased()
    gateway = place.realm.stack.children()["gateway"]
    async with (
        place.realm.seen(LEASE) as seen,
        under_way(place) as streams,
        place.connected() as idle,
        place.connected() as waiting,
    ):
        assert (await idle.ask(place.request("before"))).status == 200
        before = await place.unconfirmed()
        async with stopped(gateway):
            await place.agent.release(lease)
            await idle.send(place.request("after"))
            await waiting.send(place.request("after"))
            await ended(place, seen, lease)
            await place.until_grace_is_over(before)
            place.shop.writers["/events"].write(b"6\r\nafter\n\r\n")
            place.shop.writers["/socket"].write(b"\x81\x05after")
            taken = place.shop.taken
        for raw in (idle, waiting):
            assert (await raw.response()).status in (403, 503)
        assert not any(b"/after" in head for head in place.shop.heads)
        assert await streams.events.ended(), "not even what the target said while it stood still"
        assert await streams.socket.ended()
        await streams.are_cut()
        await none_is_left(place)
        assert place.shop.taken - taken < 1_000_000, "no more of the upload than was on its way already"


@pytest.mark.timeout(180)
async def test_a_target_that_is_away_or_hangs_stops_nobody_else(place: Place) -> None:
    await place.leased()
    async with contextlib.AsyncExitStack() as stack:
        hanging = [await stack.enter_async_context(place.connected()) for _ in range(20)]
        for raw in hanging:
            await raw.send(place.request("hangs"))
        async with asyncio.timeout(WITHIN_S):
            while sum(b"/hangs" in head for head in place.shop.heads) < len(hanging):
                await asyncio.sleep(0.01)
        assert await place.status() == 200
    async with asyncio.timeout(WITHIN_S):
        while "/hangs" not in place.shop.ended:
            await asyncio.sleep(0.01)


@pytest.mark.timeout(180)
async def test_an_agent_that_leaves_in_mid_body_leaves_nothing(place: Place) -> None:
    await place.leased()
    async with place.connected() as raw:
        await raw.send(place.request("upload", "Content-Length: 1000000", method="PUT") + b"y" * 100_000)
        async with asyncio.timeout(WITHIN_S):
            while place.shop.taken < 100_000:
                await asyncio.sleep(0.01)
    async with asyncio.timeout(WITHIN_S):
        while "/upload" not in place.shop.ended:
            await asyncio.sleep(0.01)
    assert place.shop.taken == 100_000
    assert await place.status() == 200


@pytest.mark.timeout(240)
async def test_without_kafka_it_goes_on_until_its_grace_and_tells_of_all_afterwards(place: Place) -> None:
    await place.leased()
    stack = place.realm.stack
    async with place.realm.seen(ACTION) as seen, place.connected() as events:
        await events.send(place.request("events"))
        await events.reader.readuntil(b"first\n\r\n")
        statuses: list[int] = []
        async with stopped(stack.children()["kafka"]):
            statuses.append(await place.status("meanwhile"))
            assert statuses == [200], "nothing on the way needs Kafka"
            async with asyncio.timeout(WITHIN_S):
                while statuses[-1] == 200:
                    statuses.append(await place.status("meanwhile"))
                    await asyncio.sleep(0.05)
            came = len(place.shop.heads)
            assert (statuses[-1], await place.status("meanwhile")) == (503, 503)
            assert len(place.shop.heads) == came
            async with asyncio.timeout(WITHIN_S):
                assert await events.ended(), "what was open is closed with the grace"
        statuses.append(503)

        def all_of_it() -> bool:
            done = [one for one in decided(seen) if one.resource in ("path/meanwhile", None)]
            allowed, denied = [one for one in done if one.allowed], [one for one in done if not one.allowed]
            return len(allowed) == statuses.count(200) and len(denied) >= statuses.count(503)

        await seen.until(all_of_it, f"the decisions of meanwhile: {statuses}")
        await place.until(200)
        ids = [one.action_id for one in decided(seen)]
        assert len(ids) == len(set(ids))
