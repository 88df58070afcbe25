"""Which leases a changed record ends, and why: the rules of the revoker."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.enrolment import AttestationSelector, InstanceRef
from ringfence.messages.lease import Delegator, EndCause, EndKind, Lease, LeaseStatus, Selector
from ringfence.messages.registry import (
    AgentSetCeiling,
    AgentState,
    AgentSuspend,
    TargetRemove,
    TargetState,
    TaskEnd,
    TaskState,
    UserDisable,
    UserState,
)
from ringfence.messages.run import RunStatus
from ringfence.model.identity.attestation import selector_id
from ringfence.model.verdict import ALLOWED
from ringfence.revoker.domain import (
    EndReason,
    Narrowing,
    SelectorEnd,
    StaleBasis,
    check_basis,
    check_sponsor,
    consequences,
    deadline_cause,
    derived_revocation,
    next_status,
    run_record,
    was_sponsor,
)
from tests.support import leases
from tests.support.in_memory_registry import START_MS, TD, InMemoryRegistry, permission
from tests.support.runs import LIFE_S, OneRun, Runners

WIDE, NARROW = permission("env/**"), permission("env/staging")
NOW_S = START_MS // 1000
MAX_AGE_S = 86_400


class Records(InMemoryRegistry):
    """sam sponsors bot, suzy sponsors lead, and lead handed its task on to bot; both tasks are on behalf of uma."""

    def __init__(self) -> None:
        super().__init__()
        self.organisation()
        self.give(self.user_set("olga", "uma", entitlements=self.entitlements(WIDE)))
        self.give(self.target_set("olga", "staging"))
        for agent, sponsor in (("bot", "sam"), ("lead", "suzy")):
            self.give(self.register(sponsor, agent, sponsor, ceiling=(WIDE,)))
        self.task, self.lead_task = self.assigned("sam", "bot"), self.assigned("suzy", "lead")
        self.lease: Lease = leases.lease(
            agent_id="bot", task_id=self.task, sponsor="sam", on_behalf_of="uma", target_id="staging",
            scope=(NARROW,), iat=NOW_S + 60, key_thumbprint=self.key("bot", "agent").kid,
            delegators=(
                Delegator(
                    agent_id="lead", task_id=self.lead_task, sponsor="suzy",
                    key_thumbprint=self.key("lead", "agent").kid,
                ),
            ),
        ).claims  # fmt: skip

    def assigned(self, by: str, agent: str) -> str:
        terms = self.terms(agent)
        change = self.give(
            self.assign(by, agent, terms=terms, on_behalf_of="uma", consent=self.consent("uma", terms))
        )
        assert change is not None
        assert isinstance(change.state, TaskState)
        return change.state.task_id

    def agent(self, name: str = "bot", **changed: Any) -> AgentState:
        entry = self.directory.agent(name)
        assert entry is not None
        return entry.state.model_copy(update=changed)

    def user(self, name: str, **changed: Any) -> UserState:
        entry = self.directory.user(name)
        assert entry is not None
        return entry.state.model_copy(update=changed)

    def one_task(self, **changed: Any) -> TaskState:
        entry = self.directory.task(self.task)
        assert entry is not None
        return entry.state.model_copy(update=changed)

    def target(self, **changed: Any) -> TargetState:
        entry = self.directory.target("staging")
        assert entry is not None
        return entry.state.model_copy(update=changed)


@pytest.fixture(scope="module")
def records() -> Records:
    return Records()


# --- consequences of one record ---

State = Callable[[Records], Any]
TASK = "the task"


@pytest.mark.parametrize(
    ("state", "ends"),
    [
        (lambda r: r.agent(status="registered"), []),
        (lambda r: r.agent(status="suspended"), [("agent_suspended", {"agent_id": "bot"})]),
        (lambda r: r.agent(status="decommissioned"), [("agent_decommissioned", {"agent_id": "bot"})]),
        (lambda r: r.one_task(), []),
        (lambda r: r.one_task(status="ended"), [("task_ended", {"task_id": TASK})]),
        (lambda r: r.target(), []),
        (lambda r: r.target(status="removed"), [("target_removed", {"target_id": "staging"})]),
        (
            lambda r: r.user("sam", status="disabled"),
            [("user_disabled", {"user_id": "sam"}), ("user_disabled", {"sponsor": "sam"})],
        ),
    ],
    ids=["registered", "suspended", "decommissioned", "task", "task ended", "target", "target removed", "disabled"],
)  # fmt: skip
def test_a_record_that_leaves_no_room_ends_all_that_it_covers(
    records: Records, state: State, ends: list[tuple[EndKind, dict[str, Any]]]
) -> None:
    wanted: list[tuple[EndKind, Selector]] = []
    for kind, of in ends:
        fields: dict[str, Any] = {name: records.task if id == TASK else id for name, id in of.items()}
        wanted.append((kind, Selector(**fields)))
    found = consequences(state(records), 2, NOW_S, MAX_AGE_S)
    assert all(isinstance(one, SelectorEnd) for one in found)
    assert [(one.kind, one.selector) for one in found if isinstance(one, SelectorEnd)] == wanted
    assert all(one.reason for one in found if isinstance(one, SelectorEnd))


def test_a_later_record_of_an_active_agent_narrows_its_leases_to_the_ceiling(records: Records) -> None:
    state = records.agent(ceiling=(NARROW,))
    assert consequences(state, 1, NOW_S, MAX_AGE_S) == ()
    (found,) = consequences(state, 2, NOW_S, MAX_AGE_S)
    assert isinstance(found, Narrowing)
    assert (found.selector_key, found.scope, found.beyond.kind) == ("agent:bot", (NARROW,), "scope_narrowed")
    assert "ceiling of agent bot" in found.beyond.reason
    assert found.agent is state


@pytest.mark.parametrize(
    ("age_s", "scope"), [(MAX_AGE_S - 1, (WIDE,)), (MAX_AGE_S, ())], ids=["fresh", "too old"]
)
def test_a_later_record_of_a_user_narrows_to_entitlements_that_are_fresh(
    records: Records, age_s: int, scope: tuple[Any, ...]
) -> None:
    state = records.user("uma", roles=("sponsor",))
    assert consequences(state, 1, NOW_S + age_s, MAX_AGE_S) == ()
    (found,) = consequences(state, 2, state.entitlements.as_of + age_s, MAX_AGE_S)
    assert isinstance(found, Narrowing)
    assert (found.selector_key, found.scope, found.beyond.kind) == ("user:uma", scope, "scope_narrowed")
    assert "entitlements of user uma" in found.beyond.reason


@pytest.mark.parametrize(
    ("roles", "ever_sponsor", "keys"),
    [
        (("sponsor",), True, ["user:uma"]),
        ((), True, ["user:uma", "sponsor:uma"]),
        ((), False, ["user:uma"]),
    ],
)
def test_a_user_who_is_no_sponsor_any_more_leaves_orphans(
    records: Records, roles: tuple[str, ...], ever_sponsor: bool, keys: list[str]
) -> None:
    found = consequences(records.user("uma", roles=roles), 2, NOW_S, MAX_AGE_S, ever_sponsor=ever_sponsor)
    assert [one.selector_key for one in found if isinstance(one, Narrowing)] == keys
    for orphaned in found[1:]:
        assert isinstance(orphaned, Narrowing)
        assert (orphaned.scope, orphaned.beyond.kind) == ((), "agent_orphaned")


@pytest.mark.parametrize(
    ("changed", "kind"),
    [({"status": "disabled"}, "user_disabled"), ({"roles": ()}, "agent_orphaned"), ({}, None)],
)
def test_an_agent_is_an_orphan_without_an_active_sponsor(
    records: Records, changed: dict[str, Any], kind: EndKind | None
) -> None:
    verdict = check_sponsor(records.user("sam", **changed))
    assert (verdict.kind if isinstance(verdict, EndReason) else None) == kind


def test_former_sponsor_role_is_read_from_the_commands() -> None:
    records = Records()
    records.give(records.user_set("olga", "sam"))
    for name in ("sam", "uma"):
        records.give(records.claims(UserDisable, "olga", user_id=name, reason="left"))
    entries = {name: records.directory.user(name) for name in ("sam", "uma")}
    assert {name: was_sponsor(entry.record) for name, entry in entries.items() if entry} == {
        "sam": True,
        "uma": False,
    }
    agent = records.directory.agent("bot")
    assert agent is not None
    assert not was_sponsor(agent.record)
    sam = entries["sam"]
    assert sam is not None
    assert not was_sponsor(agent.record.model_copy(update={"commands": sam.record.commands}))


# --- one lease ---


def test_a_lease_beyond_the_new_scope_ends_and_one_within_stays(records: Records) -> None:
    beyond = EndReason("scope_narrowed", "beyond")
    assert Narrowing("agent:bot", (WIDE,), beyond).check_lease(records.lease) == ALLOWED
    assert Narrowing("agent:bot", (permission("env/other"),), beyond).check_lease(records.lease) == beyond


@pytest.mark.parametrize(("agent", "how"), [("bot", "asked for"), ("lead", "handed on")])
def test_a_lease_by_a_compromised_key_ends(records: Records, agent: str, how: str) -> None:
    kid = records.key(agent, "agent").kid
    state = records.agent(agent, compromised=(kid,), keys=())
    narrowing = Narrowing(f"agent:{agent}", (WIDE,), EndReason("scope_narrowed", ""), state)
    found = narrowing.check_lease(records.lease)
    assert isinstance(found, EndReason)
    assert found.kind == "key_compromised"
    assert how in found.reason


SELECTOR = AttestationSelector(issuer="https://x.example", claims={"sub": "s"})


def of_instance(lease: Lease, selector: AttestationSelector, run: OneRun | None = None) -> Lease:
    """The lease, if an instance had asked for it that the selector let in."""
    instance = InstanceRef(
        instance_id=lease.task_id, issuer=selector.issuer, subject="s", selector=selector_id(selector),
        not_after=NOW_S + 900, run=run.ref if run else None,
    )  # fmt: skip
    key = run.key.kid if run else lease.key_thumbprint
    return lease.model_copy(update={"instance": instance, "key_thumbprint": key})


def test_a_lease_of_an_instance_ends_with_the_selector_that_let_it_in(records: Records) -> None:
    lease = of_instance(records.lease, SELECTOR)
    beyond = EndReason("scope_narrowed", "beyond")
    found = Narrowing("agent:bot", (WIDE,), beyond, records.agent()).check_lease(lease)
    assert isinstance(found, EndReason)
    assert found.kind == "scope_narrowed"
    assert found.reason
    assert found != beyond
    assert Narrowing("agent:bot", (WIDE,), beyond).check_lease(lease) == ALLOWED


def test_a_lease_of_an_instance_whose_selector_is_in_the_record_ends_only_beyond_the_ceiling(
    records: Records,
) -> None:
    lease = of_instance(records.lease, SELECTOR)
    agent, beyond = records.agent(attestation=(SELECTOR,)), EndReason("scope_narrowed", "beyond")
    assert Narrowing("agent:bot", (WIDE,), beyond, agent).check_lease(lease) == ALLOWED
    assert Narrowing("agent:bot", (), beyond, agent).check_lease(lease) == beyond


@pytest.mark.parametrize(
    ("statuses", "changed", "task", "ends"),
    [
        (("claimed", "started"), {}, "task", False),
        ((), {}, "task", True),
        (("claimed",), {}, "task", True),
        (("claimed", "started", "ended"), {}, "task", True),
        (("claimed", "started"), {"key_thumbprint": SigningKey.generate("x").kid}, "task", True),
        (("claimed", "started"), {"iat": NOW_S + 2 * LIFE_S}, "task", True),
        (("claimed", "started"), {}, "lead_task", True),
    ],
    ids=["started", "unknown", "claimed", "ended", "another key", "issued after its deadline", "another task"],
)  # fmt: skip
def test_a_lease_of_a_run_that_does_not_cover_it_ends_with_the_run(
    statuses: tuple[RunStatus, ...], changed: dict[str, Any], task: str, ends: bool
) -> None:
    records = Records()
    runners = Runners(records)
    selector = runners.admits("bot")
    run = OneRun(runners, "bot", getattr(records, task))
    run.go(*statuses)
    lease = of_instance(records.lease, selector, run).model_copy(update=changed)
    basis = check_basis(lease, records.directory, MAX_AGE_S)
    assert isinstance(basis, StaleBasis) is ends
    if isinstance(basis, StaleBasis):
        assert (basis.kind, basis.record) == ("run_ended", run_record(run.id))
        assert "run" in basis.reason


@pytest.mark.parametrize(
    ("command", "kind", "subject"),
    [
        (lambda r: r.claims(AgentSuspend, "sam", agent_id="bot", reason="x"), "agent_suspended", "agent/bot"),
        (
            lambda r: r.claims(AgentSuspend, "suzy", agent_id="lead", reason="x"),
            "agent_suspended",
            "agent/lead",
        ),
        (lambda r: r.claims(TaskEnd, "sam", task_id=r.task, reason="x"), "task_ended", "task/"),
        (lambda r: r.claims(TaskEnd, "suzy", task_id=r.lead_task, reason="x"), "task_ended", "task/"),
        (
            lambda r: r.claims(TargetRemove, "olga", target_id="staging", reason="x"),
            "target_removed",
            "target/",
        ),
        (lambda r: r.claims(UserDisable, "olga", user_id="uma", reason="x"), "user_disabled", "user/uma"),
        (lambda r: r.claims(UserDisable, "olga", user_id="sam", reason="x"), "user_disabled", "user/sam"),
        (lambda r: r.claims(UserDisable, "olga", user_id="suzy", reason="x"), "user_disabled", "user/suzy"),
        (lambda r: r.user_set("olga", "sam"), "agent_orphaned", "user/sam"),
        (lambda r: r.user_set("olga", "uma"), "scope_narrowed", "user/uma"),
        (
            lambda r: r.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=()),
            "scope_narrowed",
            "agent/bot",
        ),
    ],
)
def test_a_lease_ends_with_each_record_that_it_rests_on(command: State, kind: EndKind, subject: str) -> None:
    records = Records()
    assert check_basis(records.lease, records.directory, MAX_AGE_S) == ALLOWED
    change = records.give(command(records))
    assert change is not None
    basis = check_basis(records.lease, records.directory, MAX_AGE_S)
    assert isinstance(basis, StaleBasis)
    assert (basis.kind, basis.record[1]) == (kind, change.revision)
    assert basis.reason
    assert f"/{subject}" in basis.record[0]


def test_records_that_are_not_known_end_nothing(records: Records) -> None:
    unknown = {
        "agent_id": "x",
        "task_id": str(uuid.uuid4()),
        "target_id": "x",
        "on_behalf_of": "x",
        "sponsor": "x",
    }
    assert (
        check_basis(records.lease.model_copy(update={**unknown, "delegators": None}), records.directory, 1)
        == ALLOWED
    )


def test_the_first_revision_of_a_record_ends_nothing_and_a_later_record_is_judged_all_the_same(
    records: Records,
) -> None:
    beyond = records.lease.model_copy(
        update={"scope": (permission("other"),), "on_behalf_of": "x", "delegators": None}
    )
    assert check_basis(beyond, records.directory, MAX_AGE_S) == ALLOWED
    unknown_agent = records.lease.model_copy(update={"agent_id": "x", "scope": (permission("other"),)})
    basis = check_basis(unknown_agent, records.directory, MAX_AGE_S)
    assert isinstance(basis, StaleBasis)
    assert basis.record[0].endswith("/user/uma")


# --- what follows ---


def test_a_revocation_that_follows_from_a_record_has_the_same_id_for_each_service() -> None:
    basis = StaleBasis("task_ended", "why", ("spiffe://x", 2))
    given: dict[str, Any] = {"by": f"spiffe://{TD}/service/a", "trust_domain": TD, "at_ms": 2_002_999}
    one = derived_revocation(basis, selector=Selector(agent_id="bot"), **given)
    again = derived_revocation(
        basis, selector=Selector(agent_id="bot"), **{**given, "by": f"spiffe://{TD}/service/b"}
    )
    assert (one.iss, one.aud, one.iat, one.kind, one.reason) == (
        f"spiffe://{TD}/service/a",
        TD,
        2002,
        "task_ended",
        "why",
    )
    assert (one.selector, one.lease_id) == (Selector(agent_id="bot"), None)
    assert one.jti == again.jti == derived_id("revocation.request", "spiffe://x", 2, '{"agent_id":"bot"}')
    lease_id = str(uuid.uuid4())
    others = [
        derived_revocation(basis, selector=Selector(agent_id="c"), **given),
        derived_revocation(basis, lease_id=lease_id, **given),
        derived_revocation(replace(basis, record=("spiffe://x", 3)), lease_id=lease_id, **given),
    ]
    assert others[1].lease_id == lease_id
    assert others[1].jti == derived_id("revocation.request", "spiffe://x", 2, lease_id)
    assert len({one.jti, *(other.jti for other in others)}) == 4
    assert run_record("r") == ("run/r", 1)


@pytest.mark.parametrize(
    ("status", "kind", "stateless", "following"),
    [
        ("minting", "revocation", False, "aborted"),
        ("active", "revocation", True, "ending"),
        ("active", "deadline", True, "expired"),
        ("active", "deadline", False, "ending"),
        ("ending", "deadline", True, "revoked"),
        ("expired", "revocation", True, None),
        ("aborted", "revocation", True, None),
    ],
)
def test_a_lease_that_ends_is_cut_first_unless_it_leaves_nothing_behind(
    records: Records, status: LeaseStatus, kind: EndKind, stateless: bool, following: LeaseStatus | None
) -> None:
    begun = EndCause(kind="revocation", at_ms=1) if status == "ending" else None
    lease = records.lease.model_copy(update={"status": status, "cause": begun})
    backends = {lease.backend} if stateless else {"other"}
    assert next_status(lease, EndCause(kind=kind, at_ms=1), backends) == following


def test_a_cut_without_a_cause_ends_for_the_cause_at_hand(records: Records) -> None:
    lease = records.lease.model_copy(update={"status": "ending", "cause": None})
    assert next_status(lease, EndCause(kind="release", at_ms=1), ()) == "released"


def test_an_end_without_a_revocation_is_of_the_deadline_or_of_minting(records: Records) -> None:
    minting = records.lease.model_copy(update={"status": "minting"})
    assert deadline_cause(minting, 7) == EndCause(kind="mint_failed", at_ms=7)
    assert deadline_cause(records.lease, 7) == EndCause(kind="deadline", at_ms=records.lease.deadline * 1000)
