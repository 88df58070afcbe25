"""FastStream subscribers for consumers of Ringfence's topics: SIEMs, tools of sponsors, platforms.

Needs the extra `faststream`: `pip install 'ringfence[faststream]'`. See `docs/how-to/consume.md`.

Enters: records of the topics `audit`, `approval.request`, `lease` and `action`; handlers of a program.
Leaves: typed messages to handlers, at least once, signatures verified where there are any; `UnknownMessage`
for others.
Imports: every package below, and no `testing` beside it; it uses `client.settings`, `kernel` and `messages`.
Read first: `router.py` (`RingfenceRouter`, the subscriptions and the pause after a failure,
records into verified messages).
"""

from __future__ import annotations

try:
    import faststream.kafka  # noqa: F401 - only to say which extra is missing
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "ringfence.faststream needs FastStream; run: pip install 'ringfence[faststream]'", name=error.name
    ) from None

from ringfence.faststream.router import RingfenceRouter, Subscription, UnknownMessage
from ringfence.messages.approval import ActionRequest, ApprovalRequest
from ringfence.messages.audit import AuditEvent
from ringfence.messages.lease import Lease, LeaseEpoch
from ringfence.messages.operations import ActionAnswered, ActionDecided, RelayEnded

__all__ = [
    "ActionAnswered",
    "ActionDecided",
    "ActionRequest",
    "ApprovalRequest",
    "AuditEvent",
    "Lease",
    "LeaseEpoch",
    "RelayEnded",
    "RingfenceRouter",
    "Subscription",
    "UnknownMessage",
]
