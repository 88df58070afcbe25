"""Records of before are valid for every reader of today, and what may limit them gives nothing away."""

from __future__ import annotations

from typing import Any

import pytest

from ringfence.kernel.crypto.jws import parse, verify
from ringfence.messages.approval import Approval, Grant, GrantWithdraw
from ringfence.messages.credential import CredentialRequest
from ringfence.messages.lease import RevocationRequest
from ringfence.messages.registry import COMMANDS, AgentTransfer, UserAddKey, UserEndKey
from ringfence.model.http_targets.request_map import Action, RequestMap
from ringfence.model.identity.attestation import matching
from ringfence.model.leases.lifecycle import selector_key_of
from ringfence.model.lifecycle import CommandRefusedError
from ringfence.model.records.command_chain import Authorised, unverified_command
from ringfence.model.records.directory import Directory
from ringfence.model.records.instances import keys_of_agents
from ringfence.model.records.provisioning import given_by
from ringfence.model.requests.approvals import approval_problem
from ringfence.model.requests.facts import (
    RequestContext,
    load_context,
    load_records,
    violations,
    violations_of,
)
from ringfence.model.requests.grants import grant_problem
from ringfence.model.unknown_fields import is_understood
from ringfence.registry.domain import Current, Embedded, decide, only_reduces
from ringfence.registry.store import Memory
from tests.support.in_memory_registry import permission
from tests.support.old_records import OldRecords

AGE_S = 10**9


@pytest.fixture(scope="module")
def old() -> OldRecords:
    return OldRecords()


@pytest.fixture(scope="module")
def directory(old: OldRecords) -> Directory:
    return old.directory()


def lost(before: Any, after: Any) -> bool:
    """Whether the second lacks, or says otherwise, what the first says. New fields are no loss."""
    if isinstance(before, dict) and isinstance(after, dict):
        return any(lost(value, after.get(name)) for name, value in before.items())
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return any(lost(*pair) for pair in zip(before, after, strict=True))
    return bool(before != after)


SINCE = {UserAddKey, UserEndKey}
"""Commands that came later than the file."""


# --- they are valid ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compacted", [False, True], ids=["all of them", "the last of each"])
def test_every_reader_comes_to_the_same_states_and_revisions(old: OldRecords, compacted: bool) -> None:
    directory = old.directory(compacted=compacted)
    for kind, id, revision, state in old.states():
        entry = directory.entry(kind, id)
        assert entry is not None, id
        assert entry.revision == revision, id
        assert not lost(state, entry.state.model_dump(mode="json")), id
    assert old.alarms == []


def test_every_command_is_among_them(old: OldRecords, directory: Directory) -> None:
    given = old.commands(directory)
    assert {type(one.claims) for one in given} == set(COMMANDS) - SINCE
    (first, _) = [one for one in given if isinstance(one.claims, AgentTransfer)]
    assert (first.actor.user_id, (first.claims.model_extra or {}).get("consent")) == ("sam", None)


def test_new_commands_are_refused_for_what_those_of_before_could_say(old: OldRecords) -> None:
    """Each command as a registry of today takes it that has the records of before it."""
    directory = old.directory(kinds=())
    memory = Memory(directory, old.trust, 0)
    refused: set[str] = set()
    for kind, id, record in old.records():
        embedded = record.commands[-1]
        given = directory.chains.authorise(parse(embedded.jws), embedded.appended_at_ms)
        entry = directory.entry(kind, id)
        before = [Embedded(unverified_command(one), one) for one in entry.record.commands] if entry else []
        current = Current(entry.state, entry.revision, tuple(before)) if entry else None
        came_to = outcome(current, given, memory)
        if came_to == "unknown_field":
            assert not only_reduces(given.claims)
            refused.add(given.claims.typ)
        elif not isinstance(given.claims, AgentTransfer):  # what those need besides is not of this file
            assert came_to == (record.state, record.revision)
            assert only_reduces(given.claims) or is_understood(given.claims)
        old.admit(directory, record)
    assert refused == {
        "user.set", "provisioner.set", "provisioner.link", "agent.register", "agent.activate", "agent.set-ceiling",
        "agent.set-attestation", "agent.transfer", "agent.rotate-key", "agent.resume", "target.set", "task.assign",
        "task.delegate",
    }  # fmt: skip


def outcome(current: Current | None, given: Authorised, memory: Memory) -> object:
    """What a command leads to: state and revision, or the code of why it is refused."""
    try:
        change = decide(current, given, memory)
    except CommandRefusedError as error:
        return error.code
    return (change.state, change.revision) if change is not None else None


# --- and what may limit them gives nothing away -----------------------------------------------------------------------


def test_a_verb_whose_floor_is_not_understood_is_given_to_nobody(directory: Directory) -> None:
    def codes(verb: str) -> list[str]:
        wanted = (permission("env/a", verbs=(verb,)),)
        return [reason.code for reason in violations_of(ground(directory), wanted, START_S, AGE_S)]

    assert codes("read") == []
    assert codes("deploy") == ["verb_not_understood"]


def test_a_request_that_comes_under_a_rule_that_is_not_understood_is_no_weaker_one(
    directory: Directory,
) -> None:
    map = RequestMap(target(directory).requests)
    assert map.action("GET", "/other/a") == Action("read", "other/a")
    assert map.action("GET", "/env/a") is None
    assert "headers" in (map.not_understood("GET", "/env/a") or "")


def test_a_selector_that_is_not_understood_lets_nobody_in(directory: Directory) -> None:
    entry = directory.agent("bot")
    assert entry is not None
    issuer = entry.state.attestation[0].issuer
    plain = matching(entry.state.attestation, issuer, {"sub": "repo:acme/deploy:ref:refs/heads/main"})
    assert plain is not None
    assert matching(entry.state.attestation, issuer, {"sub": "repo:acme/other"}) is None


def test_entitlements_and_delegations_that_are_not_understood_give_nothing(directory: Directory) -> None:
    ulla, hr = directory.user("ulla"), directory.user("hr")
    assert ulla is not None
    assert hr is not None
    assert hr.state.delegation is not None
    ours = ground(directory)
    wanted = (permission("env/a", verbs=("read",)),)
    assert violations_of(ours, wanted, START_S, AGE_S) == ()
    theirs = type(ours)(ours.agent, ours.sponsor, ours.task, ulla, ours.target)
    assert [reason.side for reason in violations_of(theirs, wanted, START_S, AGE_S)] == ["entitlements:ulla"]
    assert given_by(hr.state.delegation, ["dev", "ops"]).groups == ("ops",)


def test_a_grant_and_an_approval_that_are_not_understood_open_nothing(
    old: OldRecords, directory: Directory
) -> None:
    facts, at_ms = asked(old, directory)
    revisions = facts.revisions("0" * 64)
    terms: dict[str, Any] = {"at_ms": at_ms, "ttl_s": 300, "delivery": "agent", "revisions": revisions}
    grant = opened(old, directory, Grant).claims
    problem = grant_problem(grant, facts, **terms)
    assert problem is not None
    assert problem.code == "grant_not_understood"
    plain = Grant.model_validate(grant.model_dump(exclude={"only_at"}))
    assert grant_problem(plain, facts, **terms) is None
    approval = opened(old, directory, Approval)
    theirs = approval.claims.model_copy(
        update={"request": facts.request.compact, "request_digest": facts.request.digest}
    )
    problem = approval_problem(approval._replace(claims=theirs), facts, **terms)
    assert problem is not None
    assert problem.code == "approval_not_understood"


def test_a_request_of_a_newer_agent_is_judged_by_what_is_known_of_it(
    old: OldRecords, directory: Directory
) -> None:
    facts, _ = asked(old, directory)
    assert facts.request.claims.model_extra == {"most_uses": 1}
    assert violations(facts, START_S, AGE_S) == ()


def test_an_order_stops_all_that_it_names_whatever_else_it_says(
    old: OldRecords, directory: Directory
) -> None:
    order = opened(old, directory, RevocationRequest).claims
    assert order.selector is not None
    assert order.selector.model_extra
    assert selector_key_of(order.selector) == "agent:bot"
    assert opened(old, directory, GrantWithdraw).claims.grant_id


START_S = OldRecords().document["now_s"]


def ground(directory: Directory) -> Any:
    task = next(one for one in tasks(directory) if one.act is None and one.status == "active")
    return load_records(directory, "bot", task.task_id, "staging")


def tasks(directory: Directory) -> list[Any]:
    entries = [directory.entry("task", id) for kind, id, *_ in OldRecords().states() if kind == "task"]
    return [entry.state for entry in entries if entry is not None]


def target(directory: Directory) -> Any:
    entry = directory.target("staging")
    assert entry is not None
    return entry.state


def opened(old: OldRecords, directory: Directory, model: Any) -> Any:
    jws, at_ms = old.message(model.typ)
    parsed = parse(jws)
    find = (
        keys_of_agents(directory, parsed, model, at_ms / 1000)
        if model is CredentialRequest
        else lambda iss, kid: directory.user_key(iss, kid, at_ms / 1000)
    )
    return verify(parsed, model, find, audience=old.trust_domain, appended_at_ms=at_ms)


def asked(old: OldRecords, directory: Directory) -> tuple[RequestContext, int]:
    """The request of before, held against the records, and when it was appended."""
    return load_context(directory, opened(old, directory, CredentialRequest)), old.message(
        CredentialRequest.typ
    )[1]
