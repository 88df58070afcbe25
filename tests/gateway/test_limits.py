"""What one sender takes it does not take from the others; what stands idle is closed; nothing grows."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket

import psutil
import pytest

from ringfence.gateway.dataplane.exchange import Timeouts
from ringfence.gateway.dataplane.limits import Allowance, SenderLimits, sender_at
from ringfence.gateway.dataplane.stream import DeadlineTimer, PeerTimeoutError, Stream
from ringfence.kernel.http1.head import RequestRefusedError
from tests.gateway.conftest import placed
from tests.gateway.raw import Raw, connected, connected_unix
from tests.gateway.target import OK, Reader, Target, Writer

GET = b"GET /api/files/a HTTP/1.1\r\nHost: gateway.test\r\n\r\n"


class Seconds:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_rate_fills_up_again() -> None:
    seconds = Seconds()
    limits = SenderLimits(Allowance(per_second_each=2, burst_each=3), seconds)
    for _ in range(3):
        limits.charge("a")
    with pytest.raises(RequestRefusedError) as refused:
        limits.charge("a")
    assert (refused.value.status, refused.value.headers["Retry-After"]) == (429, "1")
    limits.charge("b")
    seconds.now += 0.5
    limits.charge("a")
    with pytest.raises(RequestRefusedError):
        limits.charge("a")
    seconds.now += 100
    for _ in range(3):
        limits.charge("a")
    with pytest.raises(RequestRefusedError):
        limits.charge("a")


def test_to_open_tls_counts_for_more() -> None:
    seconds = Seconds()
    limits = SenderLimits(Allowance(per_second_each=10, burst_each=25), seconds)
    assert [limits.begin_handshake("address:a") for _ in range(3)] == [True, True, False]
    assert (limits.connections, limits.handshakes) == (2, 2)
    limits.charge("address:b", 20)
    with pytest.raises(RequestRefusedError):
        limits.charge("address:b", 20)
    limits.charge("address:b")
    seconds.now += 1
    limits.charge("address:b", 10)
    SenderLimits(Allowance(burst_each=1), seconds).charge(
        "address:a", 10
    )  # however little there can be at once


def test_one_network_of_ipv6_is_one_sender() -> None:
    assert sender_at("2001:db8::1") == sender_at("2001:db8::ffff:1") == sender_at("2001:db8::1%eth0")
    assert sender_at("2001:db8::1") != sender_at("2001:db8:0:1::1")
    assert sender_at("::ffff:192.0.2.1") == sender_at("192.0.2.1") != sender_at("192.0.2.2")


def test_many_anonymous_addresses_leave_connections_for_known_senders() -> None:
    limits = SenderLimits(Allowance(connections=8, connections_each=2), Seconds())
    came = [limits.open_connection(sender_at(f"192.0.2.{number}")) for number in range(8)]
    assert came == [True] * 6 + [False] * 2
    assert [limits.open_connection(task) for task in ("task:a", "task:b", "task:c")] == [True, True, False]
    limits.close_connection(sender_at("192.0.2.0"))
    assert limits.open_connection(sender_at("192.0.2.7"))
    assert limits.connections == 8


def test_usage_of_an_idle_sender_is_forgotten() -> None:
    seconds = Seconds()
    limits = SenderLimits(Allowance(per_second_each=100, burst_each=100), seconds)
    for number in range(10_001):
        limits.charge(f"address:{number}")
    seconds.now += 2
    limits.charge("one more")
    assert len(limits._usages) == 1


def test_requests_at_a_time_are_counted_by_sender() -> None:
    limits = SenderLimits(Allowance(concurrent_each=2), Seconds())
    limits.begin("a")
    second = limits.begin("a")
    with pytest.raises(RequestRefusedError):
        limits.begin("a")
    limits.begin("b")
    second.end()
    limits.begin("a")


async def test_the_429_of_a_rate_says_when_to_come_back() -> None:
    async with placed(allowance=Allowance(per_second_each=0.001, burst_each=2)) as place:
        async with place.connected() as raw:
            assert [(await raw.ask(GET)).status for _ in range(2)] == [200, 200]
            response = await raw.ask(GET)
            assert (response.status, response.value("retry-after")) == (429, "1000")
        assert len(place.gate.records) == 2


async def test_requests_at_a_time() -> None:
    go = asyncio.Event()

    async def script(reader: Reader, writer: Writer) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            await go.wait()
            writer.write(OK)

    async with contextlib.AsyncExitStack() as stack:
        allowance = Allowance(concurrent_each=2)
        place = await stack.enter_async_context(placed(Target(script=script), allowance=allowance))
        one, two, three = [await stack.enter_async_context(place.connected()) for _ in range(3)]
        await one.send(GET)
        await two.send(GET)
        while place.target.open < 2:
            await asyncio.sleep(0.01)
        assert (await three.ask(GET)).status == 429
        go.set()
        assert [(await raw.response()).status for raw in (one, two)] == [200, 200]
        assert (await three.ask(GET)).status == 200


async def test_an_agent_has_its_limit_wherever_it_comes_from(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    go, folder = asyncio.Event(), tmp_path_factory.mktemp("s")

    async def script(reader: Reader, writer: Writer) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            await go.wait()
            writer.write(OK)

    async with contextlib.AsyncExitStack() as stack:
        allowance = Allowance(concurrent_each=2)
        place = await stack.enter_async_context(placed(Target(script=script), allowance=allowance))

        async def through(task: str) -> Raw:
            await place.plane.listen_for_task(folder / task, task)
            return await stack.enter_async_context(connected_unix(str(folder / task)))

        one, two, three = [await through(task) for task in ("a", "b", "c")]
        await one.send(GET)
        await two.send(GET)
        while place.target.open < 2:
            await asyncio.sleep(0.01)
        response = await three.ask(GET)
        assert (response.status, b"too_many_requests" in response.body) == (429, True)
        assert [verdict.allowed for _, _, verdict in place.gate.records] == [True, True, False]
        await three.send(GET.replace(b"\r\n\r\n", b"\r\nX-Ringfence-Handle: another\r\n\r\n"))
        while place.target.open < 3:
            await asyncio.sleep(0.01)
        go.set()
        assert [(await raw.response()).status for raw in (one, two, three)] == [200, 200, 200]
        assert (await three.ask(GET)).status == 200


async def test_an_agent_has_its_rate_wherever_it_comes_from(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("s")
    async with placed(allowance=Allowance(per_second_each=0.001, burst_each=2)) as place:
        statuses = []
        for task in ("a", "b", "c"):
            await place.plane.listen_for_task(folder / task, task)
            async with connected_unix(str(folder / task)) as raw:
                statuses.append((await raw.ask(GET)).status)
        assert statuses == [200, 200, 429]
        assert [verdict.allowed for _, _, verdict in place.gate.records] == [True, True, False]


async def test_one_address_has_so_many_connections() -> None:
    async with (
        placed(allowance=Allowance(connections_each=3)) as limited,
        contextlib.AsyncExitStack() as stack,
    ):
        held = [await stack.enter_async_context(limited.connected()) for _ in range(3)]
        for raw in held:
            assert (await raw.ask(GET)).status == 200
        async with limited.connected() as raw:
            assert await raw.ended()
        held[0].writer.transport.abort()
        while limited.plane.limits.connections == 3:
            await asyncio.sleep(0.01)
        async with limited.connected() as raw:
            assert (await raw.ask(GET)).status == 200


@pytest.mark.parametrize("path", [b"/", b"/api/secrets"])
async def test_client_that_reads_no_responses_gets_no_more(path: bytes) -> None:
    """Refused by the plane or denied by the core: what nobody takes is not heaped up."""
    loop, asked = asyncio.get_running_loop(), b"GET " + path + b" HTTP/1.1\r\nHost: gateway.test\r\n\r\n"
    async with placed(timeouts=Timeouts(piece_s=1.0)) as place:
        with socket.create_connection(("127.0.0.1", place.port)) as client:
            client.setblocking(False)
            sending = loop.create_task(loop.sock_sendall(client, asked * 100_000))
            heaped = 0
            while not place.plane.connections:
                await asyncio.sleep(0.005)
            while place.plane.connections and heaped < 1024 * 1024:
                sizes = [
                    one.transport.get_write_buffer_size() for one in place.plane._deadline_timer._streams
                ]
                heaped = max([heaped, *sizes])
                await asyncio.sleep(0.005)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        assert heaped < 1024 * 1024


async def test_many_requests_at_once_are_answered_in_turns_with_others() -> None:
    refused = b"GET /api/secrets HTTP/1.1\r\nHost: gateway.test\r\n\r\n"
    async with placed() as place, place.connected() as greedy, place.connected() as modest:
        await greedy.send(refused * 1000)
        await modest.send(GET)
        assert (await modest.response()).status == 200
        ahead = sum(attempt.target == "/secrets" for _, attempt, _ in place.gate.records)
        assert ahead < 900, "all of the one before any of the other"
        for _ in range(1000):
            assert (await greedy.response()).status == 403


async def test_slow_clients_do_not_block_others() -> None:
    timeouts = Timeouts(head_s=0.5, idle_s=0.5, piece_s=0.5)
    async with placed(timeouts=timeouts) as place, contextlib.AsyncExitStack() as stack:
        slow = [await stack.enter_async_context(place.connected()) for _ in range(200)]
        for number, raw in enumerate(slow):
            await raw.send(
                (
                    b"",
                    b"GET /api",
                    GET[:-2],
                    b"PUT /api/files/a HTTP/1.1\r\nHost: gateway.test\r\nContent-Length: 9\r\n\r\nx",
                )[number % 4]
            )
        async with place.connected() as raw:
            assert (await raw.ask(GET)).status == 200

        async def trickle(raw: object) -> None:
            with contextlib.suppress(OSError, RuntimeError):  # what writing to a closed connection raises
                for byte in b"X-A: " + b"a" * 1000:
                    raw.writer.write(bytes([byte]))  # type: ignore[attr-defined]
                    await asyncio.sleep(0.05)
                pytest.fail("it was let go on to its end")

        trickling = asyncio.create_task(trickle(slow[2]))
        for raw in slow:
            while await raw.reader.read(65536):
                pass
        trickling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await trickling
        while place.plane.connections:
            await asyncio.sleep(0.01)


async def test_data_at_the_last_moment_does_not_bypass_the_timeout() -> None:
    loop, stream = asyncio.get_running_loop(), Stream()
    stream.deadline = loop.time()
    waiting = asyncio.create_task(stream.read_more())
    await asyncio.sleep(0)
    stream.data_received(b"G")
    stream.expire()  # who waited was just told of the byte
    await waiting
    patience = DeadlineTimer(every_s=0.01)
    patience.watch(stream)
    patience.start()
    with pytest.raises(PeerTimeoutError):
        await stream.read_more()
    patience.stop()


async def test_a_flood_of_connections_grows_nothing() -> None:
    async with placed(allowance=Allowance(connections_each=20)) as place:
        for _ in range(20):
            async with contextlib.AsyncExitStack() as stack:
                for _ in range(50):
                    with contextlib.suppress(OSError):
                        await stack.enter_async_context(connected(place.port))
        while place.plane.connections:
            await asyncio.sleep(0.01)
        assert place.plane.limits.connections == 0
        async with place.connected() as raw:
            assert (await raw.ask(GET)).status == 200


async def test_many_requests_grow_neither_connections_nor_memory() -> None:
    allowance = Allowance(per_second_each=1e9, burst_each=10**9)
    async with placed(allowance=allowance) as place:
        place.gate.keeps_records = False

        async def ask(count: int) -> None:
            async with place.connected() as raw:
                for _ in range(count):
                    await raw.send(GET)
                    await raw.reader.readuntil(b"\r\n\r\nok")

        async def round_of_many() -> int:
            await asyncio.gather(*(ask(250) for _ in range(8)))
            while place.plane.connections:
                await asyncio.sleep(0.01)
            place.target.requests.clear()
            for seen in place.target.raw:
                seen.clear()
            gc.collect()
            return len(gc.get_objects())

        await round_of_many()
        before, sockets = await round_of_many(), len(psutil.Process().net_connections())
        after = [await round_of_many() for _ in range(3)][-1]
        assert after - before < 500
        assert len(psutil.Process().net_connections()) <= sockets
        assert place.plane.upstreams.open <= 8
        assert place.gate.watching[place.gate.leases["api"].lease_id] == []


async def test_trouble_grows_neither_files_nor_objects() -> None:
    """Refused, malformed, broken off by the agent and by the target, cut, no TLS: whatever happens, nothing is left."""
    upload = b"PUT /api/files/a HTTP/1.1\r\nHost: gateway.test\r\nContent-Length: 99999\r\n\r\nx"
    connect = b"CONNECT api.test:443 HTTP/1.1\r\nHost: api.test:443\r\n\r\n"

    async def script(reader: Reader, writer: Writer) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if b"/files/leaves" in head:
            return
        half = OK.replace(b"Content-Length: 2", b"Content-Length: 9") if b"/files/half" in head else OK
        writer.write(half)
        await reader.read(1)

    allowance = Allowance(per_second_each=1e9, burst_each=10**9)
    async with placed(Target(script=script), allowance=allowance) as place:
        place.gate.keeps_records = False
        process = psutil.Process()

        async def trouble(number: int) -> None:
            async with place.connected() as raw:
                match number % 8:
                    case 0:
                        assert (await raw.ask(GET)).status == 200
                    case 1:
                        assert (await raw.ask(GET.replace(b"files", b"secrets"))).status == 403
                    case 2:
                        assert (await raw.ask(GET.replace(b"Host:", b"Host :"))).status == 400
                    case 3:
                        await raw.send(upload)
                    case 4:
                        await raw.send(GET.replace(b"/files/a", b"/files/half"))
                        await raw.reader.readuntil(b"ok")
                    case 5:
                        assert (await raw.ask(GET.replace(b"/files/a", b"/files/leaves"))).status == 502
                    case 6:
                        await raw.send(connect)
                        await raw.reader.readuntil(b"\r\n\r\n")
                        await raw.send(b"no hello")
                        await raw.ended()
                    case _:
                        await raw.send(GET.replace(b"/files/a", b"/files/half"))
                        await raw.reader.readuntil(b"ok")
                        place.gate.end("api")
                        await raw.ended()

        async def round_of_trouble() -> tuple[int, int]:
            turn = asyncio.Semaphore(8)

            async def one(number: int) -> None:
                async with turn:
                    await trouble(number)

            await asyncio.gather(*(one(number) for number in range(400) if number % 8 != 7))
            for _ in range(25):
                await trouble(7)  # which ends everything that goes on under the lease
            while place.plane.connections or place.plane.limits.connections:
                await asyncio.sleep(0.01)
            place.plane.upstreams.close()
            while place.target.open:
                await asyncio.sleep(0.01)
            place.target.raw.clear()
            place.blocked.clear()
            gc.collect()
            return process.num_fds(), len(gc.get_objects())

        await round_of_trouble()
        files, objects = await round_of_trouble()
        later = [await round_of_trouble() for _ in range(3)][-1]
        assert later[0] <= files
        assert later[1] - objects < 500
        assert place.gate.watching[place.gate.leases["api"].lease_id] == []
