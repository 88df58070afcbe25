"""What the trace of a request says of the actions that its lease was used for."""

from __future__ import annotations

from ringfence.kernel.tracing.api import Tracing, Work
from ringfence.messages.operations import ActionAnswered, ActionDecided


def traced(tracing: Tracing, event: ActionDecided | ActionAnswered) -> str | None:
    """Make the span of an action that was decided, or answered; returns what its event goes on from.

    What it was done to is not said: names at a target may tell more than whoever reads traces is to know.
    """
    facts: dict[str, object] = {
        "action_id": event.action_id,
        "agent_id": event.agent_id,
        "task_id": event.task_id,
        "lease_id": event.lease_id,
        "target_id": event.target_id,
        "verb": event.verb,
    }
    if isinstance(event, ActionAnswered):
        with tracing.step(
            "answer action", Work(event.traceparent, {**facts, "answer": event.answer})
        ) as span:
            return span.traceparent
    facts |= {"allowed": event.allowed, "observed": event.observed}
    took_ns = (event.latency_us or 0) * 1000
    with tracing.step("decide action", Work(event.traceparent, facts, took_ns=took_ns)) as span:
        if not event.allowed:
            span.refused(*(reason.code for reason in event.reasons))
        return span.traceparent
