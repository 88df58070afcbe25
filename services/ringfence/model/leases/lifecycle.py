"""Life cycle of a lease: the state machine of its records, its selector keys, and what a revocation covers. Pure.

A selector key (`agent:<id>`, `task:<id>`, `target:<id>`, `sponsor:<id>`, `user:<id>`, or `all`) says which leases a
selector or a fence is about. A lease matches a key if the key is among its own (`selector_keys`).
"""

from __future__ import annotations

from typing import Final

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.ids import derived_id
from ringfence.messages.base import SpiffeId
from ringfence.messages.codes import Code
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
"""Which statuses may follow each status. Only a lease that leaves nothing at its target goes from active to expired."""

ALL_LEASES = "all"


class LeaseStateError(RingfenceError):
    """Raised for a transition that the life cycle of a lease does not have."""

    code = Code.LEASE_STATE


def origin_of(lease_id: str, decision: Coordinates) -> str:
    """The origin of a lease: an id of the lease and of the one decision record that it was issued on.

    The `jti` of each of its records begins with it. So a stored lease tells a redelivery of its decision from the same
    decision at another offset, which is a replay.
    """
    return derived_id("lease", lease_id, decision.topic, decision.partition, decision.offset)


def record_id(origin: str, seq: int) -> str:
    """The `jti` of one record of a lease."""
    return f"{origin}.{seq}"


def has_origin(lease: Lease, origin: str) -> bool:
    """Whether a lease's record, of whatever `seq`, has this origin."""
    return lease.jti == record_id(origin, lease.seq)


def end_status(kind: EndKind) -> LeaseStatus:
    """The terminal status for a kind of end."""
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

    Its time is that of its cause, not of its writing: so a writer that repeats it, without having seen the first,
    writes the same. Raises LeaseStateError if `status` may not come next.
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
    """Return the same record, unsigned, for another epoch of Redis."""
    return lease.model_copy(update={"iss": by, "epoch": epoch})


def statement(lease: Lease) -> str:
    """A record without signer and epoch: records with the same statement are the same record, restated."""
    return restated(lease, by="", epoch="").model_dump_json(exclude_none=True)


def cut_before(end: Lease) -> Lease | None:
    """The `ending` record that must have come before a terminal one; None if none did."""
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
    """Whether `after` can be a later record of a lease whose latest known record is `before`."""
    if before is None:
        return True
    if before.seq >= after.seq or before.status in TERMINAL:
        return False
    return before.status != "ending" or (after.status in TERMINAL and after.cause == before.cause)


_OF_ONE_RECORD = frozenset({"iss", "iat", "jti", "seq", "status", "cause", "epoch", "traceparent"})
_TERMS = tuple(field for field in Lease.model_fields if field not in _OF_ONE_RECORD)
"""The terms of a lease: fields that no later record may change."""


def has_terms_of(before: Lease, after: Lease) -> bool:
    """Whether two records state the same lease: the same agent, task, target, scope, deadline and all other terms.

    Only the status, its cause and the fields of the record itself may differ between records of one lease. So a
    service that is taken over cannot lengthen or widen a lease by a later record.
    """
    return all(getattr(before, field) == getattr(after, field) for field in _TERMS)


def before_minting(lease: Lease) -> Lease:
    """The record, unsigned, that announces a lease whose credential will leave something at its target."""
    return lease.model_copy(update={"status": "minting"})


def after_minting(minting: Lease, *, epoch: str | None = None) -> Lease:
    """The record after that, unsigned: the credential exists. Every issuer writes the same, at any time in an epoch.

    It competes with a revoker's record that aborts the lease, so it has the `epoch` of Redis, as that one does.
    """
    origin, seq = minting.jti.rpartition(".")[0], minting.seq + 1
    return minting.model_copy(
        update={"status": "active", "seq": seq, "jti": record_id(origin, seq), "epoch": epoch}
    )


def is_over(lease: Lease) -> bool:
    """Whether the lease has ended for good."""
    return lease.status in TERMINAL


def agent_selector_key(agent_id: str) -> str:
    """The selector key of an agent's leases."""
    return f"agent:{agent_id}"


def sponsor_selector_key(user_id: str) -> str:
    """The selector key of leases whose agent had this sponsor when they were issued."""
    return f"sponsor:{user_id}"


def selector_keys(lease: Lease) -> tuple[str, ...]:
    """The selector keys that a lease matches, besides `ALL_LEASES`.

    Those of the agents that delegated its task are among them: a fence on one of them, or on its task, covers the lease
    as well, at the same moment.
    """
    return (*own_selector_keys(lease), *delegator_selector_keys(lease))


def own_selector_keys(lease: Lease) -> tuple[str, ...]:
    """The selector keys by which Redis finds the lease."""
    return (
        agent_selector_key(lease.agent_id),
        f"task:{lease.task_id}",
        f"target:{lease.target_id}",
        *shared_selector_keys(lease),
    )


def delegator_selector_keys(lease: Lease) -> tuple[str, ...]:
    """The selector keys of the agents that delegated the task. Redis finds the lease by its own agent instead."""
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
    """The selector keys that leases of several agents share, and that Redis indexes: sponsor and user."""
    return (sponsor_selector_key(lease.sponsor), f"user:{lease.on_behalf_of}")


def matches(lease: Lease, selector_key: str) -> bool:
    return selector_key == ALL_LEASES or selector_key in selector_keys(lease)


def is_cut_key(selector_key: str) -> bool:
    """Whether this is the key of a cut (`cut_key`)."""
    return selector_key.startswith("cut:")


def cut_key(selector_key: str) -> str:
    """The key of a cut: leases that it covers are refused at once, also those that no revoker has found yet."""
    return f"cut:{selector_key}"


def selector_key_of(selector: Selector) -> str:
    """The selector key of the leases that a selector is about."""
    named = {
        "agent": selector.agent_id,
        "task": selector.task_id,
        "sponsor": selector.sponsor,
        "target": selector.target_id,
        "user": selector.user_id,
    }
    return next((f"{kind}:{id}" for kind, id in named.items() if id is not None), ALL_LEASES)


def is_covered(lease: Lease, issued_before_ms: int) -> bool:
    """Whether a lease that matches a selector is covered: if it was requested before the selector was appended."""
    return lease.requested_at_ms <= issued_before_ms


# A standing privilege is a credential that is not short-lived, or that outlives its task. The aim is to have none.
# `inventory` and `audit coverage` count them.

SHORT_LIVED_S: Final = 3600
"""The default limit of a short-lived credential."""
CLOCKS_S: Final = 60
"""How far the clocks may differ that measured the two ends of a life."""


def is_short_lived(since_s: float, until_s: float, most_s: int = SHORT_LIVED_S) -> bool:
    """Whether a credential that is valid from `since_s` until `until_s` lives no longer than `most_s`."""
    return until_s - since_s <= most_s + CLOCKS_S


def is_task_bound(until_s: float, task_end_s: float | None) -> bool:
    """Whether a credential ends no later than its task; `task_end_s` is None if its task is not known."""
    return task_end_s is not None and until_s <= task_end_s + CLOCKS_S
