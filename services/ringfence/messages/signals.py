"""The state of shared-signals streams: what each receiver chose."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ringfence.messages.base import Claims, Json, Millis, NonEmpty, Uuid

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
