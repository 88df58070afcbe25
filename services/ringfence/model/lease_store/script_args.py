"""Arguments of the scripts, and what their answers mean."""

from __future__ import annotations

from collections.abc import Sequence

from ringfence.messages.credential import Coordinates
from ringfence.messages.lease import TERMINAL, Lease
from ringfence.model.lease_store.keys import GRANT_KEEP_MS, MIN_LEFT_MS, Keys, outbox_field, uuid_bytes
from ringfence.model.lease_store.scripts import Argument
from ringfence.model.lease_store.types import (
    LETTERS,
    Activation,
    Preparation,
    SignedLease,
    Step,
    StepResult,
    StoredLease,
)
from ringfence.model.leases.lifecycle import shared_selector_keys

MINTING_MS = 10_000
"""How long a restored lease that is still minting is left to its issuer."""
BATCH_SIZE = 64
"""The most leases in one run of a script: it takes less than a millisecond, in which Redis serves nobody else."""
NO_LIMIT = 2**31
"""The limit when leases that named a grant already are counted again."""


def position_text(at: Coordinates) -> str:
    """A position on Kafka, as Redis holds it."""
    return f"{at.topic} {at.partition} {at.offset} {at.appended_at_ms}"


def parse_position(text: bytes) -> Coordinates:
    """A position that `position_text` wrote. Raises ValueError."""
    topic, partition, offset, appended_at_ms = text_of(text).split(" ")
    return Coordinates(
        topic=topic, partition=int(partition), offset=int(offset), appended_at_ms=int(appended_at_ms)
    )


def restore_args(
    at: Keys, lease: SignedLease, record_keep_ms: int, *, over_seq: int = 0, published: int | None = None
) -> tuple[tuple[str | bytes, ...], tuple[Argument, ...]]:
    """Keys and arguments of RESTORE, of a lease of this shard.

    Args:
        over_seq: a record in Redis up to this `seq` is overwritten.
        published: the `seq` that Kafka has, if not the record's. Then whoever has claimed the lease keeps it.
    """  # fmt: skip
    claims, id = lease.claims, uuid_bytes(lease.claims.lease_id)
    # A restored lease that is minting has no token: its issuer takes it over, or a revoker aborts it.
    head = head_of(claims) + (" -" if claims.status == "minting" else "")
    return (
        (
            at.live(id),
            at.claimed,
            at.outbox,
            at.outbox_times,
            *at.indexes(claims),
        ),
        (
            id,
            max(claims.seq, over_seq) if published is None else published,
            claims.status,
            claims.deadline * 1000,
            head,
            lease.record,
            record_keep_ms if claims.status in TERMINAL else "",
            MINTING_MS if claims.status == "minting" else 0,
            max(claims.seq, over_seq + 1),
            claims.agent_id,
            "CH" if published is None else "NX",
        ),
    )


def uses_of(claims: Lease) -> list[tuple[str, str]]:
    """(id of the grant, id of the lease) for each grant that a lease names."""
    return [(grant_id, claims.lease_id) for grant_id in claims.grants or ()]


def use_grant_args(
    at: Keys, grant_id: str, lease_id: str, most: int
) -> tuple[tuple[str | bytes, ...], tuple[Argument, ...]]:
    """Keys and arguments of USE_GRANT, of a grant of this shard."""
    return (at.grant(grant_id),), (uuid_bytes(lease_id), most, GRANT_KEEP_MS)


def head_of(claims: Lease) -> str:
    """The head of a record: what scripts read. It is stored before the signed record."""
    return f"{_state_of(claims)} {claims.deadline}" + (f" {claims.epoch}" if claims.epoch else "")


def expected_state(claims: Lease) -> str:
    """The status, `seq` and epoch that a record must have for the next one to follow it."""
    return f"{_state_of(claims)} {claims.epoch or ''}"


def _state_of(claims: Lease) -> str:
    return f"{LETTERS[claims.status]}{claims.seq}"


def issue_args(id: bytes, lease: SignedLease) -> tuple[Argument, ...]:
    """The first arguments of the scripts that issue a lease."""
    claims = lease.claims
    return (
        id,
        claims.deadline * 1000,
        claims.requested_at_ms,
        head_of(claims),
        lease.record,
        outbox_field(claims.lease_id, claims.seq),
        MIN_LEFT_MS,
    )


def step_args(step: Step) -> tuple[Argument, ...]:
    """A step as arguments of TRANSITION."""
    claims = step.lease.claims
    over: tuple[Argument, ...] = ("",)
    if claims.status in TERMINAL:
        over = (claims.deadline * 1000, claims.agent_id, *shared_selector_keys(claims))
    return (
        uuid_bytes(claims.lease_id),
        expected_state(step.after),
        head_of(claims),
        step.lease.record,
        outbox_field(claims.lease_id, claims.seq),
        *over,
    )


def in_batches(numbers: Sequence[int], lease_ids: Sequence[str]) -> list[list[int]]:
    """Numbers of steps in batches for one run of a script each. Adjacent steps of one lease stay in one batch."""
    batches: list[list[int]] = []
    last = None
    for number, lease_id in zip(numbers, lease_ids, strict=True):
        if not batches or (len(batches[-1]) >= BATCH_SIZE and lease_id != last):
            batches.append([])
        batches[-1].append(number)
        last = lease_id
    return batches


DONE = StepResult("done")
FULL = (b"full",)


def step_result(outcome: bytes, *rest: bytes) -> StepResult:
    """TRANSITION's answer for one lease."""
    return StepResult(text_of(outcome), stored_of(*rest))  # type: ignore[arg-type]


def text_of(value: bytes) -> str:
    """An ASCII answer as text."""
    return value.decode("ascii")


def stored_of(record: bytes | None = None) -> StoredLease | None:
    """A record in an answer, if there is one."""
    return StoredLease.parse(record) if record else None


def preparation_of(outcome: bytes, *rest: bytes) -> Preparation:
    """PREPARE's answer."""
    if outcome == b"fenced":
        return Preparation("fenced", selector_key=text_of(rest[0]))
    return Preparation(text_of(outcome), stored=stored_of(*rest))  # type: ignore[arg-type]


def activation_of(outcome: bytes, *rest: bytes) -> Activation:
    """ACTIVATE's answer."""
    if outcome == b"fenced":
        return Activation("fenced", selector_key=text_of(rest[0]))
    return Activation(text_of(outcome), stored=stored_of(*rest))  # type: ignore[arg-type]
