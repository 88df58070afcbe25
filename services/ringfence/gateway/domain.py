"""Whether an action is allowed, and by which lease: from verified records and live leases alone. Pure.

Everything that is not known for certain is denied, with a stable code, a sentence, and the permission and the side that
lacks it, where there is one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal, Protocol

from ringfence.messages.credential import Reason
from ringfence.messages.lease import Lease
from ringfence.messages.permission import Permission, Scope
from ringfence.messages.registry import ActionClass, TargetState
from ringfence.model.http_targets.request_map import Action
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.records.instances import ref_void
from ringfence.model.records.key_expiry import is_lost
from ringfence.model.requests.facts import (
    DeniedError,
    RecordContext,
    key_compromised,
    load_records,
    violations_of,
)
from ringfence.model.scope.rule import Limit, exceeding
from ringfence.model.scope.scope import missing
from ringfence.model.target_settings import CREDENTIAL_KINDS

INJECTABLE: Final = frozenset(name for name, kind in CREDENTIAL_KINDS.items() if kind.fits_header)
"""The kinds of credentials that go into the header of a request."""
SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
"""Those that are defined as essentially read-only (RFC 9110, 9.2.1)."""
Access = Literal["read", "write"]
BAD_REQUEST: Final = 400
UNAUTHORIZED: Final = 401
FORBIDDEN: Final = 403
NOT_FOUND: Final = 404
CONTENT_TOO_LARGE: Final = 413
TOO_MANY_REQUESTS: Final = 429
UNAVAILABLE: Final = 503


@dataclass(frozen=True, slots=True)
class Sender:
    """Who sends a request, shown and not only said."""

    agent_id: str
    task_id: str | None = None
    """The task that it counts for; None where that is the chosen lease's."""
    lease_id: str | None = None
    """The one lease that it may go by; None where any of the task's will do."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request does not go on."""

    status: int
    reasons: tuple[Reason, ...]
    sender: Sender | None = None
    """Who it is attributed to, where that is not who it counts for."""


@dataclass(frozen=True, slots=True)
class ChosenLease:
    """The one lease that an action goes by, and the records that it was held against."""

    lease: Lease
    ground: RecordContext
    wanted: Scope


@dataclass(frozen=True, slots=True)
class ApprovalRequired:
    """The bundle wants a person's word on this one action."""

    required: ActionClass
    policy: str
    """The revision of the bundle that wants it."""


class Leases(Protocol):
    """What the decision asks of the table of leases."""

    def get(self, lease_id: str) -> Lease | None: ...

    def usable(self, agent_id: str, task_id: str | None, target_id: str) -> list[Lease]: ...

    def problem(self, lease: Lease) -> Reason | None: ...


def access_of(method: str) -> Access | None:
    """Whether a method only reads, as far as HTTP says. CONNECT asks for a tunnel: it is neither."""
    if method == "CONNECT":
        return None
    return "read" if method in SAFE_METHODS else "write"


def refuse(
    code: str,
    message: str,
    *,
    status: int = FORBIDDEN,
    permission: Permission | None = None,
    side: str | None = None,
    sender: Sender | None = None,
) -> Refusal:
    """A refusal for one reason."""
    reason = Reason(code=code, message=message[:1000], permission=permission, side=side)
    return Refusal(status, (reason,), sender)


def stale_view(why: str) -> Reason:
    """What this gateway knows is too old to go by."""
    return Reason(code="stale_view", message=f"{why}; denied until that is known again"[:1000])


def refuse_for(problem: Reason) -> Refusal:
    """A refusal for what a lease may not be used for any more."""
    return Refusal(UNAVAILABLE if problem.code == "stale_view" else FORBIDDEN, (problem,))


def authorize(
    sender: Sender,
    target: TargetState,
    action: Action,
    leases: Leases,
    directory: Directory,
    *,
    now_s: float,
    entitlements_max_age_s: int,
) -> ChosenLease | Refusal:
    """Hold one action against the leases of who sends it, and against the rule as the records have it by now.

    All that stands against it is told at once. `now_s`: this gateway's own time.
    """
    wanted = _action_scope(target.target_id, action.verb, action.resource)
    named = _lease_of_handle(sender, target, leases)
    if isinstance(named, Refusal):
        return named
    candidates = (
        [named] if named is not None else leases.usable(sender.agent_id, sender.task_id, target.target_id)
    )
    lease = narrowest(one for one in candidates if not missing(wanted, one.scope))
    task_id = lease.task_id if lease is not None else sender.task_id or (named.task_id if named else None)
    reasons: list[Reason] = []
    ground: RecordContext | None = None
    if task_id is None:
        reasons += _agent_reasons(sender.agent_id, directory)
    else:
        try:
            ground = load_records(directory, sender.agent_id, task_id, target.target_id)
            reasons += violations_of(ground, wanted, now_s, entitlements_max_age_s)
        except DeniedError as error:
            reasons.append(error.reason)
    if lease is None:
        reasons.append(_no_lease_reason(sender, wanted[0], candidates))
    else:
        reasons += _unusable_reasons(lease, target)
        gone = ref_void(lease.instance, ground.agent.state) if lease.instance and ground else None
        reasons += [gone] if gone else []
        reasons += _delegation_chain_reasons(
            lease, wanted, directory, ground.act if ground is not None else ()
        )
        if ground is not None and is_lost(lease, ground.agent.state):
            reasons.append(key_compromised(sender.agent_id))
    if lease is None or ground is None or reasons:
        return Refusal(FORBIDDEN, tuple(reasons))
    return ChosenLease(lease, ground, wanted)


@lru_cache(maxsize=4096)
def _action_scope(target_id: str, verb: str, resource: str) -> Scope:
    """One action as a scope: agents do the same again and again."""
    return (Permission(target=target_id, verbs=(verb,), resources=(resource,)),)


def narrowest(leases: Iterable[Lease]) -> Lease | None:
    """The lease of several that decides: the one that could do the least with the credential that is injected.

    Fewest globs over whole trees, then fewest over one segment, then fewest pairs of verb and resource; of equals the
    one that ends first, which is used up anyway; then by id, so that every gateway and every repeat choose the same.
    """
    return min(leases, key=_breadth, default=None)


def _breadth(lease: Lease) -> tuple[int, int, int, int, str]:
    globs = [glob for permission in lease.scope for glob in permission.resources]
    trees = sum("**" in glob for glob in globs)
    segments = sum("*" in glob for glob in globs) - trees
    pairs = sum(len(permission.verbs) * len(permission.resources) for permission in lease.scope)
    return trees, segments, pairs, lease.deadline, lease.lease_id


def _lease_of_handle(sender: Sender, target: TargetState, leases: Leases) -> Lease | Refusal | None:
    """The lease that a handle names, if it is one that this sender has at this target; None where none is named."""
    if sender.lease_id is None:
        return None
    lease = leases.get(sender.lease_id)
    if lease is None:
        return refuse("handle_unknown", "there is no such lease, or it ended long ago", status=UNAUTHORIZED)
    if lease.agent_id != sender.agent_id:
        return refuse("handle_other_agent", f"the handle is a lease of agent {lease.agent_id}")
    if sender.task_id not in (None, lease.task_id):
        return refuse("handle_other_task", "the handle is a lease of another task")
    if lease.target_id != target.target_id:
        message = (
            f"the handle is a lease for target {lease.target_id}, and this request is for {target.target_id}"
        )
        return refuse("handle_other_target", message, side="lease")
    if lease.delivery != "gateway":
        message = "the lease was delivered to the agent itself: use its credential, or ask for delivery to the gateway"
        return refuse("lease_not_for_gateways", message, side="lease")
    problem = leases.problem(lease)
    return refuse_for(problem) if problem is not None else lease


def _agent_reasons(agent_id: str, directory: Directory) -> list[Reason]:
    """What stands against an agent of which no task is known."""
    try:
        agent = directory.agent(agent_id)
    except ChainError as error:
        return [Reason(code="record_untrusted", message=str(error)[:1000])]
    if agent is None:
        return [Reason(code="agent_unknown", message=f"there is no agent {agent_id}")]
    if agent.state.status != "active":
        return [
            Reason(code=f"agent_{agent.state.status}", message=f"agent {agent_id} is {agent.state.status}")
        ]
    return []


def _no_lease_reason(sender: Sender, wanted: Permission, candidates: Sequence[Lease]) -> Reason:
    verb, resource = wanted.verbs[0], wanted.resources[0]
    if not candidates:
        whose = f"task {sender.task_id}" if sender.task_id is not None else f"agent {sender.agent_id}"
        message = f"{whose} has no live lease at {wanted.target} that is for gateways"
        return Reason(code="no_lease", message=message, permission=wanted, side="lease")
    message = f"no live lease allows {verb} on {resource} at {wanted.target}"
    return Reason(code="beyond_lease", message=message[:1000], permission=wanted, side="lease")


def _unusable_reasons(lease: Lease, target: TargetState) -> list[Reason]:
    if lease.backend not in INJECTABLE:
        message = (
            f"a credential of kind {lease.backend} does not go into a header: ask for delivery to the agent"
        )
        return [Reason(code="not_injectable", message=message)]
    if lease.backend != target.backend.kind:
        message = f"target {target.target_id} takes another kind of credential by now: ask for a new one"
        return [Reason(code="lease_outdated", message=message, side="lease")]
    return []


def _delegation_chain_reasons(
    lease: Lease, wanted: Scope, directory: Directory, checked: Collection[str]
) -> list[Reason]:
    """What agents say against it that the lease names and its task does not: their status, and their ceilings."""
    found: list[Reason] = []
    for agent_id in lease.act:
        if agent_id == lease.agent_id or agent_id in checked:
            continue
        alone = _agent_reasons(agent_id, directory)
        found += alone
        agent = directory.agent(agent_id) if not alone else None
        if agent is None:
            continue
        for lack in exceeding(wanted, (Limit.ceiling(agent_id, agent.state.ceiling),)):
            message = f"{lack.limit} does not allow it"
            found.append(
                Reason(code="beyond_scope", message=message, permission=lack.permission, side=lack.limit)
            )
    return found
