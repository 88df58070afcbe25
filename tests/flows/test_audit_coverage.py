"""Coverage against running services: what it counts, for whom, and what is said where somebody is away."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from ringfence.kernel.crypto.jws import sign
from ringfence.messages.lease import Lease
from ringfence.messages.operations import ActionDecided
from ringfence.messages.topics import ACTION, LEASE
from tests.flows import test_cli
from tests.support.world import WITHIN_S, World
from tools.schemas.examples import EXAMPLES

organisation, shell = test_cli.organisation, test_cli.shell
ASK = ("--allow", "platform:read:env/staging/web", "--reason", "look")


async def covered(shell: Any, who: str, **numbers: Any) -> Any:
    """What coverage says to somebody, once it says this: the index follows the topics."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            found = await shell.json(who, "audit", "coverage")
            if all(found[name]["whole"] == number for name, number in numbers.items()):
                return found


async def test_coverage_counts_leases_that_trace_to_a_person(shell: Any, world: World) -> None:
    await world.known(world.operator, "audit", "policy")
    nothing = await shell.json("olga", "audit", "coverage")
    assert nothing["leases_traced"] == {"part": 0, "whole": 0, "percent": None}
    assert "none" in await shell("olga", "audit", "coverage")

    task = await organisation(shell)
    issued = await shell.json("bot", "request", "--task", task, *ASK)
    good = ActionDecided(
        action_id="a1", gateway="spiffe://test.example/service/gateway", agent_id="bot", lease_id=issued["lease_id"],
        task_id=task, target_id="platform", verb="read", resource="env/staging/web", allowed=True, access="read",
        method="GET", request_digest="ab" * 32, latency_us=1, at_ms=int(time.time() * 1000),
    )  # fmt: skip
    await world.send(ACTION, "bot", good.model_dump_json(exclude_none=True))
    found = await covered(shell, "olga", leases_traced=1, actions_traced=1)
    for share in ("leases_traced", "actions_traced", "leases_short_lived_and_task_bound", "agents_known"):
        assert found[share] == {"part": 1, "whole": 1, "percent": 100.0}, share
    assert found["agents_sponsored"] == {"part": 1, "whole": 1, "percent": 100.0}
    assert (found["standing_privileges"], found["not_traced"], found["gaps"]) == (0, [], [])

    # An issuer that is in other hands makes up a lease; a gateway in observe mode lets pass what has none.
    issuer = world.key("issuer")
    made_up = EXAMPLES[Lease].model_copy(
        update={
            "iss": issuer.id, "aud": world.td, "iat": int(time.time()), "jti": "made-up", "status": "active",
            "agent_id": "ghost", "sponsor": "otto", "on_behalf_of": "otto", "cause": None,
            "deadline": int(time.time()) + 50_000,
        }
    )  # fmt: skip
    assert isinstance(made_up, Lease)
    await world.send(LEASE, made_up.lease_id, sign(made_up, issuer))
    observed = good.model_copy(
        update={"action_id": "a2", "lease_id": None, "allowed": False, "observed": True}
    )
    await world.send(ACTION, "bot", observed.model_dump_json(exclude_none=True))
    found = await covered(shell, "olga", leases_traced=2, actions_traced=2)
    assert found["leases_traced"]["part"] == found["actions_traced"]["part"] == 1
    assert {one["code"] for one in found["not_traced"]} == {"decision_missing", "no_lease"}
    assert (found["standing_privileges"], found["standing"][0]["lease"]) == (1, made_up.lease_id)
    assert found["agents_unknown"] == ["ghost"]
    told = await shell("olga", "audit", "coverage")
    for part in (
        "50.0 %",
        "1 of 2",
        "no decision of policy",
        "it went by no lease",
        "ghost",
        made_up.lease_id,
    ):
        assert part in told, told
    assert "and 1 more" in await shell("olga", "audit", "coverage", "--show", "1")

    # Of all that each sees what concerns them: bot's sponsor, the human it was for, and nobody else.
    key = ("--new-key", str(shell.folder / "petra.json"))
    await shell("olga", "user", "add", "petra", "--name", "Petra", "--role", "sponsor", *key)
    sees = {who: await shell.json(who, "audit", "coverage") for who in ("sam", "maria", "petra")}
    assert {who: one["leases_traced"]["whole"] for who, one in sees.items()} == {
        "sam": 1,
        "maria": 1,
        "petra": 0,
    }
    assert {who: one["agents_sponsored"]["whole"] for who, one in sees.items()} == {
        "sam": 1,
        "maria": 0,
        "petra": 0,
    }
    assert (sees["petra"]["not_traced"], sees["petra"]["agents_unknown"]) == ([], [])

    before = await shell.json("olga", "audit", "coverage", "--since", "2d", "--until", "1d")
    assert before["leases_traced"]["whole"] == 0
    for wrong in (("--since", "1h", "--until", "2h"), ("--since", "yesterday"), ("--until", "2030-01-01")):
        await shell("olga", "audit", "coverage", *wrong, status=2)


async def test_coverage_names_services_that_do_not_answer(
    shell: Any, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.known(world.operator, "audit")
    monkeypatch.setenv("RINGFENCE_POLICY_URL", "http://127.0.0.1:1")
    found = await shell.json("olga", "audit", "coverage")
    assert found["agents_sponsored"] is None
    assert "RINGFENCE_POLICY_URL" in found["gaps"][0]
    assert "?" in await shell("olga", "audit", "coverage")
    monkeypatch.setenv("RINGFENCE_AUDIT_URL", "http://127.0.0.1:1")
    assert "RINGFENCE_AUDIT_URL" in await shell("olga", "audit", "coverage", status=1)


async def test_audit_shows_it_to_nobody_without_a_token(world: World) -> None:
    async with world.running("registry", "audit"):
        await world.known(world.operator, "audit")
        for what in ("leases", "actions"):
            for who in (None, world.party("user", "eve")):
                assert (await world.get("audit", f"/v1/coverage/{what}", who)).status_code == 401
            answer = await world.get("audit", f"/v1/coverage/{what}", world.operator, since_ms="x")
            assert answer.status_code == 400
