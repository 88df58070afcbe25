"""A lease's record looked at without verifying it: what orders and filters records before they are verified."""

from __future__ import annotations

import re
from dataclasses import dataclass

import orjson

from ringfence.kernel.crypto.keys import b64decode
from ringfence.messages.lease import Delegator, Lease

MAX_SEQ = 100
"""No lease has so many records: a number beyond is not its author's."""


_EPOCH = re.compile(r"\d{1,9}\.[0-9a-f]{8}")


@dataclass(frozen=True, slots=True)
class LeaseSummary:
    """What a record says of itself, nothing of it verified: enough to know whether it is needed."""

    lease_id: str
    seq: int
    status: str
    deadline: int
    epoch: str | None = None
    granted: bool = False


def summarise(jws: bytes) -> LeaseSummary | None:
    """A look at a record; None where it is none of a lease, whoever wrote it."""
    try:
        claims = orjson.loads(b64decode(jws.split(b".")[1]))
        lease_id, seq, status, deadline = (claims[name] for name in ("lease_id", "seq", "status", "deadline"))
        uuid = bytes.fromhex(lease_id.replace("-", ""))
        epoch, granted = claims.get("epoch"), claims.get("grants") is not None
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    right = len(uuid) == 16 and type(seq) is int and 0 < seq < MAX_SEQ and type(deadline) is int
    right = right and (epoch is None or (type(epoch) is str and _EPOCH.fullmatch(epoch) is not None))
    return LeaseSummary(lease_id, seq, str(status), deadline, epoch, granted) if right else None


def unverified(jws: bytes) -> Lease | None:
    """The claims of a record, quickly: to find out whether a revocation may be about it, never to act."""
    try:
        claims = orjson.loads(b64decode(jws.split(b".")[1]))
        names = [claims[name] for name in ("agent_id", "task_id", "sponsor", "target_id", "on_behalf_of")]
        right = all(type(name) is str for name in names) and type(claims["requested_at_ms"]) is int
        if claims.get("delegators") is not None:
            claims["delegators"] = tuple(Delegator.model_validate(one) for one in claims["delegators"])
    except (ValueError, LookupError, TypeError):
        return None
    return Lease.model_construct(**claims) if right else None
