"""What every connection of the embedded data plane needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ringfence.gateway.contract import Gate, ReportBlocked
from ringfence.gateway.dataplane.certificate_authority import Authority
from ringfence.gateway.dataplane.exchange import Timeouts
from ringfence.gateway.dataplane.forwarder import Forwarder
from ringfence.gateway.dataplane.limits import Limits
from ringfence.gateway.dataplane.upstream_pool import Upstreams
from ringfence.gateway.errors import Answer


@dataclass(frozen=True, slots=True)
class DataPlaneContext:
    """One for all listeners of a plane."""

    gate: Gate
    knows: Callable[[str], bool]
    answer: Answer
    authority: Authority
    forwarder: Forwarder
    upstreams: Upstreams
    limits: Limits
    patiences: Timeouts
    blocked: ReportBlocked
