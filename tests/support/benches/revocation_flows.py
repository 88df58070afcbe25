"""What flows of the revoker are held to: a lease has one life, with one end, and an order one answer."""

from __future__ import annotations

from typing import Any

from ringfence.kernel.crypto.jws import Signed
from ringfence.messages.base import ServiceRole, Topic
from ringfence.messages.credential import Coordinates
from ringfence.messages.lease import TERMINAL, EndCause, Lease, LeaseStatus
from ringfence.messages.operations import ServiceEvent
from ringfence.messages.topics import LEASE
from ringfence.model.lease_store import LeaseStore
from ringfence.revoker.settings import RevokerSettings
from tests.support.benches.issuer_bench import Asked, IssuerBench
from tests.support.world import Party

QUICK: dict[ServiceRole, Any] = {"revoker": RevokerSettings(visibility_ms=300, outbox_age_ms=500)}


async def ended(desk: IssuerBench, asked: Asked) -> list[Signed[Lease]]:
    """All records of a lease once it is over, each once, by `seq`; checked to be one life with one end."""
    await desk.lease(asked.lease_id, *TERMINAL)
    records = {record.compact: record for record in await desk.records(asked.lease_id)}
    life = sorted(records.values(), key=lambda record: record.claims.seq)
    assert [record.claims.seq for record in life] == list(range(1, len(life) + 1))
    assert [record.claims.status in TERMINAL for record in life] == [False] * (len(life) - 1) + [True]
    assert {record.claims.model_copy(update=_CHANGING).model_dump_json() for record in life[1:]} == {
        life[0].claims.model_copy(update=_CHANGING).model_dump_json()
    }
    return life


_CHANGING = {"iss": "", "iat": 0, "jti": "", "seq": 1, "status": "active", "cause": None, "epoch": None}


def statuses(life: list[Signed[Lease]]) -> list[LeaseStatus]:
    return [record.claims.status for record in life]


async def lives(desk: IssuerBench, store: LeaseStore, *leases: Asked) -> None:
    """Fails unless all of these are active and nothing was written about them but that they are."""
    for asked in leases:
        assert (await store.look(asked.lease_id)).active
        assert {record.claims.status for record in await desk.issued_records(asked.lease_id)} == {"active"}


async def accepted(desk: IssuerBench, by: Party, **fields: Any) -> ServiceEvent:
    claims, _ = await desk.revoke(by, **fields)
    event = await desk.verdict(claims)
    assert event.kind == "accepted", event.reasons
    return event


async def refused(desk: IssuerBench, by: Party, **fields: Any) -> str:
    claims, _ = await desk.revoke(by, **fields)
    event = await desk.verdict(claims)
    assert (event.kind, event.subject) == ("refused", "revocation.request")
    return event.reasons[0].code


async def redeliver(desk: IssuerBench, topic: Topic[Any], at: Coordinates) -> None:
    """Hand a record that was handled once to the revoker again, as a broker does after a crash before the commit."""
    name = topic.name(desk.world.prefix)
    record = await desk.world.record_at(topic, at)
    for consumer in desk.world.runtimes["revoker"].consumers:
        if name in consumer._handlers:
            await consumer._handlers[name]([record])


async def expired_in_time(desk: IssuerBench, store: LeaseStore, asked: Asked) -> None:
    """A lease ends by its deadline alone, not before it, and Redis has what Kafka has."""
    life = await ended(desk, asked)
    assert statuses(life) == ["active", "expired"]
    end = life[-1].claims
    assert end.iss == desk.world.key("revoker").id
    assert end.cause == EndCause(kind="deadline", at_ms=end.deadline * 1000)
    record = await desk.world.consume_until(
        LEASE, lambda r: r.key == asked.lease_id and r.value.decode() == life[-1].compact
    )
    assert record.appended_at_ms >= end.deadline * 1000 - 20  # two clocks of one machine
    every = await desk.world.records(LEASE)
    assert {r.partition for r in every if r.key == asked.lease_id} == {record.partition}
    assert (await store.get([asked.lease_id]))[asked.lease_id].jws.decode() == life[-1].compact
    assert asked.lease_id not in await store.find(f"agent:{desk.bot.name}")
