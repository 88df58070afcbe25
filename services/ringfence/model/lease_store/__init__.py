"""Lease store: the live leases in Redis or Valkey (7 or newer), shared by all issuers and revokers.

Leases are sharded. Each shard has a hash tag of its own, and every script touches one slot, so a cluster works. Scripts
read Redis's clock, never the caller's. Every operation is idempotent: a repeat returns that it was done already.

`store` has the operations, `scripts` their Lua, `keys` every Redis key. `rebuild` restores Redis from Kafka after data
loss, `survey` checks its integrity, `codec` is the form of records in Redis.
"""

from __future__ import annotations

from ringfence.model.lease_store.codec import unpack
from ringfence.model.lease_store.connection import FullError, LostError
from ringfence.model.lease_store.keys import (
    CLOSING_TOKEN,
    DAY_MS,
    FENCE_KEEP_MS,
    GRANT_KEEP_MS,
    MIN_LEFT_MS,
    RECORD_KEEP_MS,
    SELECTOR_KEEP_MS,
    outbox_field,
)
from ringfence.model.lease_store.rebuild import LeaseKeys, RecordVersion, Restoration
from ringfence.model.lease_store.script_args import uses_of
from ringfence.model.lease_store.store import LeaseStore
from ringfence.model.lease_store.survey import SLACK_MS, Knowledge, LiveLease
from ringfence.model.lease_store.types import (
    Activation,
    ClaimedLeases,
    LeaseLookup,
    OutboxRecord,
    Preparation,
    SignedLease,
    Step,
    StepResult,
    StoredLease,
)

__all__ = [
    "CLOSING_TOKEN",
    "DAY_MS",
    "FENCE_KEEP_MS",
    "GRANT_KEEP_MS",
    "MIN_LEFT_MS",
    "RECORD_KEEP_MS",
    "SELECTOR_KEEP_MS",
    "SLACK_MS",
    "Activation",
    "ClaimedLeases",
    "FullError",
    "Knowledge",
    "LeaseKeys",
    "LeaseLookup",
    "LeaseStore",
    "LiveLease",
    "LostError",
    "OutboxRecord",
    "Preparation",
    "RecordVersion",
    "Restoration",
    "SignedLease",
    "Step",
    "StepResult",
    "StoredLease",
    "outbox_field",
    "unpack",
    "uses_of",
]
