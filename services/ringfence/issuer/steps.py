"""What the trace of a request says of the issuer's part in it."""

from __future__ import annotations

from ringfence.issuer.domain import Issue, Refusal
from ringfence.kernel.tracing.api import Span
from ringfence.model.leases.tracing import ids_of


def say(span: Span, outcome: Issue | Refusal) -> None:
    """Whether a decision holds, and if not, why."""
    if isinstance(outcome, Issue):
        span.note(**ids_of(outcome.lease))
    else:
        span.refused(*(reason.code for reason in outcome.reasons))
