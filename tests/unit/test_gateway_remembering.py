"""What was weighed is gone by as long as nothing that it rests on changed, and no longer."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from ringfence.gateway.contract import Attempt, PresentedIdentity
from ringfence.gateway.decision.context import ActionIds
from ringfence.gateway.decision.fast_path import ChosenLeaseCache, RequestCache, valid_until_s
from ringfence.gateway.domain import ChosenLease, Sender
from ringfence.kernel.crypto.jws import sign
from ringfence.messages.registry import AgentSetCeiling
from ringfence.messages.trust import TrustBundle
from ringfence.model.http_targets import Action
from ringfence.model.verdict import Refused
from tests.support.in_memory_registry import permission
from tests.unit.test_gateway_domain import MAX_AGE_S, READ, WIDE, Place

SHOWN = PresentedIdentity(task_id="a task")
ATTEMPT = Attempt(None, "https", "GET", "/env/staging/web", target_id="staging")


class Memory:
    """What `place` weighed, remembered."""

    def __init__(self, max_age_s: int = MAX_AGE_S, limit: int = 10) -> None:
        self.place = Place()
        self.sender = Sender("bot", self.place.task)
        self.remembered = ChosenLeaseCache(self.place.table, self.place.ledger.directory, limit=limit)
        chosen = self.place.weigh()
        assert isinstance(chosen, ChosenLease)
        self.chosen = chosen
        self.remembered.put(self.sender, READ, chosen, max_age_s)
        directory = self.place.ledger.directory
        self.recalled: RequestCache[ChosenLease] = RequestCache(self.place.table, directory, limit=limit)
        self.recalled.put(SHOWN, ATTEMPT, chosen, chosen, valid_until_s(chosen, max_age_s))

    def recall(
        self, presented: PresentedIdentity | None = None, attempt: Attempt | None = None
    ) -> ChosenLease | None:
        now_s = self.place.ledger.clock.ms / 1000
        return self.recalled.get(presented or SHOWN, attempt or ATTEMPT, now_s)

    def found(self, sender: Sender | None = None, action: Action = READ) -> ChosenLease | None:
        return self.remembered.get(
            sender or self.sender, self.place.target(), action, self.place.ledger.clock.ms / 1000
        )


def test_the_same_sender_and_action_find_it_again() -> None:
    memory = Memory()
    assert memory.found() is memory.chosen
    assert memory.found(Sender("bot", None)) is None
    assert memory.found(Sender("thief", memory.place.task)) is None
    assert memory.found(Sender("bot", memory.place.task, memory.place.lease.lease_id)) is None
    assert memory.found(action=Action("deploy", READ.resource)) is None
    assert memory.found(action=Action("read", "env/staging/db")) is None


def test_the_very_same_request_is_recalled_and_no_other() -> None:
    memory = Memory()
    assert memory.recall() is memory.chosen
    for presented in (
        PresentedIdentity(),
        PresentedIdentity("other"),
        PresentedIdentity("a task", handle="L"),
        PresentedIdentity("a task", "C"),
    ):
        assert memory.recall(presented) is None
    others: list[dict[str, Any]] = [
        {name: "other"} for name in ("method", "target", "authority", "target_id", "label")
    ]
    for other in [*others, {"scheme": "http"}]:
        assert memory.recall(attempt=dataclasses.replace(ATTEMPT, **other)) is None, other
    memory.recalled.put(
        SHOWN, dataclasses.replace(ATTEMPT, target="/b", body=b"{}"), memory.chosen, memory.chosen, 2**40
    )
    memory.recalled.put(
        SHOWN, dataclasses.replace(ATTEMPT, target="/" + "c" * 600), memory.chosen, memory.chosen, 2**40
    )
    assert memory.recall(attempt=dataclasses.replace(ATTEMPT, target="/b")) is None, "its body may matter"
    assert memory.recall(attempt=dataclasses.replace(ATTEMPT, target="/" + "c" * 600)) is None
    for number in range(20):
        memory.recalled.put(
            SHOWN, dataclasses.replace(ATTEMPT, target=f"/{number}"), memory.chosen, memory.chosen, 2**40
        )
    assert memory.recall() is None, "the oldest are forgotten first"


def another_ceiling(memory: Memory) -> None:
    ledger, other = memory.place.ledger, permission("db/*", verbs=("read",))
    ledger.give(ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=(WIDE, other)))


def another_lease(memory: Memory) -> None:
    memory.place.leased(permission("env/staging/web", verbs=("read",)))


def revoked(memory: Memory) -> None:
    memory.place.table.revoke(memory.place.lease.lease_id, memory.place.ledger.clock.ms)


def fenced(memory: Memory) -> None:
    memory.place.table.fence("agent:bot", memory.place.lease.requested_at_ms, revocation_id="an order")


def ended(memory: Memory) -> None:
    lease = memory.place.lease
    memory.place.table.apply(lease.model_copy(update={"seq": lease.seq + 1, "status": "ending"}))


def another_trust_bundle(memory: Memory) -> None:
    """A key that is not believed any more may have signed what it rests on."""
    ledger, now_s = memory.place.ledger, memory.place.ledger.clock.ms // 1000
    bundle = TrustBundle(
        iss=ledger.root.id,
        aud="test.example",
        iat=now_s,
        exp=now_s + 10**6,
        jti="next",
        version=2,
        services=(),
    )
    ledger.trust.load(sign(bundle, ledger.root, header_jwk=True), now_s)


def at_its_deadline(memory: Memory) -> None:
    memory.place.ledger.clock.ms = memory.place.lease.deadline * 1000


@pytest.mark.parametrize(
    "change",
    [another_ceiling, another_lease, revoked, fenced, ended, another_trust_bundle, at_its_deadline],
)
def test_changed_input_invalidates_the_memory(change: Callable[[Memory], None]) -> None:
    memory = Memory()
    change(memory)
    assert memory.found() is None
    recalled = memory.recall()
    assert recalled is None or isinstance(memory.place.table.check_live(recalled.lease), Refused), (
        "asked each time"
    )


def test_a_lease_of_somebody_else_changes_nothing() -> None:
    memory = Memory()
    memory.place.leased(agent_id="thief", act=("thief",))
    memory.place.leased(target_id="other")
    assert memory.found() is memory.chosen


def test_a_lease_that_came_back_is_another() -> None:
    """What is forgotten with the last lease must not be found again with the next one."""
    memory = Memory()
    ended(memory)
    memory.place.leased()
    assert memory.found() is None


def test_memory_ends_with_the_age_of_entitlements() -> None:
    entitlements = Memory().chosen.ground.user.state.entitlements
    memory = Memory(max_age_s=memory_age(entitlements.as_of))
    assert memory.found() is memory.chosen
    memory.place.ledger.clock.ms += 2000
    assert memory.found() is None


def memory_age(as_of: int) -> int:
    """So many seconds that entitlements of then are one second from their end when a `Place` is made."""
    return Place().ledger.clock.ms // 1000 - as_of + 1


def test_the_oldest_are_forgotten_first() -> None:
    memory = Memory(limit=2)
    for verb in ("one", "two"):
        memory.remembered.put(memory.sender, Action(verb, "env/x"), memory.chosen, MAX_AGE_S)
    assert memory.found() is None
    assert memory.found(action=Action("two", "env/x")) is memory.chosen


def test_ids_are_random_uuids() -> None:
    ids = ActionIds()
    many = {ids.new() for _ in range(2000)}
    assert len(many) == 2000
    assert all(str(uuid.UUID(id)) == id for id in many)
    assert {(uuid.UUID(id).version, uuid.UUID(id).variant) for id in many} == {(4, uuid.RFC_4122)}
