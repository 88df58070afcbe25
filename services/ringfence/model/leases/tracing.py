"""Trace spans about leases."""

from __future__ import annotations

from ringfence.kernel.tracing.api import Span, Tracing, Work, nearest
from ringfence.messages.lease import Lease


def ids_of(lease: Lease) -> dict[str, str]:
    """The attributes of a span about a lease."""
    return {
        "agent_id": lease.agent_id,
        "task_id": lease.task_id,
        "request_id": lease.request_id,
        "lease_id": lease.lease_id,
        "target_id": lease.target_id,
        "backend": lease.backend,
    }


def step_of(lease: Lease, name: str, tracing: Tracing) -> Span:
    """A span for one step of a lease, in the trace of its request."""
    return tracing.step(name, work_on(lease))


def work_on(lease: Lease, cause: str | None = None) -> Work:
    """Return the input of a span about one of many leases.

    `cause`: the `traceparent` of the message that caused the step.
    """
    parent = nearest(cause, lease.traceparent) if cause is not None else lease.traceparent
    return Work(parent, ids_of(lease), because_of=cause)
