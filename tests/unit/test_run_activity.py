"""What the report of a run says that it was allowed, denied and relayed, by what it reads on Kafka."""

from __future__ import annotations

import asyncio
import uuid
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import Received
from ringfence.messages.credential import Reason
from ringfence.messages.enrolment import InstanceRef, RunRef
from ringfence.messages.lease import EndCause
from ringfence.messages.topics import LEASE
from ringfence.runner.lifecycle.activity import RunActivity
from tests.support.audit_fixtures import TD, AuditFixtures, Story

RUN, OTHER = "0f8fad5b-d9cb-469f-a165-70867728950e", "7c9e6679-7425-50de-944b-e07fc1f90ae7"


def instance(run_id: str) -> InstanceRef:
    return InstanceRef(
        instance_id=str(uuid.uuid4()), issuer="https://acme.example/runner/runner-1", subject="x", selector="0" * 64,
        not_after=1_900_000_000, run=RunRef(run_id=run_id, task_id=str(uuid.uuid4())),
    )  # fmt: skip


class Bench:
    def __init__(self) -> None:
        self.office = AuditFixtures()
        self.office.staff()
        connection = SimpleNamespace(trust=self.office.trust, settings=SimpleNamespace(trust_domain=TD))
        self.activity = RunActivity(cast(Any, connection), RUN, "deploy-bot")
        self.activity.started(self.office.key("agent", "deploy-bot").kid)
        self.issuer, self.revoker = (self.office.key("service", role) for role in ("issuer", "revoker"))

    def read(self, *records: Received) -> None:
        self.activity._on_records(records)

    def story(self) -> Story:
        return self.office.credential(approved=False)

    def active(self, story: Story, run_id: str = RUN) -> Received:
        return story.lease("active", 1, self.issuer, instance=instance(run_id))

    def ended(self, story: Story) -> Received:
        cause = EndCause(kind="run_ended", at_ms=1, by=self.revoker.id, ref="x", reason="its run has ended")
        return story.lease("revoked", 2, self.revoker, cause=cause, instance=instance(RUN))


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_leases_of_the_run_are_what_it_was_allowed_with_how_they_ended(bench: Bench) -> None:
    story, other = bench.story(), bench.story()
    bench.read(bench.active(story), bench.active(other, OTHER), other.active)
    (allowed,) = bench.activity.allowed()
    assert (allowed["lease_id"], allowed["status"], allowed["ended_by"]) == (story.lease_id, "active", None)
    bench.read(bench.ended(story), bench.active(story))
    (allowed,) = bench.activity.allowed()
    assert (allowed["status"], allowed["ended_by"]) == ("revoked", "run_ended"), "the highest seq counts"


async def test_run_activity_waits_for_the_end_of_the_leases(bench: Bench) -> None:
    story = bench.story()
    bench.read(bench.active(story))
    assert await bench.activity.leases_ended(0.01) == (story.lease_id,)
    waiting = asyncio.create_task(bench.activity.leases_ended(10))
    await asyncio.sleep(0)
    bench.read(bench.ended(story))
    assert await waiting == ()


def test_forged_lease_is_not_in_the_run_report(bench: Bench) -> None:
    story = bench.story()
    forged = story.lease("active", 1, SigningKey.generate(bench.issuer.id), instance=instance(RUN))
    bench.read(
        forged, bench.office.received(LEASE, b"\xff", key="x"), bench.office.received(LEASE, b"", key="x")
    )
    assert bench.activity.allowed() == []


def test_denials_of_requests_by_the_runs_key_are_told(bench: Bench) -> None:
    reason = Reason(code="beyond_scope", message="no")
    story = bench.story()
    bench.read(story.decision("denied", reasons=(reason,)), story.allowed)
    (denied,) = bench.activity.denied()
    assert (denied["what"], denied["reasons"][0]["code"]) == ("credential", "beyond_scope")
    bench.activity.started("another key")
    bench.read(bench.story().decision("denied", reasons=(reason,)))
    assert len(bench.activity.denied()) == 1


def test_blocked_actions_are_those_that_name_the_run(bench: Bench) -> None:
    why = {"allowed": False, "reasons": (Reason(code="no_lease", message="none"),)}
    bench.read(
        bench.office.action(run_id=RUN, **why),
        bench.office.action(run_id=OTHER, **why),
        bench.office.action(**why),
        bench.office.action(run_id=RUN, **{**why, "agent_id": "migrate-bot"}),
        bench.office.action(run_id=RUN),
    )
    (denied,) = bench.activity.denied()
    assert (denied["what"], denied["target_id"], denied["reasons"][0]["code"]) == (
        "action",
        "staging",
        "no_lease",
    )


def test_relays_are_told_with_their_bytes(bench: Bench) -> None:
    lease_id = str(uuid.uuid4())
    end = bench.office.relay_end(lease_id, run_id=RUN)
    bench.read(end, end, bench.office.relay_end(lease_id), bench.office.answer(run_id=RUN, lease_id=lease_id))
    (relay,) = bench.activity.relays()
    assert (relay["target_id"], relay["sent_bytes"], relay["received_bytes"]) == ("staging", 120, 4096)


async def test_unreadable_topic_is_reported_in_the_run_report() -> None:
    async def away(*_: Any, **__: Any) -> None:
        raise UnavailableError("the topic is missing")

    activity = RunActivity(cast(Any, SimpleNamespace(follow=away)), RUN, "deploy-bot")
    await activity.follow()
    assert activity.problem == "the topic is missing"
