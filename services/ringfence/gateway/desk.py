"""What every connection of the embedded data plane needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ringfence.gateway.attempts import Blocks, Gate
from ringfence.gateway.authority import Authority
from ringfence.gateway.forwarding import Forwarder, Patiences
from ringfence.gateway.limits import Limits
from ringfence.gateway.plans import Plans
from ringfence.gateway.refusals import Answer
from ringfence.gateway.upstream import Upstreams


@dataclass(frozen=True, slots=True)
class Desk:
    """One for all listeners of a plane."""

    gate: Gate
    knows: Callable[[str], bool]
    answer: Answer
    authority: Authority
    forwarder: Forwarder
    upstreams: Upstreams
    plans: Plans
    limits: Limits
    patiences: Patiences
    blocked: Blocks
