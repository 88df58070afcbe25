"""Leases as the lease store takes them, for its tests: signed by somebody whom nobody need believe."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from typing import Any, cast

from ringfence.kernel.base.ids import derived_id, lease_id
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.credential import Coordinates
from ringfence.messages.lease import EndCause, Lease, LeaseStatus
from ringfence.model.lease_store import LeaseStore, SignedLease, Step
from ringfence.model.leases.lifecycle import follow, origin_of, record_id
from tools.schemas.examples import EXAMPLES

EXAMPLE = EXAMPLES[Lease]
assert isinstance(EXAMPLE, Lease)
VISIBLE_MS = 60_000
CAUSE = EndCause(kind="revocation", at_ms=1, by="spiffe://acme.example/user/olga", ref="r1", reason="a test")
REVOKER = "spiffe://acme.example/service/revoker"
_KEY = SigningKey.generate(REVOKER)


def signed(claims: Lease) -> SignedLease:
    """A lease and its record."""
    return SignedLease(claims, sign(claims, _KEY))


def lease(**fields: Any) -> SignedLease:
    """A new active lease, of an agent of its own unless told otherwise."""
    name, request_id = uuid.uuid4().hex[:8], str(uuid.uuid4())
    id = lease_id(request_id)
    origin = origin_of(id, Coordinates(topic="t", partition=0, offset=1, appended_at_ms=1))
    given = {
        "lease_id": id,
        "request_id": request_id,
        "decision_id": derived_id("decision", request_id, "allowed"),
        "jti": record_id(origin, 1),
        "agent_id": (agent_id := fields.get("agent_id", f"bot-{name}")),
        "act": (agent_id,),
        "task_id": str(uuid.uuid4()),
        "sponsor": f"sam-{name}",
        "target_id": f"target-{name}",
        "on_behalf_of": f"maria-{name}",
        "deadline": int(time.time()) + 600,
        "status": "active",
        "seq": 1,
        "cause": None,
        **fields,
    }
    claims = cast(Lease, EXAMPLE.model_copy(update=given))
    return signed(claims)


def step(before: SignedLease, *statuses: LeaseStatus, cause: EndCause = CAUSE) -> Step:
    """The step to the last of these statuses, from the one before it."""
    claims = after = before.claims
    for status in statuses:
        after, claims = claims, follow(claims, status, by=REVOKER, cause=cause)
    return Step(signed(claims), after)


async def bearing(store: LeaseStore, mark: str, agent_id: str | None = None) -> list[str]:
    """The ids of the leases that bear a mark, as those come to them who act on it."""
    ids = await store.find(mark, agent_id=agent_id)
    stored = await store.get(ids)
    return [id for id in ids if stored[id].may_match(mark)]


async def until(found: Callable[[], Any]) -> Any:
    """What `found()` gives once it is true."""
    async with asyncio.timeout(60):
        while not (answer := await found()):
            await asyncio.sleep(0.02)
    return answer


def soon() -> int:
    """A deadline that a test waits for, and before which it can do something, on a machine under load too."""
    return int(time.time()) + 4


async def claimed(store: LeaseStore, visibility_ms: int = VISIBLE_MS) -> dict[str, Any]:
    """What is due now in all shards."""
    found: dict[str, Any] = {}
    for one in await store.claim(store.shards, limit=10, visibility_ms=visibility_ms):
        found |= one.leases
    return found


def minting(**fields: Any) -> SignedLease:
    """A lease that is being minted."""
    return lease(**{"status": "minting", **fields})


def minted(before: SignedLease) -> SignedLease:
    """The `active` record after a `minting` one."""
    claims = before.claims
    origin = claims.jti.rpartition(".")[0]
    active = claims.model_copy(update={"status": "active", "seq": 2, "jti": record_id(origin, 2)})
    return signed(active)
