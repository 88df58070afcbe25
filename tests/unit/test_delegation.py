"""Agents that hand on parts of their tasks: what the registry refuses, and what no registry makes a reader believe."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.base import Claims, Permission, Scope
from ringfence.messages.registry import (
    AgentDecommission,
    AgentResume,
    AgentRotateKey,
    AgentSetCeiling,
    AgentSuspend,
    AnyRecord,
    ModelLimits,
    TaskDelegate,
    TaskEnd,
    TaskState,
    UserDisable,
    VerbFloor,
)
from ringfence.model.identity.spiffe_ids import SubjectKind
from ringfence.model.lifecycle import MAX_DEPTH, CommandRefusedError
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.requests.approvals import may_approve
from ringfence.model.requests.facts import load_records, violations_of
from ringfence.registry.domain import MAX_PARTS
from ringfence.revoker.revocations.verification import Delegations
from tests.support import user_keys
from tests.support.in_memory_registry import START_MS, TD, InMemoryRegistry, permission

NOW_S = START_MS // 1000
WIDE, NARROW = (permission("env/**"),), (permission("env/a"),)
AGENTS = ("bot", "second", "third", "fourth", "fifth")


@pytest.fixture
def ledger() -> InMemoryRegistry:
    """sam's bot, suzy's other agents, uma who may do what she has done."""
    ledger = InMemoryRegistry()
    ledger.organisation()
    ledger.give(ledger.user_set("olga", "uma", entitlements=ledger.entitlements(*WIDE)))
    ledger.give(
        ledger.target_set("olga", "staging", verbs=(VerbFloor(verb="deploy"), VerbFloor(verb="read")))
    )
    for agent in AGENTS:
        ledger.give(ledger.register("olga", agent, "sam" if agent == "bot" else "suzy", ceiling=WIDE))
    return ledger


@pytest.fixture
def task(ledger: InMemoryRegistry) -> str:
    return made(ledger, ledger.assign("uma", "bot"))


def made(ledger: InMemoryRegistry, claims: Any, **how: Any) -> str:
    """The id of a task that the registry takes."""
    change = ledger.give(claims, **how)
    assert change is not None
    assert isinstance(change.state, TaskState)
    return change.state.task_id


def part(ledger: InMemoryRegistry, by: str, parent: str, to: str, **terms: Any) -> TaskDelegate:
    given = {"not_after": NOW_S + 600, **terms}
    return ledger.claims(
        TaskDelegate, by, iss=ledger.key(by, "agent").id, parent=parent, terms=ledger.terms(to, **given)
    )


def by_agent(ledger: InMemoryRegistry, model: type[Any], agent: str, **fields: Any) -> Any:
    return ledger.claims(model, agent, iss=ledger.key(agent, "agent").id, **fields)


def refused(ledger: InMemoryRegistry, claims: Claims, key: SigningKey | None = None) -> str:
    """The code with which a command is refused."""
    with pytest.raises(CommandRefusedError) as caught:
        ledger.give(claims, key)
    return caught.value.code


def state_of(ledger: InMemoryRegistry, id: str) -> TaskState:
    entry = ledger.directory.task(id)
    assert entry is not None
    return entry.state


def reader_of(ledger: InMemoryRegistry, *, but_for: Sequence[str] = ()) -> Directory:
    """Somebody who reads all records only now."""
    reader = ledger.reader(ledger.alarms.append)
    kinds: tuple[SubjectKind, ...] = ("task", "agent", "target", "user")  # those that rest on others first
    for kind in kinds:
        for entry in ledger.directory.entries(kind):
            if entry.record.sub.rpartition("/")[2] not in but_for:
                assert ledger.admit(ledger.sign_record(*_parts(entry.record)), reader) is None
    return reader


def _parts(record: AnyRecord) -> tuple[Any, Any, int]:
    return record.state, record.commands, record.revision


# --- what is handed on ------------------------------------------------------------------------------------------------


def test_a_part_names_its_parent_its_chain_and_the_same_human(ledger: InMemoryRegistry, task: str):
    first = made(ledger, part(ledger, "bot", task, "second", scope=NARROW))
    second = made(ledger, part(ledger, "second", first, "third", scope=NARROW))
    state = state_of(ledger, second)
    assert (state.parent, state.act) == (first, ("third", "second", "bot"))
    assert (state.on_behalf_of, state.assigned_by, state.agent_id) == ("uma", "uma", "third")
    assert state_of(ledger, first).act == ("second", "bot")


def test_a_task_of_nobody_elses_says_what_it_said_before_there_were_parts(
    ledger: InMemoryRegistry, task: str
):
    entry = ledger.directory.task(task)
    assert entry is not None
    payload = parse(entry.compact).payload
    assert b'"parent"' not in payload
    assert b'"act"' not in payload
    assert entry.state.act is None


@pytest.mark.parametrize(
    "wanted",
    [
        (permission("env/**", verbs=("deploy", "read")),),
        (permission("env/**", target="production"),),
        (permission("**"),),
        (permission("env/a"), permission("other")),
    ],
)
def test_delegated_task_is_no_wider_than_the_task(ledger: InMemoryRegistry, task: str, wanted: Scope):
    assert refused(ledger, part(ledger, "bot", task, "second", scope=wanted)) == "beyond_parent"


def test_delegated_task_is_no_wider_than_the_one_above(ledger: InMemoryRegistry, task: str):
    first = made(ledger, part(ledger, "bot", task, "second", scope=NARROW))
    assert refused(ledger, part(ledger, "second", first, "third", scope=WIDE)) == "beyond_parent"


def test_delegated_task_has_no_higher_limit_than_the_task(ledger: InMemoryRegistry) -> None:
    terms = ledger.terms("bot", limits=ModelLimits(tokens=100))
    task = made(ledger, ledger.assign("uma", "bot", terms=terms))
    higher = part(ledger, "bot", task, "second", limits=ModelLimits(tokens=101))
    assert refused(ledger, higher) == "beyond_parent"
    made(ledger, part(ledger, "bot", task, "second", limits=ModelLimits(tokens=100, requests=5)))


def test_delegated_task_ends_no_later_than_the_task(ledger: InMemoryRegistry, task: str):
    end = state_of(ledger, task).not_after
    later = part(ledger, "bot", task, "second", not_after=end + 1)
    assert refused(ledger, later) == "later_than_parent"
    over = part(ledger, "bot", task, "second", not_after=ledger.clock.ms // 1000)
    assert refused(ledger, over) == "task_over"
    assert made(ledger, part(ledger, "bot", task, "second", not_after=end))


def test_delegation_back_to_a_delegating_agent_is_refused(ledger: InMemoryRegistry, task: str):
    assert refused(ledger, part(ledger, "bot", task, "bot")) == "delegation_loop"
    first = made(ledger, part(ledger, "bot", task, "second"))
    second = made(ledger, part(ledger, "second", first, "third"))
    for back in ("bot", "second", "third"):
        assert refused(ledger, part(ledger, "third", second, back)) == "delegation_loop"


def test_delegations_of_one_task_are_limited(ledger: InMemoryRegistry, task: str):
    for n in range(MAX_PARTS):
        one = made(ledger, part(ledger, "bot", task, "second"))
        if n % 2:  # those that have ended count too
            ledger.give(by_agent(ledger, TaskEnd, "bot", task_id=one, reason="x"))
    assert refused(ledger, part(ledger, "bot", task, "second")) == "too_many_parts"
    other = made(ledger, ledger.assign("uma", "bot"))
    assert made(ledger, part(ledger, "bot", other, "second"))


# --- who hands on -----------------------------------------------------------------------------------------------------


def test_another_agent_hands_nothing_on(ledger: InMemoryRegistry, task: str):
    assert refused(ledger, part(ledger, "second", task, "third")) == "not_task_agent"
    first = made(ledger, part(ledger, "bot", task, "second"))
    # Not even one that is in the chain: that part is another's.
    assert refused(ledger, part(ledger, "bot", first, "third")) == "not_task_agent"


@pytest.mark.parametrize("who", ["uma", "sam", "olga", "root"])
def test_no_person_hands_on(ledger: InMemoryRegistry, task: str, who: str):
    claims = ledger.claims(TaskDelegate, who, parent=task, terms=ledger.terms("second"))
    assert refused(ledger, claims) == "not_task_agent"


def test_another_agents_signature_is_none(ledger: InMemoryRegistry, task: str):
    with pytest.raises(InvalidMessageError, match="no valid key"):
        ledger.give(part(ledger, "bot", task, "second"), ledger.key("second", "agent"))


def test_an_old_key_hands_nothing_on(ledger: InMemoryRegistry):
    old, new = SigningKey.generate(ledger.key("bot", "agent").id), ledger.key("late", "agent")
    keys = (old.record(ledger.clock.ms // 1000 + 10), ledger.key_record(new))
    ledger.give(ledger.register("olga", "late", "sam", ceiling=WIDE, keys=keys))
    task = made(ledger, ledger.assign("uma", "late"))
    assert made(ledger, part(ledger, "late", task, "second"), key=old)
    ledger.clock.ms += 60_000
    with pytest.raises(InvalidMessageError, match="no valid key"):
        ledger.give(part(ledger, "late", task, "second"), old)
    # What it signed in its time holds for ever, and a registry that says that it came then is not believed later.
    assert reader_of(ledger).task(task) is not None


def test_part_handed_on_by_key_that_rests_on_compromised_key_gives_nothing(
    ledger: InMemoryRegistry, task: str
):
    honest = made(ledger, part(ledger, "bot", task, "second"))
    since_ms, thief = ledger.clock.ms, SigningKey.generate(ledger.key("bot", "agent").id)
    key = ledger.key_record(thief)
    ledger.give(ledger.claims(AgentRotateKey, "sam", agent_id="bot", key=key, overlap_s=3600))
    stolen = made(ledger, part(ledger, "bot", task, "second"), key=thief)
    below = made(ledger, part(ledger, "second", stolen, "third"))

    def codes(task_id: str, agent: str, directory: Directory) -> list[str]:
        records = load_records(directory, agent, task_id, "staging")
        return [one.code for one in violations_of(records, WIDE, ledger.clock.ms / 1000, 30 * 86_400)]

    assert codes(stolen, "second", ledger.directory) == []
    kid = ledger.key("sam").kid
    ledger.give(user_keys.end_key(ledger, "otto", "sam", kid, compromised=True, since_ms=since_ms))
    for reader in (ledger.directory, reader_of(ledger)):
        assert codes(stolen, "second", reader) == codes(below, "third", reader) == ["key_voucher_compromised"]
        assert codes(honest, "second", reader) == []
    assert refused(ledger, part(ledger, "bot", task, "second"), thief) == "key_voucher_compromised"
    ledger.give(by_agent(ledger, TaskEnd, "bot", task_id=honest, reason="narrowing"), thief)


@pytest.mark.parametrize("model", [AgentSuspend, AgentDecommission])
def test_suspended_or_decommissioned_agent_cannot_delegate(
    ledger: InMemoryRegistry, task: str, model: type[Any]
):
    ledger.give(ledger.claims(model, "olga", agent_id="bot", reason="x"))
    code = "agent_suspended" if model is AgentSuspend else "agent_decommissioned"
    assert refused(ledger, part(ledger, "bot", task, "second")) == code


def test_delegation_to_or_through_a_suspended_agent_is_refused(ledger: InMemoryRegistry, task: str):
    first = made(ledger, part(ledger, "bot", task, "second"))
    assert refused(ledger, part(ledger, "bot", task, "nobody")) == "unknown_agent"
    ledger.give(ledger.claims(AgentSuspend, "olga", agent_id="third", reason="x"))
    assert refused(ledger, part(ledger, "second", first, "third")) == "agent_suspended"
    ledger.give(ledger.claims(AgentSuspend, "olga", agent_id="bot", reason="x"))
    assert refused(ledger, part(ledger, "second", first, "fourth")) == "agent_suspended"


def test_delegation_of_an_ended_task_is_refused(ledger: InMemoryRegistry, task: str):
    first = made(ledger, part(ledger, "bot", task, "second", not_after=NOW_S + 60))
    assert refused(ledger, part(ledger, "bot", "0b8a1a5c-9a3e-5d57-8a2b-4a8d2f7f5b11", "second")) == (
        "unknown_parent"
    )
    ledger.give(ledger.claims(TaskEnd, "uma", task_id=task, reason="done"))
    assert refused(ledger, part(ledger, "bot", task, "second")) == "task_ended"
    # The part itself was not ended by anybody; what it is a part of was.
    assert state_of(ledger, first).status == "active"
    assert refused(ledger, part(ledger, "second", first, "third")) == "task_ended"
    short = made(ledger, ledger.assign("uma", "bot", terms=ledger.terms("bot", not_after=NOW_S + 120)))
    ledger.clock.ms = (NOW_S + 120) * 1000
    assert refused(ledger, part(ledger, "bot", short, "second")) == "task_ended"


def test_delegation_on_behalf_of_a_disabled_user_is_refused(ledger: InMemoryRegistry, task: str):
    ledger.give(ledger.claims(UserDisable, "olga", user_id="uma", reason="left"))
    assert refused(ledger, part(ledger, "bot", task, "second")) == "user_disabled"


# --- who ends it ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["bot", "second"])
def test_every_delegating_agent_above_can_end_a_delegated_task(ledger: InMemoryRegistry, task: str, who: str):
    first = made(ledger, part(ledger, "bot", task, "second"))
    second = made(ledger, part(ledger, "second", first, "third"))
    end = by_agent(ledger, TaskEnd, who, task_id=second, reason="done")
    given = ledger.directory.chains.authorise(parse(ledger.signed(end)), ledger.clock.ms)
    assert (given.actor.user_id, given.actor.roles) == (None, frozenset())
    ledger.give(end)
    assert state_of(ledger, second).status == "ended"
    reader = reader_of(ledger)
    entry = reader.task(second)
    assert entry is not None
    assert entry.state.status == "ended"


@pytest.mark.parametrize("who", ["third", "fourth"])
def test_no_other_agent_ends_it(ledger: InMemoryRegistry, task: str, who: str):
    first = made(ledger, part(ledger, "bot", task, "second"))
    second = made(ledger, part(ledger, "second", first, "third"))
    assert refused(ledger, by_agent(ledger, TaskEnd, who, task_id=second, reason="x")) == "not_entitled"
    assert refused(ledger, by_agent(ledger, TaskEnd, "bot", task_id=task, reason="x")) == "not_entitled"
    ledger.give(ledger.claims(AgentSuspend, "olga", agent_id="second", reason="x"))
    assert refused(ledger, by_agent(ledger, TaskEnd, "second", task_id=second, reason="x")) == (
        "agent_suspended"
    )


@pytest.mark.parametrize("who", ["uma", "suzy", "olga"])
def test_people_end_it_as_any_task(ledger: InMemoryRegistry, task: str, who: str):
    first = made(ledger, part(ledger, "bot", task, "second"))
    ledger.give(ledger.claims(TaskEnd, who, task_id=first, reason="x"))
    assert state_of(ledger, first).status == "ended"


# --- a registry that lies ---------------------------------------------------------------------------------------------


def forged(ledger: InMemoryRegistry, id: str, commands: Any = None, **state: Any) -> str:
    """Why a reader who was given this record instead of the honest one does not believe it."""
    entry = ledger.directory.task(id)
    assert entry is not None
    reader = reader_of(ledger, but_for=(id,))
    record = ledger.sign_record(entry.state.model_copy(update=state), commands or entry.record.commands)
    assert ledger.admit(record, reader) is None
    before = len(ledger.alarms)
    with pytest.raises(ChainError) as caught:
        reader.task(id)
    # A part of what is not there yet may be in order when it is; of anything else somebody is to be told.
    told = [alarm.code for alarm in ledger.alarms[before:]]
    assert told == ([] if "to hand on a part of" in str(caught.value) else ["chain_broken"])
    return str(caught.value)


@pytest.mark.parametrize(
    "state",
    [
        {"scope": (permission("**"),)},
        {"not_after": NOW_S + 3599},
        {"on_behalf_of": "sam"},
        {"assigned_by": "sam"},
        {"agent_id": "fourth"},
        {"parent": None, "act": None},
        {"act": ("second", "fifth")},
    ],
)
def test_registry_cannot_widen_a_delegated_task(ledger: InMemoryRegistry, task: str, state: dict[str, Any]):
    first = made(ledger, part(ledger, "bot", task, "second", scope=NARROW))
    assert "not what its commands say" in forged(ledger, first, **state)


def test_registry_cannot_invent_a_delegated_task(ledger: InMemoryRegistry, task: str):
    """It signs the command itself, with its own key or as the agent; or has none at all."""
    first = made(ledger, part(ledger, "bot", task, "second", scope=NARROW))
    claims = part(ledger, "bot", task, "second")
    assert "no valid key" in forged(ledger, first, (ledger.embed(claims, key=ledger.registry),))
    own = ledger.claims(TaskDelegate, "x", iss=ledger.registry.id, parent=task, terms=ledger.terms("second"))
    assert "no valid key" in forged(ledger, first, (ledger.embed(own, key=ledger.registry),))
    assigned = ledger.directory.task(task)
    assert assigned is not None
    assert forged(ledger, first, assigned.record.commands)


def test_reader_rejects_every_delegation_that_the_registry_refuses(ledger: InMemoryRegistry, task: str):
    first = made(ledger, part(ledger, "bot", task, "second", scope=NARROW))
    at_ms = ledger.clock.ms
    refusals = {
        "does not allow": part(ledger, "bot", task, "second", scope=(permission("**"),)),
        "s earlier than that": part(ledger, "bot", task, "second", not_after=NOW_S + 7200),
        "only bot": part(ledger, "third", task, "second"),
        "in the chain already": part(ledger, "bot", task, "bot"),
        "to hand on a part of": part(ledger, "bot", "0b8a1a5c-9a3e-5d57-8a2b-4a8d2f7f5b11", "second"),
    }
    for why, claims in refusals.items():
        assert why in forged(ledger, first, (ledger.embed(claims, at_ms),))
    before = ledger.embed(part(ledger, "bot", task, "second", scope=NARROW), START_MS)
    assert "no valid key" in forged(ledger, first, (before,))  # there was no agent yet


def test_registry_cannot_give_an_agent_the_history_of_another(ledger: InMemoryRegistry, task: str):
    """A record under the bot's name has the commands that made `second`: its key does not speak for the bot."""
    second = ledger.directory.agent("second")
    assert second is not None
    reader = reader_of(ledger, but_for=("bot",))
    lie = ledger.sign_record(second.state, second.record.commands, sub=ledger.key("bot", "agent").id)
    assert ledger.admit(lie, reader) is None
    command = ledger.signed(part(ledger, "bot", task, "third"), ledger.key("second", "agent"))
    with pytest.raises(ChainError, match="about something else"):
        reader.chains.authorise(parse(command), ledger.clock.ms)


def test_registry_cannot_give_a_task_the_history_of_another(ledger: InMemoryRegistry, task: str):
    """What the narrow task allows is no more for a record that has the commands of a wider one."""
    narrow = made(ledger, ledger.assign("uma", "bot", terms=ledger.terms("bot", scope=NARROW)))
    first = made(ledger, part(ledger, "bot", narrow, "second", scope=NARROW))
    wide = ledger.directory.task(task)
    assert wide is not None
    reader = reader_of(ledger, but_for=(narrow, first))
    lie = ledger.sign_record(wide.state, wide.record.commands, sub=f"spiffe://{TD}/task/{narrow}")
    assert ledger.admit(lie, reader) is None
    embedded = ledger.embed(part(ledger, "bot", narrow, "second", scope=WIDE))
    given = ledger.directory.chains.authorise(parse(embedded.jws), embedded.appended_at_ms)
    state = state_of(ledger, first).model_copy(update={"task_id": given.command_id, "scope": WIDE})
    assert ledger.admit(ledger.sign_record(state, (embedded,)), reader) is None
    with pytest.raises(ChainError, match="about something else"):
        reader.task(given.command_id)


def test_the_deepest_chain_that_may_be_is_believed_by_who_looks_at_its_end_first(
    ledger: InMemoryRegistry, task: str
):
    at = task
    for by, to in pairwise(AGENTS[: MAX_DEPTH + 1]):
        at = made(ledger, part(ledger, by, at, to))
    end = reader_of(ledger).chains.task_at(at, ledger.clock.ms)
    assert end is not None
    assert end.act == AGENTS[MAX_DEPTH::-1]


def test_a_chain_that_is_too_deep_is_believed_by_nobody(ledger: InMemoryRegistry, task: str):
    """Agents that conspire with the registry make a chain of records as long as they like."""
    names = [f"a{n}" for n in range(12)]
    for name in names:
        ledger.give(ledger.register("olga", name, "suzy", ceiling=WIDE))
    reader, at, by = reader_of(ledger), state_of(ledger, task), "bot"
    ids = []
    for name in (names * 20)[:240]:
        embedded = ledger.embed(part(ledger, by, at.task_id, name))
        given = ledger.directory.chains.authorise(parse(embedded.jws), embedded.appended_at_ms)
        at = at.model_copy(
            update={
                "task_id": given.command_id,
                "agent_id": name,
                "parent": at.task_id,
                "act": (name, *(at.act or ("bot",))),
                "not_after": NOW_S + 600,
            }
        )
        assert ledger.admit(ledger.sign_record(at, (embedded,)), reader) is None
        ledger.clock.ms += 1000
        ids.append(at.task_id)
        by = name
    with pytest.raises(ChainError, match="longer than any may be"):
        reader.task(ids[-1])
    believed = []
    for id in ids[:8]:
        try:
            believed.append(reader.task(id))
        except ChainError:
            continue
    assert len(believed) == MAX_DEPTH


# --- later ------------------------------------------------------------------------------------------------------------


def test_the_verdict_is_the_same_for_ever(ledger: InMemoryRegistry, task: str):
    """Whatever came after a command, to its signer, to the task above, to the people: it was in order then."""
    first = made(ledger, part(ledger, "bot", task, "second"))
    second = made(ledger, part(ledger, "second", first, "third"))
    later: list[Any] = [
        ledger.claims(AgentSuspend, "olga", agent_id="bot", reason="x"),
        ledger.claims(AgentResume, "olga", agent_id="bot", reason="x"),
        ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=()),
        ledger.transfer("olga", "bot", "suzy", without_consent=True),
        ledger.claims(AgentSuspend, "olga", agent_id="bot", reason="x"),
        ledger.claims(TaskEnd, "uma", task_id=first, reason="x"),
        ledger.claims(TaskEnd, "uma", task_id=task, reason="x"),
        ledger.claims(AgentDecommission, "olga", agent_id="second", reason="x"),
        ledger.claims(UserDisable, "olga", user_id="uma", reason="x"),
        ledger.claims(UserDisable, "olga", user_id="sam", reason="x"),
    ]
    for claims in later:
        claims = claims.model_copy(
            update={"iat": ledger.clock.ms // 1000, "exp": ledger.clock.ms // 1000 + 300}
        )
        ledger.give(claims)
        reader = reader_of(ledger)
        for id in (task, first, second):
            assert reader.task(id) is not None
    assert ledger.alarms == []


def test_delegation_signed_while_suspended_is_rejected_after_resuming(ledger: InMemoryRegistry, task: str):
    """Not even where the registry took it, and the agent is active again."""
    first = made(ledger, part(ledger, "bot", task, "second"))
    ledger.give(ledger.claims(AgentSuspend, "olga", agent_id="bot", reason="x"))
    embedded = ledger.embed(part(ledger, "bot", task, "second"))
    ledger.clock.ms += 1000
    ledger.give(ledger.claims(AgentResume, "olga", agent_id="bot", reason="x"))
    assert "bot is suspended" in forged(ledger, first, (embedded,))


def test_records_come_in_any_order_and_nobody_is_accused(ledger: InMemoryRegistry, task: str):
    first = made(ledger, part(ledger, "bot", task, "second"))
    reader = reader_of(ledger, but_for=(task,))
    for _ in range(2):
        with pytest.raises(ChainError) as caught:
            reader.task(first)
        assert caught.value.code == "chain_incomplete"
    assert ledger.alarms == []
    entry = ledger.directory.task(task)
    assert entry is not None
    assert ledger.admit(ledger.sign_record(*_parts(entry.record)), reader) is None
    assert reader.task(first) is not None


# --- the rule ---------------------------------------------------------------------------------------------------------


def reasons(
    ledger: InMemoryRegistry, agent: str, task: str, wanted: Permission
) -> list[tuple[str, str | None]]:
    ground = load_records(ledger.directory, agent, task, "staging")
    found = violations_of(ground, (wanted,), ledger.clock.ms / 1000, 86_400)
    return [(reason.code, reason.side) for reason in found]


@pytest.mark.parametrize(("small", "other"), [("bot", "second"), ("second", "bot")])
def test_every_ceiling_of_the_chain_counts(ledger: InMemoryRegistry, small: str, other: str):
    task = made(ledger, ledger.assign("uma", "bot"))
    first = made(ledger, part(ledger, "bot", task, "second"))
    assert reasons(ledger, "second", first, permission("env/b")) == []
    ledger.give(ledger.claims(AgentSetCeiling, "olga", agent_id=small, ceiling=NARROW))
    assert reasons(ledger, "second", first, permission("env/b")) == [("beyond_scope", f"ceiling:{small}")]
    assert reasons(ledger, "second", first, permission("env/a")) == []
    ledger.give(ledger.claims(AgentSetCeiling, "olga", agent_id=other, ceiling=()))
    assert ("beyond_scope", f"ceiling:{other}") in reasons(ledger, "second", first, permission("env/a"))


def test_end_or_suspension_above_denies_requests_below(ledger: InMemoryRegistry, task: str):
    first = made(ledger, part(ledger, "bot", task, "second"))
    second = made(ledger, part(ledger, "second", first, "third"))
    ledger.give(ledger.claims(AgentSuspend, "olga", agent_id="bot", reason="x"))
    assert reasons(ledger, "third", second, permission("env/a")) == [("agent_suspended", None)]
    ledger.give(ledger.claims(AgentResume, "olga", agent_id="bot", reason="x"))
    assert reasons(ledger, "third", second, permission("env/a")) == []
    ledger.give(ledger.claims(TaskEnd, "uma", task_id=task, reason="x"))
    assert reasons(ledger, "third", second, permission("env/a")) == [("task_ended", None)]
    ledger.give(ledger.claims(UserDisable, "olga", user_id="sam", reason="x"))
    assert ("agent_orphaned", None) in reasons(ledger, "third", second, permission("env/a"))


def test_delegation_with_a_compromised_key_denies_every_request(ledger: InMemoryRegistry, task: str):
    first = made(ledger, part(ledger, "bot", task, "second"))
    assert reasons(ledger, "second", first, permission("env/a")) == []
    new = SigningKey.generate(ledger.key("bot", "agent").id)
    rotate = ledger.claims(
        AgentRotateKey, "sam", agent_id="bot", key=ledger.key_record(new), compromised=True, reason="lost"
    )
    ledger.give(rotate)
    assert reasons(ledger, "second", first, permission("env/a")) == [("key_compromised", None)]
    with pytest.raises(InvalidMessageError, match="no valid key"):
        ledger.give(part(ledger, "bot", task, "second"))
    again = made(ledger, part(ledger, "bot", task, "second"), key=new)
    assert reasons(ledger, "second", again, permission("env/a")) == []
    assert reader_of(ledger).task(first) is not None  # it was in order when it was given


def test_a_second_person_answers_for_no_agent_of_the_chain(ledger: InMemoryRegistry, task: str):
    """sam sponsors the bot, suzy the one that it handed a part to; otto is nobody's."""
    first = made(ledger, part(ledger, "bot", task, "second"))
    ledger.give(ledger.user_set("olga", "otto", ["operator", "sponsor"]))
    ground = load_records(ledger.directory, "second", first, "staging")
    may = {
        who: may_approve(ledger.directory, who, "second_person", ground) for who in ("sam", "suzy", "otto")
    }
    assert may == {"sam": False, "suzy": False, "otto": True}
    assert may_approve(ledger.directory, "suzy", "sponsor", ground)
    assert not may_approve(ledger.directory, "sam", "sponsor", ground)


def test_an_agent_of_the_chain_does_not_act_in_another_ones_part(ledger: InMemoryRegistry, task: str):
    first = made(ledger, part(ledger, "bot", task, "second"))
    assert ("task_other_agent", None) in reasons(ledger, "bot", first, permission("env/a"))


# --- where to look ----------------------------------------------------------------------------------------------------


def test_holders_of_delegated_tasks_by_task_agent_and_sponsor(ledger: InMemoryRegistry):
    held = Delegations(ledger.directory)
    task = made(ledger, ledger.assign("uma", "bot"))
    first = made(ledger, part(ledger, "bot", task, "second"))
    made(ledger, part(ledger, "second", first, "third"))
    made(ledger, part(ledger, "bot", task, "fourth"))
    assert held.holders(f"task:{task}") == {"second", "third", "fourth"}
    assert held.holders(f"task:{first}") == {"third"}
    assert held.holders("agent:bot") == {"second", "third", "fourth"}
    assert held.holders("agent:second") == {"third"}
    assert held.holders("agent:third") == frozenset()
    assert held.holders("sponsor:sam") == {"second", "third", "fourth"}
    assert held.holders("target:staging") == frozenset()
