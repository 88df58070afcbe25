"""A program that prints the lists of the command line from canned answers, for tests with a pseudo-terminal.

`python -m tests.support.terminal_lists` runs each command at each width, after a line `## WIDTH COMMAND`. The services'
answers are those below.
"""

from __future__ import annotations

import fcntl
import struct
import termios
import time
from dataclasses import replace
from typing import Any

from ringfence.cli.main import main
from ringfence.client.approvals.history_comparison import RequestGroup
from ringfence.client.approvals.sponsor import Sponsor
from ringfence.client.reports.read_api import ReadApi
from ringfence.messages.base import Permission
from tests.unit.test_action_questions import pending as pending_action
from tests.unit.test_questions import ONE

NOW_S = int(time.time())
AGENT = "invoice-reconciliation-agent-eu-west"
OTHER_AGENT = "deploy-bot"
USER = "maria.gonzalez-fernandez"
SPONSOR = "samuel.okonkwo-lindqvist"
TARGET = "postgres-billing-ledger-production"
RESOURCE = "schemas/ledger_2026/tables/invoice_line_items"
REASON = "The monthly reconciliation found three invoices that have no line items, and has to read them again"
IDS = (
    "3f2a9c1d-0a4d-5d39-9b5e-0a4d7e6c0f5d",
    "77777777-1111-4d39-9b5e-0a4d7e6c0f5d",
    "77777777-2222-4d39-9b5e-0a4d7e6c0f5d",
)
SCOPE = [
    {"target": TARGET, "verbs": ["select", "update"], "resources": [RESOURCE]},
    {"target": "staging", "verbs": ["deploy"], "resources": ["env/staging/web"]},
]  # fmt: skip


def _permissions() -> tuple[Permission, ...]:
    return tuple(Permission.model_validate(one, strict=False) for one in SCOPE)


LEASES = [
    {
        "id": id, "agent_id": agent, "on_behalf_of": USER, "scope": SCOPE[:count], "status": "active",
        "deadline": NOW_S + 250, "task_id": IDS[0],
    }
    for id, agent, count in zip(IDS, (AGENT, OTHER_AGENT, OTHER_AGENT), (2, 1, 1), strict=True)
]  # fmt: skip
TASKS = [
    {
        "id": id, "revision": 1,
        "state": {
            "task_id": id, "agent_id": AGENT, "on_behalf_of": USER, "assigned_by": USER, "purpose": REASON,
            "scope": SCOPE, "not_after": NOW_S + 86_400, "status": "active",
        },
    }
    for id in IDS
]  # fmt: skip
INVENTORY = {
    "at_ms": NOW_S * 1000, "after": None, "cursor": "c", "gaps": [],
    "totals": dict.fromkeys(
        ("agents", "decommissioned", "live_sponsor", "orphans", "registered", "suspended", "keys_ending", "keys_ended",
         "running_tasks", "leases", "standing_leases", "used", "granted", "not_seen", "long_tasks",
         "with_combination"), 1),
    "agents": [
        {
            "id": agent, "status": "active", "sponsor": SPONSOR, "sponsor_is": "disabled", "orphan": True,
            "last_seen_ms": NOW_S * 1000, "running_tasks": 2, "leases": 3, "standing_leases": ["l"], "long_tasks": [],
            "reach": [{"target": TARGET, "verbs": ["select", "update"], "unused": ["update"], "exists": True}],
            "ceiling_by": {"by": f"spiffe://ringfence.local/user/{SPONSOR}", "at_ms": NOW_S * 1000},
            "keys_end": NOW_S + 86_400,
            "combinations": ["what reads code must not run CI; it allows clone, and run-ci"],
        }
        for agent in (AGENT, OTHER_AGENT)
    ],
}  # fmt: skip
WHO_POLICY = {
    "agents": [
        {
            "id": AGENT, "status": "active", "sponsor": SPONSOR, "sponsor_is": "live", "now": True,
            "ceiling": [SCOPE[0]], "ceiling_by": {"by": f"x/user/{SPONSOR}", "at_ms": NOW_S * 1000},
            "tasks": [
                {
                    "id": IDS[0], "on_behalf_of": USER, "entitlements_by": "scim", "scope": [SCOPE[0]],
                    "approvals": ["sponsor"], "against": [], "purpose": REASON, "assigned_by": USER,
                    "handed_on_by": [OTHER_AGENT], "not_after": NOW_S + 3600,
                }
            ],
        }
    ],
    "after": None, "gaps": [], "exists": True,
}  # fmt: skip
WHO_AUDIT = {
    "lines": [
        {
            "agent": AGENT, "sponsor": SPONSOR, "on_behalf_of": USER, "allowed": 5, "denied": 1, "observed": 0,
            "leases": 2, "handed_out": 0, "unverified": 0, "first_ms": NOW_S * 1000, "last_ms": NOW_S * 1000,
            "lease": IDS[1],
        }
    ],
    "after": None, "looked_at_ms": [0, NOW_S * 1000],
}  # fmt: skip


def _node(kind: str, id: str, title: str, seconds: int, *children: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": kind, "id": id, "title": title, "at_ms": (NOW_S // 86_400 * 86_400 + seconds) * 1000,
        "duration_ms": 1200, "children": list(children),
    }  # fmt: skip


TRACE = {
    "id": IDS[1], "kind": "lease", "truncated": False,
    "roots": [
        {"kind": "user", "id": USER, "title": f"{USER}, on whose behalf it was done", "at_ms": None, "children": [
            _node("task", IDS[0], f"task for agent {AGENT}: {REASON}", 1,
                _node("request", IDS[2], f"{AGENT} asked for {TARGET}:select,update:{RESOURCE}", 2,
                    _node("approval", "a", f"{SPONSOR} approved", 3),
                    _node("lease", IDS[1], f"credential issued for {TARGET}:select,update:{RESOURCE}", 4,
                        _node("end", "e", f"released by {AGENT}", 5)))),
        ]},
    ],
}  # fmt: skip


class _Sponsor:
    def groups(self, *, everyone: bool) -> list[Any]:
        one = replace(
            ONE, request_id=IDS[0], agent=AGENT, on_behalf_of=USER, scope=_permissions(), reason=REASON
        )
        return [
            RequestGroup((one, replace(one, request_id=IDS[1]))),
            RequestGroup((replace(ONE, agent=OTHER_AGENT),)),
        ]

    def actions(self, *, everyone: bool) -> list[Any]:
        return [pending_action(request_id=IDS[2], agent=AGENT, on_behalf_of=USER, expires_at=NOW_S + 500)]

    async def __aenter__(self) -> _Sponsor:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None


class _Api:
    """`ReadApi` without any service."""

    async def __aenter__(self) -> _Api:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def get(self, service: str, *path: str, **query: Any) -> Any:
        match service, *path:
            case "registry", "tasks":
                return {"tasks": TASKS}
            case "registry", "targets", _:
                return {}
            case "revoker", "leases":
                return {"leases": [] if query.get("overdue") else LEASES, "more": False}
            case "policy", "inventory":
                return INVENTORY
            case "policy", "reach":
                return WHO_POLICY
            case "audit", "trace", _:
                return TRACE
            case "audit", "who":
                return WHO_AUDIT
        raise AssertionError((service, path))


COMMANDS = {
    "approvals list": (AGENT, OTHER_AGENT, USER, IDS[0][:8], "alike", "ends", RESOURCE, REASON),
    "lease list": (AGENT, OTHER_AGENT, USER, IDS[0][:8], IDS[1][:10], "ends", "active", TARGET, RESOURCE),
    "inventory": (AGENT, OTHER_AGENT, SPONSOR, "orphan", "standing", TARGET, "(unused)", "by leave of"),
    "task list": (AGENT, USER, IDS[0][:8], IDS[2][:10], "active", "ends", RESOURCE, REASON),
    f"audit who --target {TARGET}": (
        AGENT,
        USER,
        SPONSOR,
        IDS[0][:8],
        RESOURCE,
        "until",
        "allowed",
        "denied",
    ),
    f"audit trace {IDS[1]}": (AGENT, USER, SPONSOR, IDS[0][:8], IDS[1][:10], IDS[2][:10], RESOURCE, REASON),
}
"""Commands, and what nobody can decide without."""
WIDTHS = (80, 120, 160)


def _run_all() -> None:
    Sponsor.connect = lambda *_: _Sponsor()  # type: ignore[assignment, method-assign]
    ReadApi.__init__ = lambda *_: None  # type: ignore[method-assign]
    for name in ("__aenter__", "__aexit__", "get"):
        setattr(ReadApi, name, getattr(_Api, name))
    for width in WIDTHS:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
        for command in COMMANDS:
            for wide in ("", " --wide"):
                print(f"## {width} {command}{wide}", flush=True)
                main([*command.split(), *wide.split()])


if __name__ == "__main__":
    _run_all()
