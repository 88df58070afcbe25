"""The inventory against running services: who sees what, what changes it, and what is said where somebody is away."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ringfence.client.errors import ApiError
from ringfence.client.reports.access_report import read_inventory
from ringfence.client.reports.read_api import ReadApi
from ringfence.client.settings import ClientSettings
from ringfence.kernel.crypto.jws import parse
from ringfence.messages.operations import ServiceEvent
from ringfence.messages.registry import AgentSuspend, UserDisable
from ringfence.messages.topics import SERVICE_EVENT
from tests.flows import test_cli
from tests.support.world import DAY_S, WITHIN_S, Party, World, scope

Shell, organisation, shell = test_cli.Shell, test_cli.organisation, test_cli.shell
ENV = scope("platform", ("read", "deploy"), ("env/**",))


class Staff:
    """sam has two agents, suzy one; adam is an auditor, uma has no role."""

    def __init__(self, world: World, *people: Party) -> None:
        self.world = world
        self.sam, self.suzy, self.adam, self.uma = people

    async def ask(self, who: Party | None, path: str = "/v1/inventory", **query: str) -> Any:
        answer = await self.world.get("policy", path, who, **query)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def ids(self, who: Party, **query: str) -> list[str]:
        return [agent["id"] for agent in (await self.ask(who, **query))["agents"]]

    async def until(self, who: Party, agent: str, **state: Any) -> Any:
        """What the inventory says of an agent, once it says this."""
        async with asyncio.timeout(WITHIN_S):
            while True:
                answer = await self.world.get("policy", "/v1/inventory", who, agent=agent)
                for row in answer.json().get("agents", ()):  # none while policy has not heard of who asks
                    if all(row[name] == value for name, value in state.items()):
                        return row
                await asyncio.sleep(0.05)


@pytest.fixture
async def staff(world: World) -> AsyncIterator[Staff]:
    async with world.running("registry", "policy"):
        people = [
            await world.user("sam", ("sponsor",), ENV),
            await world.user("suzy", ("sponsor",)),
            await world.user("adam", ("auditor",)),
            await world.user("uma"),
        ]
        staff = Staff(world, *people)
        await world.target("platform")
        soon = world.party("agent", "robot").key.record(int(time.time()) + 3 * DAY_S)
        await world.agent("bot", staff.sam, ENV)
        await world.agent("idle", staff.sam)
        await world.agent("robot", staff.suzy, ENV, keys=(soon,))
        for agent in ("bot", "idle", "robot"):
            await staff.until(staff.adam, agent)
        async with asyncio.timeout(WITHIN_S):
            while (await staff.ask(staff.adam))["gaps"]:  # until the registry's heartbeat was heard
                await asyncio.sleep(0.05)
        yield staff


async def test_ceiling_with_a_forbidden_combination_is_listed_and_a_finding(staff: Staff) -> None:
    """By the bundle in a worker process, as policy runs it."""
    pair = scope("platform", ("push", "merge"), ("web",))
    await staff.world.agent("both", staff.sam, pair)
    async with asyncio.timeout(WITHIN_S):
        while not (await staff.until(staff.adam, "both"))["combinations"]:
            await asyncio.sleep(0.05)
    record = await staff.world.consume_until(
        SERVICE_EVENT, lambda record: "ceiling_combination" in str(parse(record.value).payload)
    )
    found = parse(record.value).unverified_claims(ServiceEvent)
    assert (found.kind, found.agent_id) == ("finding", "both")
    assert (await staff.ask(staff.adam))["totals"]["with_combination"] == 1


# --- who sees what ----------------------------------------------------------------------------------------------------


async def test_sponsors_see_their_own_operators_and_auditors_all_and_others_none(staff: Staff) -> None:
    world = staff.world
    for who in (world.operator, staff.adam):
        assert await staff.ids(who) == ["bot", "idle", "robot"]
        assert (await staff.ask(who))["totals"]["agents"] == 3
    assert await staff.ids(staff.sam) == ["bot", "idle"]
    assert await staff.ids(staff.suzy) == ["robot"]
    nothing = await staff.ask(staff.uma)
    assert (nothing["agents"], set(nothing["totals"].values()), nothing["gaps"]) == ([], {0}, [])
    # Naming somebody else's agent, or its sponsor, shows no more, neither in rows nor in sums.
    for query in ({"agent": "robot"}, {"sponsor": "suzy"}):
        answer = await staff.ask(staff.sam, **query)
        assert (answer["agents"], answer["totals"]["agents"]) == ([], 0)
    start = await staff.ask(staff.sam)
    suspend = world.claims(AgentSuspend, staff.suzy, agent_id="robot", reason="x")
    await world.accepted(suspend, staff.suzy)
    await staff.until(staff.suzy, "robot", status="suspended")
    changes = "/v1/inventory/changes"
    assert (await staff.ask(staff.sam, changes, after=start["cursor"]))["agents"] == []
    (told,) = (await staff.ask(staff.suzy, changes, after=start["cursor"]))["agents"]
    assert (told["id"], told["status"]) == ("robot", "suspended")


async def test_strangers_are_turned_away(staff: Staff) -> None:
    world = staff.world
    for who in (None, world.party("user", "eve"), world.party("user", "sam")):
        for path in ("/v1/inventory", "/v1/inventory/changes"):
            assert (await world.get("policy", path, who)).status_code == 401
    for query in ({"limit": "5001"}, {"limit": "x"}, {"keys_within_s": "-1"}):
        assert (await world.get("policy", "/v1/inventory", staff.adam, **query)).status_code == 400
    for after in ("", "other.1"):
        answer = await world.get("policy", "/v1/inventory/changes", staff.adam, after=after)
        assert answer.status_code == 400


# --- what it shows ----------------------------------------------------------------------------------------------------


async def test_agents_are_found_by_what_is_amiss(staff: Staff) -> None:
    world = staff.world
    assert await staff.ids(staff.adam, keys_ending="1") == ["robot"]
    assert await staff.ids(staff.adam, keys_ending="1", keys_within_s="3600") == []
    assert await staff.ids(staff.adam, unused="1") == ["bot", "robot"]
    assert await staff.ids(staff.adam, target="platform") == ["bot", "robot"]
    assert await staff.ids(staff.adam, orphans="1") == []
    disable = world.claims(UserDisable, world.operator, user_id="suzy", reason="left")
    await world.accepted(disable, world.operator)
    row = await staff.until(staff.adam, "robot", orphan=True)
    assert (row["sponsor"], row["sponsor_is"]) == ("suzy", "disabled")
    assert await staff.ids(staff.adam, orphans="1") == ["robot"]
    totals = (await staff.ask(staff.adam))["totals"]
    assert (totals["agents"], totals["live_sponsor"], totals["orphans"], totals["keys_ending"]) == (
        3,
        2,
        1,
        1,
    )


async def test_inventory_pages_are_complete(staff: Staff) -> None:
    found, after = [], ""
    while True:
        page = await staff.ask(staff.adam, limit="1", **({"after": after} if after else {}))
        assert ("totals" in page) == (not after)
        found += [agent["id"] for agent in page["agents"]]
        if page["after"] is None:
            break
        after = page["after"]
    assert found == ["bot", "idle", "robot"]


async def test_another_policy_says_the_same_from_kafka_alone(staff: Staff) -> None:
    world = staff.world
    task = await world.task(world.party("agent", "bot"), staff.sam, ENV)
    before = await staff.until(staff.adam, "bot", running_tasks=1)
    async with world.running("policy"):
        after = await staff.until(staff.adam, "bot", running_tasks=1)
        assert (after, after["tasks"][0]["id"]) == (before, task)
        (old_cursor,) = {(await staff.ask(staff.adam))["cursor"].partition(".")[0]}
        assert old_cursor != "", "a table built anew has cursors of its own"


# --- where somebody is away -------------------------------------------------------------------------------------------


def settings(world: World, **changes: str) -> ClientSettings:
    """Of a client of this world."""
    shared = world.settings("registry")
    names = ("kafka", "topic_prefix", "trust_domain", "trust_root", "embedded_broker")
    fields: dict[str, Any] = {name: getattr(shared, name) for name in names}
    fields |= {f"{role}_url": f"http://127.0.0.1:{port}" for role, port in world.ports.items()}
    return ClientSettings(**{**fields, **changes})


async def test_a_revoker_that_is_away_is_a_gap_and_no_zero(staff: Staff) -> None:
    away = settings(staff.world, revoker_url="http://127.0.0.1:1")
    async with ReadApi(staff.adam.key, away) as api:
        found = await read_inventory(api)
        (gap,) = found.gaps
        assert "RINGFENCE_REVOKER_URL" in gap
        assert found.totals["overdue_leases"] is None
        assert [agent["id"] for agent in found.agents] == ["bot", "idle", "robot"]
        assert all("overdue_leases" not in agent for agent in found.agents)
        assert (len((await read_inventory(api, 2)).agents), (await read_inventory(api, 2)).more) == (2, 1)


async def test_without_policy_there_is_no_inventory_and_that_is_said(staff: Staff) -> None:
    away = settings(staff.world, policy_url="http://127.0.0.1:1")
    async with ReadApi(staff.adam.key, away) as api:
        with pytest.raises(ApiError, match="RINGFENCE_POLICY_URL"):
            await read_inventory(api)


async def test_records_that_nobody_confirms_any_more_are_said_to_be_old(world: World) -> None:
    async with world.running("policy", grace_s=1.0):
        async with world.running("registry"):
            await world.user("sam", ("sponsor",))
        async with asyncio.timeout(WITHIN_S):
            while not (
                gaps := (await world.get("policy", "/v1/inventory", world.operator)).json().get("gaps")
            ):
                await asyncio.sleep(0.05)
        assert "may be behind" in gaps[0]


# --- by the command line ----------------------------------------------------------------------------------------------


async def test_the_command_says_the_sums_first_and_then_the_agents(shell: Any) -> None:
    task = await organisation(shell)
    ask = ("request", "--task", task, "--allow", "platform:read:env/staging/web", "--reason", "look")
    await shell("bot", *ask)
    found = await shell.json("sam", "inventory")
    (agent,) = found["agents"]
    assert (agent["leases"], agent["running_tasks"], agent["orphan"], agent["overdue_leases"]) == (
        1,
        1,
        False,
        0,
    )
    assert agent["ceiling_by"]["by"].endswith("/user/sam")
    assert agent["last_seen_ms"] == agent["keys"][0]["last_seen_ms"] > 0
    assert found["gaps"] == []
    async with asyncio.timeout(WITHIN_S):
        while (used := (await shell.json("sam", "inventory"))["totals"]["used"]) == 0:
            pass
    assert used == 1
    lines = (await shell("sam", "inventory")).splitlines()
    assert lines[0].startswith("1 agent: 1 with a live sponsor, 0 orphans; 0 not taken on yet, 0 suspended")
    assert lines[2].startswith("now: 1 running task, 1 live lease, 0 of them standing; 0 revoked")
    assert lines[3] == "in 30 days: 1 of 2 granted verbs used, 0 agents not seen"
    table = "\n".join(lines[4:])
    assert "platform: deploy (unused), read" in table
    assert "--limit lists more" in await shell("sam", "inventory", "--limit", "0")
    assert "no such agent that you may see" in await shell("maria", "inventory")
    assert "no such agent that you may see" in await shell("olga", "inventory", "--orphans")
    assert "no such agent that you may see" in await shell("olga", "inventory", "--status", "suspended")
    assert "1 agent:" in await shell("olga", "inventory", "--status", "active")
    assert "draws on a terminal" in await shell("sam", "inventory", "--watch", status=2)


async def test_a_watch_prints_a_line_for_each_agent_that_changes(shell: Any) -> None:
    await organisation(shell)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "ringfence.cli.main", "--identity", str(shell.folder / "olga.json"), "--json",
        "inventory", "--watch", "--every", "1s", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        limit=2**20,
    )  # fmt: skip
    assert process.stdout is not None
    try:

        async def until(status: str) -> None:
            assert process.stdout is not None
            async with asyncio.timeout(WITHIN_S):
                while line := await process.stdout.readline():
                    told = json.loads(line)
                    if "agent" in told and (told["agent"]["id"], told["agent"]["status"]) == ("bot", status):
                        return
            raise AssertionError(f"it ended: {await process.stderr.read()!r}")  # type: ignore[union-attr]

        await until("active")
        await shell("sam", "agent", "suspend", "bot", "--reason", "x")
        await until("suspended")
        await shell("sam", "agent", "resume", "bot", "--reason", "x")
        await until("active")
    finally:
        process.terminate()
        await process.wait()
