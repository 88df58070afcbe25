"""Whose malformed records count towards the limit that halts a consumer: of services that may write them there."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Sequence
from typing import Any, cast

import pytest

from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.base.errors import InvalidMessageError, UnavailableError
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.acls import Operation, Party, acls
from ringfence.kernel.kafka.dead_letters import (
    BURST_MS,
    MAX_INVALID_SIGNED,
    DeadLetters,
    HaltedError,
)
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.trust_updates import DeferredRecords
from ringfence.messages.base import SERVICE_ROLES, Claims, ServiceRole, Topic, typ_header
from ringfence.messages.codes import Code
from ringfence.messages.lease import Lease, RevocationRequest
from ringfence.messages.topics import (
    ALL,
    APPROVAL_RESPONSE,
    AUDIT_CHECKPOINT,
    CREDENTIAL_DECISION,
    CREDENTIAL_REQUEST,
    LEASE,
    REGISTRY_COMMAND,
    REVOCATION_REQUEST,
    TRUST,
    USER,
)
from tests.support.malformed_records import DAY_S, Services, malformed, second_form, signed_messages, typs

MANY = MAX_INVALID_SIGNED + 5
SIGNED = [topic for topic in ALL if signed_messages(topic)]
NOW_MS = int(time.time()) * 1000


@pytest.fixture(scope="module")
def services() -> Services:
    return Services()


class Broker:
    """Takes letters."""

    async def send(self, *_: Any, **__: Any) -> Awaitable[None]:
        async def acknowledged() -> None:
            pass

        return acknowledged()


class Reader:
    """A consumer's dead letters, and what it makes of records by the services that may sign them."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self.dead_letters = DeadLetters(cast(Any, Broker()), "test", SystemClock(), services.trust)
        self._offset = 0

    async def take(self, topic: Topic[Any], value: str, at_ms: int = NOW_MS) -> None:
        self._offset += 1
        record = Received(topic, f"t.{topic.what}.v1", 0, self._offset, at_ms, "k", value.encode())
        with pytest.raises(InvalidMessageError) as refused:
            self._open(record)
        await self.dead_letters.send(record, refused.value)

    async def take_all(self, topic: Topic[Any], values: Sequence[str], at_ms: int = NOW_MS) -> bool:
        """Whether it halted."""
        try:
            for value in values:
                await self.take(topic, value, at_ms)
        except HaltedError:
            return True
        return False

    def _open(self, record: Received) -> None:
        jws, trust = parse(record.value), self._services.trust
        model = next((m for m in signed_messages(record.topic) if typ_header(m) == jws.header.typ), Claims)
        if model is Claims:
            raise InvalidMessageError("another typ", code=Code.TYP_UNEXPECTED)
        find = trust.finder(*model.signed_by, at_s=record.appended_at_ms / 1000)
        verify(jws, model, find, audience=trust.trust_domain)


def some(key: SigningKey, typ: str, many: int = MANY, **claims: Any) -> list[str]:
    return [malformed(key, typ, "test.example", number=n, **claims) for n in range(many)]


@pytest.mark.parametrize("role", SERVICE_ROLES)
@pytest.mark.parametrize("topic", SIGNED, ids=lambda topic: topic.what)
async def test_only_who_may_write_a_message_on_a_topic_halts_who_reads_it(
    topic: Topic[Any], role: ServiceRole, services: Services
) -> None:
    for model in signed_messages(topic):
        halted = await Reader(services).take_all(topic, some(services.keys[role], typ_header(model)))
        assert halted == (role in model.signed_by), model.typ


@pytest.mark.parametrize("role", SERVICE_ROLES)
async def test_a_message_of_another_topic_halts_nobody(role: ServiceRole, services: Services) -> None:
    reader = Reader(services)
    for typ in {typ for topic in SIGNED for typ in typs(topic)} - set(typs(REVOCATION_REQUEST)):
        assert not await reader.take_all(REVOCATION_REQUEST, some(services.keys[role], typ))


async def test_records_signed_by_agents_and_people_never_halt(services: Services) -> None:
    reader = Reader(services)
    for kind in ("agent", "user", "provisioner"):
        key = SigningKey.generate(f"spiffe://test.example/{kind}/somebody")
        for topic in SIGNED:
            for typ in typs(topic):
                assert not await reader.take_all(topic, some(key, typ))


async def test_records_signed_in_the_name_of_another_never_halt(services: Services) -> None:
    """Also of one whose role may write there: a signature holds for one `iss` and its keys."""
    typ, policy = typ_header(RevocationRequest), services.keys["policy"]
    reader = Reader(services)
    assert not await reader.take_all(REVOCATION_REQUEST, some(policy, typ, iss=services.keys["revoker"].id))
    another = SigningKey.generate("spiffe://test.example/service/revoker")
    assert not await reader.take_all(REVOCATION_REQUEST, some(another, typ))


async def test_a_key_counts_in_its_time_alone_and_not_once_it_has_ended(services: Services) -> None:
    services, now_s = Services(), NOW_MS // 1000
    values = some(services.keys["revoker"], typ_header(RevocationRequest))
    services.publish(revoker=now_s + 3600)
    assert await Reader(services).take_all(REVOCATION_REQUEST, values)
    assert not await Reader(services).take_all(REVOCATION_REQUEST, values, NOW_MS + 3_600_000), (
        "after its end"
    )
    services.publish(revoker=now_s - 1)
    assert not await Reader(services).take_all(REVOCATION_REQUEST, values, NOW_MS - 5000), "rotated since"


async def test_copies_of_an_old_bad_deploy_halt_nobody(services: Services) -> None:
    """Whoever may read the topic has them, and whoever may write to it can append them again."""
    reader, typ = Reader(services), typ_header(RevocationRequest)
    old = some(services.keys["revoker"], typ, iat=NOW_MS // 1000 - 2 * 3600)
    assert not await reader.take_all(REVOCATION_REQUEST, old)
    one = some(services.keys["revoker"], typ, 1)
    assert not await reader.take_all(REVOCATION_REQUEST, one * MANY)


async def test_other_forms_of_signatures_are_the_same_records_and_halt_nobody(services: Services) -> None:
    reader, typ = Reader(services), typ_header(RevocationRequest)
    few = some(services.keys["revoker"], typ, MAX_INVALID_SIGNED)
    assert not await reader.take_all(REVOCATION_REQUEST, few)
    assert not await reader.take_all(REVOCATION_REQUEST, [second_form(one) for one in few])
    assert await reader.take_all(REVOCATION_REQUEST, some(services.keys["revoker"], typ, 1, burst=1))


async def test_one_topics_limit_is_not_used_up_by_who_writes_to_another(services: Services) -> None:
    reader = Reader(services)
    registry = some(services.keys["registry"], typ_header(signed_messages(USER)[0]), MAX_INVALID_SIGNED)
    assert not await reader.take_all(USER, registry)
    revoker = some(services.keys["revoker"], typ_header(RevocationRequest), MAX_INVALID_SIGNED)
    assert not await reader.take_all(REVOCATION_REQUEST, revoker)
    assert await reader.take_all(
        USER, some(services.keys["registry"], typ_header(signed_messages(USER)[0]), 1)
    )


async def test_records_before_a_burst_are_not_counted(services: Services) -> None:
    reader, key = Reader(services), services.keys["revoker"]
    for n in range(3):
        values = some(key, typ_header(RevocationRequest), MAX_INVALID_SIGNED, burst=n)
        assert not await reader.take_all(REVOCATION_REQUEST, values, NOW_MS + n * (BURST_MS + 1))


# --- after the end of the bundle, when what may be vouched for by the next one is waited for ---


@pytest.mark.parametrize("role", SERVICE_ROLES)
async def test_after_the_end_of_the_bundle_only_who_may_write_there_is_waited_for(role: ServiceRole) -> None:
    """Else one record of any service would hold up orders of people until there is another bundle."""
    services = Services()
    services.publish(lasts_s=-DAY_S // 2)  # long before this module was imported
    for topic, model in ((REVOCATION_REQUEST, RevocationRequest), (LEASE, Lease)):
        value = malformed(services.keys[role], typ_header(model), "test.example")
        record = Received(topic, f"t.{topic.what}.v1", 0, 0, NOW_MS, "k", value.encode())
        kept: list[Received] = []
        postponed = DeferredRecords(services.trust, kept.extend)
        postponed.on_records([record])
        postponed.redeliver()
        refused = InvalidMessageError("nobody is believed", code=Code.KEY_UNKNOWN)
        if role in model.signed_by:
            with pytest.raises(UnavailableError):
                await Reader(services).dead_letters.send(record, refused)
            assert len(kept) == 2, "it is read again"
        else:
            await Reader(services).dead_letters.send(record, refused)
            assert len(kept) == 1


# --- the same declaration says who is granted Write ---


def writers(topic: Topic[Any]) -> set[Party]:
    return {
        one.party for one in acls("p") if one.name == topic.name("p") and one.operation == Operation.WRITE
    }


@pytest.mark.parametrize("topic", SIGNED, ids=lambda topic: topic.what)
def test_services_are_granted_write_where_they_are_believed_and_nowhere_else(topic: Topic[Any]) -> None:
    relays = {
        TRUST: {"registry"},
        REGISTRY_COMMAND: {"scim", "console"},
        APPROVAL_RESPONSE: {"console"},
        CREDENTIAL_REQUEST: {"gateway"},
        REVOCATION_REQUEST: {"gateway", "console"},
    }
    """What the root, a provisioner's key, people at a console, and agents signed."""
    believed = {role for model in signed_messages(topic) for role in model.signed_by}
    assert writers(topic) & set(SERVICE_ROLES) == believed | relays.get(topic, set())


def test_revocations_are_written_by_agents_people_and_the_revoker_alone() -> None:
    """And by gateways, to which agents post them, and consoles, which carry what people signed."""
    assert writers(REVOCATION_REQUEST) == {"agents", "gateway", "users", "operators", "revoker", "console"}
    assert writers(CREDENTIAL_DECISION) == {"policy"}
    assert writers(CREDENTIAL_REQUEST) == {"agents", "gateway"}
    assert writers(AUDIT_CHECKPOINT) == {"audit", "users", "operators"}


def test_a_console_reads_nothing_from_kafka() -> None:
    mine = [one for one in acls("p") if one.party == "console"]
    assert {one.operation for one in mine} == {Operation.WRITE}
    assert {one.name for one in mine} >= {
        topic.name("p") for topic in (APPROVAL_RESPONSE, REGISTRY_COMMAND, REVOCATION_REQUEST)
    }
