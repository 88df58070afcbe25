"""Who may end which leases, what the change of a record ends, and how a lease ends. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ringfence.kernel.ids import derived_id
from ringfence.kernel.jws import Signed
from ringfence.messages.credential import Coordinates, Reason
from ringfence.messages.lease import EndCause, EndKind, Lease, LeaseStatus, RevocationRequest, Selector
from ringfence.messages.permission import Scope
from ringfence.messages.registry import AgentState, AnyState, TargetState, TaskState, UserState
from ringfence.model.chains import ChainError
from ringfence.model.directory import Directory, Entry
from ringfence.model.identity import subject_of
from ringfence.model.leases import bears, end_status, is_over, mark_of
from ringfence.model.scope import missing

BY_USERS: frozenset[EndKind] = frozenset({"revocation"})
BY_AGENTS: frozenset[EndKind] = frozenset({"release"})
BY_SERVICES: frozenset[EndKind] = frozenset(
    {
        "revocation",
        "task_ended",
        "agent_suspended",
        "agent_decommissioned",
        "user_disabled",
        "target_removed",
        "scope_narrowed",
    }
)


# --- orders -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Order:
    """A revocation of which the signature holds, and where it stands."""

    signed: Signed[RevocationRequest]
    at: Coordinates
    traceparent: str | None = None

    @property
    def claims(self) -> RevocationRequest:
        return self.signed.claims

    @property
    def id(self) -> str:
        """The same for the same message wherever it stands."""
        return derived_id("revocation", self.claims.iss, self.claims.jti)

    def cause(self) -> EndCause:
        """What the records of the leases that it ends say."""
        claims = self.claims
        return EndCause(
            kind=claims.kind,
            at_ms=self.at.appended_at_ms,
            by=claims.iss,
            ref=claims.jti,
            reason=claims.reason,
        )


def objection(order: Order, lease: Lease | None, directory: Directory) -> Reason | None:
    """Why an order is not followed, or None. `lease` is the one that it names, where Redis knows it."""
    claims = order.claims
    agent_id = subject_of(claims.aud, claims.iss, "agent")
    user_id = subject_of(claims.aud, claims.iss, "user")
    kinds = BY_AGENTS if agent_id else BY_USERS if user_id else BY_SERVICES
    if claims.kind not in kinds:
        return Reason(
            code="kind_unexpected", message=f"{claims.iss} may not ask for an end of kind {claims.kind}"
        )
    if claims.lease_id is not None and lease is None:
        return Reason(
            code="lease_unknown", message=f"there is no lease {claims.lease_id}, or it ended long ago"
        )
    if agent_id is None and user_id is None:
        return None  # a service: its signature was accepted for its role
    if agent_id is not None:
        entitled = lease is not None and lease.agent_id == agent_id
        who = "an agent gives back its own leases only"
    else:
        entitled = _user_may(user_id or "", claims.selector, lease, directory)
        who = (
            "leases are revoked by the agent's sponsor, the task's assigner, the user they are on behalf of, "
            "or an operator"
        )
    return None if entitled else Reason(code="not_entitled", message=who)


def _user_may(user_id: str, selector: Selector | None, lease: Lease | None, directory: Directory) -> bool:
    try:
        user = directory.user(user_id)
        if user is None or user.state.status != "active":
            return False
        if "operator" in user.state.roles:
            return True
        if lease is not None:
            return user_id == lease.on_behalf_of or _answers_for(
                user_id, directory, agent_id=lease.agent_id, task_id=lease.task_id
            )
        if selector is None:
            return False
        return user_id in (selector.sponsor, selector.user_id) or _answers_for(
            user_id, directory, agent_id=selector.agent_id, task_id=selector.task_id
        )
    except ChainError:
        return False


def _answers_for(user_id: str, directory: Directory, *, agent_id: str | None, task_id: str | None) -> bool:
    """Whether the user sponsors the agent, or one of the task's, or assigned the task, or is who it is on behalf of."""
    task = directory.task(task_id) if task_id is not None else None
    if task is not None and user_id in (task.state.assigned_by, task.state.on_behalf_of):
        return True
    agent = directory.agent(agent_id or (task.state.agent_id if task else ""))
    return agent is not None and agent.state.sponsor == user_id


def agent_of_task(task_id: str, directory: Directory) -> str | None:
    """The only agent that has leases of a task; None where it is not known.

    A task is assigned to one agent for good, and no other is issued a credential for it.
    """
    try:
        task = directory.task(task_id)
    except ChainError:
        return None
    return task.state.agent_id if task is not None else None


# --- records ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ending:
    """Everything that a selector covers ends: what the record says leaves no room for any of it."""

    kind: EndKind
    selector: Selector
    reason: str


@dataclass(frozen=True, slots=True)
class Narrowing:
    """What bears `mark` and does not fit `scope` ends."""

    mark: str
    scope: Scope
    reason: str

    def unfit(self, lease: Lease) -> bool:
        return bool(missing(lease.scope, self.scope))


def consequences(
    state: AnyState, revision: int, now_s: float, entitlements_max_age_s: int
) -> tuple[Ending | Narrowing, ...]:
    """What a record, as it is now, means for the leases that there are."""
    match state:
        case AgentState():
            return _of_agent(state, revision)
        case UserState():
            fresh = state.entitlements.as_of + entitlements_max_age_s > now_s
            return _of_user(state, revision, state.entitlements.scope if fresh else ())
        case TaskState():
            if state.status == "active":
                return ()
            reason = f"task {state.task_id} was ended"
            return (Ending("task_ended", Selector(task_id=state.task_id), reason),)
        case TargetState():
            if state.status == "active":
                return ()
            reason = f"target {state.target_id} was removed"
            return (Ending("target_removed", Selector(target_id=state.target_id), reason),)


def _of_agent(state: AgentState, revision: int) -> tuple[Ending | Narrowing, ...]:
    if state.status != "active":
        kind: EndKind = "agent_suspended" if state.status == "suspended" else "agent_decommissioned"
        reason = f"agent {state.agent_id} is {state.status}"
        return (Ending(kind, Selector(agent_id=state.agent_id), reason),)
    if revision == 1:
        return ()  # there was nothing before that could be wider
    reason = f"beyond the ceiling of agent {state.agent_id} as it is now"
    return (Narrowing(f"agent:{state.agent_id}", state.ceiling, reason),)


def _of_user(state: UserState, revision: int, entitled: Scope) -> tuple[Ending | Narrowing, ...]:
    if state.status != "active":
        reason = f"user {state.user_id} was disabled"
        return (
            Ending("user_disabled", Selector(user_id=state.user_id), reason),
            Ending("user_disabled", Selector(sponsor=state.user_id), reason),
        )
    if revision == 1:
        return ()
    reason = f"beyond the entitlements of user {state.user_id} as they are now"
    return (Narrowing(f"user:{state.user_id}", entitled, reason),)


@dataclass(frozen=True, slots=True)
class Overtaken:
    """Why a lease does not stand beside a record: what follows from that, of what it bears, is its end."""

    kind: EndKind
    reason: str
    record: tuple[str, int]
    """The record's subject and revision."""


def overtaken(lease: Lease, directory: Directory, entitlements_max_age_s: int) -> Overtaken | None:
    """The first of the records that a lease rests on, as they are, that leaves no room for it; or None.

    Whether entitlements were too old is judged as of its issue. Raises ChainError where a record counts for nothing.
    """
    entries: tuple[Entry[Any] | None, ...] = (
        directory.agent(lease.agent_id),
        directory.task(lease.task_id),
        directory.target(lease.target_id),
        directory.user(lease.on_behalf_of),
        directory.user(lease.sponsor),
    )
    for entry in entries:
        if entry is None:
            continue
        record = (entry.record.sub, entry.revision)
        for one in consequences(entry.state, entry.revision, lease.iat, entitlements_max_age_s):
            if isinstance(one, Ending):
                if bears(lease, mark_of(one.selector)):
                    return Overtaken(one.kind, one.reason, record)
            elif bears(lease, one.mark) and one.unfit(lease):
                return Overtaken("scope_narrowed", one.reason, record)
    return None


def derived_order(
    kind: EndKind,
    reason: str,
    *,
    by: str,
    trust_domain: str,
    at_ms: int,
    record: tuple[str, int],
    lease_id: str | None = None,
    selector: Selector | None = None,
) -> RevocationRequest:
    """The order that follows from a record (its subject, its revision). The same record gives the same `jti`."""
    what = lease_id or (selector.model_dump_json(exclude_defaults=True) if selector else "")
    return RevocationRequest(
        iss=by,
        aud=trust_domain,
        iat=at_ms // 1000,
        jti=derived_id("revocation.request", *record, what),
        kind=kind,
        lease_id=lease_id,
        selector=selector,
        reason=reason,
    )


# --- endings ----------------------------------------------------------------------------------------------------------


def next_status(lease: Lease, cause: EndCause, stateless: Collection[str]) -> LeaseStatus | None:
    """The next status of a lease that ends; None where it has ended.

    A cut comes first, unless the lease's own time is over and its credential left nothing at the target: then nobody
    accepts it any more as it is.
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
    """A lease's own time is over, or that which its credential had to be made in."""
    if lease.status == "minting":
        return EndCause(kind="mint_failed", at_ms=now_ms)
    return _of_deadline(lease.deadline)


@lru_cache(maxsize=64)
def _of_deadline(deadline_s: int) -> EndCause:
    """Many leases end in the same second."""
    return EndCause(kind="deadline", at_ms=deadline_s * 1000)
