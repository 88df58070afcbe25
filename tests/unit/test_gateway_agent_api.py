"""The bounds of the HTTP API for agents: what is remembered, for whom, and how much of it."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import orjson
import pytest

from ringfence.gateway.agent_api.publications import (
    KEPT_S,
    JournalEntry,
    PostedMessage,
    PublicationJournal,
    Publications,
)
from ringfence.gateway.agent_api.replies import SealedReplies, WaitingRequests
from ringfence.gateway.dataplane.request_reader import ApiTarget, ListenerContext, read_api_target
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.jwe import ReplyKey
from ringfence.kernel.crypto.jws import Signed, sign
from ringfence.kernel.crypto.keys import SigningKey, b64encode
from ringfence.kernel.http1.head import RequestRefusedError, parse_request
from ringfence.kernel.kafka.producer import Publisher
from ringfence.kernel.kafka.record import Outbound, Received
from ringfence.messages.base import Permission
from ringfence.messages.credential import CredentialRequest
from ringfence.messages.lease import RevocationRequest
from ringfence.messages.registry import BackendSettings
from ringfence.messages.topics import CREDENTIAL_REPLY
from ringfence.model.target_settings import reserved_name

NOW_S = 1_790_000_000
KEY = SigningKey.generate("spiffe://test.example/agent/bot")


def reply(id: str, size: int = 100, agent: str | None = "bot") -> Received:
    """A record of `credential.reply` about a request."""
    head = b64encode(orjson.dumps({"kid": id})).encode()
    return Received(CREDENTIAL_REPLY, "reply", 0, 0, 0, agent, head + b"." + b"x" * (size - len(head) - 1))


def ids(count: int) -> list[str]:
    return [str(uuid.uuid4()) for _ in range(count)]


def never(callback: Callable[[], None]) -> Callable[[], None]:
    return lambda: None


def test_replies_are_kept_in_order_and_found_by_agent_and_request() -> None:
    replies, (one, other) = SealedReplies(), ids(2)
    first, second = reply(one, 150), reply(one, 160)
    replies.on_records([first, reply(other), second, reply(one, agent="else")])
    assert [replies.get("bot", one, n) for n in range(3)] == [first.value, second.value, None]
    assert replies.has("else", one)
    assert not replies.has("else", other)


def test_malformed_reply_is_skipped() -> None:
    replies, id = SealedReplies(), ids(1)[0]
    for value in (b"", b"{}", b"a.b", b"\xff.a", orjson.dumps({"kid": id})):
        replies.on_records([reply(id)._replace(value=value)])
    replies.on_records([reply("not-a-uuid"), reply(id, agent=None)])
    assert not replies.has("bot", id)
    assert not replies.has("bot", "not-a-uuid")


def test_one_agent_cannot_push_out_the_replies_of_others() -> None:
    replies, mine, theirs = SealedReplies(bytes_per_agent=1000, bytes_in_total=10_000), ids(50), ids(3)
    replies.on_records([reply(id, agent="other") for id in theirs])
    replies.on_records([reply(id) for id in mine])
    assert [replies.has("bot", id) for id in mine] == [False] * 40 + [True] * 10
    assert all(replies.has("other", id) for id in theirs)


def test_all_agents_together_have_a_bound() -> None:
    replies, all_ids = SealedReplies(bytes_per_agent=1000, bytes_in_total=1000), ids(20)
    replies.on_records([reply(id, agent=f"a{n}") for n, id in enumerate(all_ids)])
    assert [replies.has(f"a{n}", id) for n, id in enumerate(all_ids)] == [False] * 10 + [True] * 10


async def test_a_wait_ends_with_its_reply_alone() -> None:
    replies, (one, other) = SealedReplies(), ids(2)
    waiting = asyncio.create_task(replies.next("bot", one, 1, wait_s=60, on_disconnect=never))
    await asyncio.sleep(0)
    replies.on_records([reply(one), reply(other)])
    await asyncio.sleep(0)
    assert not waiting.done(), "the first reply is there, and the second was asked for"
    second = reply(one, 160)
    replies.on_records([second])
    assert await waiting == second.value


async def test_a_wait_ends_when_the_agent_goes() -> None:
    replies, gone = SealedReplies(), list[Callable[[], None]]()

    def on_disconnect(callback: Callable[[], None]) -> Callable[[], None]:
        gone.append(callback)
        return lambda: None

    waiting = asyncio.create_task(replies.next("bot", ids(1)[0], 0, wait_s=60, on_disconnect=on_disconnect))
    await asyncio.sleep(0)
    gone[0]()
    assert await waiting is None


async def test_a_wait_without_a_reply_ends_with_its_time_and_leaves_nothing() -> None:
    replies = SealedReplies()
    assert await replies.next("bot", ids(1)[0], 0, wait_s=0.01, on_disconnect=never) is None
    assert not replies._waiting
    assert not replies._arrivals


def test_places_to_wait_are_limited_for_each_agent_each_sender_and_all() -> None:
    waiting = WaitingRequests(per_agent=1, per_sender=2, in_total=3)
    with waiting.place("a", "here"):
        with pytest.raises(RequestRefusedError) as refused, waiting.place("a", "there"):
            pass
        assert (refused.value.status, refused.value.code) == (429, "waiting_limit")
        with waiting.place("b", "here"):
            with pytest.raises(RequestRefusedError), waiting.place("c", "here"):
                pass
            with waiting.place("c", "there"), pytest.raises(RequestRefusedError), waiting.place("d", "there"):
                pass
    with waiting.place("a", "here"):
        pass
    assert not waiting._agents
    assert not waiting._senders


# --- publications -----------------------------------------------------------------------------------------------------


class Recorder(Publisher):
    """Takes messages, and acknowledges them."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str]] = []

    async def send(self, topic: Any, type: str, record: Outbound, **_: Any) -> Any:
        self.sent.append((record.key, str(record.value)))
        acknowledged: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        acknowledged.set_result(None)
        return acknowledged


def posted(agent: str = "bot", **fields: Any) -> PostedMessage:
    now_s = int(time.time())
    given = {
        "iss": f"spiffe://test.example/agent/{agent}", "aud": "test.example", "iat": now_s, "exp": now_s + 60,
        "jti": str(uuid.uuid4()), "task_id": str(uuid.uuid4()), "ttl_s": 60, "reason": "x",
        "scope": (Permission(target="t", verbs=("read",), resources=("a",)),), "reply_key": ReplyKey().public,
    }  # fmt: skip
    claims = CredentialRequest(**{**given, **fields})
    return PostedMessage(
        Signed(claims, sign(claims, KEY)), message_id(claims.iss, claims.jti), agent, KEY.kid
    )


async def test_the_memory_of_one_agent_is_bounded_and_so_is_that_of_all() -> None:
    recorder = Recorder()
    publications = Publications(recorder, per_agent=2, in_total=4)
    other, mine = posted("other"), [posted() for _ in range(5)]
    for message in (other, *mine):
        await publications.publish(message, None)
    assert [publications.find(one.id) is not None for one in mine] == [False] * 3 + [True] * 2
    assert publications.find(other.id) is not None
    for agent in ("x", "y", "z"):
        await publications.publish(posted(agent), None)
    assert len(publications._by_id) == 4
    assert publications.find(other.id) is None, "the oldest of all goes first"
    assert sum(map(len, publications._of_agent.values())) == 4


async def test_a_request_that_has_a_reply_was_published_by_somebody() -> None:
    recorder, message = Recorder(), posted()
    publications = Publications(
        recorder, is_answered=lambda agent, request: (agent, request) == ("bot", message.id)
    )
    await publications.publish(message, None)
    await publications.publish(posted(), None)
    assert len(recorder.sent) == 1


async def test_failed_publication_is_sent_by_the_next_post() -> None:
    class Broken(Recorder):
        async def send(self, *args: Any, **options: Any) -> Any:
            from aiokafka.errors import KafkaConnectionError

            if not self.sent:
                self.sent.append(("", ""))
                raise KafkaConnectionError
            return await super().send(*args, **options)

    recorder, message = Broken(), posted()
    publications = Publications(recorder)
    with pytest.raises(RequestRefusedError) as refused:
        await publications.publish(message, None)
    assert refused.value.status == 503
    await publications.publish(message, None)
    assert recorder.sent[1:] == [("bot", message.signed.compact)]


async def test_a_post_that_goes_away_loses_nothing() -> None:
    began, goes_on = asyncio.Event(), asyncio.Event()

    class Slow(Recorder):
        async def send(self, *args: Any, **options: Any) -> Any:
            began.set()
            await goes_on.wait()
            return await super().send(*args, **options)

    recorder, message = Slow(), posted()
    publications = Publications(recorder)
    first = asyncio.create_task(publications.publish(message, None))
    await began.wait()
    first.cancel()
    second = asyncio.create_task(publications.publish(message, None))
    goes_on.set()
    await second
    assert len(recorder.sent) == 1


def test_a_release_is_keyed_by_its_agent_as_well() -> None:
    claims = RevocationRequest(
        iss="spiffe://test.example/agent/bot", aud="test.example", iat=1, jti="1", kind="release",
        lease_id=str(uuid.uuid4()), reason="done",
    )  # fmt: skip
    message = PostedMessage(cast("Any", Signed(claims, sign(claims, KEY))), "1", "bot", KEY.kid)
    assert message.topic.what == "revocation.request"


# --- the name ---------------------------------------------------------------------------------------------------------


OWN = frozenset({"gateway.test"})


@pytest.mark.parametrize(
    ("line", "host", "found"),
    [
        ("/v1/trust", "ringfence", ApiTarget("", "/v1/trust", "", "http://ringfence/v1/trust")),
        ("/v1/trust?x=1", "RingFence:80", ApiTarget("", "/v1/trust", "x=1", "http://RingFence:80/v1/trust")),
        ("http://ringfence/v1/a", "ringfence", ApiTarget("", "/v1/a", "", "http://ringfence/v1/a")),
        (
            "/ringfence/v1/a",
            "gateway.test",
            ApiTarget("/ringfence", "/v1/a", "", "http://gateway.test/ringfence/v1/a"),
        ),
        ("/ringfence/v1/a", "api.test", None),
        ("/hub/ringfence/v1/a", "gateway.test", None),
        ("/hub/v1/a", "gateway.test", None),
        ("/ringfences/v1/a", "gateway.test", None),
        ("/v1/a", "ringfence.test", None),
    ],
)
def test_requests_to_the_gateways_own_api_are_recognised(
    line: str, host: str, found: ApiTarget | None
) -> None:
    request = parse_request(f"GET {line} HTTP/1.1\r\nHost: {host}\r\n".encode())
    listener = ListenerContext("x", "http", OWN)
    assert read_api_target(request, listener, lambda authority: authority == "api.test") == found


def test_a_gateway_that_is_named_so_itself_keeps_its_targets() -> None:
    listener = ListenerContext("x", "http", frozenset({"ringfence"}))

    def found(line: str) -> ApiTarget | None:
        request = parse_request(f"GET {line} HTTP/1.1\r\nHost: ringfence\r\n".encode())
        return read_api_target(request, listener, lambda authority: False)

    assert found("/hub/a") is None
    assert found("/v1/trust") is not None
    assert found("/ringfence/v1/trust") is not None


@pytest.mark.parametrize(
    ("target", "settings", "reserved"),
    [
        ("ringfence", {}, True),
        ("ringfence-hub", {}, False),
        ("hub", {"url": "https://ringfence"}, True),
        ("hub", {"url": "https://ringfence.:443"}, True),
        ("hub", {"url": "https://ringfence.example"}, False),
        ("hub", {"address": "RINGFENCE:5432"}, True),
        ("hub", {"address": "ringfence2:5432"}, False),
        ("hub", {"url": 5}, False),
    ],
)
def test_reserved_target_names_are_recognised(target: str, settings: dict[str, Any], reserved: bool) -> None:
    backend = BackendSettings.model_validate({"kind": "jwt", **settings})
    assert (reserved_name(target, backend) is not None) == reserved


# --- the journal: what a gateway that starts again remembers ---


def entry(id: str, at_s: int = NOW_S, agent: str = "bot") -> JournalEntry:
    return JournalEntry(id, "d" * 64, agent, "kid", "task", at_s)


def test_a_journal_has_what_was_written_for_a_day(tmp_path: Path) -> None:
    path, (one, two, old) = tmp_path / "publications.jsonl", ids(3)
    journal = PublicationJournal(path, now_s=lambda: NOW_S)
    assert journal.open() == []
    for written in (entry(one), entry(old, NOW_S - KEPT_S - 1), entry(two)):
        assert not journal.add(written)
    journal.close()
    with path.open("ab") as file:
        file.write(b'{"id": "cut of')
    again = PublicationJournal(path, now_s=lambda: NOW_S)
    assert again.open() == [entry(one), entry(two)]
    assert len(path.read_bytes().splitlines()) == 2, "it is written anew"
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_journal_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    journal = PublicationJournal(tmp_path / "missing" / "file", now_s=lambda: NOW_S)
    assert journal.open() == []
    assert not journal.add(entry(ids(1)[0]))


async def test_a_journal_is_written_anew_with_what_is_remembered(tmp_path: Path) -> None:
    path, recorder = tmp_path / "publications.jsonl", Recorder()
    journal = PublicationJournal(path, now_s=lambda: int(time.time()), max_lines=4)
    publications = Publications(recorder, journal=journal, per_agent=2)
    messages = [posted() for _ in range(6)]
    for message in messages:
        await publications.publish(message, None)
    kept = [orjson.loads(line)["id"] for line in path.read_bytes().splitlines()]
    assert len(kept) < 6
    assert kept[-1] == messages[-1].id
    await publications.close()
    restarted = Publications(recorder, journal=PublicationJournal(path, now_s=lambda: int(time.time())))
    assert restarted.find(messages[-1].id) is not None
    await restarted.publish(messages[-1], None)
    assert len(recorder.sent) == 6, "Kafka has it already"
