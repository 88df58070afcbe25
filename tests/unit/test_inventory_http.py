"""What the inventory's routes say where not all is known yet, or does not hold."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from ringfence.kernel.service.http import application
from ringfence.messages.base import Permission
from ringfence.model.identity.api_tokens import api_token
from ringfence.model.records.api_access import Authenticator
from ringfence.policy.agents.ceilings import CeilingCombinations
from ringfence.policy.api import inventory
from ringfence.policy.api import inventory as agents
from ringfence.policy.api.inventory import InventoryApi
from ringfence.rego.engine import CEILING
from ringfence.testing.parts import InProcessEngine
from tests.support.in_memory_registry import TD
from tests.unit.test_inventory import Book


class Desk(Book):
    """A book behind policy's HTTP."""

    def __init__(self) -> None:
        super().__init__()
        self.stale: str | None = None
        runtime: Any = SimpleNamespace(
            clock=self.clock, settings=SimpleNamespace(trust_domain=TD), key=self.issuer, event=self._publish
        )
        authenticator = Authenticator(self.ledger.directory, "policy", self.clock)
        self.ceilings = CeilingCombinations(
            runtime, self.ledger.directory, InProcessEngine(entry_point=CEILING)
        )
        api = InventoryApi(
            runtime, self.ledger.directory, authenticator, self.roster, lambda: self.stale, self.ceilings
        )
        self.app = application(api.routes(), [])

    async def _publish(self, *event: object, **fields: object) -> None:
        """What a finding says has tests of its own."""

    async def get(self, who: str, path: str = "/v1/inventory", **query: str) -> httpx.Response:
        token = api_token(self.ledger.key(who), "policy", now_ms=self.now_s * 1000)
        bearer = {"Authorization": f"Bearer {token}"}
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://policy") as client:
            return await client.get(path, params=query, headers=bearer)


@pytest.fixture
async def desk() -> Desk:
    desk = Desk()
    await desk.ceilings.check_marked()
    return desk


async def test_inventory_is_unavailable_before_the_tables_are_complete(desk: Desk):
    answer = await desk.get("olga")
    assert (answer.status_code, answer.json()["error"]) == (503, "unavailable")


async def test_agents_not_read_yet_are_reported_as_a_gap(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    desk.roster.complete = True
    desk.register("robot")
    monkeypatch.setattr(agents, "_SETTLED_AT_ONCE", 0)
    answer = (await desk.get("adam")).json()
    assert (answer["totals"]["agents"], answer["agents"]) == (0, [])
    assert answer["gaps"][0].endswith("as they are now: 2; ask again")
    monkeypatch.undo()
    answer = (await desk.get("adam")).json()
    assert (answer["totals"]["agents"], answer["gaps"]) == (2, [])


async def test_unverifiable_records_are_reported_to_auditors(desk: Desk):
    desk.roster.complete = True
    desk.stale = "the registry was not heard"
    entry = desk.ledger.directory.agent("bot")
    assert entry is not None
    made_up = entry.state.model_copy(update={"agent_id": "evil"})
    desk.ledger.admit(desk.ledger.sign_record(made_up, entry.record.commands))
    for who in ("olga", "sam"):
        answer = (await desk.get(who)).json()
        assert [agent["id"] for agent in answer["agents"]] == ["bot"]
        assert len(answer["gaps"]) == 2, answer["gaps"]
        assert answer["gaps"][0].endswith("left out: 1")
        assert "do not verify" in answer["gaps"][0]
        assert "the registry was not heard" in answer["gaps"][1]
    answer = (await desk.get("uma")).json()
    assert (answer["agents"], answer["gaps"]) == ([], [])


async def test_more_changes_than_can_be_told_are_begun_anew(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    desk.roster.complete = True
    cursor = (await desk.get("olga")).json()["cursor"]
    for number in range(3):
        desk.register(f"robot-{number}")
    told = (await desk.get("olga", "/v1/inventory/changes", after=cursor, agent="robot-1")).json()
    assert {agent["id"]: agent["fits"] for agent in told["agents"]} == {
        "robot-0": False, "robot-1": True, "robot-2": False,
    }  # fmt: skip
    monkeypatch.setattr(inventory, "MAX_ROWS", 2)
    answer = await desk.get("olga", "/v1/inventory/changes", after=cursor)
    assert (answer.status_code, answer.json()["error"]) == (400, "cursor_lost")


async def test_ceiling_with_a_forbidden_combination_is_listed_and_summed(desk: Desk):
    desk.roster.complete = True
    pair = Permission(target="platform", verbs=("push", "merge"), resources=("web",))
    desk.register("robot", ceiling=(pair,))
    await desk.ceilings.check_marked()
    answer = (await desk.get("adam")).json()
    combinations = {agent["id"]: agent["combinations"] for agent in answer["agents"]}
    assert combinations["bot"] == []
    assert combinations["robot"][0].endswith("; it allows push, and merge")
    assert answer["totals"]["with_combination"] == 1
    assert (await desk.get("adam", agent="bot")).json()["totals"]["with_combination"] == 0


async def test_ceilings_that_were_not_checked_are_a_gap():
    unchecked = Desk()
    unchecked.roster.complete = True
    answer = (await unchecked.get("adam")).json()
    assert answer["gaps"] == ["which ceilings allow a forbidden combination: they are still being checked"]
    assert (await unchecked.get("uma")).json()["gaps"] == []
