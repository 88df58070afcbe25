"""All pages by path, and the navigation."""

from __future__ import annotations

from typing import Final

from ringfence.console.views.agents import agent, agents
from ringfence.console.views.approvals import approval, approvals
from ringfence.console.views.audit import audit, findings, trace
from ringfence.console.views.coverage import coverage
from ringfence.console.views.gateway import gateway
from ringfence.console.views.grants import grants
from ringfence.console.views.leases import lease, leases
from ringfence.console.views.offers import offer
from ringfence.console.views.page import MakePage
from ringfence.console.views.tasks import task, tasks

PAGES: Final[dict[str, MakePage]] = {
    "/approvals": approvals,
    "/approvals/{id}": approval,
    "/grants": grants,
    "/agents": agents,
    "/agents/{id}": agent,
    "/offers/{id}": offer,
    "/leases": leases,
    "/leases/{id}": lease,
    "/tasks": tasks,
    "/tasks/{id}": task,
    "/audit": audit,
    "/trace/{id}": trace,
    "/gateway": gateway,
    "/findings": findings,
    "/coverage": coverage,
}
SECTIONS: Final = {
    "approvals": "Approvals",
    "agents": "Agents",
    "leases": "Leases",
    "tasks": "Tasks",
    "audit": "Audit",
    "gateway": "Gateway",
    "findings": "Findings",
    "coverage": "Coverage",
}
"""The entries of the navigation: the path below `/`, and what people read."""
