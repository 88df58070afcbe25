"""What a run left behind: the records on Kafka, what the prober saw at the targets, what is still there.

Everything is verified when it comes here; nothing of what services hold in Redis or in memory is in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ringfence.messages.credential import Coordinates
from ringfence.messages.lease import Lease, RevocationRequest
from ringfence.messages.registry import AnyState
from ringfence.model.audit_log.verification import Fault

Revocability = Literal["instant", "session", "ttl"]


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """One record on `lease`. `digest` is that of what it says: a repeat of a record has the same, by whomever."""

    claims: Lease
    digest: str
    at: Coordinates
    void: bool = False
    """It came after the marker of a newer epoch than its own: no reader takes it for anything."""


@dataclass(frozen=True, slots=True)
class Order:
    """One record on `revocation.request`, signed by somebody who may have a say."""

    claims: RevocationRequest
    at: Coordinates


@dataclass(frozen=True, slots=True)
class State:
    """A record of a user, agent, target or task, with its chain of commands verified, and since when it stood there."""

    subject: str
    revision: int
    at_ms: int
    state: AnyState


@dataclass(frozen=True, slots=True)
class Followed:
    """A revoker's word that an order was carried out: everything that it covered is cut."""

    actor: str
    ref: str
    at_ms: int


@dataclass(frozen=True, slots=True)
class Probe:
    """One use of a credential at its target, by the clock of this machine, in ms. What nobody answered is none."""

    lease_id: str
    began_ms: int
    ended_ms: int
    worked: bool


@dataclass(frozen=True, slots=True)
class Ack:
    """A gateway's signed word that it forwards nothing more of what an order covers. `at_ms`: when it was appended."""

    gateway: str
    order_id: str
    at_ms: int


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something that a target still holds or accepts when all is over."""

    target_id: str
    lease_id: str
    what: str


@dataclass
class History:
    """A whole run, as the checker takes it."""

    leases: list[LeaseRecord] = field(default_factory=list)
    """In the order of the topic."""
    orders: list[Order] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    """What people, agents, targets and tasks were, one after another."""
    followed: list[Followed] = field(default_factory=list)
    received: set[str] = field(default_factory=set)
    """The leases that agents were given a credential of."""
    probes: list[Probe] = field(default_factory=list)
    acks: list[Ack] = field(default_factory=list)
    forwarded: dict[str, list[Probe]] = field(default_factory=dict)
    """By gateway: whether it would have forwarded a request under a lease."""
    leftovers: list[Leftover] = field(default_factory=list)
    requests: dict[str, int] = field(default_factory=dict)
    """By request id: when an agent's signed request was appended first, in ms."""
    answered: dict[str, int] = field(default_factory=dict)
    """The requests to which a sealed reply was put out, and when the first was appended, in ms."""
    steps: list[Coordinates] = field(default_factory=list)
    """Where everything stands that audit must tell: all that anybody asked for, decided, did, or found."""
    audited: set[tuple[str, int, int]] = field(default_factory=set)
    """Topic, partition and offset of every record that has an event on `audit`."""
    trail: list[Fault] = field(default_factory=list)
    """What an auditor finds wrong with the audit trail."""
    forged: list[str] = field(default_factory=list)
    """Records on `lease` that nobody of authority signed."""
    revocability: dict[str, Revocability] = field(
        default_factory=lambda: {"jwt": "instant", "redis": "session"}
    )
    """By the kind of the backend."""

    @property
    def is_told(self) -> bool:
        """Whether audit has told every step."""
        return all((at.topic, at.partition, at.offset) in self.audited for at in self.steps)
