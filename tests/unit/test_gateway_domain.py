"""Whether an action is allowed: every side, every state, and the one lease that decides."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import pytest

from ringfence.gateway.domain import (
    BAD_REQUEST,
    FORBIDDEN,
    TOO_MANY_REQUESTS,
    UNAUTHORIZED,
    UNAVAILABLE,
    ChosenLease,
    Refusal,
    Sender,
    access_of,
    authorize,
    narrowest,
    refuse,
    stale_view,
)
from ringfence.gateway.state.leases import LeaseTable
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.base import Permission
from ringfence.messages.codes import ReceivedCode
from ringfence.messages.enrolment import AttestationSelector, InstanceRef
from ringfence.messages.lease import Lease
from ringfence.messages.registry import (
    AgentDecommission,
    AgentRotateKey,
    AgentSetAttestation,
    AgentSetCeiling,
    AgentSuspend,
    ModelLimits,
    TargetRemove,
    TargetState,
    TaskDelegate,
    TaskEnd,
    UserDisable,
)
from ringfence.model.http_targets import Action
from ringfence.model.identity.attestation import selector_id
from ringfence.model.lifecycle import subject_key
from tests.support import leases
from tests.support.in_memory_registry import InMemoryRegistry, permission

MAX_AGE_S = 30 * 86_400
READ = Action("read", "env/staging/web")
GATEWAY_KEY = SigningKey.generate("spiffe://acme.example/service/gateway")
WIDE = permission("env/**", verbs=("read", "deploy"))


class Place:
    """sam sponsors bot; uma assigned it a task; it has a lease at `staging`."""

    def __init__(self, wide: Permission = WIDE, limits: ModelLimits | None = None) -> None:
        """`wide`: what the task, the agents and uma may do; `limits`: of the task."""
        self.ledger = InMemoryRegistry()
        self.ledger.organisation()
        give, ledger = self.ledger.give, self.ledger
        give(ledger.user_set("olga", "uma", entitlements=ledger.entitlements(wide)))
        give(ledger.target_set("olga", "staging"))
        give(ledger.target_set("olga", "other"))
        give(ledger.register("sam", "bot", "sam", ceiling=(wide,)))
        give(ledger.register("sam", "thief", "sam", ceiling=(wide,)))
        terms = ledger.terms("bot", scope=(wide,), limits=limits)
        change = give(ledger.assign("uma", "bot", terms=terms))
        assert change is not None
        self.task = change.state.task_id  # type: ignore[union-attr]
        self.table = LeaseTable(ledger.clock)
        self.lease = self.leased()

    def leased(self, *scope: Permission, **fields: Any) -> Lease:
        given = {
            "agent_id": "bot", "act": ("bot",), "task_id": self.task, "target_id": "staging", "backend": "jwt",
            "delivery": "gateway", "deadline": self.ledger.clock.ms // 1000 + 600,
            "requested_at_ms": self.ledger.clock.ms,
            "scope": scope or (permission("env/staging/*", verbs=("read",)),), **fields,
        }  # fmt: skip
        one = leases.lease(**given).claims
        self.table.apply(one)
        return one

    def target(self, id: str = "staging") -> TargetState:
        entry = self.ledger.directory.target(id)
        assert entry is not None
        return entry.state

    def weigh(
        self, sender: Sender | None = None, action: Action = READ, *, target: str = "staging"
    ) -> ChosenLease | Refusal:
        return authorize(
            sender or Sender("bot", self.task), self.target(target), action, self.table, self.ledger.directory,
            now_s=self.ledger.clock.ms / 1000, entitlements_max_age_s=MAX_AGE_S,
        )  # fmt: skip

    def codes(self, *args: Any, **kwargs: Any) -> set[str]:
        found = self.weigh(*args, **kwargs)
        return {reason.code for reason in found.reasons} if isinstance(found, Refusal) else set()

    def sides(self, *args: Any, **kwargs: Any) -> set[str | None]:
        found = self.weigh(*args, **kwargs)
        assert isinstance(found, Refusal)
        return {reason.side for reason in found.reasons}


@pytest.fixture
def place() -> Place:
    return Place()


def test_action_within_every_limit_is_allowed_by_the_lease(place: Place) -> None:
    found = place.weigh()
    assert isinstance(found, ChosenLease)
    assert found.lease == place.lease
    assert (found.ground.agent.state.agent_id, found.ground.task.state.task_id) == ("bot", place.task)


@pytest.mark.parametrize(
    ("action", "codes"),
    [
        (Action("read", "env/production/web"), {"beyond_lease"}),
        (Action("read", "env/staging/web/x"), {"beyond_lease"}),
        (Action("read", "other"), {"beyond_scope", "beyond_lease"}),
        (Action("deploy", "env/staging/web"), {"verb_unknown", "beyond_lease"}),
        (Action("wipe", "env/staging/web"), {"verb_unknown", "beyond_scope", "beyond_lease"}),
    ],
)
def test_action_beyond_a_limit_names_that_limit(place: Place, action: Action, codes: set[str]) -> None:
    assert place.codes(action=action) == codes


def test_every_side_that_lacks_it_is_named_with_the_permission(place: Place) -> None:
    found = place.weigh(action=Action("read", "other"))
    assert isinstance(found, Refusal)
    assert found.status == 403
    assert {reason.side for reason in found.reasons} == {"task", "ceiling:bot", "entitlements:uma", "lease"}
    for reason in found.reasons:
        assert reason.permission == permission("other", verbs=("read",))


def test_a_lease_that_is_wider_than_a_side_is_by_now_allows_no_more_than_that(place: Place) -> None:
    ledger = place.ledger
    narrow = permission("env/production/*", verbs=("read",))
    ledger.give(ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=(narrow,)))
    assert (place.codes(), place.sides()) == ({"beyond_scope"}, {"ceiling:bot"})
    ledger.give(ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=(WIDE,)))
    assert place.codes() == set()
    ledger.give(ledger.user_set("olga", "uma", entitlements=ledger.entitlements(narrow)))
    assert (place.codes(), place.sides()) == ({"beyond_scope"}, {"entitlements:uma"})


def test_entitlements_past_their_age_count_for_nothing(place: Place) -> None:
    ledger = place.ledger
    old = ledger.entitlements(WIDE, as_of=ledger.clock.ms // 1000 - MAX_AGE_S)
    ledger.give(ledger.user_set("olga", "uma", entitlements=old))
    assert (place.codes(), place.sides()) == ({"beyond_scope"}, {"entitlements:uma"})


@pytest.mark.parametrize(
    ("model", "by", "fields", "code"),
    [
        (AgentSuspend, "sam", {"agent_id": "bot", "reason": "x"}, "agent_suspended"),
        (AgentDecommission, "sam", {"agent_id": "bot", "reason": "x"}, "agent_decommissioned"),
        (UserDisable, "olga", {"user_id": "sam", "reason": "x"}, "agent_orphaned"),
        (UserDisable, "olga", {"user_id": "uma", "reason": "x"}, "user_disabled"),
        (TargetRemove, "olga", {"target_id": "staging", "reason": "x"}, "target_removed"),
    ],
)
def test_inactive_party_denies_the_action(
    place: Place, model: Any, by: str, fields: dict[str, str], code: str
) -> None:
    place.ledger.give(place.ledger.claims(model, by, **fields))
    assert code in place.codes()


def test_the_end_of_the_task_stops_it_and_so_does_its_time(place: Place) -> None:
    end = place.ledger.clock.ms
    place.ledger.clock.ms += 3600 * 1000
    place.lease = place.leased(deadline=place.ledger.clock.ms // 1000 + 600)
    assert place.codes() == {"task_ended"}
    place.ledger.clock.ms = end
    place.ledger.give(place.ledger.claims(TaskEnd, "uma", task_id=place.task, reason="done"))
    assert place.codes() == {"task_ended"}


def test_a_task_is_for_its_agent_alone(place: Place) -> None:
    assert place.codes(Sender("thief", place.task)) == {"task_other_agent", "no_lease"}


def test_unknown_agent_or_task_is_denied_by_name(place: Place) -> None:
    assert place.codes(Sender("nobody", place.task)) == {"agent_unknown", "no_lease"}
    assert place.codes(Sender("nobody")) == {"agent_unknown", "no_lease"}
    missing = "00000000-0000-5000-8000-000000000000"
    assert place.codes(Sender("bot", missing)) == {"task_unknown", "no_lease"}


def test_without_a_task_any_lease_of_the_agent_will_do_and_its_task_is_the_actions(place: Place) -> None:
    found = place.weigh(Sender("bot"))
    assert isinstance(found, ChosenLease)
    assert found.ground.task.state.task_id == place.task
    place.ledger.give(place.ledger.claims(AgentSuspend, "sam", agent_id="bot", reason="x"))
    assert "agent_suspended" in place.codes(Sender("bot"))
    assert place.codes(Sender("bot"), Action("wipe", "x")) == {"agent_suspended", "beyond_lease"}


def test_a_handle_names_just_that_lease(place: Place) -> None:
    narrow = place.leased(permission("env/staging/api", verbs=("read",)))
    named = Sender("bot", place.task, narrow.lease_id)
    assert place.codes(named) == {"beyond_lease"}, "the other lease would allow it"
    found = place.weigh(named, Action("read", "env/staging/api"))
    assert isinstance(found, ChosenLease)
    assert found.lease.lease_id == narrow.lease_id
    wider = Sender("bot", place.task, place.lease.lease_id)
    found = place.weigh(wider, Action("read", "env/staging/api"))
    assert isinstance(found, ChosenLease)
    assert found.lease.lease_id == place.lease.lease_id


def test_handle_of_a_revoked_lease_is_denied(place: Place) -> None:
    place.table.revoke(place.lease.lease_id, place.ledger.clock.ms)
    assert place.codes(Sender("bot", place.task, place.lease.lease_id)) == {"lease_cut"}


@pytest.mark.parametrize(("ahead_ms", "status", "code"), [(0, 403, "lease_ended"), (5000, 503, "stale_view")])
def test_lease_ended_only_by_a_fast_clock_is_denied_as_stale(
    place: Place, ahead_ms: int, status: int, code: str
) -> None:
    clock = place.ledger.clock
    place.table = LeaseTable(clock, lambda: clock.ms - ahead_ms)
    mine = place.leased(deadline=clock.ms // 1000 + 10)
    clock.ms = mine.deadline * 1000
    found = place.weigh(Sender("bot", place.task, mine.lease_id))
    assert isinstance(found, Refusal)
    assert (found.status, [reason.code for reason in found.reasons]) == (status, [code])


@pytest.mark.parametrize("status", ["minting", "ending", "released", "expired", "aborted"])
def test_only_an_active_lease_counts(place: Place, status: str) -> None:
    place.table.apply(place.lease.model_copy(update={"seq": 9, "status": status}))
    assert place.codes() == {"no_lease"}
    assert place.codes(Sender("bot", place.task, place.lease.lease_id)) == {"lease_ended"}


def test_every_agent_of_the_chain_counts(place: Place) -> None:
    ledger = place.ledger
    place.table.revoke(place.lease.lease_id, ledger.clock.ms)
    place.leased(act=("bot", "thief"))
    assert place.codes() == set()
    narrow = permission("env/production/*", verbs=("read",))
    ledger.give(ledger.claims(AgentSetCeiling, "sam", agent_id="thief", ceiling=(narrow,)))
    assert place.sides() == {"ceiling:thief"}
    ledger.give(ledger.claims(AgentSuspend, "sam", agent_id="thief", reason="x"))
    assert place.codes() == {"agent_suspended"}


# --- which of several -------------------------------------------------------------------------------------------------


def _lease(*resources: str, verbs: Sequence[str] = ("read",), deadline: int = 1000) -> Lease:
    return leases.lease(scope=(permission(*resources, verbs=verbs),), deadline=deadline).claims


@pytest.mark.parametrize(
    ("narrower", "wider"),
    [
        (_lease("env/a"), _lease("env/*")),
        (_lease("env/*"), _lease("env/**")),
        (_lease("env/a", "env/b"), _lease("env/*")),
        (_lease("env/a"), _lease("env/a", verbs=("read", "deploy"))),
        (_lease("env/a", deadline=999), _lease("env/a", deadline=1000)),
        (_lease("env/a", verbs=("read", "deploy")), _lease("env/*")),
        (
            _lease("env/a", verbs=("read", "deploy", "wipe")),
            _lease("env/a", "env/b", verbs=("read", "deploy")),
        ),
        (_lease("env/a/**", "b/*/c"), _lease("env/a/**", "b/*/c", "d/*/e")),
        (_lease("env/a/**", "env/b/c/**", "d"), _lease("env/a/**", "env/b/c/**", "d/*")),
    ],
)
def test_the_narrowest_decides(narrower: Lease, wider: Lease) -> None:
    """Whatever their ids: those only tell equals apart, and here they favour the wider one."""
    narrower = narrower.model_copy(update={"lease_id": "ffffffff-ffff-5fff-8fff-ffffffffffff"})
    wider = wider.model_copy(update={"lease_id": "00000000-0000-5000-8000-000000000000"})
    assert narrowest([wider, narrower]) == narrowest([narrower, wider]) == narrower


def test_equals_are_told_apart_by_their_ids() -> None:
    one, other = sorted([_lease("a"), _lease("a")], key=lambda lease: lease.lease_id)
    assert narrowest([other, one]) == one
    assert narrowest([]) is None


def test_a_lease_of_an_instance_that_is_let_in_no_more_is_none() -> None:
    place = Place()
    wanted = AttestationSelector(issuer="https://x.example", claims={"sub": "a"})
    place.ledger.give(place.ledger.claims(AgentSetAttestation, "sam", agent_id="bot", attestation=(wanted,)))
    ref = InstanceRef(
        instance_id="3f1c7a52-9a0e-5c1b-8d2e-7a529a0e5c1b", issuer=wanted.issuer, subject="a",
        selector=selector_id(wanted), not_after=place.ledger.clock.ms // 1000 + 300,
    )  # fmt: skip
    lease = place.leased(instance=ref)
    found = place.weigh(sender=Sender("bot", None, lease.lease_id))
    assert isinstance(found, ChosenLease)
    place.ledger.give(place.ledger.claims(AgentSetAttestation, "sam", agent_id="bot", attestation=()))
    found = place.weigh(sender=Sender("bot", None, lease.lease_id))
    assert isinstance(found, Refusal)
    assert [reason.code for reason in found.reasons] == ["instance_void"]


def test_a_lease_of_a_compromised_key_is_refused_however_its_agent_is_known(place: Place) -> None:
    """By a certificate or the socket of its task too: whoever asked for it need not have been the agent."""
    ledger = place.ledger
    old, new = ledger.key("bot", "agent"), SigningKey.generate(ledger.key("bot", "agent").id)
    place.leased(lease_id="00000000-0000-4000-8000-00000000000a", key_thumbprint=old.kid)
    place.table.revoke(place.lease.lease_id, ledger.clock.ms)
    assert place.codes() == set()
    claims = ledger.claims(
        AgentRotateKey, "sam", agent_id="bot", key=ledger.key_record(new), compromised=True
    )
    ledger.give(claims)
    for sender in (Sender("bot"), Sender("bot", place.task)):
        assert place.codes(sender) == {"key_compromised"}
    place.table.revoke("00000000-0000-4000-8000-00000000000a", ledger.clock.ms)
    place.leased(lease_id="00000000-0000-4000-8000-00000000000b", key_thumbprint=new.kid)
    assert place.codes() == set()


# --- what a refusal says ----------------------------------------------------------------------------------------------


def reasons(found: ChosenLease | Refusal) -> list[tuple[str, str | None, Permission | None]]:
    assert isinstance(found, Refusal)
    return [(reason.code, reason.side, reason.permission) for reason in found.reasons]


def test_chosen_lease_carries_the_wanted_permission(place: Place) -> None:
    found = place.weigh()
    assert isinstance(found, ChosenLease)
    assert found.wanted == (permission("env/staging/web", verbs=("read",)),)


def test_a_handle_that_nobody_knows_is_no_authorisation(place: Place) -> None:
    found = place.weigh(Sender("bot", place.task, "unknown"))
    assert isinstance(found, Refusal)
    assert (found.status, reasons(found), found.sender) == (401, [("handle_unknown", None, None)], None)


def test_a_lease_that_is_for_something_else_is_what_lacks_it(place: Place) -> None:
    sender = Sender("bot", place.task, place.lease.lease_id)
    assert reasons(place.weigh(sender, target="other")) == [("handle_other_target", "lease", None)]
    found = place.weigh(sender, target="other")
    assert isinstance(found, Refusal)
    assert found.status == 403
    assert "staging" in found.reasons[0].message
    assert "other" in found.reasons[0].message
    to_itself = place.leased(delivery="agent")
    sender = Sender("bot", place.task, to_itself.lease_id)
    assert reasons(place.weigh(sender)) == [("lease_not_for_gateways", "lease", None)]


def test_without_a_lease_the_lease_is_what_lacks_the_permission(place: Place) -> None:
    place.table.revoke(place.lease.lease_id, place.ledger.clock.ms)
    wanted = permission("env/staging/web", verbs=("read",))
    found = place.weigh()
    assert reasons(found) == [("no_lease", "lease", wanted)]
    assert isinstance(found, Refusal)
    assert place.task in found.reasons[0].message
    found = place.weigh(Sender("bot"))
    assert reasons(found) == [("no_lease", "lease", wanted)]
    assert isinstance(found, Refusal)
    assert "agent bot" in found.reasons[0].message
    place.leased(backend="http")
    assert reasons(place.weigh()) == [("lease_outdated", "lease", None)]


def test_the_records_of_a_named_leases_task_count_though_it_allows_too_little(place: Place) -> None:
    sender = Sender("bot", None, place.lease.lease_id)
    assert place.codes(sender, Action("read", "other")) == {"beyond_lease", "beyond_scope"}
    assert place.codes(sender, Action("read", "env/production/web")) == {"beyond_lease"}


def test_a_lease_of_a_task_that_nobody_knows_is_good_for_nothing(place: Place) -> None:
    place.table.revoke(place.lease.lease_id, place.ledger.clock.ms)
    ref = InstanceRef(
        instance_id="3f1c7a52-9a0e-5c1b-8d2e-7a529a0e5c1b", issuer="https://x.example", subject="a",
        selector="5" * 64, not_after=place.ledger.clock.ms // 1000 + 300,
    )  # fmt: skip
    place.leased(task_id="00000000-0000-5000-8000-000000000000", instance=ref)
    assert reasons(place.weigh(Sender("bot"))) == [("task_unknown", None, None)]


def test_a_compromised_key_is_named_with_its_agent(place: Place) -> None:
    ledger = place.ledger
    new = SigningKey.generate(ledger.key("bot", "agent").id)
    rotated = ledger.claims(
        AgentRotateKey, "sam", agent_id="bot", key=ledger.key_record(new), compromised=True
    )
    ledger.give(rotated)
    place.table.revoke(place.lease.lease_id, ledger.clock.ms)
    place.leased(key_thumbprint=ledger.key("bot", "agent").kid)
    found = place.weigh()
    assert isinstance(found, Refusal)
    assert "agent bot" in found.reasons[0].message


def test_a_record_that_does_not_hold_is_no_agent(place: Place) -> None:
    ledger = place.ledger
    reader = ledger.reader()
    entry = ledger.directory.agent("bot")
    assert entry is not None
    ledger.admit(ledger.sign_record(entry.state, entry.record.commands, entry.revision), reader)
    found = authorize(
        Sender("bot"), place.target(), READ, LeaseTable(ledger.clock), reader, now_s=ledger.clock.ms / 1000,
        entitlements_max_age_s=MAX_AGE_S,
    )  # fmt: skip
    assert [code for code, *_ in reasons(found)] == ["record_untrusted", "no_lease"]
    assert isinstance(found, Refusal)
    assert found.reasons[0].message.strip()


# --- agents that the lease names and its task does not ----------------------------------------------------------------


@pytest.fixture
def others(place: Place) -> Place:
    """The lease names two agents more than its task does."""
    ledger = place.ledger
    ledger.give(ledger.register("sam", "helper", "sam", ceiling=(WIDE,)))
    place.table.revoke(place.lease.lease_id, ledger.clock.ms)
    place.lease = place.leased(act=("bot", "thief", "helper"))
    return place


def test_the_ceiling_of_each_of_them_counts(others: Place) -> None:
    ledger = others.ledger
    assert others.codes() == set()
    for agent in ("helper", "thief"):
        ledger.give(ledger.claims(AgentSetCeiling, "sam", agent_id=agent, ceiling=()))
    wanted = permission("env/staging/web", verbs=("read",))
    assert reasons(others.weigh()) == [
        ("beyond_scope", "ceiling:thief", wanted),
        ("beyond_scope", "ceiling:helper", wanted),
    ]


def test_each_of_them_is_active(others: Place) -> None:
    ledger = others.ledger
    ledger.give(ledger.claims(AgentSetCeiling, "sam", agent_id="thief", ceiling=()))
    ledger.give(ledger.claims(AgentSuspend, "sam", agent_id="helper", reason="x"))
    assert [code for code, *_ in reasons(others.weigh())] == ["beyond_scope", "agent_suspended"]
    ledger.give(ledger.claims(AgentSuspend, "sam", agent_id="thief", reason="x"))
    found = others.weigh()
    assert [code for code, *_ in reasons(found)] == ["agent_suspended", "agent_suspended"]
    assert isinstance(found, Refusal)
    assert ["thief" in found.reasons[0].message, "helper" in found.reasons[1].message] == [True, True]


def test_unknown_delegating_agent_is_denied(place: Place) -> None:
    place.table.revoke(place.lease.lease_id, place.ledger.clock.ms)
    place.leased(act=("bot", "nobody"))
    assert reasons(place.weigh()) == [("agent_unknown", None, None)]


def test_delegating_agents_named_by_the_task_are_checked_once(place: Place) -> None:
    ledger = place.ledger
    terms = ledger.terms("thief", scope=(WIDE,), not_after=ledger.clock.ms // 1000 + 600)
    change = ledger.give(
        ledger.claims(TaskDelegate, "bot", iss=ledger.key("bot", "agent").id, parent=place.task, terms=terms)
    )
    assert change is not None
    part = subject_key(change.state)[1]
    place.leased(agent_id="thief", act=("thief", "bot"), task_id=part)
    sender = Sender("thief", part)
    assert isinstance(place.weigh(sender), ChosenLease)
    ledger.give(ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=()))
    wanted = permission("env/staging/web", verbs=("read",))
    assert reasons(place.weigh(sender)) == [("beyond_scope", "ceiling:bot", wanted)]
    ledger.give(ledger.claims(AgentSuspend, "sam", agent_id="thief", reason="x"))
    assert sorted(code for code, *_ in reasons(place.weigh(sender))) == ["agent_suspended", "beyond_scope"]


def test_the_leases_own_agent_is_told_of_once_where_its_task_is_not_there(place: Place) -> None:
    place.table.revoke(place.lease.lease_id, place.ledger.clock.ms)
    place.leased(task_id="00000000-0000-5000-8000-000000000000")
    place.ledger.give(place.ledger.claims(AgentSuspend, "sam", agent_id="bot", reason="x"))
    assert reasons(place.weigh(Sender("bot"))) == [("task_unknown", None, None)]


# --- words that others go by ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "access"),
    [
        ("GET", "read"), ("HEAD", "read"), ("OPTIONS", "read"), ("TRACE", "read"),
        ("POST", "write"), ("PUT", "write"), ("DELETE", "write"), ("PATCH", "write"), ("get", "write"), ("X", "write"),
        ("CONNECT", None),
    ],
)  # fmt: skip
def test_access_of_a_method_is_read_or_write(method: str, access: str | None) -> None:
    assert access_of(method) == access


def test_a_refusal_says_all_that_it_is_given() -> None:
    wanted, sender = permission("a", verbs=("read",)), Sender("bot")
    found = refuse(ReceivedCode("x"), "y" * 1001, status=429, permission=wanted, side="task", sender=sender)
    assert (found.status, found.sender) == (429, sender)
    (reason,) = found.reasons
    assert (reason.code, reason.message, reason.permission, reason.side) == ("x", "y" * 1000, wanted, "task")
    plain = refuse(ReceivedCode("x"), "y")
    assert (plain.status, plain.sender, plain.reasons[0].side) == (403, None, None)


def test_statuses_are_those_of_http() -> None:
    named = (
        BAD_REQUEST,
        UNAUTHORIZED,
        FORBIDDEN,
        TOO_MANY_REQUESTS,
        UNAVAILABLE,
    )
    assert [HTTPStatus(status).phrase for status in named] == [
        "Bad Request", "Unauthorized", "Forbidden", "Too Many Requests",
        "Service Unavailable",
    ]  # fmt: skip


def test_a_view_that_is_too_old_is_said_with_its_reason() -> None:
    reason = stale_view("no heartbeat")
    assert (reason.code, reason.message.startswith("no heartbeat; denied")) == ("stale_view", True)
    assert len(stale_view("x" * 2000).message) == 1000
