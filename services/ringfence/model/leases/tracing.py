"""What the trace of a request says of its lease."""

from __future__ import annotations

from ringfence.kernel.tracing.api import Span, Tracing, Work
from ringfence.kernel.tracing.traceparent import nearest
from ringfence.messages.lease import Lease


def ids_of(lease: Lease) -> dict[str, str]:
    """What a span about a lease notes: whose it is."""
    return {
        "agent_id": lease.agent_id,
        "task_id": lease.task_id,
        "request_id": lease.request_id,
        "lease_id": lease.lease_id,
        "target_id": lease.target_id,
        "backend": lease.backend,
    }


def step_of(lease: Lease, name: str, tracing: Tracing) -> Span:
    """Something that is done for one lease, in the trace of its request."""
    return tracing.step(name, work_on(lease))


def work_on(lease: Lease, order: str | None = None) -> Work:
    """The same, for one of many leases. `order`: the `traceparent` of what was said about it, where something was."""
    parent = nearest(order, lease.traceparent) if order is not None else lease.traceparent
    return Work(parent, ids_of(lease), because_of=order)
