"""What revokers name as halted, and for how long it counts."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from ringfence.kernel.base.clock import RemoteClock
from ringfence.kernel.crypto.jws import parse, sign, sign_payload, verify
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import SERVICE_ROLES, Claims, Millis, ServiceRole
from ringfence.messages.operations import Heartbeat, StreamDigest
from ringfence.messages.topics import HEARTBEAT
from ringfence.model.leases.revoker_halts import RevokerHalts
from tests.support.malformed_records import Services, second_form
from tests.support.verdicts import code_of, reason_of

GRACE_MS = 5000
GROUP = "ringfence.revoker"


@pytest.fixture(scope="module")
def services() -> Services:
    return Services()


class Listener:
    """An issuer's or a gateway's ear, and the broker's clock."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self.ms = 1_000_000
        self._began_s = services.trust.require().iat
        self.halts = RevokerHalts(services.trust, grace_ms=GRACE_MS, broker=RemoteClock(lambda: self.ms))

    @property
    def now_ms(self) -> int:
        """On the broker."""
        return self._began_s * 1000 + self.ms

    def beat(self, *halted: str, by: ServiceRole = "revoker", at_ms: int | None = None) -> Received:
        """A heartbeat as it arrives now. `at_ms`: when it says that it was signed."""
        key, at_ms = self._services.keys[by], self.now_ms if at_ms is None else at_ms
        claims = Heartbeat(
            iss=key.id, aud=self._services.td, iat=at_ms // 1000, jti="b", at_ms=at_ms, halted=halted
        )
        return self.arrives(sign(claims, key).encode())

    def arrives(self, value: bytes) -> Received:
        record = Received(HEARTBEAT, "t.heartbeat.v1", 0, 0, self.now_ms, "revoker", value)
        self.halts.on_heartbeats([record])
        return record

    def code(self) -> str | None:
        return code_of(self.halts.check())


@pytest.fixture
def listener(services: Services) -> Listener:
    return Listener(services)


def test_halt_named_by_a_revoker_denies_until_the_grace_passes(listener: Listener) -> None:
    assert listener.code() is None
    listener.beat()
    assert listener.code() is None
    listener.beat(GROUP)
    denial = reason_of(listener.halts.check())
    assert denial.code == "revoker_halted"
    assert GROUP in denial.message
    assert "restart" in denial.message
    listener.ms += GRACE_MS
    assert listener.code() == "revoker_halted"
    listener.ms += 1
    assert listener.code() is None, "it is heard no more, or names nothing any more"


def test_a_healthy_replica_hides_no_halted_one(listener: Listener) -> None:
    """Both sign with one key."""
    for _ in range(20):
        listener.ms += 1000
        listener.beat(GROUP)
        listener.beat()
        assert listener.code() == "revoker_halted"


def test_every_group_is_named(listener: Listener) -> None:
    listener.beat(GROUP)
    listener.ms += 3000
    listener.beat("ringfence.revoker-records")
    denial = reason_of(listener.halts.check())
    assert f"{GROUP}, {GROUP}-records" in denial.message
    listener.ms += 3000
    denial = reason_of(listener.halts.check())
    assert f"(consumer group {GROUP}-records)" in denial.message


@pytest.mark.parametrize("role", [role for role in SERVICE_ROLES if role != "revoker"])
def test_no_other_service_halts_anything(listener: Listener, role: ServiceRole) -> None:
    listener.beat(GROUP, by=role)
    assert listener.code() is None


def test_a_heartbeat_that_is_sent_again_keeps_no_halt_alive(listener: Listener) -> None:
    record = listener.beat(GROUP)
    for _ in range(10):
        listener.ms += 1000
        listener.arrives(record.value)
    assert listener.code() is None
    listener.beat(GROUP, at_ms=listener.now_ms - 3_600_000)
    assert listener.code() is None, "one of long ago that was not seen then"


def test_heartbeat_with_other_form_of_its_signature_keeps_no_halt_alive(listener: Listener) -> None:
    record = listener.beat(GROUP)
    listener.ms += GRACE_MS
    listener.arrives(second_form(record.value.decode()).encode())
    listener.ms += 1
    assert listener.code() is None


def test_a_heartbeat_of_before_names_nothing(services: Services, listener: Listener) -> None:
    key = services.keys["revoker"]
    old = '{"iss":"%s","aud":"%s","iat":%d,"jti":"b","at_ms":%d}'
    payload = old % (key.id, services.td, listener.now_ms // 1000, listener.now_ms)
    record = listener.arrives(sign_payload(Heartbeat, payload.encode(), key).encode())
    assert (listener.code(), record.topic) == (None, HEARTBEAT)


def test_a_reader_of_before_takes_no_notice(services: Services, listener: Listener) -> None:
    class OfBefore(Claims):
        typ: ClassVar[str] = "heartbeat"
        at_ms: Millis
        streams: tuple[StreamDigest, ...] = ()

    record, find = listener.beat(GROUP), services.trust.finder("revoker", at_s=listener.now_ms / 1000)
    read = verify(parse(record.value), OfBefore, find, audience=services.td).claims
    assert (read.at_ms, read.streams) == (listener.now_ms, ())


@pytest.mark.parametrize("name", ["", "two words", "esc\x1b[2J", "a" * 256])
def test_a_group_has_a_name_that_can_be_shown(name: str) -> None:
    fields: dict[str, Any] = {
        "iss": "spiffe://t/service/revoker",
        "aud": "t",
        "iat": 1,
        "jti": "b",
        "at_ms": 1,
    }
    with pytest.raises(ValueError, match="halted"):
        Heartbeat(**fields, halted=(name,))
