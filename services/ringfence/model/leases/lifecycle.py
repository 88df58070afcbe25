"""The life of a lease: which record may follow which, what ends it, and what covers it. Pure."""

from __future__ import annotations

from typing import Final

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.ids import derived_id
from ringfence.messages.base import SpiffeId
from ringfence.messages.credential import Coordinates
from ringfence.messages.lease import TERMINAL, EndCause, EndKind, Lease, LeaseStatus, Selector

FOLLOWING: dict[LeaseStatus, frozenset[LeaseStatus]] = {
    "minting": frozenset({"active", "aborted"}),
    "active": frozenset({"ending", "expired"}),
    "ending": frozenset({"released", "revoked", "expired"}),
    "released": frozenset(),
    "revoked": frozenset(),
    "expired": frozenset(),
    "aborted": frozenset(),
}
"""What may come after each status. Only a pure token, which leaves nothing behind at its target, expires straight away.
"""

ALL_LEASES = "all"
"""The mark that every lease bears."""


class LeaseStateError(RingfenceError):
    """A step that the life of a lease does not have."""

    code = "lease_state"


def origin_of(lease_id: str, decision: Coordinates) -> str:
    """What a lease springs from: its id and the one record of the decision that it was issued on.

    It begins the `jti` of each of its records, so that a stored lease tells a redelivery of its decision from the same
    decision at another place of the topic, which is a replay.
    """
    return derived_id("lease", lease_id, decision.topic, decision.partition, decision.offset)


def record_id(origin: str, seq: int) -> str:
    """The `jti` of one record of a lease."""
    return f"{origin}.{seq}"


def has_origin(lease: Lease, origin: str) -> bool:
    """Whether a lease's record, of whatever `seq`, has this origin."""
    return lease.jti == record_id(origin, lease.seq)


def end_status(kind: EndKind) -> LeaseStatus:
    """The terminal status that a cause leads to."""
    match kind:
        case "deadline":
            return "expired"
        case "release":
            return "released"
        case "mint_failed":
            return "aborted"
        case _:
            return "revoked"


def follow(
    lease: Lease, status: LeaseStatus, *, by: SpiffeId, cause: EndCause, epoch: str | None = None
) -> Lease:
    """The record after `lease`, unsigned: `seq` one higher, written by the service `by` in this epoch of Redis.

    It bears the time of its cause, not of its writing: whoever writes it once more, having seen nothing of the first
    time, writes the same. Raises LeaseStateError where `status` may not come next.
    """
    if status not in FOLLOWING[lease.status]:
        raise LeaseStateError(f"lease {lease.lease_id} is {lease.status}: {status} does not follow")
    origin = lease.jti.rpartition(".")[0]
    return lease.model_copy(
        update={
            "iss": by,
            "iat": max(lease.iat, cause.at_ms // 1000),
            "jti": record_id(origin, lease.seq + 1),
            "seq": lease.seq + 1,
            "status": status,
            "cause": cause,
            "epoch": epoch,
        }
    )


def restated(lease: Lease, *, by: SpiffeId, epoch: str) -> Lease:
    """The same record, unsigned, said once more in another epoch of Redis."""
    return lease.model_copy(update={"iss": by, "epoch": epoch})


def statement(lease: Lease) -> str:
    """What a record says, whoever signed it in whichever epoch: two that are the same in this are one."""
    return restated(lease, by="", epoch="").model_dump_json(exclude_none=True)


def cut_before(end: Lease) -> Lease | None:
    """The `ending` record that comes before a terminal one, as it must have been; None where none does."""
    if end.status not in TERMINAL or end.status == "aborted" or end.seq < 3:
        return None
    return end.model_copy(
        update={
            "status": "ending",
            "seq": end.seq - 1,
            "jti": record_id(end.jti.rpartition(".")[0], end.seq - 1),
        }
    )


def comes_after(before: Lease | None, after: Lease) -> bool:
    """Whether `after` can be a later record of the life of which `before` is the latest one known."""
    if before is None:
        return True
    if before.seq >= after.seq or before.status in TERMINAL:
        return False
    return before.status != "ending" or (after.status in TERMINAL and after.cause == before.cause)


_OF_ONE_RECORD = frozenset({"iss", "iat", "jti", "seq", "status", "cause", "epoch", "traceparent"})
_TERMS = tuple(field for field in Lease.model_fields if field not in _OF_ONE_RECORD)
"""What a lease is about. No later record of it says anything else of these."""


def has_terms_of(before: Lease, after: Lease) -> bool:
    """Whether two records state the same lease: the same agent, task, target, scope, deadline and all other terms.

    Only the status, its cause and the fields of the record itself may differ between records of one lease. So a
    service that is taken over cannot lengthen or widen a lease by a later record.
    """
    return all(getattr(before, field) == getattr(after, field) for field in _TERMS)


def before_minting(lease: Lease) -> Lease:
    """The record that announces a lease whose credential will leave something at its target, unsigned."""
    return lease.model_copy(update={"status": "minting"})


def after_minting(minting: Lease, *, epoch: str | None = None) -> Lease:
    """The record after that, unsigned: the credential is there. The same at every time, by every issuer of an epoch.

    It competes with the record of a revoker that aborts the lease, so it bears the `epoch` of Redis as that one does.
    """
    origin, seq = minting.jti.rpartition(".")[0], minting.seq + 1
    return minting.model_copy(
        update={"status": "active", "seq": seq, "jti": record_id(origin, seq), "epoch": epoch}
    )


def is_over(lease: Lease) -> bool:
    """Whether the lease has ended for good."""
    return lease.status in TERMINAL


def agent_selector_key(agent_id: str) -> str:
    """What all leases of an agent bear."""
    return f"agent:{agent_id}"


def sponsor_selector_key(user_id: str) -> str:
    """What all leases bear whose agent had this sponsor when they were issued."""
    return f"sponsor:{user_id}"


def selector_keys(lease: Lease) -> tuple[str, ...]:
    """What the lease is fenced by besides `ALL_LEASES`, and ended with: each as `<kind>:<id>`.

    Those of the agents that handed its task on are among them: a fence on one of them, or on its task, stops the lease
    as well, in the same moment.
    """
    return (*own_selector_keys(lease), *delegator_selector_keys(lease))


def own_selector_keys(lease: Lease) -> tuple[str, ...]:
    """What the lease is found by in Redis."""
    return (
        agent_selector_key(lease.agent_id),
        f"task:{lease.task_id}",
        f"target:{lease.target_id}",
        *shared_selector_keys(lease),
    )


def delegator_selector_keys(lease: Lease) -> tuple[str, ...]:
    """Those of its marks that it bears as what came of other agents' tasks; each is found by the lease's own agent."""
    return tuple(
        selector_key
        for one in lease.delegators or ()
        for selector_key in (
            agent_selector_key(one.agent_id),
            f"task:{one.task_id}",
            sponsor_selector_key(one.sponsor),
        )
    )


def shared_selector_keys(lease: Lease) -> tuple[str, ...]:
    """Those of its marks that the leases of several agents bear, and that they are found by: sponsor and user."""
    return (sponsor_selector_key(lease.sponsor), f"user:{lease.on_behalf_of}")


def matches(lease: Lease, selector_key: str) -> bool:
    """Whether the lease bears a mark."""
    return selector_key == ALL_LEASES or selector_key in selector_keys(lease)


def is_cut_key(selector_key: str) -> bool:
    """Whether a fence is one of those that cut."""
    return selector_key.startswith("cut:")


def cut_key(selector_key: str) -> str:
    """The fence of a selector alone: what it covers is not only not issued any more, it is cut, found or not."""
    return f"cut:{selector_key}"


def selector_key_of(selector: Selector) -> str:
    """The mark that all leases bear which the selector is about."""
    named = {
        "agent": selector.agent_id,
        "task": selector.task_id,
        "sponsor": selector.sponsor,
        "target": selector.target_id,
        "user": selector.user_id,
    }
    return next((f"{kind}:{id}" for kind, id in named.items() if id is not None), ALL_LEASES)


def is_covered(lease: Lease, issued_before_ms: int) -> bool:
    """Whether a selector of which the first record was appended then covers a lease that bears its mark."""
    return lease.requested_at_ms <= issued_before_ms


# What a standing privilege is: a credential that is not short-lived, or that its task does not bound. Pure.
#
# Nothing stands where the answer is "none": that is the aim, and `inventory` and `audit coverage` count what
# falls short.

SHORT_LIVED_S: Final = 3600
"""What lives no longer than this is short-lived, where nobody says otherwise."""
CLOCKS_S: Final = 60
"""So far the clocks may differ that the two ends of a life were measured by."""


def is_short_lived(since_s: float, until_s: float, most_s: int = SHORT_LIVED_S) -> bool:
    """Whether what may be used from `since_s` until `until_s` lives no longer than `most_s`."""
    return until_s - since_s <= most_s + CLOCKS_S


def is_task_bound(until_s: float, task_end_s: float | None) -> bool:
    """Whether it ends no later than its task; `task_end_s` is None where no task is known that it is of."""
    return task_end_s is not None and until_s <= task_end_s + CLOCKS_S
