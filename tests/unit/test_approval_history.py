"""Audit's answers on how people answered an agent's requests before: what counts, for whom, and how much is told."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import httpx
import orjson
import pytest

from ringfence.audit.api import MAX_AGENTS, ApprovalHistoryApi, AuditApi
from ringfence.audit.index import store
from ringfence.audit.index.store import SqliteIndex
from ringfence.client.errors import ApiError
from ringfence.client.reports.read_api import ReadApi
from ringfence.client.settings import ClientSettings
from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.http import application
from ringfence.messages.topics import AUDIT
from ringfence.model.records.api_access import Authenticator
from tests.support.audit_fixtures import TD, AuditFixtures

WRITE, READ = "staging:write:env/a", "staging:read:env/a"
_numbers = itertools.count(1)


def event(code: str, agent: str, request: str | None, *privileges: str, **fields: Any) -> dict[str, Any]:
    """An event as audit writes it, as far as the index reads it."""
    number = next(_numbers)
    return {
        "metadata": {"uid": f"e{number}", "event_code": code},
        "message": "so", "time": fields.pop("time", 1000 + number), "class_uid": 3003,
        "privileges": list(privileges),
        "unmapped": {
            "agent": agent, "request": request, "ttl_s": 300, "delivery": "agent",
            "verified": {"by": ["spiffe://test.example/user/sam"]}, **fields,
        },
    }  # fmt: skip


class Asked:
    """An index, and audit's API over it for one person."""

    def __init__(self, office: AuditFixtures, events: Sequence[dict[str, Any]], who: str) -> None:
        clock, index = SystemClock(), SqliteIndex(None)
        index.add(
            [
                Received(AUDIT, AUDIT.name(""), 0, number, one["time"], "k", orjson.dumps(one))
                for number, one in enumerate(events)
            ]
        )
        self.complete = True
        base = AuditApi(
            index, office.directory, clock, Authenticator(office.directory, "audit", clock), lambda: True
        )
        history = ApprovalHistoryApi(index, base.viewer, lambda: self.complete)
        self.api = ReadApi(office.key("user", who), ClientSettings(trust_domain=TD))
        self.api._http = httpx.AsyncClient(transport=httpx.ASGITransport(application(history.routes(), [])))

    @classmethod
    async def of(cls, *events: dict[str, Any], who: str = "sam") -> Asked:
        """After the records of the organisation were read."""
        office = AuditFixtures()
        await office.audit(*office.staff())
        return cls(office, events, who)

    async def __call__(self, *agents: str, since_ms: int = 0, without: tuple[str, ...] = ()) -> Any:
        return await self.api.approval_history(agents, since_ms=since_ms, without=without)


def answer(outcome: str, count: int, *privileges: str, ttl_s: int = 300, delivery: str = "agent") -> Any:
    return {
        "outcome": outcome, "privileges": list(privileges), "ttl_s": ttl_s, "delivery": delivery, "count": count,
    }  # fmt: skip


async def test_equal_answers_are_counted_and_others_stand_apart() -> None:
    asked = await Asked.of(
        *[event("approval.given", "deploy-bot", f"r{number}", WRITE) for number in range(3)],
        event("approval.denied", "deploy-bot", "r3", WRITE),
        event("grant.given", "deploy-bot", None, WRITE, ttl_s=60),
        event("approval.given", "deploy-bot", "r4", READ, WRITE, delivery="gateway"),
        event("credential.issued", "deploy-bot", "r4", WRITE),
        event("approval.given", "deploy-bot", "r5", WRITE, verified={}),
    )
    assert await asked("deploy-bot") == {
        "deploy-bot": [
            answer("approved", 1, READ, WRITE, delivery="gateway"),
            answer("approved", 1, WRITE, ttl_s=60),
            answer("denied", 1, WRITE),
            answer("approved", 3, WRITE),
        ]
    }
    assert (await asked("deploy-bot", without=("r0", "r3", "r4")))["deploy-bot"] == [
        answer("approved", 1, WRITE, ttl_s=60),
        answer("approved", 2, WRITE),
    ]


async def test_old_answers_count_however_many_events_came_since(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are found by an index: searches of events look at the latest ones alone."""
    monkeypatch.setattr(store, "_MAX_SCANNED", 2)
    old = event("approval.given", "deploy-bot", "r0", WRITE, time=10)
    asked = await Asked.of(old, *[event("credential.issued", "deploy-bot", "r1", WRITE) for _ in range(9)])
    assert (await asked("deploy-bot", since_ms=10))["deploy-bot"] == [answer("approved", 1, WRITE)]
    assert (await asked("deploy-bot", since_ms=11))["deploy-bot"] == []


async def test_approval_history_hides_agents_of_others() -> None:
    events = [event("approval.given", agent, "r", WRITE) for agent in ("deploy-bot", "other-bot")]
    assert await (await Asked.of(*events))("deploy-bot", "other-bot") == {
        "deploy-bot": [answer("approved", 1, WRITE)],
        "other-bot": [],
    }
    assert len((await (await Asked.of(*events, who="olga"))("other-bot"))["other-bot"]) == 1


@pytest.mark.parametrize("agents", [[], [f"a{number}" for number in range(MAX_AGENTS + 1)]])
async def test_no_agent_or_too_many_are_refused(agents: list[str]) -> None:
    with pytest.raises(ApiError) as refused:
        await (await Asked.of())(*agents)
    assert refused.value.status == 400


async def test_an_index_that_is_not_complete_says_nothing() -> None:
    asked = await Asked.of(event("approval.given", "deploy-bot", "r", WRITE))
    asked.complete = False
    with pytest.raises(ApiError) as refused:
        await asked("deploy-bot")
    assert refused.value.status == 503
