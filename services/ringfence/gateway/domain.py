"""Authorization of one action: whether it is allowed, and by which lease. Pure: verified records and live leases in.

Default deny: whatever is not certain is denied, with a stable code, a sentence, and, where there is one, the permission
and the limit that does not allow it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal, Protocol

from ringfence.messages.base import Permission, Scope
from ringfence.messages.codes import AnyCode, Code, inactive_agent, status_of
from ringfence.messages.credential import Reason
from ringfence.messages.lease import Lease
from ringfence.messages.registry import ActionClass, TargetState
from ringfence.model.http_targets import Action
from ringfence.model.lifecycle import hold_of, hold_text
from ringfence.model.records.agent_keys import is_lost
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.records.instances import check_ref
from ringfence.model.records.runs import run_violations
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
from ringfence.model.verdict import ALLOWED, Allowed, Refused, refused

INJECTABLE: Final = frozenset(name for name, kind in CREDENTIAL_KINDS.items() if kind.fits_header)
"""The kinds of credentials that can be injected as a request header."""
SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
"""The safe methods (RFC 9110, 9.2.1)."""
Access = Literal["read", "write"]
BAD_REQUEST: Final = 400
UNAUTHORIZED: Final = 401
FORBIDDEN: Final = 403
NOT_FOUND: Final = 404
TOO_MANY_REQUESTS: Final = 429
UNAVAILABLE: Final = 503


@dataclass(frozen=True, slots=True)
class Sender:
    """The authenticated sender of a request."""

    agent_id: str
    task_id: str | None = None
    """The task that the request counts for; None if it is that of the chosen lease."""
    lease_id: str | None = None
    """The only lease that the request may use; None where any lease of the task may be used."""
    run_id: str | None = None
    """The run whose own socket the request came through: only leases of its instance may be used."""
    key_proved: bool = False
    """Whether the request has a proof by the key of its lease. Without it, or the run's socket, no run's lease counts.
    """


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is refused."""

    status: int
    reasons: tuple[Reason, ...]
    sender: Sender | None = None
    """The agent that the refusal is attributed to, if that is not the sender."""


@dataclass(frozen=True, slots=True)
class ChosenLease:
    """The one lease that allows an action, and the verified records that it was checked against."""

    lease: Lease
    ground: RecordContext
    wanted: Scope


@dataclass(frozen=True, slots=True)
class ApprovalRequired:
    """The bundle requires a person's approval of this action."""

    required: ActionClass
    policy: str
    """The revision of the bundle that requires it."""


class Leases(Protocol):
    """The part of the lease table that authorization reads."""

    def get(self, lease_id: str) -> Lease | None: ...

    def usable(self, agent_id: str, task_id: str | None, target_id: str) -> list[Lease]: ...

    def check_live(self, lease: Lease) -> Allowed | Refused: ...


def access_of(method: str) -> Access | None:
    """Whether a method reads or writes (RFC 9110, 9.2.1). None for CONNECT, which asks for a tunnel."""
    if method == "CONNECT":
        return None
    return "read" if method in SAFE_METHODS else "write"


def refuse(
    code: AnyCode,
    message: str,
    *,
    status: int | None = None,
    permission: Permission | None = None,
    side: str | None = None,
    sender: Sender | None = None,
) -> Refusal:
    """Build a refusal with one reason. `status`: where it is another one than that of the code."""
    reason = Reason(code=code, message=message[:1000], permission=permission, side=side)
    return Refusal(status or status_of(code, FORBIDDEN), (reason,), sender)


def stale_view(why: str) -> Reason:
    """The reason for a denial by a gateway whose view is too old."""
    return Reason(code=Code.STALE_VIEW, message=f"{why}; denied until that is known again"[:1000])


def refuse_for(reason: Reason) -> Refusal:
    """Build a refusal from the reason why a lease cannot be used."""
    return Refusal(UNAVAILABLE if reason.code == Code.STALE_VIEW else FORBIDDEN, (reason,))


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
    """Authorize one action: find the lease that allows it, and check the invariant against the current records.

    All reasons against it are returned together. `now_s`: the time of this gateway.
    """
    wanted = _action_scope(target.target_id, action.verb, action.resource)
    named = _lease_of_handle(sender, target, leases)
    if isinstance(named, Refusal):
        return named
    usable = (
        [named] if named is not None else leases.usable(sender.agent_id, sender.task_id, target.target_id)
    )
    candidates = [one for one in usable if isinstance(check_run_of_lease(sender, one), Allowed)]
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
        elsewhere = check_run_of_lease(sender, usable[0]) if usable and not candidates else ALLOWED
        reasons.append(
            elsewhere.reason
            if isinstance(elsewhere, Refused)
            else _no_lease_reason(sender, wanted[0], candidates)
        )
    else:
        reasons += _unusable_reasons(lease, target)
        reasons += lease_reasons(lease, ground, wanted, directory, now_s)
    if lease is None or ground is None or reasons:
        return Refusal(FORBIDDEN, tuple(reasons))
    return ChosenLease(lease, ground, wanted)


def lease_reasons(
    lease: Lease, ground: RecordContext | None, wanted: Scope, directory: Directory, now_s: float
) -> list[Reason]:
    """The reasons why a live lease may not be used by what the records are now, besides task, limits and statuses."""
    admitted = check_ref(lease.instance, ground.agent.state) if lease.instance and ground else ALLOWED
    reasons = [admitted.reason] if isinstance(admitted, Refused) else []
    reasons += run_violations(
        lease.instance, directory.runs.of(lease.instance), agent_id=lease.agent_id, task_id=lease.task_id,
        kid=lease.key_thumbprint, now_s=now_s,
    )  # fmt: skip
    reasons += _delegation_chain_reasons(lease, wanted, directory, ground.act if ground is not None else ())
    if ground is not None and is_lost(lease, ground.agent.state):
        reasons.append(key_compromised(lease.agent_id))
    return reasons


@lru_cache(maxsize=4096)
def _action_scope(target_id: str, verb: str, resource: str) -> Scope:
    """The scope of one action, cached because agents repeat their actions."""
    return (Permission(target=target_id, verbs=(verb,), resources=(resource,)),)


def narrowest(leases: Iterable[Lease]) -> Lease | None:
    """Choose the lease with the least privilege, since its credential is injected. None if there is none.

    Fewest globs over whole trees, then fewest over one segment, then fewest pairs of verb and resource. Of equal leases
    the one that ends first, then the one with the lowest id: so every gateway chooses the same.
    """
    return min(leases, key=_breadth, default=None)


def _breadth(lease: Lease) -> tuple[int, int, int, int, str]:
    globs = [glob for permission in lease.scope for glob in permission.resources]
    trees = sum("**" in glob for glob in globs)
    segments = sum("*" in glob for glob in globs) - trees
    pairs = sum(len(permission.verbs) * len(permission.resources) for permission in lease.scope)
    return trees, segments, pairs, lease.deadline, lease.lease_id


def check_run_of_lease(sender: Sender, lease: Lease) -> Allowed | Refused:
    """Check whether a lease may be used where the request came in.

    1. On a run's socket: the lease is of that run's instance (`socket_other_run`).
    2. Elsewhere: the lease is of no run, or the request has a proof by its key (`lease_of_run`). A task's socket is
       open to all who can open the file, and a certificate is the agent's.
    """
    run_id = run_id_of_lease(lease)
    if sender.run_id is not None and run_id != sender.run_id:
        message = f"the socket is of run {sender.run_id}, and the lease is another's; ask for one here"
        return refused(Code.SOCKET_OTHER_RUN, message, side="lease")
    if run_id is not None and sender.run_id is None and not sender.key_proved:
        message = (
            f"the lease is of run {run_id}: use the run's own socket, or a listener with a proof by its key"
        )
        return refused(Code.LEASE_OF_RUN, message, side="lease")
    return ALLOWED


def run_id_of_lease(lease: Lease) -> str | None:
    """The run whose instance asked for a lease; None if none did."""
    return (
        lease.instance.run.run_id if lease.instance is not None and lease.instance.run is not None else None
    )


def _lease_of_handle(sender: Sender, target: TargetState, leases: Leases) -> Lease | Refusal | None:
    """The lease that the handle names, if the sender may use it at this target; None if there is no handle.

    1. The lease is known (`handle_unknown`).
    2. It is of the sender's agent (`handle_other_agent`), and of its task (`handle_other_task`).
    3. It may be used where the request came in (`check_run_of_lease`).
    4. It is for this target (`handle_other_target`), and was delivered to gateways (`lease_not_for_gateways`).
    5. It is live (`Leases.check_live`).
    """
    if sender.lease_id is None:
        return None
    lease = leases.get(sender.lease_id)
    if lease is None:
        return refuse(Code.HANDLE_UNKNOWN, "there is no such lease, or it ended long ago")
    if lease.agent_id != sender.agent_id:
        return refuse(Code.HANDLE_OTHER_AGENT, f"the handle is a lease of agent {lease.agent_id}")
    if sender.task_id not in (None, lease.task_id):
        return refuse(Code.HANDLE_OTHER_TASK, "the handle is a lease of another task")
    if isinstance(elsewhere := check_run_of_lease(sender, lease), Refused):
        return Refusal(FORBIDDEN, (elsewhere.reason,))
    if lease.target_id != target.target_id:
        message = (
            f"the handle is a lease for target {lease.target_id}, and this request is for {target.target_id}"
        )
        return refuse(Code.HANDLE_OTHER_TARGET, message, side="lease")
    if lease.delivery != "gateway":
        message = "the lease was delivered to the agent itself: use its credential, or ask for delivery to the gateway"
        return refuse(Code.LEASE_NOT_FOR_GATEWAYS, message, side="lease")
    live = leases.check_live(lease)
    return refuse_for(live.reason) if isinstance(live, Refused) else lease


def _agent_reasons(agent_id: str, directory: Directory) -> list[Reason]:
    try:
        agent = directory.agent(agent_id)
    except ChainError as error:
        return [Reason(code=Code.RECORD_UNTRUSTED, message=str(error)[:1000])]
    if agent is None:
        return [Reason(code=Code.AGENT_UNKNOWN, message=f"there is no agent {agent_id}")]
    if (hold := hold_of(agent.state)) is not None:
        return [Reason(code=Code.RESTS_ON_COMPROMISED, message=hold_text(f"agent {agent_id}", hold))]
    if agent.state.status != "active":
        return [
            Reason(
                code=inactive_agent(agent.state.status), message=f"agent {agent_id} is {agent.state.status}"
            )
        ]
    return []


def _no_lease_reason(sender: Sender, wanted: Permission, candidates: Sequence[Lease]) -> Reason:
    verb, resource = wanted.verbs[0], wanted.resources[0]
    if not candidates:
        whose = f"task {sender.task_id}" if sender.task_id is not None else f"agent {sender.agent_id}"
        message = f"{whose} has no live lease at {wanted.target} that is for gateways"
        return Reason(code=Code.NO_LEASE, message=message, permission=wanted, side="lease")
    message = f"no live lease allows {verb} on {resource} at {wanted.target}"
    return Reason(code=Code.BEYOND_LEASE, message=message[:1000], permission=wanted, side="lease")


def _unusable_reasons(lease: Lease, target: TargetState) -> list[Reason]:
    if lease.backend not in INJECTABLE:
        message = (
            f"a credential of kind {lease.backend} does not go into a header: ask for delivery to the agent"
        )
        return [Reason(code=Code.NOT_INJECTABLE, message=message)]
    if lease.backend != target.backend.kind:
        message = f"target {target.target_id} takes another kind of credential by now: ask for a new one"
        return [Reason(code=Code.LEASE_OUTDATED, message=message, side="lease")]
    return []


def _delegation_chain_reasons(
    lease: Lease, wanted: Scope, directory: Directory, checked: Collection[str]
) -> list[Reason]:
    """The reasons against agents of the lease's delegation chain that the task does not name: status and ceiling."""
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
                Reason(code=Code.BEYOND_SCOPE, message=message, permission=lack.permission, side=lack.limit)
            )
    return found
