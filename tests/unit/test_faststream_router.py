"""What `ringfence.faststream` declares, and how its users test their handlers in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faststream.exceptions import SetupError
from faststream.kafka import TestKafkaBroker
from faststream.security import SASLScram256

from ringfence.client.settings import ClientSettings
from ringfence.faststream import ActionDecided, AuditEvent, Lease, RingfenceRouter, UnknownMessage

SCHEMAS = Path(__file__).parents[2] / "schemas"


async def test_a_handler_is_tested_in_memory() -> None:
    router = RingfenceRouter(ClientSettings())
    received: list[AuditEvent | UnknownMessage] = []
    audit = router.audit_events(group="siem")

    @audit()
    async def on_event(event: AuditEvent | UnknownMessage) -> None:
        received.append(event)

    example = json.loads((SCHEMAS / "audit-event.example.json").read_text())
    async with TestKafkaBroker(router.broker()) as broker:
        await broker.publish(example, "ringfence.audit.v1")
        await broker.publish({"no": "event"}, "ringfence.audit.v1")
    assert received[0] == AuditEvent.model_validate(example)
    assert isinstance(received[1], UnknownMessage)
    assert received[1].code == "claims_invalid"
    assert received[1].topic == "ringfence.audit.v1"


def test_broker_connects_as_the_settings_say() -> None:
    settings = ClientSettings(
        kafka="kafka.example:9093",
        kafka_security_protocol="SASL_PLAINTEXT",
        kafka_sasl_mechanism="SCRAM-SHA-256",
        kafka_sasl_username="siem",
        kafka_sasl_password="env:SIEM_PASSWORD",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIEM_PASSWORD", "opensesame")
        broker = RingfenceRouter(settings).broker()
    security = broker.specification.security
    assert isinstance(security, SASLScram256)
    assert (security.username, security.password, security.use_ssl) == ("siem", "opensesame", False)


@pytest.mark.parametrize(
    ("subscribe", "kind", "says"),
    [
        (RingfenceRouter.audit_events, Lease, "event codes"),
        (RingfenceRouter.leases, "credential.issued", "Lease, LeaseEpoch"),
        (RingfenceRouter.leases, ActionDecided, "Lease, LeaseEpoch"),
    ],
)
def test_a_handler_of_what_a_topic_does_not_carry_is_refused(
    subscribe: Callable[..., Any], kind: Any, says: str
) -> None:
    with pytest.raises(SetupError, match=says):
        subscribe(RingfenceRouter(ClientSettings()), group="g")(kind)


def test_two_handlers_of_one_kind_are_refused() -> None:
    subscription = RingfenceRouter(ClientSettings()).leases(group="g")
    subscription(Lease)
    with pytest.raises(SetupError, match="already"):
        subscription(Lease)
    subscription()
    with pytest.raises(SetupError, match="already"):
        subscription()


def test_a_subscription_needs_a_group_and_takes_one_record_at_a_time() -> None:
    router = RingfenceRouter(ClientSettings())
    with pytest.raises(SetupError, match="group"):
        router.leases(group="")
    with pytest.raises(SetupError, match="batch"):
        router.leases(group="g", batch=True)
