"""All pages by path, and the navigation."""

from __future__ import annotations

from typing import Final

from ringfence.console.views.agents import agent, agents
from ringfence.console.views.approvals import approval, approvals
from ringfence.console.views.page import MakePage

PAGES: Final[dict[str, MakePage]] = {
    "/approvals": approvals,
    "/approvals/{id}": approval,
    "/agents": agents,
    "/agents/{id}": agent,
}
SECTIONS: Final = {
    "approvals": "Approvals",
    "agents": "Agents",
}
"""The entries of the navigation: the path below `/`, and what people read."""
