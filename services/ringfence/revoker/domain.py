"""Rules of the revoker: which leases a changed record ends, and which status an ending lease gets next. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ringfence.kernel.base.ids import derived_id
from ringfence.messages.base import Scope
from ringfence.messages.lease import EndCause, EndKind, Lease, LeaseStatus, RevocationRequest, Selector
from ringfence.messages.registry import (
    AgentState,
    AnyRecord,
    AnyState,
    Hold,
    TargetState,
    TaskState,
    UserRecord,
    UserSet,
    UserState,
)
from ringfence.model.leases.lifecycle import end_status, is_over, matches, selector_key_of
from ringfence.model.lifecycle import hold_of, hold_text, subject_key
from ringfence.model.records.agent_keys import is_lost
from ringfence.model.records.command_chain import unverified_command
from ringfence.model.records.directory import Directory, VerifiedRecord
from ringfence.model.records.instances import check_ref
from ringfence.model.records.runs import run_violations
from ringfence.model.scope.rule import are_in_force
from ringfence.model.scope.scope import missing
from ringfence.model.verdict import ALLOWED, Allowed, Refused

# --- records ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SelectorEnd:
    """All leases that a selector covers end: the record leaves no room for any of them."""

    kind: EndKind
    selector: Selector
    reason: str


@dataclass(frozen=True, slots=True)
class EndReason:
    """Why one lease ends."""

    kind: EndKind
    reason: str


@dataclass(frozen=True, slots=True)
class Narrowing:
    """Of the leases that match `selector_key`, those end that are no longer covered."""

    selector_key: str
    scope: Scope
    beyond: EndReason
    """The reason for a lease whose scope is beyond `scope`."""
    agent: AgentState | None = None
    """If given, leases also end that were asked for with a compromised key, or an attestation selector it lost."""

    def check_lease(self, lease: Lease) -> Allowed | EndReason:
        """Check that the records leave room for a lease.

        1. No key that it was asked for or handed on with is compromised.
        2. The agent's record still admits the instance that asked for it.
        3. `scope` covers its scope.
        """
        if self.agent is not None and is_lost(lease, self.agent):
            how = "asked for" if lease.agent_id == self.agent.agent_id else "its task was handed on"
            reason = f"{how} with a key of agent {self.agent.agent_id} that is compromised"
            return EndReason("key_compromised", reason)
        if self.agent is not None and lease.instance is not None:
            admitted = check_ref(lease.instance, self.agent)
            if isinstance(admitted, Refused):
                return EndReason("scope_narrowed", admitted.reason.message)
        return self.beyond if missing(lease.scope, self.scope) else ALLOWED


def consequences(
    state: AnyState,
    revision: int,
    now_s: float,
    entitlements_max_age_s: int,
    *,
    ever_sponsor: bool = True,
) -> tuple[SelectorEnd | Narrowing, ...]:
    """The consequences of a record, as it is now, for existing leases.

    `ever_sponsor`: whether a user may have been a sponsor. If not, this record makes no agent an orphan.
    """
    if (hold := hold_of(state)) is not None:
        return _of_held(state, hold)
    match state:
        case AgentState():
            return _of_agent(state, revision)
        case UserState():
            fresh = are_in_force(state.entitlements, now_s, entitlements_max_age_s)
            return _of_user(
                state, revision, state.entitlements.scope if fresh else (), ever_sponsor=ever_sponsor
            )
        case TaskState():
            if state.status == "active":
                return ()
            reason = f"task {state.task_id} was ended"
            return (SelectorEnd("task_ended", Selector(task_id=state.task_id), reason),)
        case TargetState():
            if state.status == "active":
                return ()
            reason = f"target {state.target_id} was removed"
            return (SelectorEnd("target_removed", Selector(target_id=state.target_id), reason),)


def _of_held(state: AnyState, hold: Hold) -> tuple[SelectorEnd, ...]:
    """All leases end that rest on a record which rests on a compromised key."""
    kind, id = subject_key(state)
    reason = hold_text(f"{kind} {id}", hold)
    match state:
        case AgentState():
            selectors = [Selector(agent_id=id)]
        case UserState():
            selectors = [Selector(user_id=id), Selector(sponsor=id)]
        case TaskState():
            selectors = [Selector(task_id=id)]
        case _:
            selectors = [Selector(target_id=id)]
    return tuple(SelectorEnd("key_compromised", selector, reason) for selector in selectors)


def _of_agent(state: AgentState, revision: int) -> tuple[SelectorEnd | Narrowing, ...]:
    if state.status == "registered":
        return ()  # it never had a lease
    if state.status != "active":
        kind: EndKind = "agent_suspended" if state.status == "suspended" else "agent_decommissioned"
        reason = f"agent {state.agent_id} is {state.status}"
        return (SelectorEnd(kind, Selector(agent_id=state.agent_id), reason),)
    if revision == 1:
        return ()  # no earlier ceiling can have been wider
    reason = f"beyond the ceiling of agent {state.agent_id} as it is now"
    return (Narrowing(f"agent:{state.agent_id}", state.ceiling, EndReason("scope_narrowed", reason), state),)


def _of_user(
    state: UserState, revision: int, entitled: Scope, *, ever_sponsor: bool
) -> tuple[SelectorEnd | Narrowing, ...]:
    if state.status != "active":
        reason = f"user {state.user_id} was disabled"
        return (
            SelectorEnd("user_disabled", Selector(user_id=state.user_id), reason),
            SelectorEnd("user_disabled", Selector(sponsor=state.user_id), reason),
        )
    if revision == 1:
        return ()
    reason = f"beyond the entitlements of user {state.user_id} as they are now"
    user_narrowing = Narrowing(f"user:{state.user_id}", entitled, EndReason("scope_narrowed", reason))
    if "sponsor" in state.roles or not ever_sponsor:
        return (user_narrowing,)
    orphaned = check_sponsor(state)
    assert isinstance(orphaned, EndReason)
    return user_narrowing, Narrowing(f"sponsor:{state.user_id}", (), orphaned)


def check_sponsor(state: UserState) -> Allowed | EndReason:
    """Check that agents that this user sponsors are no orphans."""
    if state.status != "active":
        return EndReason("user_disabled", f"user {state.user_id}, the sponsor, was disabled")
    if "sponsor" not in state.roles:
        return EndReason("agent_orphaned", f"user {state.user_id}, the sponsor, is no sponsor any more")
    return ALLOWED


def was_sponsor(record: AnyRecord) -> bool:
    """Whether a user was ever a sponsor, by the commands in their record: no registry may omit them."""
    if not isinstance(record, UserRecord):
        return False
    commands = map(unverified_command, record.commands)
    return any(isinstance(command, UserSet) and "sponsor" in command.roles for command in commands)


@dataclass(frozen=True, slots=True)
class StaleBasis:
    """A record that leaves no room for a lease, and why."""

    kind: EndKind
    reason: str
    record: tuple[str, int]
    """Its subject and revision."""


def check_basis(lease: Lease, directory: Directory, entitlements_max_age_s: int) -> Allowed | StaleBasis:
    """Check that the records that a lease rests on leave room for it now. Returns the first that does not.

    Whether entitlements were too old is judged as of the lease's issue. Raises ChainError if a record does not count.
    """
    entries: list[VerifiedRecord[Any] | None] = [
        directory.agent(lease.agent_id),
        directory.task(lease.task_id),
        directory.target(lease.target_id),
        directory.user(lease.on_behalf_of),
        directory.user(lease.sponsor),
    ]
    for delegator in lease.delegators or ():
        entries += [
            directory.agent(delegator.agent_id),
            directory.task(delegator.task_id),
            directory.user(delegator.sponsor),
        ]
    against_run = run_violations(
        lease.instance, directory.runs.of(lease.instance), agent_id=lease.agent_id, task_id=lease.task_id,
        kid=lease.key_thumbprint, now_s=lease.iat,
    )  # fmt: skip
    for reason_of_run in against_run:
        assert lease.instance is not None
        assert lease.instance.run is not None
        return StaleBasis("run_ended", reason_of_run.message, run_record(lease.instance.run.run_id))
    for entry in entries:
        if entry is None:
            continue
        record = (entry.record.sub, entry.revision)
        for consequence in consequences(entry.state, entry.revision, lease.iat, entitlements_max_age_s):
            if isinstance(consequence, SelectorEnd):
                if matches(lease, selector_key_of(consequence.selector)):
                    return StaleBasis(consequence.kind, consequence.reason, record)
            elif matches(lease, consequence.selector_key):
                verdict = consequence.check_lease(lease)
                if isinstance(verdict, EndReason):
                    return StaleBasis(verdict.kind, verdict.reason, record)
    return ALLOWED


def run_record(run_id: str) -> tuple[str, int]:
    """What a revocation that follows from the end of a run is derived from: a run ends once."""
    return f"run/{run_id}", 1


def derived_revocation(
    basis: StaleBasis,
    *,
    by: str,
    trust_domain: str,
    at_ms: int,
    lease_id: str | None = None,
    selector: Selector | None = None,
) -> RevocationRequest:
    """The revocation that follows from a record. The same record gives the same `jti`."""
    covered = lease_id or (selector.model_dump_json(exclude_defaults=True) if selector else "")
    return RevocationRequest(
        iss=by,
        aud=trust_domain,
        iat=at_ms // 1000,
        jti=derived_id("revocation.request", *basis.record, covered),
        kind=basis.kind,
        lease_id=lease_id,
        selector=selector,
        reason=basis.reason,
    )


# --- endings ----------------------------------------------------------------------------------------------------------


def next_status(lease: Lease, cause: EndCause, stateless: Collection[str]) -> LeaseStatus | None:
    """The next status of a lease that ends; None if it has ended.

    The cut comes first, except at the deadline of a lease that leaves nothing at its target: its credential expires at
    the same moment, and no target accepts it.
    """
    if is_over(lease):
        return None
    if lease.status == "minting":
        return "aborted"
    if lease.status == "ending":
        return end_status((lease.cause or cause).kind)
    if cause.kind == "deadline" and lease.backend in stateless:
        return "expired"
    return "ending"


def deadline_cause(lease: Lease, now_ms: int) -> EndCause:
    """The cause of an end without revocation: the deadline, or the time to mint the credential, is over."""
    if lease.status == "minting":
        return EndCause(kind="mint_failed", at_ms=now_ms)
    return _cause_at(lease.deadline)


@lru_cache(maxsize=64)
def _cause_at(deadline_s: int) -> EndCause:
    """Cached: many leases end in the same second."""
    return EndCause(kind="deadline", at_ms=deadline_s * 1000)
