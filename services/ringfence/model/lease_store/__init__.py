"""The living leases in Redis or Valkey (7 or newer), shared by all issuers and revokers.

Leases are spread over shards, each with a hash tag of its own: every script touches one slot, so a cluster works. A
script reads Redis's own clock, never the caller's. Everything here may be repeated: what was done already is told, and
not done again.
"""

from __future__ import annotations

from ringfence.model.lease_store.codec import unpack
from ringfence.model.lease_store.connection import FullError, LostError
from ringfence.model.lease_store.keys import (
    AHEAD_MS,
    CLOSING_TOKEN,
    DAY_MS,
    FENCE_KEEP_MS,
    GRANT_KEEP_MS,
    MIN_LEFT_MS,
    RECORD_KEEP_MS,
    SELECTOR_KEEP_MS,
    outbox_field,
)
from ringfence.model.lease_store.rebuild import Had, Held, Restoration
from ringfence.model.lease_store.script_args import prepare_step, uses_of
from ringfence.model.lease_store.store import LeaseStore
from ringfence.model.lease_store.survey import SLACK_MS, Alive, Knowledge
from ringfence.model.lease_store.types import (
    Activation,
    Claimed,
    Looked,
    Outgoing,
    Preparation,
    PreparedStep,
    SignedLease,
    Step,
    Stepped,
    StoredLease,
)

__all__ = [
    "AHEAD_MS",
    "CLOSING_TOKEN",
    "DAY_MS",
    "FENCE_KEEP_MS",
    "GRANT_KEEP_MS",
    "MIN_LEFT_MS",
    "RECORD_KEEP_MS",
    "SELECTOR_KEEP_MS",
    "SLACK_MS",
    "Activation",
    "Alive",
    "Claimed",
    "FullError",
    "Had",
    "Held",
    "Knowledge",
    "LeaseStore",
    "Looked",
    "LostError",
    "Outgoing",
    "Preparation",
    "PreparedStep",
    "Restoration",
    "SignedLease",
    "Step",
    "Stepped",
    "StoredLease",
    "outbox_field",
    "prepare_step",
    "unpack",
    "uses_of",
]
