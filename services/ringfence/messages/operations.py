"""Operational messages: service events, actions, heartbeats, and dead letters.

The state of shared-signals streams: what each receiver chose.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field

from ringfence.messages.base import (
    SERVICE_ROLES,
    Claims,
    Digest,
    Json,
    Message,
    Millis,
    Name,
    NonEmpty,
    SpiffeId,
    Uuid,
)
from ringfence.messages.credential import Coordinates, Reason
from ringfence.messages.enrolment import EnrolledInstance
from ringfence.messages.run import Labels

StreamStatus = Literal["enabled", "paused", "disabled", "deleted"]
"""The first three are those of SSF 1.0. A deleted stream has a record that says so, because nobody signs a
tombstone."""
DeliveryMethod = Literal["urn:ietf:rfc:8935", "urn:ietf:rfc:8936"]
"""Push, and poll."""


class SignalStream(Claims):
    """One receiver's stream, as of one `revision`. Readers fold by the highest; lower ones count for nothing."""

    typ: ClassVar[str] = "signal.stream"
    signed_by = ("signals",)

    receiver: NonEmpty
    """By the name of its token. The settings of the service say what it may receive."""
    stream_id: Uuid
    revision: Annotated[int, Field(ge=1)]
    status: StreamStatus
    reason: str | None = None
    """Why the receiver changed the status last, in its words."""
    method: DeliveryMethod
    events_requested: tuple[str, ...] | None = None
    """As the receiver gave them; all if it gave none."""
    description: str | None = None
    removed: tuple[dict[str, Json], ...] = ()
    """Subject identifiers (RFC 9493) that the receiver wants to hear nothing of."""
    since_ms: Millis | None = None
    """Ends appended before this are not reported. None: this record's append time, for a stream that is new or enabled
    again."""


EventKind = Literal[
    "started",
    "stopped",
    "accepted",
    "refused",
    "replayed",
    "finding",
    "proposed",
    "withdrawn",
    "lapsed",
    "widened",
]


class EventSubject(StrEnum):
    """The subjects of service events that are about no message and no service."""

    CONSUMER_HALTED = "consumer halted"
    KEY = "key"
    OBSERVE_MODE = "observe mode"
    POLICY_BUNDLE = "policy bundle"
    RECORD = "record"
    RECORDS_GONE = "records gone"
    SCIM = "scim"
    SIGNALS = "signals"


class ServiceEvent(Claims):
    """What a service did with a message, or found out. `jti` is derived from what it reports.

    `accepted`, `refused` and `proposed` answer a command. Its sender waits for the event with the command's `jti` as
    `ref` and its `iss` as `actor`. A proposed command waits for a second person: then it is `accepted` after all,
    `withdrawn`, or `lapsed`. `widened`: one person alone widened something.
    """

    typ: ClassVar[str] = "service.event"
    signed_by = SERVICE_ROLES

    kind: EventKind
    subject: NonEmpty
    """Its subject: the message's name, or the service."""
    actor: SpiffeId | None = None
    """Who caused it, if a signature says so."""
    ref: str | None = None
    """The `jti` of the message that it is about."""
    source: Coordinates | None = None
    reasons: tuple[Reason, ...] = ()
    result: str | None = None
    """The id of what came out of it, e.g. of the task; of a renewed key its end, in seconds since 1970."""
    agent_id: str | None = None
    request_id: str | None = None
    lease_id: str | None = None
    task_id: str | None = None
    enrolled: EnrolledInstance | None = None
    """The running instance that a registry let in: what it needs to refuse the same token to anybody else."""
    sponsor: str | None = None
    """The person to notify, if there is one: the sponsor who is accountable for the agent."""
    at_ms: Millis
    traceparent: str | None = None


class PartitionDigest(Message):
    """What a compacted topic's partition holds: how many ids, and the XOR of SHA-256 over each `id@revision`."""

    topic: NonEmpty
    partition: Annotated[int, Field(ge=0)]
    count: Annotated[int, Field(ge=0)]
    digest: Digest


class StreamDigest(Message):
    """A digest of a range of a partition: the XOR of SHA-256 over each `offset@` with the record's bytes."""

    topic: NonEmpty
    partition: Annotated[int, Field(ge=0)]
    start: Annotated[int, Field(ge=0)]
    end: Annotated[int, Field(ge=0)]
    """The offset after the last one. Nothing had come after it yet, as far as the signer knew."""
    digest: Digest


GroupName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,255}$")]
"""A consumer group on Kafka, with its prefix."""


class RunnerPool(Message):
    """The pool whose orders a runner takes, as it is now."""

    name: Name
    labels: Labels
    free: Annotated[int, Field(ge=0)]
    """How many more runs it may start now."""


class Heartbeat(Claims):
    """Once a second: this service is alive, and this is what a complete local table holds now, or what has come."""

    typ: ClassVar[str] = "heartbeat"
    signed_by = ("registry", "revoker", "gateway", "runner")

    at_ms: Millis
    tables: tuple[PartitionDigest, ...] = ()
    streams: tuple[StreamDigest, ...] = ()
    """Of revokers, for `lease` and `revocation.request`: what has come since the heartbeat before."""
    halted: Annotated[tuple[GroupName, ...], Field(max_length=100)] = ()
    """Of revokers: their consumer groups that have halted. While one is named, issuers and gateways deny."""
    runs: Annotated[tuple[Uuid, ...], Field(max_length=1000)] = ()
    """Of runners: the runs that go on in the process that sends this. Several processes may be one runner."""
    pool: RunnerPool | None = None
    """Of runners that take orders."""


class DeadLetter(Message):
    """An invalid record: its coordinates and the reason, never its payload."""

    source: Coordinates
    service: NonEmpty
    code: NonEmpty
    reason: NonEmpty
    at_ms: Millis


AnswerKind = Literal["result", "tool_error", "rpc_error", "accepted", "transport_error", "none"]
"""`transport_error`: by its status; `rpc_error`: a JSON-RPC error; `tool_error`: a result with `isError`; `accepted`:
there was nothing to answer; `none`: no whole answer was seen."""

INJECTED: Final = "injected"
"""The label of requests that follow from input in which tooling found injected instructions."""


class ActionAsked(Message):
    """What became of the question to a person about an action; the decision's reasons say the rest."""

    request_id: Uuid
    """Of the `action.request`."""
    request_digest: Digest
    by: Name | None = None
    """Who approved or denied; None if nobody answered in time."""
    waited_ms: Annotated[int, Field(ge=0)]
    """How long this request waited; `latency_us` is without it."""


MAX_PATH_CHARS: Final = 256


class Destination(Message):
    """The destination of a request, as its sender wrote it: safe to print, without query and user information."""

    scheme: Literal["http", "https"] | None = None
    host: Annotated[str, Field(pattern=r"^[a-z0-9._:?-]{1,253}$")] | None = None
    """`?` replaces characters that no host has."""
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    path: Annotated[str, Field(max_length=MAX_PATH_CHARS, pattern=r"^[!-~]*$")] | None = None
    """Undecoded. Truncated if it ends in `...`."""


class ActionDecided(Message):
    """One request of an agent through the gateway, and what was decided on it; or, with `count`, several that are alike
    and were refused before anything could be decided."""

    action_id: NonEmpty
    gateway: SpiffeId | None = None
    """Who decided."""
    agent_id: NonEmpty | None = None
    """The sender, as far as proven; if somebody else used an agent's handle, that sender."""
    act: tuple[Name, ...] | None = None
    """For a delegated task, the acting agents: the sender first, then the last to delegate."""
    task_id: str | None = None
    run_id: Uuid | None = None
    """The run whose instance sent it: by the socket of the run, or by a lease of the run."""
    lease_id: str | None = None
    target_id: str | None = None
    verb: str | None = None
    resource: str | None = None
    allowed: bool
    reasons: tuple[Reason, ...] = ()
    access: Literal["read", "write"] | None = None
    """By its method (RFC 9110, 9.2.1), whatever the verb is called; at an endpoint of MCP by the message. CONNECT is
    neither."""
    method: Annotated[str, Field(max_length=32)] | None = None
    destination: Destination | None = None
    """Its destination, if it was not allowed."""
    request_digest: Digest | None = None
    """Over method, URL and body: it tells two requests apart, and says nothing of what was in them."""
    latency_us: Annotated[int, Field(ge=0)] | None = None
    """What deciding took."""
    label: Annotated[str, Field(max_length=64)] | None = None
    """The origin of the request as the sender's tooling states it. It is not verified."""
    observed: Literal[True] | None = None
    """Set if it was forwarded in observe mode, with the agent's inherited credential: it would have been blocked."""
    asked: ActionAsked | None = None
    """Set if a person was asked about it."""
    count: Annotated[int, Field(ge=1)] | None = None
    """The number of requests that this event reports, if they were refused before a decision; else 1."""
    at_ms: Millis
    traceparent: str | None = None


class ModelUsage(Message):
    """What one request to a language model used, and what is counted for its task."""

    input_tokens: Annotated[int, Field(ge=0)] | None = None
    """As the answer says, with those of caches; None if it does not say."""
    output_tokens: Annotated[int, Field(ge=0)] | None = None
    tokens: Annotated[int, Field(ge=0)]
    """The tokens that are counted."""
    counted: Literal["usage", "estimate", "reservation", "nothing"]
    """Why: `usage`: the answer says so; `estimate`: by the bytes of request and answer, as the answer does not say, or
    says less than a quarter of that; `reservation`: the answer ended too early, or does not say; `nothing`: the target
    refused the request."""


class ActionAnswered(Message):
    """What came of an action at an endpoint of MCP or at a language model, at its end: the ways to fail are kept
    apart."""

    action_id: NonEmpty
    """Of the `ActionDecided` that let it pass."""
    gateway: SpiffeId | None = None
    agent_id: NonEmpty | None = None
    act: tuple[Name, ...] | None = None
    task_id: str | None = None
    run_id: Uuid | None = None
    lease_id: str | None = None
    target_id: str | None = None
    verb: str | None = None
    resource: str | None = None
    answer: AnswerKind
    http_status: Annotated[int, Field(ge=100, le=599)] | None = None
    rpc_code: Annotated[int, Field(ge=-(2**53), le=2**53)] | None = None
    """Of the JSON-RPC error. What it says in words stays between agent and target."""
    usage: ModelUsage | None = None
    """Of a language model."""
    at_ms: Millis
    traceparent: str | None = None


class RelayEnded(Message):
    """The end of a byte relay of a run, to a target whose protocol is not HTTP. Bytes are counted, and not read."""

    action_id: NonEmpty
    """Of the `ActionDecided` that allowed it."""
    gateway: SpiffeId | None = None
    agent_id: NonEmpty
    task_id: NonEmpty
    run_id: Uuid
    lease_id: NonEmpty
    """The first of the leases that it rested on."""
    target_id: NonEmpty
    destination: Destination
    sent_bytes: Annotated[int, Field(ge=0)]
    """From the run to the target."""
    received_bytes: Annotated[int, Field(ge=0)]
    duration_ms: Annotated[int, Field(ge=0)]
    reason: Reason | None = None
    """Why the gateway ended it, or could not begin it. None if a side ended it, or if nothing passed for long."""
    at_ms: Millis
    traceparent: str | None = None
