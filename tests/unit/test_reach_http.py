"""Who could reach a target now: by which tasks, what stands in the way, and who is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from ringfence.kernel.base.ids import message_id
from ringfence.kernel.service.http import application
from ringfence.messages.base import Permission
from ringfence.messages.registry import AgentSuspend, VerbFloor
from ringfence.model.identity.api_tokens import api_token
from ringfence.model.records.api_access import Authenticator
from ringfence.policy.api import grants
from ringfence.policy.api.grants import ReachApi
from tests.support.in_memory_registry import TD
from tests.unit.test_inventory import Book

MAX_AGE_S = 10**6
MAY = Permission(target="platform", verbs=("read", "deploy"), resources=("env/staging/*",))
WANTED = Permission(target="platform", verbs=("read", "deploy"), resources=("env/**", "lab/**"))


class Desk(Book):
    """A book behind policy's HTTP."""

    def __init__(self) -> None:
        super().__init__()
        self.stale: str | None = None
        settings = SimpleNamespace(trust_domain=TD, entitlements_max_age_s=MAX_AGE_S)
        runtime: Any = SimpleNamespace(clock=self.clock, settings=settings)
        authenticator = Authenticator(self.ledger.directory, "policy", self.clock)
        api = ReachApi(runtime, self.ledger.directory, authenticator, self.roster, lambda: self.stale)
        self.app = application(api.routes(), [])
        self.roster.complete = True
        verbs = (VerbFloor(verb="read"), VerbFloor(verb="deploy", floor="sponsor"))
        self.ledger.give(self.ledger.target_set("olga", "platform", verbs=verbs))
        may = self.ledger.entitlements(MAY)
        self.ledger.give(self.ledger.user_set("olga", "sam", ["sponsor"], entitlements=may))

    def run(self, life_s: int = 3600) -> str:
        """The id of a new task of bot, for sam."""
        terms = self.ledger.terms("bot", scope=(WANTED,), not_after=self.now_s + life_s)
        claims = self.ledger.assign("sam", "bot", terms=terms)
        self.ledger.give(claims)
        return message_id(claims.iss, claims.jti)

    async def ask(self, who: str, **query: str) -> httpx.Response:
        token = api_token(self.ledger.key(who), "policy", now_ms=self.now_s * 1000)
        bearer = {"Authorization": f"Bearer {token}"}
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://policy") as client:
            return await client.get("/v1/reach", params={"target": "platform", **query}, headers=bearer)

    async def agents(self, who: str = "olga", **query: str) -> list[Any]:
        answer = await self.ask(who, **query)
        assert answer.status_code == 200, answer.text
        found: list[Any] = answer.json()["agents"]
        return found


@pytest.fixture
def desk() -> Desk:
    return Desk()


async def test_an_agent_without_a_task_could_with_one(desk: Desk):
    (bot,) = await desk.agents()
    assert (bot["id"], bot["sponsor"], bot["now"], bot["tasks"]) == ("bot", "sam", False, [])
    assert bot["ceiling"] == [{"target": "platform", "verbs": ["deploy", "read"], "resources": ["env/**"]}]
    assert bot["ceiling_by"]["by"].endswith("/olga")


async def test_a_task_counts_as_far_as_all_sides_allow(desk: Desk):
    task = desk.run()
    (bot,) = await desk.agents()
    (told,) = bot["tasks"]
    assert (told["id"], bot["now"], told["against"]) == (task, True, [])
    assert told["scope"] == [
        {"target": "platform", "verbs": ["deploy", "read"], "resources": ["env/staging/*"]}
    ]
    assert (told["on_behalf_of"], told["assigned_by"], told["entitlements_by"]) == ("sam", "sam", "test")
    assert told["approvals"] == ["sponsor"], "that is the floor of deploy"
    nothing = await desk.agents(resource="quite/else/where")
    assert nothing == []
    (narrow,) = await desk.agents(verb="read", resource="env/staging/web")
    assert narrow["ceiling"] == [{"target": "platform", "verbs": ["read"], "resources": ["env/staging/web"]}]


async def test_entitlements_past_their_age_let_nobody_reach_anything(desk: Desk):
    desk.ledger.task_max_s = MAX_AGE_S * 3  # a task that was assigned under another limit
    desk.run(life_s=MAX_AGE_S * 3)
    assert (await desk.agents())[0]["now"]
    desk.clock.ms += MAX_AGE_S * 2000
    (bot,) = await desk.agents()
    assert (bot["now"], bot["tasks"]) == (False, [])


async def test_reasons_against_an_agents_reach_are_listed(desk: Desk):
    desk.run()
    desk.ledger.give(desk.ledger.claims(AgentSuspend, "sam", agent_id="bot", reason="odd"))
    (bot,) = await desk.agents()
    (told,) = bot["tasks"]
    assert (bot["status"], bot["now"]) == ("suspended", False)
    assert any("suspended" in reason for reason in told["against"])


async def test_each_is_told_of_their_own(desk: Desk):
    desk.register("robot", sponsor="suzy")
    told = {who: [agent["id"] for agent in await desk.agents(who)] for who in ("olga", "sam", "suzy", "uma")}
    assert told == {"olga": ["bot", "robot"], "sam": ["bot"], "suzy": ["robot"], "uma": []}


async def test_pages_go_on_where_they_ended(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    for number in range(4):
        desk.register(f"robot-{number}")
    desk.register("writer", ceiling=(Permission(target="elsewhere", verbs=("read",), resources=("**",)),))
    whole = [agent["id"] for agent in await desk.agents()]
    assert whole == ["bot", "robot-0", "robot-1", "robot-2", "robot-3"]
    for name, most in (("_ROWS", 2), ("_LOOKED_AT", 1)):
        monkeypatch.setattr(grants, name, most)
        found: list[str] = []
        after: Any = ""
        while after is not None:
            answer = (await desk.ask("olga", after=after)).json()
            found += [agent["id"] for agent in answer["agents"]]
            after = answer["after"]
        assert found == whole, name


async def test_unknown_or_invalid_reach_is_reported(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    answer = (await desk.ask("olga", target="nowhere")).json()
    assert (answer["exists"], answer["agents"]) == (False, [])
    for query in ({"verb": "fly"}, {"resource": "a//b"}, {"target": ""}):
        refused = await desk.ask("olga", **query)
        assert (refused.status_code, refused.json()["error"]) == (400, "query_invalid"), query
    desk.stale = "the registry was not heard"
    assert "the registry was not heard" in (await desk.ask("olga")).json()["gaps"][0]
    assert (await desk.ask("uma")).json()["gaps"] == []
    desk.stale = None
    for _ in range(2):
        desk.run()
    monkeypatch.setattr(grants, "MAX_TASKS", 1)
    assert "2 running tasks: 1 were looked at" in (await desk.ask("olga")).json()["gaps"][0]
    desk.roster.complete = False
    assert (await desk.ask("olga")).status_code == 503
