"""What the trace of a request says of policy's part in it."""

from __future__ import annotations

from collections.abc import Sequence

from ringfence.kernel.tracing.api import Span, Tracing, Work
from ringfence.messages.credential import Outcome, Reason
from ringfence.policy.domain import Case


def step_of(case: Case, name: str, tracing: Tracing) -> Span:
    """Something that is done about one request."""
    facts = {
        "request_id": case.request_id,
        "agent_id": case.agent_id,
        "task_id": case.request.claims.task_id,
    }
    return tracing.step(name, Work(case.traceparent, facts))


def say(span: Span, outcome: Outcome, reasons: Sequence[Reason]) -> None:
    """What it came to; of a denial also why."""
    span.note(outcome=outcome)
    if outcome == "denied":
        span.refused(*(reason.code for reason in reasons))
