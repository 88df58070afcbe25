"""The inventory's table: what stands in an agent's line, what changes it, and what it adds up to."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any, cast

import pytest

from ringfence.kernel.base.api_errors import CursorLostError
from ringfence.kernel.base.ids import lease_id, message_id
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import Permission
from ringfence.messages.credential import Coordinates, CredentialDecision, CredentialRequest
from ringfence.messages.lease import Lease, LeaseStatus
from ringfence.messages.registry import (
    AgentDecommission,
    AgentRotateKey,
    AgentSetCeiling,
    AgentSuspend,
    TaskEnd,
    UserDisable,
)
from ringfence.messages.topics import LEASE
from ringfence.messages.trust import ServiceIdentity, TrustBundle
from ringfence.policy.agents.agent_index import _IDLE_S, AgentIndex
from ringfence.policy.agents.holdings import Holdings
from ringfence.policy.agents.inventory import InventoryRow, row_of, totals
from ringfence.policy.agents.usage import DAY_S, MAX_KEYS, KeyLastSeen
from tests.support.in_memory_registry import TD, InMemoryRegistry
from tools.schemas.examples import EXAMPLES

READ, DEPLOY = (
    Permission(target="platform", verbs=(verb,), resources=("env/staging/web",))
    for verb in ("read", "deploy")
)
CEILING = (Permission(target="platform", verbs=("deploy", "read"), resources=("env/**",)),)


class Book:
    """An honest registry and what policy knows, put together in a roster."""

    def __init__(self) -> None:
        self.ledger = InMemoryRegistry()
        self.clock = self.ledger.clock
        self.issuer = SigningKey.generate(f"spiffe://{TD}/service/issuer")
        self.holdings = Holdings(self._trust(), self.clock)
        self.key_last_seen = KeyLastSeen()
        self.roster = AgentIndex(self.ledger.directory, self.holdings, self.key_last_seen, self.clock)
        self.numbers = itertools.count()
        self.ledger.organisation()
        self.ledger.give(self.ledger.target_set("olga", "platform"))
        self.register("bot")

    def _trust(self) -> TrustStore:
        now_s, trust = self.clock.ms // 1000, TrustStore(TD, self.ledger.root.kid)
        service = ServiceIdentity(
            id=self.issuer.id, roles=("issuer",), keys=(self.issuer.record(now_s + 10**8),)
        )
        bundle = TrustBundle(
            iss=self.ledger.root.id, aud=TD, iat=now_s, exp=now_s + 10**8, jti="b", version=1, services=(service,)
        )  # fmt: skip
        trust.load(sign(bundle, self.ledger.root, header_jwk=True), now_s)
        return trust

    @property
    def now_s(self) -> int:
        return self.clock.ms // 1000

    def register(self, agent: str, sponsor: str = "sam", **fields: Any) -> None:
        fields = {"ceiling": CEILING, **fields}
        self.ledger.give(self.ledger.register("olga", agent, sponsor, **fields))

    def assign(self, agent: str = "bot", life_s: int = 3600) -> str:
        """The id of a new task."""
        terms = self.ledger.terms(agent, not_after=self.now_s + life_s)
        claims = self.ledger.assign("sam", agent, terms=terms)
        self.ledger.give(claims)
        return message_id(claims.iss, claims.jti)

    def allow(self, task: str, ttl_s: int = 300, agent: str = "bot", scope: Permission = READ) -> str:
        """An allowed decision stands on Kafka; returns the id of its request."""
        key = self.ledger.key(agent, "agent")
        request = cast(CredentialRequest, EXAMPLES[CredentialRequest]).model_copy(
            update={
                "iss": key.id, "aud": TD, "iat": self.now_s, "jti": f"r{next(self.numbers)}", "scope": (scope,),
                "task_id": task,
            }
        )  # fmt: skip
        id = message_id(request.iss, request.jti)
        decision = cast(CredentialDecision, EXAMPLES[CredentialDecision]).model_copy(
            update={
                "request_id": id, "request": sign(request, key), "outcome": "allowed", "ttl_s": ttl_s,
                "source": Coordinates(topic="t", partition=0, offset=0, appended_at_ms=self.clock.ms),
            }
        )  # fmt: skip
        self.key_last_seen.on_decision(decision, agent)
        self.holdings.decided(decision, agent, self.clock.ms)
        return id

    def lease(self, request_id: str, task: str, status: LeaseStatus = "active", seq: int = 1) -> None:
        """A record of its lease stands on Kafka."""
        id = lease_id(request_id)
        claims = cast(Lease, EXAMPLES[Lease]).model_copy(
            update={
                "iss": self.issuer.id, "aud": TD, "iat": self.now_s, "jti": f"{id}.{seq}", "lease_id": id,
                "seq": seq, "status": status, "agent_id": "bot", "task_id": task, "scope": (READ,),
                "deadline": self.now_s + 300, "requested_at_ms": self.clock.ms, "cause": None,
            }
        )  # fmt: skip
        value, offset = sign(claims, self.issuer).encode(), next(self.numbers)
        self.holdings.on_leases([Received(LEASE, LEASE.name("t"), 0, offset, self.clock.ms, id, value)])

    def look(self) -> None:
        """At all that changed, or that time changed."""
        asyncio.run(self.roster.settle(1000))
        assert self.roster.behind == 0

    def line(self, agent: str = "bot") -> InventoryRow:
        self.look()
        line = self.roster.line(agent)
        assert line is not None
        return line

    def row(self, agent: str = "bot") -> dict[str, Any]:
        facts = self.roster.facts(agent)
        assert facts is not None
        return row_of(facts, {"platform"})

    def sums(self, within_s: int = 14 * DAY_S) -> dict[str, int]:
        self.look()
        lines = [self.line(agent) for agent in self.roster.ids()]
        return totals(lines, self.now_s, self.now_s + within_s)


@pytest.fixture
def book() -> Book:
    return Book()


# --- who answers for it -----------------------------------------------------------------------------------------------


def test_an_agent_has_a_live_sponsor_until_that_one_is_disabled(book: Book):
    assert (book.line().sponsor_is, book.line().orphan) == ("live", False)
    book.ledger.give(book.ledger.claims(UserDisable, "olga", user_id="sam", reason="left"))
    assert book.roster.behind == 1, "it is looked at again because its sponsor changed"
    assert (book.line().sponsor_is, book.line().orphan) == ("disabled", True)
    assert book.row()["orphan"] is True
    book.ledger.give(book.ledger.transfer("olga", "bot", "suzy"))
    assert (book.line().sponsor, book.line().orphan) == ("suzy", False)


def test_sponsor_without_the_role_leaves_an_orphan(book: Book):
    book.ledger.give(book.ledger.user_set("olga", "sam", ["auditor"]))
    assert (book.line().sponsor_is, book.line().orphan) == ("no_sponsor", True)


def test_decommissioned_agent_is_no_orphan(book: Book):
    book.register("old")
    book.ledger.give(book.ledger.claims(AgentDecommission, "sam", agent_id="old", reason="done"))
    book.ledger.give(book.ledger.claims(UserDisable, "olga", user_id="sam", reason="left"))
    sums = book.sums()
    assert (sums["agents"], sums["orphans"], sums["decommissioned"]) == (1, 1, 1)
    assert not book.line("old").orphan


def test_inventory_names_the_commands_behind_an_agents_reach(book: Book):
    ceiling = (Permission(target="shop", verbs=("read",), resources=("**",)),)
    book.ledger.give(book.ledger.claims(AgentSetCeiling, "olga", agent_id="bot", ceiling=ceiling))
    at_ms = book.clock.ms - 1000
    book.ledger.give(book.ledger.claims(AgentSuspend, "sam", agent_id="bot", reason="x"))
    row = book.row()
    assert row["ceiling_by"] == {
        "command": "agent.set-ceiling",
        "by": f"spiffe://{TD}/user/olga",
        "at_ms": at_ms,
    }
    assert row["reach"] == [{"target": "shop", "exists": False, "verbs": ["read"], "unused": ["read"]}]
    assert row["authorised_by"][-1]["command"] == "agent.suspend"


# --- what it holds and used -------------------------------------------------------------------------------------------


def test_leases_are_counted_while_they_live(book: Book):
    task = book.assign()
    request = book.allow(task)
    assert (book.line().leases, book.line().tasks) == (1, 1)
    book.lease(request, task)
    assert book.line().leases == 1
    book.lease(request, task, "expired", 2)
    assert book.line().leases == 0


def test_a_deadline_takes_a_lease_away_though_nothing_comes(book: Book):
    book.allow(book.assign(), ttl_s=300)
    assert book.line().leases == 1
    book.clock.ms += 301_000
    assert book.line().leases == 0


def test_a_task_runs_until_its_end_or_until_it_is_ended(book: Book):
    task = book.assign(life_s=600)
    book.assign(life_s=1200)
    assert book.line().tasks == 2
    assert {one["purpose"] for one in book.row()["tasks"]} == {"made by a test"}
    book.ledger.give(book.ledger.claims(TaskEnd, "sam", task_id=task, reason="done"))
    assert book.line().tasks == 1
    book.clock.ms += 1_300_000
    assert book.line().tasks == 0


def test_a_lease_stands_that_is_long_or_that_no_running_task_bounds(book: Book):
    long, short = book.assign(life_s=20_000), book.assign(life_s=1200)
    book.allow(long, ttl_s=3600)
    assert book.line().standing == 0
    book.allow(long, ttl_s=7200, scope=DEPLOY)
    assert book.line().standing == 1
    outlives = book.allow(short, ttl_s=1800)
    assert book.line().standing == 2
    assert lease_id(outlives) in book.row()["standing_leases"]
    book.ledger.give(book.ledger.claims(TaskEnd, "sam", task_id=long, reason="done"))
    assert book.line().standing == 3
    assert book.sums()["standing_leases"] == 3


def test_leases_that_stand_are_named_and_no_others(book: Book):
    task = book.assign(life_s=20_000)
    named = [lease_id(book.allow(task, ttl_s=7200)) for _ in range(2)]
    book.clock.ms += 6_000_000
    book.allow(task, ttl_s=1200)  # it ends with them, and is short-lived
    row = book.row()
    assert (row["standing_leases"], row["leases"]) == (named, 3)
    assert row["leases_until"] == book.now_s + 1200


def test_use_of_a_ceiling_is_remembered_for_30_days(book: Book):
    task = book.assign()
    assert (book.line().granted, book.line().unused, book.line().seen) == (2, 2, False)
    book.lease(book.allow(task), task)
    assert (book.line().unused, book.line().seen) == (1, True)
    assert book.row()["reach"][0]["unused"] == ["deploy"]
    sums = book.sums()
    assert (sums["granted"], sums["used"], sums["with_unused"]) == (2, 1, 1)
    book.clock.ms += 31 * DAY_S * 1000
    assert book.line().unused == 2


def test_an_agent_is_seen_with_each_of_its_keys(book: Book):
    assert book.row()["last_seen_ms"] is None
    task = book.assign()
    at_ms = book.clock.ms
    book.allow(task)
    row = book.row()
    assert (row["last_seen_ms"], row["keys"][0]["last_seen_ms"]) == (at_ms, at_ms)
    assert book.sums()["not_seen"] == 0


def test_only_so_many_keys_are_remembered():
    key_last_seen, key = KeyLastSeen(), SigningKey.generate(f"spiffe://{TD}/agent/bot")
    request = cast(CredentialRequest, EXAMPLES[CredentialRequest]).model_copy(update={"iss": key.id})
    kids = []
    for number in range(MAX_KEYS + 1):
        key = SigningKey.generate(key.id)
        compact = sign(request, key)
        kids.append(parse(compact).header.kid)
        source = Coordinates(topic="t", partition=0, offset=0, appended_at_ms=1000 + number)
        changes = {"request": compact, "source": source}
        key_last_seen.on_decision(
            cast(CredentialDecision, EXAMPLES[CredentialDecision]).model_copy(update=changes), "bot"
        )
    assert list(key_last_seen.of("bot")) == kids[1:]


# --- keys -------------------------------------------------------------------------------------------------------------


def test_an_agent_whose_last_key_ends_soon_is_counted_and_with_a_newer_one_not(book: Book):
    soon, later = (book.ledger.key("robot", "agent").record(book.now_s + days * DAY_S) for days in (7, 90))
    book.register("robot", keys=(soon,))
    other = SigningKey.generate(f"spiffe://{TD}/agent/third")
    book.register(
        "third",
        keys=(other.record(book.now_s + 7 * DAY_S), SigningKey.generate(other.id).record(later.not_after)),
    )
    assert book.sums()["keys_ending"] == 1
    assert book.sums(within_s=6 * DAY_S)["keys_ending"] == 0
    book.clock.ms += 8 * DAY_S * 1000
    assert (book.sums()["keys_ending"], book.sums()["keys_ended"]) == (0, 1)


def test_a_key_in_other_hands_is_no_key_that_lasts(book: Book):
    stolen, key = book.ledger.key("bot", "agent"), SigningKey.generate(f"spiffe://{TD}/agent/bot")
    command = book.ledger.claims(
        AgentRotateKey, "sam", agent_id="bot", key=key.record(book.now_s + 7 * DAY_S), replaces=(stolen.kid,),
        compromised=True,
    )  # fmt: skip
    book.ledger.give(command)
    assert book.sums()["keys_ending"] == 1
    assert {key["kid"]: key["compromised"] for key in book.row()["keys"]} == {
        stolen.kid: True,
        key.kid: False,
    }


def test_an_agent_that_its_sponsor_has_not_taken_on_is_one_of_those_that_there_are(book: Book):
    book.register("new", inactive=True)
    assert (book.sums()["agents"], book.sums()["registered"], book.sums()["active"]) == (2, 1, 1)


# --- what changed -----------------------------------------------------------------------------------------------------


def test_changes_after_a_cursor_are_listed_once(book: Book):
    book.register("robot", "suzy")
    book.line()
    cursor = book.roster.cursor
    assert list(book.roster.changed(cursor)) == []
    book.assign("robot")
    book.assign("bot")
    book.assign("robot")
    book.line()
    assert sorted(book.roster.changed(cursor)) == ["bot", "robot"]
    assert list(book.roster.changed(book.roster.cursor)) == []


@pytest.mark.parametrize("cursor", ["", "x.1", "1", "other.5"])
def test_a_cursor_of_another_table_is_refused(book: Book, cursor: str):
    with pytest.raises(CursorLostError):
        list(book.roster.changed(cursor))


async def test_an_agent_that_changes_all_the_time_is_looked_at_once_a_round(
    book: Book, monkeypatch: pytest.MonkeyPatch
):
    book.register("robot", "suzy")
    task, looked, pauses = book.assign(), list[str](), list[float]()
    facts = book.roster.facts

    def changing(agent_id: str) -> Any:
        looked.append(agent_id)
        book.allow(task)
        return facts(agent_id)

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise asyncio.CancelledError

    monkeypatch.setattr(book.roster, "facts", changing)
    monkeypatch.setattr("ringfence.policy.agents.agent_index.asyncio.sleep", pause)
    with pytest.raises(asyncio.CancelledError):
        await book.roster.keep()
    assert looked == ["bot", "robot", "bot", "bot"]
    assert set(pauses) == {_IDLE_S}


def test_a_record_that_does_not_verify_has_no_line_and_is_counted(book: Book):
    entry = book.ledger.directory.agent("bot")
    assert entry is not None
    wider = entry.state.model_copy(update={"agent_id": "evil", "sponsor": "suzy"})
    assert book.ledger.admit(book.ledger.sign_record(wider, entry.record.commands)) is None
    book.line()
    assert (book.roster.ids(), book.roster.broken) == (["bot"], 1)


def test_an_agent_that_cannot_be_told_of_ends_nothing(book: Book, monkeypatch: pytest.MonkeyPatch):
    book.register("robot")
    book.line()
    facts = book.roster.facts

    def fails(agent_id: str) -> Any:
        if agent_id == "robot":
            raise KeyError("what nobody thought of")
        return facts(agent_id)

    monkeypatch.setattr(book.roster, "facts", fails)
    for agent in ("bot", "robot"):
        book.assign(agent)
    assert book.line().tasks == 1
    assert (book.roster.ids(), book.roster.broken) == (["bot"], 1)
    monkeypatch.undo()
    book.assign("robot")
    assert book.line("robot").tasks == 2
    assert (book.roster.ids(), book.roster.broken) == (["bot", "robot"], 0)


@pytest.mark.parametrize("head", ["e30", "bnVsbA", "W10", "!", "", "x" * 600])
def test_a_decision_on_what_names_no_key_is_no_sighting(head: str):
    example = cast(CredentialDecision, EXAMPLES[CredentialDecision])
    key_last_seen = KeyLastSeen()
    key_last_seen.on_decision(example.model_copy(update={"request": f"{head}.e30.AA"}), "bot")
    assert not key_last_seen.of("bot")
