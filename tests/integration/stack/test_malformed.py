"""What anybody with write access may put onto a topic besides garbage: records without value or key, broken headers,
and messages that are truly signed and still not what they should be. Nothing stops anybody."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer

from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey, b64encode
from ringfence.messages.base import Topic
from ringfence.messages.credential import Coordinates
from ringfence.messages.topics import (
    ACTION,
    AGENT,
    ALL,
    APPROVAL_RESPONSE,
    AUDIT,
    AUDIT_INTAKE,
    AUDITED,
    CREDENTIAL_DECISION,
    CREDENTIAL_REPLY,
    CREDENTIAL_REQUEST,
    DEAD_LETTER,
    LEASE,
    REGISTRY_COMMAND,
    REVOCATION_REQUEST,
    RUN,
    TRUST,
)
from tests.integration.stack.test_attacks import (
    BURIED,
    CONSUMED,
    FOLLOWED,
    READERS,
    RECORDS,
    WATCHED,
    buried,
    decided,
    make_request,
    no_lease,
    put,
)
from tests.support import audit_stories
from tests.support.audit_stories import asked_for, forged, realm_leaves
from tests.support.stack import RunningStack

pytestmark = pytest.mark.broker

TOLD = set(AUDITED)

HEADERS: list[list[tuple[str, bytes]]] = [
    [],
    [("traceparent", b"\xff\xfe"), ("ce_id", b""), ("ce_time", b"yesterday")],
    [("traceparent", b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-01")],
    [("traceparent", b"x" * 20_000), ("traceparent", b"y"), ("", b"no name")],
]


@pytest.fixture
async def raw(realm: RunningStack) -> AsyncIterator[AIOKafkaProducer]:
    """A producer that sets nothing by itself."""
    producer = AIOKafkaProducer(bootstrap_servers=realm.settings.kafka)
    await producer.start()
    try:
        yield producer
    finally:
        await producer.stop()


async def throw(
    raw: AIOKafkaProducer, realm: RunningStack, topic: Topic[Any], value: bytes | None, key: bytes | None,
    headers: list[tuple[str, bytes]],
) -> Coordinates:  # fmt: skip
    sent = await raw.send_and_wait(topic.name(realm.settings.topic_prefix), value, key=key, headers=headers)
    return Coordinates(
        topic=sent.topic, partition=sent.partition, offset=sent.offset, appended_at_ms=sent.timestamp
    )


PLAIN = {
    ACTION: "not_json",
    AUDIT: "not_json",
    DEAD_LETTER: "not_json",
    CREDENTIAL_REPLY: "not_a_jwe",
}
"""What is no JWS, and what is said of a record there that cannot be read at all."""


def headless_story(topic: Topic[Any], told: list[tuple[bytes | None, bytes | None]]) -> str:
    """As `garbage_story`: each is told by audit, buried by who consumes the topic, a finding where it is a record."""
    story = ""
    for value, key in told:
        unread = PLAIN.get(topic, "not_a_jws")
        if value is None and topic in RECORDS | {TRUST}:
            unread = "tombstone"
        if value == b"{}" and topic in PLAIN:
            unread = "not_an_envelope" if topic is CREDENTIAL_REPLY else "claims_invalid"
        lines = [forged(unread)] if topic in TOLD else []
        if value is None and topic is LEASE:
            lines = ["3003 Forget: Success/Observed lease.forgotten by nobody known\n"]
        forgets = value is None and topic in RECORDS | {LEASE, RUN}
        if topic in BURIED | RECORDS | {AUDIT_INTAKE} and not forgets:
            lines.append(audit_stories.buried(unread))
        if topic in RECORDS:
            named = (
                f" for {(key or b'').decode(errors='replace').partition('-')[0]}" if topic is AGENT else ""
            )
            lines += [f"3002 Finding: Failure finding [{unread}] by {one}{named}\n" for one in READERS]
        story += "".join(f"~{one}" for one in lines for _ in HEADERS)
    return story


@pytest.mark.parametrize("topic", ALL, ids=lambda topic: topic.what)
async def test_records_without_value_key_or_sound_headers_stop_nobody(
    realm: RunningStack, raw: AIOKafkaProducer, topic: Topic[Any]
) -> None:
    # Of an agent that there is the registry would say again what it is, once or several times.
    name = realm.agent if topic is not AGENT else f"nobody-{realm.mark}"
    values, keys = (None, b"{}", b"a.b.c"), (None, b"\xff", b"k" * 5000, name.encode())
    # A broker takes no record without a key into a compacted topic.
    told = [(value, key) for value in values for key in keys if key or (value and not topic.compacted)]
    async with realm.as_agent() as agent, realm.seen(*WATCHED) as seen:
        story = headless_story(topic, told)
        async with realm_leaves(realm, seen, story) as places:
            for value, key in told:
                thrown = [await throw(raw, realm, topic, value, key, headers) for headers in HEADERS]
                places += thrown
                if topic in CONSUMED | FOLLOWED and not (topic is RUN and value is None):
                    for where in thrown:
                        assert (await buried(seen, where))["code"]
        await realm.read(agent)
        assert realm.stack.ended() is None
        realm.stack.wait_ready()


def signed(key: SigningKey, payload: str, **header: Any) -> str:
    """A JWS over any text as `credential.request`, truly signed."""
    head = b64encode(
        json.dumps(
            {"alg": key.alg, "kid": key.kid, "typ": "ringfence.credential.request+jwt", **header}
        ).encode()
    )
    signing_input = f"{head}.{b64encode(payload.encode('utf-8', 'surrogatepass'))}"
    return f"{signing_input}.{b64encode(key.sign(signing_input.encode()))}"


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


REQUESTS = {
    "nested deeply": lambda text: text[:-1] + f', "new": {nested(5000)}}}',
    "half a character": lambda text: text.replace("an attack", "\\ud800"),
    "no number": lambda text: text.replace('"ttl_s":300', '"ttl_s":NaN'),
    "a number without end": lambda text: text.replace('"ttl_s":300', '"ttl_s":1e999'),
    "a number as text": lambda text: text.replace('"ttl_s":300', '"ttl_s":"300"'),
    "a truth as number": lambda text: text.replace('"ttl_s":300', '"ttl_s":true'),
    "no time at all": lambda text: text.replace('"ttl_s":300', '"ttl_s":0'),
    "time that runs back": lambda text: text.replace('"ttl_s":300', '"ttl_s":-1'),
    "several audiences": lambda text: text.replace(
        '"aud":"acme.example"', '"aud":["acme.example","other.example"]'
    ),
    "another domain": lambda text: text.replace('"aud":"acme.example"', '"aud":"other.example"'),
    "an empty scope": lambda text: text[:-1] + ', "scope": []}',
    "text behind it": lambda text: text + "x",
    "a list": lambda text: f"[{text}]",
    "half of it": lambda text: text[: len(text) // 2],
    "an id that is none": lambda text: text.replace('"task_id":"', '"task_id":"A'),
}


async def test_truly_signed_requests_that_are_none_are_buried(realm: RunningStack) -> None:
    key = realm.key("agent", realm.agent)
    async with realm.as_agent() as agent, realm.publisher() as publisher, realm.seen(*WATCHED) as seen:
        for what, change in REQUESTS.items():
            code = "aud_unexpected" if what == "another domain" else "claims_invalid"
            text = make_request(realm).model_dump_json(exclude_none=True)
            changed = change(text)
            assert changed != text, what
            async with realm_leaves(realm, seen, forged(code) + audit_stories.buried(code)) as about:
                where = await put(publisher, CREDENTIAL_REQUEST, realm.agent, signed(key, changed))
                about.append(where)
                assert (await buried(seen, where))["service"] == "policy", what
        await realm.read(agent)
        assert realm.stack.ended() is None


SAID_OTHERWISE: list[tuple[dict[str, Any], str]] = [
    ({"alg": "none"}, "alg_unexpected"),
    ({"alg": "HS256"}, "alg_unexpected"),
    ({"alg": "EdDSA"}, "alg_unexpected"),
    ({"typ": "JWT"}, "typ_unexpected"),
    ({"typ": "ringfence.approval+jwt"}, "typ_unexpected"),
    ({"typ": "application/ringfence.credential.request+jwt"}, "typ_unexpected"),
    ({"crit": ["exp"]}, "not_a_jws"),
    ({"kid": "0" * 43}, "key_unknown"),
    ({"kid": None}, "not_a_jws"),
    ({"kid": "\ud800" + "0" * 42}, "not_a_jws"),
    ({"b64": False}, "not_a_jws"),
]


async def test_headers_that_say_something_else(realm: RunningStack) -> None:
    key = realm.key("agent", realm.agent)
    async with realm.as_agent() as agent, realm.publisher() as publisher, realm.seen(*WATCHED) as seen:
        text = make_request(realm).model_dump_json(exclude_none=True)
        for header, code in SAID_OTHERWISE:
            async with realm_leaves(realm, seen, forged(code) + audit_stories.buried(code)) as about:
                where = await put(publisher, CREDENTIAL_REQUEST, realm.agent, signed(key, text, **header))
                about.append(where)
                await buried(seen, where)
        await realm.read(agent)


async def test_a_key_in_the_header_is_nobodys(realm: RunningStack) -> None:
    async with realm.as_agent() as agent, realm.publisher() as publisher, realm.seen(*WATCHED) as seen:
        mine, thief = realm.key("agent", realm.agent), SigningKey.generate(realm.key("agent", realm.agent).id)
        text = make_request(realm).model_dump_json(exclude_none=True)
        jwk = thief.public.model_dump(exclude_none=True)
        for kid in (mine.kid, thief.kid):
            code = "signature_invalid" if kid == mine.kid else "key_unknown"
            async with realm_leaves(realm, seen, forged(code) + audit_stories.buried(code)) as about:
                compact = signed(thief, text, jwk=jwk, kid=kid)
                where = await put(publisher, CREDENTIAL_REQUEST, realm.agent, compact)
                about.append(where)
                assert (await buried(seen, where))["code"] == code
        await realm.read(agent)


async def test_unknown_field_of_a_newer_request_is_kept_in_the_decision(realm: RunningStack) -> None:
    async with realm.as_agent() as agent, realm.publisher() as publisher, realm.seen(*WATCHED) as seen:
        request = make_request(realm, colour={"of": ["the", "sky"]})
        compact = sign(request, realm.key("agent", realm.agent))
        await put(publisher, CREDENTIAL_REQUEST, realm.agent, compact)
        decision = await decided(realm, agent, seen, message_id(request.iss, request.jti), "allowed")
        assert decision.request == compact
        await seen.until(lambda: not no_lease(seen, decision.request_id), "the lease")


OTHERS = {
    REGISTRY_COMMAND: "registry",
    CREDENTIAL_DECISION: "issuer",
    APPROVAL_RESPONSE: "policy",
    REVOCATION_REQUEST: "revoker",
}


@pytest.mark.parametrize("topic", OTHERS, ids=lambda topic: topic.what)
async def test_a_sound_message_on_another_topic_is_none_there(realm: RunningStack, topic: Topic[Any]) -> None:
    async with realm.as_agent() as agent, realm.publisher() as publisher, realm.seen(*WATCHED) as seen:
        request = make_request(realm)
        story = forged("typ_unexpected") + audit_stories.buried("typ_unexpected")
        async with realm_leaves(realm, seen, story) as about:
            where = await put(publisher, topic, realm.agent, sign(request, realm.key("agent", realm.agent)))
            about.append(where)
            letter = await buried(seen, where)
            assert (letter["service"], letter["code"]) == (OTHERS[topic], "typ_unexpected")
        await realm.read(agent)
        await seen.up_to_now()
        assert no_lease(seen, message_id(request.iss, request.jti))


async def test_a_request_that_is_too_large_is_buried(realm: RunningStack) -> None:
    async with realm.as_agent() as agent, realm.publisher() as publisher, realm.seen(*WATCHED) as seen:
        request = make_request(realm, new="x" * 100_000)
        # It was truly asked for, whatever policy does with it.
        async with realm_leaves(realm, seen, asked_for() + audit_stories.buried("too_large")) as about:
            compact = sign(request, realm.key("agent", realm.agent))
            where = await put(publisher, CREDENTIAL_REQUEST, realm.agent, compact)
            about.append(where)
            assert (await buried(seen, where))["code"] == "too_large"
        await realm.read(agent)
