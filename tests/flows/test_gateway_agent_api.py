"""HTTP access for agents: what is published, what is refused, who fetches which reply."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiokafka.errors import KafkaTimeoutError

from ringfence.dev.processes import free_port
from ringfence.gateway.agent_api.replies import WaitingRequests
from ringfence.gateway.dataplane.limits import Allowance
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey, b64encode
from ringfence.kernel.kafka.producer import Publisher
from ringfence.kernel.kafka.record import partition_of
from ringfence.messages.credential import RequestWithdraw
from ringfence.messages.registry import BackendSettings, TaskEnd
from ringfence.messages.topics import CREDENTIAL_REPLY, CREDENTIAL_REQUEST
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.gateway.certificates import Certificates
from tests.gateway.raw import Response, connected
from tests.support.benches.agent_api_bench import (
    JOSE,
    WIDE,
    ApiOffice,
    Caller,
    Posted,
    agent_desk,
    api_office,
    release,
    request,
    typ_of,
)
from tests.support.benches.gateway_flows import action, gateway, handle
from tests.support.benches.issuer_bench import IssuerBench
from tests.support.world import WITHIN_S, World


@pytest.fixture(scope="module")
async def office(
    kafka: Kafka, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[ApiOffice]:
    async with api_office(kafka, redis_server, tmp_path_factory.mktemp("api")) as found:
        yield found


@pytest.fixture
async def desk(office: ApiOffice) -> IssuerBench:
    return await agent_desk(office)


async def with_socket(office: ApiOffice, desk: IssuerBench) -> Caller:
    """The socket of the desk's task, once it is there."""
    await handle(desk, "read")
    caller = office.over_socket(desk)
    assert caller.socket is not None
    async with asyncio.timeout(WITHIN_S):
        while not caller.socket.exists():
            await asyncio.sleep(0.02)
    return caller


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


# --- what goes well ---------------------------------------------------------------------------------------------------


async def test_over_tcp_a_request_is_published_and_its_reply_fetched(
    office: ApiOffice, desk: IssuerBench
) -> None:
    caller, asked = office.over_tcp(desk), request(desk)
    answer = await caller.post(asked)
    status = f"/ringfence{asked.status}"
    assert (answer.status_code, answer.json()) == (202, {"id": asked.id, "status": status})
    assert answer.headers["location"] == status

    (record,) = await office.published(desk)
    assert (record.value, record.key) == (asked.compact.encode(), desk.bot.name)
    partitions = await office.world.publisher.partitions(CREDENTIAL_REQUEST)
    assert record.partition == partition_of(desk.bot.name, partitions)

    nothing = await caller.get(asked)
    assert (nothing.status_code, nothing.headers["retry-after"]) == (202, "1")
    waiting = asyncio.create_task(caller.get(asked, "?wait=1m"))
    await (await office.played(asked)).issue("s3cret")
    reply = await waiting
    assert (reply.status_code, reply.headers["content-type"]) == (200, "application/jose")
    assert reply.headers["link"] == f'<{status}?after=1>; rel="next"'
    opened = json.loads(asked.reply_key.open(reply.content))
    assert opened["request_id"] == asked.id
    again = await caller.get(asked)
    assert again.content == reply.content, "it is there also for who asks after it came"


async def test_through_the_socket_of_its_task_without_a_proof(office: ApiOffice, desk: IssuerBench) -> None:
    caller, asked = await with_socket(office, desk), request(desk)
    answer = await caller.post(asked)
    assert (answer.status_code, answer.json()) == (202, {"id": asked.id, "status": asked.status})
    assert "dpop-nonce" not in answer.headers
    played = await office.played(asked)

    waiting = asyncio.create_task(caller.get(asked, "?wait=30s"))
    await played.reply(played.decision("approval_required", required=("sponsor",)))
    first = await waiting
    await played.issue()
    second = await caller.get(asked, "?wait=30s&after=1")
    assert (first.status_code, second.status_code) == (200, 200)
    opened = [json.loads(asked.reply_key.open(one.content)) for one in (first, second)]
    assert "lease" not in opened[0]
    assert opened[1]["lease"]
    assert (await caller.get(asked, "?after=2")).status_code == 202


async def test_withdrawals_and_releases_are_published(office: ApiOffice, desk: IssuerBench) -> None:
    caller, asked, given_back = office.over_tcp(desk), request(desk), release(desk)
    await caller.post(asked)
    claims = desk.world.claims(RequestWithdraw, desk.bot, request_id=asked.id)
    withdrawn = await caller.post(sign(claims, desk.bot.key))
    assert (withdrawn.status_code, withdrawn.json()["status"]) == (202, f"/ringfence{asked.status}")
    released = await caller.post(given_back)
    assert (released.status_code, released.json()) == (202, {"id": given_back.id})
    assert "location" not in released.headers
    assert sorted(map(typ_of, await office.published(desk))) == [
        "ringfence.credential.request+jwt",
        "ringfence.request.withdraw+jwt",
        "ringfence.revocation.request+jwt",
    ]


async def test_trust_bundle_is_served_to_any_caller(office: ApiOffice) -> None:
    answer = await Caller(f"http://127.0.0.1:{office.port}/ringfence").call("GET", "/v1/trust")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/jose")
    assert answer.content == office.world.trust.compact


async def test_a_request_goes_on_with_the_trace_of_its_header(office: ApiOffice, desk: IssuerBench) -> None:
    traceparent = f"00-{uuid.uuid4().hex}-00f067aa0ba902b7-01"
    asked = request(desk)
    await office.over_tcp(desk).call(
        "POST", "/v1/requests", asked.compact, {**JOSE, "traceparent": traceparent}
    )
    (record,) = await office.published(desk)
    assert record.traceparent.split("-")[1] == traceparent.split("-")[1]


# --- what is refused --------------------------------------------------------------------------------------------------


def tampered(compact: str) -> str:
    head, body, tail = compact.split(".")
    return f"{head}.{body}.{tail[:-8]}{'A' * 8}"


def long(desk: IssuerBench) -> str:
    return request(desk).compact + "A" * 64 * 1024


def other_domain(desk: IssuerBench) -> str:
    return request(desk, aud="elsewhere.example").compact


def expired(desk: IssuerBench) -> str:
    now_s = int(time.time())
    return request(desk, iat=now_s - 300, exp=now_s - 60).compact


def by_a_stranger(desk: IssuerBench) -> str:
    return request(desk, SigningKey.generate(desk.bot.id)).compact


def by_a_user(desk: IssuerBench) -> str:
    return sign(
        release(desk).claims.model_copy(update={"iss": desk.sam.id, "kind": "revocation"}), desk.sam.key
    )


def of_another_type(desk: IssuerBench) -> str:
    return sign(desk.world.claims(TaskEnd, desk.bot, task_id=desk.task, reason="x"), desk.bot.key)


def a_kill_switch(desk: IssuerBench) -> str:
    return release(desk, kind="revocation").compact


def everything_of_itself(desk: IssuerBench) -> str:
    return release(desk, lease_id=None, selector={"agent_id": desk.bot.name}).compact


def nobody_can_reply_to(desk: IssuerBench) -> str:
    reply_key = request(desk).claims.reply_key.model_copy(update={"x": "AAAA"})
    return request(desk, reply_key=reply_key).compact


REFUSED: list[tuple[Callable[[IssuerBench], str], int, str]] = [
    (lambda desk: tampered(request(desk).compact), 403, "signature_invalid"),
    (by_a_stranger, 403, "key_unknown"),
    (by_a_user, 403, "key_unknown"),
    (other_domain, 400, "aud_unexpected"),
    (expired, 400, "expired"),
    (long, 413, "too_large"),
    (of_another_type, 400, "typ_unexpected"),
    (a_kill_switch, 400, "kind_unexpected"),
    (everything_of_itself, 400, "kind_unexpected"),
    (nobody_can_reply_to, 400, "reply_key_invalid"),
    (lambda desk: "not a message", 400, "not_a_jws"),
    (lambda desk: "", 400, "not_a_jws"),
]


@pytest.mark.parametrize(("made", "status", "why"), REFUSED)
async def test_post_an_agent_may_not_make_is_refused_and_audited(
    office: ApiOffice, desk: IssuerBench, made: Callable[[IssuerBench], str], status: int, why: str
) -> None:
    caller = await with_socket(office, desk)
    before = len(await office.published(desk))
    answer = await caller.post(made(desk))
    assert code(answer) == (status, why)
    assert answer.headers["content-type"] == "application/problem+json"
    over_tcp = await office.over_tcp(desk).post(made(desk))
    assert code(over_tcp) == (status, why)
    assert len(await office.published(desk)) == before
    event = await action(office.world, task_id=desk.task, allowed=False, method="POST")
    assert (event.agent_id, event.reasons[0].code) == (desk.bot.name, why)


async def test_only_application_jose_is_taken(office: ApiOffice, desk: IssuerBench) -> None:
    for headers in (
        {"Content-Type": "application/json"},
        {"Content-Type": "text/plain; x=application/jose"},
        {},
    ):
        answer = await office.over_tcp(desk).call("POST", "/v1/requests", request(desk).compact, headers)
        assert code(answer) == (415, "content_type_unexpected")
    parameter = {"Content-Type": "Application/JOSE; charset=us-ascii"}
    taken = await office.over_tcp(desk).call("POST", "/v1/requests", request(desk).compact, parameter)
    assert taken.status_code == 202
    assert len(await office.published(desk)) == 1


async def test_a_socket_takes_nothing_of_another_task(office: ApiOffice, desk: IssuerBench) -> None:
    caller, other = await with_socket(office, desk), await agent_desk(office)
    before = len(await office.published(desk))
    assert code(await caller.post(request(other))) == (403, "socket_other_agent")
    assert await office.published(other) == []

    own = request(desk)
    task, desk.task = desk.task, await desk.world.task(desk.bot, by=desk.sue, scope=WIDE)
    elsewhere = request(desk)
    assert code(await caller.post(elsewhere)) == (403, "socket_other_task")
    assert (await office.over_tcp(desk).post(elsewhere)).status_code == 202
    withdraw = desk.world.claims(RequestWithdraw, desk.bot, request_id=elsewhere.id)
    assert code(await caller.post(sign(withdraw, desk.bot.key))) == (403, "socket_other_task")
    assert code(await caller.get(elsewhere)) == (404, "request_unknown")
    desk.task = task
    assert (await caller.post(own)).status_code == 202
    assert len(await office.published(desk)) == before + 2


async def test_a_socket_releases_no_lease_of_another_task(office: ApiOffice, desk: IssuerBench) -> None:
    caller = await with_socket(office, desk)
    desk.task = await desk.world.task(desk.bot, by=desk.sue, scope=WIDE)
    async with asyncio.timeout(WITHIN_S):
        # The gateway passes on the release of a lease that it has not read of yet: it is its agent's own.
        while (
            answer := await caller.post(release(desk, lease_id=await handle(desk, "read")))
        ).status_code == 202:
            pass
    assert code(answer) == (403, "socket_other_task")


async def test_over_tcp_the_key_of_the_message_must_prove_itself(
    office: ApiOffice, desk: IssuerBench
) -> None:
    caller, other, asked = office.over_tcp(desk), await agent_desk(office), request(desk)
    url = f"{caller.base}/v1/requests"
    bare = await Caller(caller.base).post(asked)
    assert code(bare) == (401, "proof_missing")
    assert "DPoP" in bare.headers["www-authenticate"]
    caller.nonce = bare.headers["dpop-nonce"]

    async def refused(**dpop: Any) -> None:
        answer = await caller.post(asked, **dpop)
        assert code(answer) == (401, "invalid_dpop_proof")

    await refused(key=other.bot.key)
    await refused(key=SigningKey.generate(desk.bot.id))
    await refused(url=f"{caller.base}/v1/trust")
    await refused(url=url.replace("http:", "https:"))
    await refused(method="GET")
    await refused(now_s=int(time.time()) - 600)
    await refused(access_token=str(uuid.uuid4()))
    nonce_of_nobody = await caller.call(
        "POST", "/v1/requests", asked.compact, {**JOSE, "DPoP": caller.proof("POST", url, nonce="x" * 32)}
    )
    assert code(nonce_of_nobody) == (401, "use_dpop_nonce")
    assert await office.published(desk) == []

    once = caller.proof("POST", url)
    assert (
        await caller.call("POST", "/v1/requests", asked.compact, {**JOSE, "DPoP": once})
    ).status_code == 202
    replayed = await caller.call("POST", "/v1/requests", asked.compact, {**JOSE, "DPoP": once})
    assert code(replayed) == (401, "invalid_dpop_proof")
    assert len(await office.published(desk)) == 1


async def test_on_a_tls_listener_a_certificate_is_the_agents_own_and_proves_no_message(
    office: ApiOffice, desk: IssuerBench, tmp_path: Path
) -> None:
    certificates, port, other = Certificates(tmp_path), free_port(), await agent_desk(office)
    own = {
        "listen": str(port), "spool": tmp_path / "spool", "tls_cert_file": certificates.server_file("127.0.0.1"),
        "tls_client_ca_file": certificates.file, "names": (f"127.0.0.1:{port}",),
    }  # fmt: skip

    def caller(certificate_of: str, key: SigningKey | None) -> Caller:
        context = certificates.trusting()
        context.load_cert_chain(certificates.client(certificate_of))
        return Caller(f"https://127.0.0.1:{port}/ringfence", key, tls=context)

    asked = request(desk)
    async with gateway(office.world, **own):
        assert code(await caller(desk.bot.id, None).post(asked)) == (401, "proof_missing")
        assert code(await caller(other.bot.id, desk.bot.key).post(asked)) == (403, "certificate_other_agent")
        assert await office.published(desk) == []
        mine = caller(desk.bot.id, desk.bot.key)
        assert (await mine.post(asked)).status_code == 202
        assert (await mine.get(asked)).status_code == 202
        assert code(await caller(other.bot.id, desk.bot.key).get(asked)) == (403, "certificate_other_agent")


async def test_tls_listener_shows_a_renewed_certificate_without_a_restart(
    office: ApiOffice, tmp_path: Path
) -> None:
    certificates, port = Certificates(tmp_path), free_port()
    file = certificates.server_file("127.0.0.1")

    async def serial() -> object:
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=certificates.trusting())
        writer.close()
        return writer.get_extra_info("ssl_object").getpeercert()["serialNumber"]

    own = {"listen": str(port), "spool": tmp_path / "spool", "tls_cert_file": file}
    async with gateway(office.world, **own, names=(f"127.0.0.1:{port}",)):
        before = await serial()
        file.write_bytes(certificates.server_file("127.0.0.1").read_bytes())
        async with asyncio.timeout(WITHIN_S):
            while await serial() == before:
                await asyncio.sleep(0.1)


async def test_only_who_posted_a_request_fetches_its_reply(office: ApiOffice, desk: IssuerBench) -> None:
    caller, asked, other = office.over_tcp(desk), request(desk), await agent_desk(office)
    socket = await with_socket(office, desk)
    foreign_socket = await with_socket(office, other)
    await caller.post(asked)
    await (await office.played(asked)).issue()
    assert (await caller.get(asked, "?wait=60s")).status_code == 200
    assert (await socket.get(asked)).status_code == 200, "the socket of its task may as well"

    for stranger in (office.over_tcp(other), foreign_socket, office.over_tcp(desk, SigningKey.generate("x"))):
        answer = await stranger.get(asked)
        assert code(answer) == (404, "request_unknown")
    assert code(await Caller(caller.base).get(asked)) == (401, "proof_missing")
    never = Posted(request(desk).claims, "", asked.reply_key)
    for own in (caller, socket):
        assert code(await own.get(never)) == (404, "request_unknown")


async def test_a_query_that_is_not_understood_is_refused(office: ApiOffice, desk: IssuerBench) -> None:
    caller, asked = office.over_tcp(desk), request(desk)
    await caller.post(asked)
    for query in ("wait=30", "wait=61s", "wait=2m", "wait=", "after=-1", "after=x", "wait=1s&wait=2s", "x=1"):
        assert code(await caller.get(asked, f"?{query}")) == (400, "query_invalid"), query
    assert (await caller.get(asked, "?")).status_code == 202


async def test_unknown_path_or_method_of_the_api_is_refused(office: ApiOffice, desk: IssuerBench) -> None:
    caller = office.over_tcp(desk)
    for method, path in (
        ("GET", "/v1/requests"), ("PUT", "/v1/requests"), ("DELETE", f"/v1/requests/{uuid.UUID(int=1)}"),
        ("POST", "/v1/trust"),
    ):  # fmt: skip
        assert code(await caller.call(method, path)) == (405, "method_unexpected"), (method, path)
    for path in ("/v1/requests/", "/v1/requests/x", "/v1//trust", "/v2/trust"):
        assert code(await caller.call("GET", path)) == (404, "api_path_unknown"), path


# --- once -------------------------------------------------------------------------------------------------------------


async def test_an_agent_sees_its_own_tasks_and_their_leases(office: ApiOffice, desk: IssuerBench) -> None:
    by_socket, over_tcp = await with_socket(office, desk), office.over_tcp(desk)
    for caller in (by_socket, over_tcp):
        answer = await caller.call("GET", f"/v1/tasks/{desk.task}")
        assert answer.status_code == 200, answer.text
        seen = answer.json()
        assert (seen["task_id"], seen["agent_id"], seen["status"]) == (desk.task, desk.bot.name, "active")
        assert seen["scope"] == [one.model_dump(mode="json") for one in WIDE]
        assert [lease["target"] for lease in seen["leases"]] == ["hub"]
    held = (await by_socket.call("GET", f"/v1/tasks/{desk.task}")).json()["leases"]
    await office.over_tcp(desk).post(release(desk, lease_id=held[0]["lease_id"]))
    async with asyncio.timeout(WITHIN_S):
        while (await by_socket.call("GET", f"/v1/tasks/{desk.task}")).json()["leases"]:
            await asyncio.sleep(0.02)


async def test_task_of_another_agent_is_hidden(office: ApiOffice, desk: IssuerBench) -> None:
    other, path = await agent_desk(office), f"/v1/tasks/{desk.task}"
    stranger = office.over_tcp(desk, SigningKey.generate(desk.bot.key.id))
    for caller in (office.over_tcp(other), await with_socket(office, other), stranger):
        answer = await caller.call("GET", path)
        missing = await caller.call("GET", f"/v1/tasks/{uuid.uuid4()}")
        assert code(answer) == code(missing) == (404, "task_unknown")
    without_proof = Caller(f"http://127.0.0.1:{office.port}/ringfence")
    assert code(await without_proof.call("GET", path)) == (401, "proof_missing")
    for_another = await office.over_tcp(desk).call("GET", path, method="POST")
    assert code(for_another) == (401, "invalid_dpop_proof")
    assert code(await office.over_tcp(desk).call("POST", path)) == (405, "method_unexpected")


async def test_message_posted_twice_is_published_once(office: ApiOffice, desk: IssuerBench) -> None:
    caller, asked, at_once = office.over_tcp(desk), request(desk), request(desk)
    first, second = await caller.post(asked), await caller.post(asked)
    assert (first.status_code, first.json()) == (second.status_code, second.json())
    assert first.status_code == 202
    answers = await asyncio.gather(*(office.over_tcp(desk).post(at_once) for _ in range(10)))
    assert {(one.status_code, one.text) for one in answers} == {(202, answers[0].text)}
    assert len(await office.published(desk)) == 2


async def test_another_message_under_the_same_id_is_a_conflict(office: ApiOffice, desk: IssuerBench) -> None:
    caller, asked = office.over_tcp(desk), request(desk)
    other = request(desk, jti=asked.claims.jti, reason="something else")
    assert (await caller.post(asked)).status_code == 202
    assert code(await caller.post(other)) == (409, "id_taken")
    assert len(await office.published(desk)) == 1


@pytest.mark.parametrize("broken", ["refuses", "hangs"])
async def test_without_kafka_nothing_is_acknowledged(
    office: ApiOffice, desk: IssuerBench, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    caller, asked = office.over_tcp(desk), request(desk)
    publisher = office.world.runtimes["gateway"].publisher
    send, back = publisher.send, asyncio.Event()

    async def away(topic: Any, *args: Any, **options: Any) -> Any:
        if topic is not CREDENTIAL_REQUEST:
            return await send(topic, *args, **options)
        if broken == "refuses":
            raise KafkaTimeoutError
        await back.wait()
        return await send(topic, *args, **options)

    monkeypatch.setattr(Publisher, "send", lambda self, *args, **options: away(*args, **options))
    monkeypatch.setattr("ringfence.gateway.agent_api.publications.TIMEOUT_S", 0.2)
    answer = await caller.post(asked)
    assert code(answer) == (503, "kafka_unavailable")
    assert answer.headers["retry-after"] == "1"
    assert await office.published(desk) == []
    monkeypatch.undo()
    back.set()
    assert (await caller.post(asked)).status_code == 202
    assert len(await office.published(desk)) == 1


async def test_after_a_restart_a_reply_is_found_and_a_repeat_changes_nothing(
    world: World, tmp_path: Path, kafka: Kafka, redis_server: RedisServer
) -> None:
    async with api_office(kafka, redis_server, tmp_path / "one") as office:
        desk = await agent_desk(office)
        first, answered, open_one = office.over_tcp(desk), request(desk), request(desk)
        await first.post(answered)
        await first.post(open_one)
        await (await office.played(answered)).issue()
        reply = await first.get(answered, "?wait=60s")
        other, port = await agent_desk(office), free_port()
        # Another process with the same topics: it remembers nothing of what the first one published.
        async with gateway(office.world, listen=str(port), spool=tmp_path / "spool-two"):
            second = Caller(f"http://127.0.0.1:{port}/ringfence", desk.bot.key)
            assert (await second.get(answered)).content == reply.content
            foreign = Caller(second.base, other.bot.key)
            assert code(await foreign.get(answered)) == (404, "request_unknown")
            assert code(await second.get(open_one)) == (404, "request_unknown")
            assert (await second.post(answered)).status_code == 202
            assert len(await office.published(desk)) == 2, "what has a reply was published before"
            assert (await second.post(open_one)).status_code == 202
            assert (await second.get(open_one)).status_code == 202


async def test_a_gateway_that_starts_again_knows_who_waits_for_what(
    office: ApiOffice, desk: IssuerBench, tmp_path: Path
) -> None:
    """Without a repeat of the post, and for nobody else than before."""
    asked, other, before = request(desk), await agent_desk(office), len(await office.published(desk))
    port, spool = free_port(), tmp_path / "spool"
    caller, foreign = (Caller(f"http://127.0.0.1:{port}/ringfence", one.bot.key) for one in (desk, other))
    async with gateway(office.world, listen=str(port), spool=spool):
        assert (await caller.post(asked)).status_code == 202
    async with gateway(office.world, listen=str(port), spool=spool):
        assert (await caller.get(asked)).status_code == 202
        assert code(await foreign.get(asked)) == (404, "request_unknown")
        assert (await caller.post(asked)).status_code == 202
        assert len(await office.published(desk)) == before + 1, "the journal knows that Kafka has it"
        changed = request(desk, jti=asked.claims.jti, reason="something else")
        assert code(await caller.post(changed)) == (409, "id_taken")
        waiting = asyncio.create_task(caller.get(asked, "?wait=60s"))
        await (await office.played(asked)).issue()
        assert (await waiting).status_code == 200


async def test_a_repeat_whose_time_is_over_counts_where_there_is_a_reply(
    office: ApiOffice, desk: IssuerBench
) -> None:
    """As of a request that waits for a person for longer than it is valid, at a gateway that has forgotten it."""
    now_s = int(time.time())
    held, never_posted = (request(desk, iat=now_s - 900, exp=now_s - 600) for _ in range(2))
    head = b64encode(json.dumps({"kid": held.id}).encode()).encode()
    await office.world.send(CREDENTIAL_REPLY, desk.bot.name, head + b".a.b.c.d")
    caller, before = office.over_tcp(desk), len(await office.published(desk))
    async with asyncio.timeout(WITHIN_S):
        while (answer := await caller.post(held)).status_code != 202:
            assert code(answer) == (400, "expired")
    assert (await caller.get(held)).status_code == 200
    assert code(await caller.post(never_posted)) == (400, "expired")
    assert len(await office.published(desk)) == before, "nothing of it is published again"


# --- limits -----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def strict(office: ApiOffice, folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    """The URL of another gateway, with limits that a test reaches."""
    wiring, port = "ringfence.gateway.app", free_port()
    monkeypatch.setattr(f"{wiring}.POSTS", Allowance(per_second_each=0.001, burst_each=3))
    monkeypatch.setattr(f"{wiring}.WAITING_PER_AGENT", 1)
    async with gateway(office.world, listen=str(port), spool=folder / "spool"):
        yield f"http://127.0.0.1:{port}/ringfence"


async def test_a_flood_of_one_agent_is_stopped_and_another_is_served(
    office: ApiOffice, desk: IssuerBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = await agent_desk(office)
    async with strict(office, tmp_path, monkeypatch) as base:
        flooding = [Caller(base, desk.bot.key).post(request(desk)) for _ in range(12)]
        answers = await asyncio.gather(*flooding)
        refused = [one for one in answers if one.status_code == 429]
        assert len(refused) == 9
        assert {code(one) for one in refused} == {(429, "too_many_requests")}
        assert int(refused[0].headers["retry-after"]) >= 1
        event = await action(office.world, agent_id=desk.bot.name, allowed=False)
        assert event.reasons[0].code == "too_many_requests"
        stranger = SigningKey.generate(other.bot.id)
        for _ in range(5):
            assert code(await Caller(base, stranger).post(request(other, stranger))) == (403, "key_unknown")
        assert (await Caller(base, other.bot.key).post(request(other))).status_code == 202
    assert len(await office.published(desk)) == 3


async def test_waiting_reply_request_does_not_block_other_callers(
    office: ApiOffice, desk: IssuerBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even in a data plane that lets one request of an address be in progress at a time."""
    monkeypatch.setattr(
        "ringfence.gateway.dataplane.listeners.Allowance", partial(Allowance, concurrent_each=1)
    )
    other, asked, waits, place = (
        await agent_desk(office),
        request(desk),
        asyncio.Event(),
        WaitingRequests.place,
    )

    def told(self: WaitingRequests, agent_id: str, sender: str) -> AbstractContextManager[None]:
        waits.set()
        return place(self, agent_id, sender)

    monkeypatch.setattr(WaitingRequests, "place", told)
    async with strict(office, tmp_path, monkeypatch) as base:
        caller, theirs = Caller(base, desk.bot.key), request(other)
        await caller.post(asked)
        first = asyncio.create_task(Caller(base, desk.bot.key).get(asked, "?wait=60s"))
        await asyncio.wait_for(waits.wait(), WITHIN_S)
        third = await caller.get(asked, "?wait=1s")
        assert code(third) == (429, "waiting_limit")
        assert third.headers["retry-after"] == "1"
        assert (await caller.get(asked)).status_code == 202, "who does not wait takes no place"
        assert (await Caller(base, other.bot.key).post(theirs)).status_code == 202
        assert (await Caller(base, other.bot.key).get(theirs, "?wait=1s")).status_code == 202
        await (await office.played(asked)).issue()
        assert (await first).status_code == 200
        assert (await caller.get(asked, "?wait=1s&after=1")).status_code == 202


# --- by whatever name it is called ------------------------------------------------------------------------------------


async def raw(office: ApiOffice, head: str, body: str = "") -> Response:
    async with connected(office.port) as connection:
        return await connection.ask(f"{head}\r\n\r\n{body}".encode())


def problem(answer: Response) -> tuple[int, str]:
    return answer.status, json.loads(answer.body)["code"]


async def test_agent_api_answers_at_its_host_and_path_only(office: ApiOffice) -> None:
    own = f"127.0.0.1:{office.port}"
    for line, host in [
        ("GET http://ringfence/v1/trust", "ringfence"),
        ("GET /v1/trust", "ringfence"),
        ("GET /v1/trust", "RingFence:80"),
        ("GET /ringfence/v1/trust", own),
    ]:
        answer = await raw(office, f"{line} HTTP/1.1\r\nHost: {host}")
        assert (answer.status, answer.body) == (200, office.world.trust.compact), (line, host)
    for line, host, refused in [
        ("GET http://ringfence/v1/trust", own, (400, "host_disagrees")),
        (f"GET http://{own}/ringfence/v1/trust", "ringfence", (400, "host_disagrees")),
        ("GET /v1/trust", "ringfence.", (400, "host_invalid")),
        ("GET /v1/trust", "x@ringfence", (400, "host_invalid")),
        ("GET /v1/trust", "ringfence:8080", (421, "host_unknown")),
        ("GET /ringfence/v1/trust", "elsewhere.test", (421, "host_unknown")),
        ("GET /RINGFENCE/v1/trust", own, None),
        ("GET /%72ingfence/v1/trust", own, None),
        ("GET //ringfence/v1/trust", own, None),
        ("GET /hub/../ringfence/v1/trust", own, None),
        ("GET /ringfence", own, (404, "target_missing")),
    ]:
        answer = await raw(office, f"{line} HTTP/1.1\r\nHost: {host}")
        assert answer.status >= 400, (line, host)
        assert refused is None or problem(answer) == refused, (line, host)


async def test_a_body_is_framed_in_one_way_or_refused(office: ApiOffice, desk: IssuerBench) -> None:
    caller = office.over_tcp(desk)
    await Caller(caller.base).post(request(desk))  # for a nonce
    bare = await Caller(caller.base).post("x")
    caller.nonce = bare.headers["dpop-nonce"]

    async def posted(framing: str, body: str) -> Response:
        proof = caller.proof("POST", f"{caller.base}/v1/requests")
        head = (
            f"POST /ringfence/v1/requests HTTP/1.1\r\nHost: 127.0.0.1:{office.port}\r\nDPoP: {proof}\r\n"
            f"Content-Type: application/jose\r\n{framing}"
        )
        return await raw(office, head, body)

    text = request(desk).compact
    chunks = f"{len(text[:100]):x}\r\n{text[:100]}\r\n{len(text[100:]):x}\r\n{text[100:]}\r\n0\r\n\r\n"
    assert (await posted("Transfer-Encoding: chunked", chunks)).status == 202
    both = f"Transfer-Encoding: chunked\r\nContent-Length: {len(chunks)}"
    assert problem(await posted(both, chunks)) == (400, "malformed_http")
    extension = chunks.replace("\r\n", ";x\r\n", 1)
    assert problem(await posted("Transfer-Encoding: chunked", extension)) == (400, "malformed_http")
    twice = f"Content-Length: {len(text)}\r\nContent-Length: {len(text)}"
    assert problem(await posted(twice, text)) == (400, "malformed_http")
    endless = f"{70_000:x}\r\n{'x' * 70_000}\r\n0\r\n\r\n"
    assert problem(await posted("Transfer-Encoding: chunked", endless)) == (413, "too_large")
    assert len(await office.published(desk)) == 1


async def test_pipelined_request_after_an_api_call_is_handled_separately(office: ApiOffice) -> None:
    own = f"Host: 127.0.0.1:{office.port}\r\n\r\n"
    async with connected(office.port) as connection:
        await connection.send(
            f"GET /ringfence/v1/trust HTTP/1.1\r\n{own}GET /ringfence/v1/nothing HTTP/1.1\r\n{own}".encode()
        )
        assert (await connection.response()).status == 200
        assert problem(await connection.response()) == (404, "api_path_unknown")


async def test_through_connect_the_gateways_ca_covers_the_name(office: ApiOffice, desk: IssuerBench) -> None:
    context, asked = ssl.create_default_context(cafile=str(office.ca)), request(desk)
    proxy = f"http://127.0.0.1:{office.port}"
    caller = Caller("https://ringfence", desk.bot.key, proxy=proxy, tls=context)
    answer = await caller.post(asked)
    assert (answer.status_code, answer.json()["status"]) == (202, asked.status)
    for port in (80, 8443):
        refused = await raw(office, f"CONNECT ringfence:{port} HTTP/1.1\r\nHost: ringfence:{port}")
        assert refused.status in (403, 407)


async def test_through_http_proxy_by_absolute_form(office: ApiOffice, desk: IssuerBench) -> None:
    caller = Caller("http://ringfence", desk.bot.key, proxy=f"http://127.0.0.1:{office.port}")
    asked = request(desk)
    answer = await caller.post(asked)
    assert (answer.status_code, answer.json()["status"]) == (202, asked.status)


@pytest.mark.tools
async def test_curl_is_enough(office: ApiOffice, desk: IssuerBench, tmp_path: Path) -> None:
    """As docs/http-access.md has it: a signed request in a file, and the socket of its task."""
    socket, asked, file = (await with_socket(office, desk)).socket, request(desk), tmp_path / "request.jws"
    file.write_text(asked.compact)

    async def curl(*arguments: str) -> bytes:
        process = await asyncio.create_subprocess_exec(
            "curl", "-sS", "--fail-with-body", "--unix-socket", str(socket), *arguments,
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, _ = await asyncio.wait_for(process.communicate(), WITHIN_S)
        assert process.returncode == 0, out
        return out

    posted = await curl(
        "-H", "Content-Type: application/jose", "--data-binary", f"@{file}", "http://ringfence/v1/requests"
    )
    status = json.loads(posted)["status"]
    waiting = asyncio.create_task(curl(f"http://ringfence{status}?wait=60s"))
    await (await office.played(asked)).issue("s3cret")
    assert json.loads(asked.reply_key.open(await waiting))["request_id"] == asked.id
    assert await curl("http://ringfence/v1/trust") == office.world.trust.compact


# --- the name is reserved ---------------------------------------------------------------------------------------------


async def test_a_target_of_that_name_from_before_stays_and_takes_no_calls(
    office: ApiOffice, desk: IssuerBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record is as an older registry accepted it: readers go on to accept it, and the API has the host."""
    world = office.world
    backend = BackendSettings.model_validate({"kind": "jwt", "url": "https://ringfence"})
    monkeypatch.setattr("ringfence.registry.domain.reserved_name", lambda target_id, backend: None)
    await world.target("ringfence", backend=backend)
    entry = world.runtimes["gateway"]
    assert entry.unready() == []
    own = f"127.0.0.1:{office.port}"
    for line, host in [("GET http://ringfence/v1/trust", "ringfence"), ("GET /ringfence/v1/trust", own)]:
        answer = await raw(office, f"{line} HTTP/1.1\r\nHost: {host}")
        assert (answer.status, answer.body) == (200, world.trust.compact)
    answer = await raw(office, "GET http://ringfence/a HTTP/1.1\r\nHost: ringfence")
    assert problem(answer) == (404, "api_path_unknown")


async def test_switched_off_there_is_no_such_host(
    office: ApiOffice, desk: IssuerBench, tmp_path: Path
) -> None:
    port = free_port()
    async with gateway(office.world, listen=str(port), agent_api=False, spool=tmp_path / "spool"):
        caller = Caller(f"http://127.0.0.1:{port}/ringfence", desk.bot.key)
        answer = await caller.post(request(desk))
        assert answer.status_code in (401, 403)
        async with connected(port) as connection:
            by_host = await connection.ask(
                b"GET http://ringfence/v1/trust HTTP/1.1\r\nHost: ringfence\r\n\r\n"
            )
        assert by_host.status in (401, 403)
    assert await office.published(desk) == []
