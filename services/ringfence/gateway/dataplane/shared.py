"""State that all connections of one data plane share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ringfence.gateway.contract import AgentApi, AnswerVerdict, Gate, ReportBlocked
from ringfence.gateway.dataplane.exchange import Timeouts
from ringfence.gateway.dataplane.forwarder import Forwarder, UpstreamPool
from ringfence.gateway.dataplane.limits import SenderLimits
from ringfence.gateway.dataplane.run_relays import RunRelays
from ringfence.gateway.dataplane.tls_listener import CertificateAuthority


@dataclass(frozen=True, slots=True)
class DataPlaneContext:
    """The context, shared by all listeners of a data plane."""

    gate: Gate
    is_target_host: Callable[[str], bool]
    answer: AnswerVerdict
    authority: CertificateAuthority
    forwarder: Forwarder
    upstreams: UpstreamPool
    limits: SenderLimits
    timeouts: Timeouts
    report_blocked: ReportBlocked
    agent_api: AgentApi | None = None
    """Answers agents that call the gateway itself; None if it is switched off."""
    relays: RunRelays | None = None
    """Opens relays for runs; None if there are none."""
