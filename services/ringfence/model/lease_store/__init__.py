"""Lease store: the live leases in Redis or Valkey (7 or newer), shared by all issuers and revokers.

Leases are sharded. Each shard has a hash tag of its own, and every script touches one slot, so a cluster
works. Scripts read Redis's clock, never the caller's. Every operation is idempotent: a repeat returns that it
was done already. `rebuild` restores Redis from Kafka after data loss, `survey` checks its integrity, `codec`
packs records.

Enters: signed lease records, selectors, steps of leases; from issuer and revoker.
Leaves: activations, due leases, outbox records to publish; UnavailableError if Redis does not answer,
LostError if it may have lost leases.
Imports: all of the model below it, `kernel` and `messages`; the console may not import it.
Read first: `store.py` (the operations), `scripts.py` (their Lua), `keys.py` (every Redis key).
"""

from __future__ import annotations

from ringfence.model.lease_store.budgets import Budget, LeaseStoreBudgets, Spent
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
    ExpiredScan,
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
    "Budget",
    "ClaimedLeases",
    "ExpiredScan",
    "FullError",
    "Knowledge",
    "LeaseKeys",
    "LeaseLookup",
    "LeaseStore",
    "LeaseStoreBudgets",
    "LiveLease",
    "LostError",
    "OutboxRecord",
    "Preparation",
    "RecordVersion",
    "Restoration",
    "SignedLease",
    "Spent",
    "Step",
    "StepResult",
    "StoredLease",
    "outbox_field",
    "unpack",
    "uses_of",
]
