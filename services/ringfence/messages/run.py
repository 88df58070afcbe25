"""Runs: an agent's command in a fresh sandbox. Orders and stops, signed by users, and records, by runners."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from ringfence.messages.base import (
    Claims,
    Digest,
    ExpiringClaims,
    Message,
    Millis,
    Name,
    NonEmpty,
    Seconds,
    SpiffeId,
    TtlSeconds,
    Uuid,
)
from ringfence.messages.credential import Reason

RunStatus = Literal["claimed", "started", "ended", "lost"]
"""`claimed`: the runner has taken it on, and nothing runs yet. `lost`: nobody knows how it ended."""
ImageDigest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
"""A container image by its content (OCI image specification, digests). A tag could change its meaning."""
Argument = Annotated[str, Field(max_length=8192, pattern=r"^[^\x00]*$")]
"""One word of a command line; execve(2) takes no NUL."""


Labels = Annotated[dict[Name, Annotated[str, Field(max_length=256)]], Field(max_length=32)]
"""What a pool of runners says of itself, such as its zone, by name. Values are compared to the letter."""


class Mount(Message):
    """A mount by the name that the runner's pool has for it: no order holds a path of a host."""

    name: Name
    read_write: bool = False


class RunLimits(Message):
    """What a sandbox may use at the most."""

    memory_bytes: Annotated[int, Field(ge=1, lt=2**53)]
    cpu_millis: Annotated[int, Field(ge=1, le=1_024_000)]
    """In thousandths of one CPU."""
    pids: Annotated[int, Field(ge=1, le=4_194_304)]


class RunOrder(ExpiringClaims):
    """Run a command for an agent's task, in a fresh sandbox: signed by a user with a key file.

    It has no environment values and no host paths: what only looked harmless there would be authority from outside.
    With a field that its reader does not know, it starts nothing.
    """

    typ: ClassVar[str] = "run.order"

    pool: Name
    agent_id: Name
    task_id: Uuid
    command: Annotated[tuple[Argument, ...], Field(min_length=1, max_length=256)]
    image: ImageDigest | None = None
    """None: the pool's default."""
    mounts: Annotated[tuple[Mount, ...], Field(max_length=32)] = ()
    limits: RunLimits
    ttl_s: TtlSeconds
    """How long the run may take, from its claim."""
    labels: Labels | None = None
    """Labels that the pool must have; None: any pool."""


class RunStop(ExpiringClaims):
    """End a run, or an order that waits: signed by a user who may order it. Its Kafka key is the run's id.

    From then on it is final: a run that a stop names does not start.
    """

    typ: ClassVar[str] = "run.stop"

    run_id: Uuid
    reason: NonEmpty


class RunExit(Message):
    """How the command of a run ended."""

    code: Annotated[int, Field(ge=0, le=255)] | None = None
    signal: Annotated[int, Field(ge=1, le=64)] | None = None
    reason: NonEmpty | None = None
    """Set if something else than the command ended the run: a stop, its time limit, a failed sandbox."""


class Run(Claims):
    """A run, as of one status. `iss` is its runner, and stays that.

    A run goes from `claimed` to `started` to `ended` or `lost`, and never back: readers ignore every other record.
    While it is `started`, the instance with the key `key_thumbprint` acts for its agent within its task. With an
    unknown field, a started run lets nobody act; an end still counts.
    """

    typ: ClassVar[str] = "run"
    signed_by = ("runner",)

    run_id: Uuid
    """The UUIDv5 of "run" and the order's id; of a local run, of "run", its runner's SPIFFE ID and `nonce`."""
    order_id: Uuid | None = None
    """The UUIDv5 of the order's (`iss`, `jti`)."""
    nonce: NonEmpty | None = None
    """Of a local run, which has no order: what tells it from the others of its runner."""
    ordered_by: SpiffeId | None = None
    """Who signed the order."""
    agent_id: Name
    task_id: Uuid
    status: RunStatus
    key_thumbprint: NonEmpty | None = None
    """The key that was made inside the sandbox. It is known from the start on."""
    deadline: Seconds
    """The end of the run at the latest."""
    backend: Name
    """What made the sandbox."""
    limits: RunLimits
    policy_digest: Digest | None = None
    """Over what the sandbox allows, as its runner was set up."""
    image_digest: ImageDigest | None = None
    mounts: Annotated[tuple[Mount, ...], Field(max_length=32)] = ()
    exit: RunExit | None = None
    refused: Reason | None = None
    """Why its runner does not start what was ordered: such a run is `ended` from the beginning."""
    remained: Annotated[tuple[NonEmpty, ...], Field(max_length=64)] = ()
    """What could not be destroyed, or was written to a mount and would be executed later."""
    at_ms: Millis

    @model_validator(mode="after")
    def _of_one_origin(self) -> Run:
        if (self.order_id is None) == (self.nonce is None):
            raise ValueError("a run has either an order_id or, where it is local, a nonce")
        if self.status == "started" and self.key_thumbprint is None:
            raise ValueError("a run that has started names the key that was made in its sandbox")
        return self
