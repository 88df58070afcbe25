"""AuthZEN: a target's resource server asks policy."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from ringfence.messages.registry import AgentRotateKey, AgentSuspend, VerbFloor
from ringfence.policy.decisions.evaluator import RequestEvaluator
from tests.support.http_client import plain_client
from tests.support.world import WITHIN_S, Party, World, scope


class Desk:
    """deploy-bot may read and deploy all of platform; maria, whose task it has, may only deploy to staging."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.server: Party
        self.task = ""

    @classmethod
    async def open(cls, world: World) -> Desk:
        desk = cls(world)
        everything = scope("platform", ["read", "deploy", "wipe"], ["**"])
        staging = scope("platform", ["read", "deploy", "wipe"], ["env/staging/**"])
        sam = await world.user("sam", roles=("sponsor",))
        maria = await world.user("maria", entitlements=staging)
        verbs = (VerbFloor(verb="read"), VerbFloor(verb="deploy"), VerbFloor(verb="wipe", floor="operator"))
        desk.server = await world.target("platform", verbs=verbs)
        bot = await world.agent("deploy-bot", sponsor=sam, ceiling=everything)
        desk.task = await world.task(bot, by=maria, scope=everything)
        await desk.read()
        return desk

    async def read(self) -> None:
        """Return when policy has read all records that there are: nobody unknown may ask."""
        assert await self.world.runtimes["policy"].tables_caught_up(WITHIN_S)

    def question(self, **parts: Any) -> dict[str, Any]:
        return {
            "subject": {"type": "agent", "id": "deploy-bot"},
            "action": {"name": "read"},
            "resource": {"type": "platform", "id": "env/staging/web"},
            "context": {"task_id": self.task},
            **parts,
        }

    async def post(
        self, path: str, body: Any, who: Party | None = None, headers: dict[str, str] | None = None
    ) -> httpx.Response:
        url = f"http://127.0.0.1:{self.world.ports['policy']}/access/v1/{path}"
        async with plain_client(timeout=WITHIN_S, trust_env=False) as http:
            bearer = self.world.bearer(who or self.server, "policy")
            return await http.post(url, json=body, headers={**bearer, **(headers or {})})

    async def ask(self, **parts: Any) -> dict[str, Any]:
        response = await self.post("evaluation", self.question(**parts))
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found

    async def codes(self, **parts: Any) -> list[str]:
        """Of a no."""
        answer = await self.ask(**parts)
        assert answer["decision"] is False
        return [reason["code"] for reason in answer["context"]["reasons"]]


async def test_one_question(world: World):
    async with world.running("registry", "policy"):
        desk = await Desk.open(world)
        yes = await desk.ask()
        assert (yes["decision"], yes["context"]["outcome"]) == (True, "allowed")
        assert yes["context"]["policy_revision"]

        production = {"type": "platform", "id": "env/production/web"}
        no = await desk.ask(resource=production)
        assert no["decision"] is False
        assert [(r["code"], r["side"]) for r in no["context"]["reasons"]] == [
            ("beyond_scope", "entitlements:maria")
        ]
        assert await desk.codes(action={"name": "fly"}) != []
        assert await desk.codes(subject={"type": "agent", "id": "nobody"}) == ["agent_unknown"]
        assert await desk.codes(subject={"type": "agent", "id": "x/../deploy-bot"}) == ["agent_unknown"]
        assert await desk.codes(context={"task_id": "11111111-1111-4111-8111-111111111111"}) == [
            "task_unknown"
        ]

        # What takes a person is no yes, whoever has approved what the agent holds.
        waits = await desk.ask(action={"name": "wipe"})
        assert waits["decision"] is False
        assert (waits["context"]["outcome"], waits["context"]["approvals"]) == (
            "approval_required", ["operator"],
        )  # fmt: skip

        suspend = world.claims(AgentSuspend, world.operator, agent_id="deploy-bot", reason="enough")
        await world.accepted(suspend, world.operator)
        await desk.read()
        assert "agent_suspended" in await desk.codes()


async def test_a_question_about_an_agent_that_once_lost_a_key(world: World):
    """Nobody signs a question: which keys are in other hands says nothing about it."""
    async with world.running("registry", "policy"):
        desk = await Desk.open(world)
        key = world.party("agent", "deploy-bot").key_record()
        lost = world.claims(
            AgentRotateKey,
            world.operator,
            agent_id="deploy-bot",
            key=key,
            compromised=True,
            reason="in a log",
        )
        await world.accepted(lost, world.operator)
        await desk.read()
        assert (await desk.ask())["decision"] is True


async def test_many_questions(world: World):
    async with world.running("registry", "policy"):
        desk = await Desk.open(world)
        staging, production = (
            {"resource": {"type": "platform", "id": f"env/{where}/web"}}
            for where in ("staging", "production")
        )

        async def decisions(*questions: dict[str, Any], semantic: str | None = None) -> list[bool]:
            body = {**desk.question(), "evaluations": list(questions)}
            if semantic:
                body["options"] = {"evaluations_semantic": semantic}
            response = await desk.post("evaluations", body)
            assert response.status_code == 200, response.text
            return [answer["decision"] for answer in response.json()["evaluations"]]

        three = (staging, production, staging)
        assert await decisions(*three) == [True, False, True]
        assert await decisions(*three, semantic="execute_all") == [True, False, True]
        assert await decisions(*three, semantic="deny_on_first_deny") == [True, False]
        assert await decisions(*three, semantic="permit_on_first_permit") == [True]
        # What stands beside the questions is for those that do not say it themselves.
        assert await decisions({}, {"action": {"name": "wipe"}}) == [True, False]
        single = await desk.post("evaluations", desk.question())
        assert single.json()["decision"] is True

        # What is wrong with one is its own answer, and a denial like any other where the first one ends it.
        elsewhere = {"resource": {"type": "database", "id": "x"}}
        wrong: dict[str, Any] = {"action": {}}
        body = {**desk.question(), "evaluations": [staging, wrong, elsewhere, staging]}
        answers = (await desk.post("evaluations", body)).json()["evaluations"]
        assert [answer["decision"] for answer in answers] == [True, False, False, True]
        assert [answers[n]["context"]["error"]["status"] for n in (1, 2)] == [400, 403]
        assert await decisions(staging, wrong, staging, semantic="deny_on_first_deny") == [True, False]
        assert await decisions(wrong, staging, staging, semantic="permit_on_first_permit") == [False, True]


async def test_authzen_callers_and_questions_are_checked(world: World):
    async with world.running("registry", "policy"):
        desk = await Desk.open(world)
        other = await world.target("database")
        await desk.read()
        good = desk.question()
        assert (await desk.post("evaluation", good, other)).status_code == 403
        assert (await desk.post("evaluation", good, world.operator)).status_code == 401
        async with plain_client(timeout=WITHIN_S, trust_env=False) as http:
            url = f"http://127.0.0.1:{world.ports['policy']}/access/v1/evaluation"
            assert (await http.post(url, json=good)).status_code == 401

        bad: list[Any] = [
            [], {}, {**good, "subject": {"type": "user", "id": "maria"}}, {**good, "context": {}},
            {**good, "action": {}}, {**good, "resource": {"type": "platform"}},
            {**good, "action": {"name": ""}},
        ]  # fmt: skip
        for body in bad:
            assert (await desk.post("evaluation", body)).status_code == 400, body
        too_long = {**good, "padding": "x" * 70_000}
        assert (await desk.post("evaluation", too_long)).status_code == 413
        async with plain_client(timeout=WITHIN_S, trust_env=False) as http:
            for type, status in (
                ("text/plain", 400), ("", 400), ("application/json; charset=utf-8", 200),
            ):  # fmt: skip
                headers = {**world.bearer(desk.server, "policy"), "Content-Type": type}
                answered = await http.post(url, content=json.dumps(good), headers=headers)
                assert answered.status_code == status, type
            text = json.dumps(good)
            for body in (
                text.replace('{"name": "read"}', '{"name": "read", "name": "wipe"}'),
                text.replace('"deploy-bot"', r'"deploy-\ud800"'), "[" * 30_000, text[:-1], "null",
            ):  # fmt: skip
                assert body != text
                headers = {**world.bearer(desk.server, "policy"), "Content-Type": "application/json"}
                assert (await http.post(url, content=body, headers=headers)).status_code == 400, body[:200]
        # What nobody here knows is passed over.
        unknown = {**good, "evaluations": [], "later": 1, "options": {"another_option": "value"}}
        assert (await desk.post("evaluations", unknown)).json()["decision"] is True
        too_many = {**good, "evaluations": [{}] * 65}
        assert (await desk.post("evaluations", too_many)).status_code == 400
        unknown = {**good, "evaluations": [{}], "options": {"evaluations_semantic": "toss_a_coin"}}
        assert (await desk.post("evaluations", unknown)).status_code == 400
        named = {"X-Request-ID": "r-1"}
        for path, body, status in (
            ("evaluation", good, 200),
            ("evaluation", {}, 400),
            ("evaluations", [], 400),
        ):
            answered = await desk.post(path, body, headers=named)
            assert (answered.status_code, answered.headers["X-Request-ID"]) == (status, "r-1")
        refused = await desk.post("evaluation", good, other, named)
        assert (refused.status_code, refused.headers["X-Request-ID"]) == (403, "r-1")
        assert "platform" not in refused.text
        assert "X-Request-ID" not in (await desk.post("evaluation", good)).headers


async def test_internal_error_is_500_with_the_request_id(world: World, monkeypatch: pytest.MonkeyPatch):
    async def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a secret of the inside")

    async with world.running("registry", "policy"):
        desk = await Desk.open(world)
        monkeypatch.setattr(RequestEvaluator, "evaluate", broken)
        for path in ("evaluation", "evaluations"):
            question = desk.question(evaluations=[{}])
            answered = await desk.post(path, question, headers={"X-Request-ID": "r-2"})
            assert (answered.status_code, answered.headers["X-Request-ID"]) == (500, "r-2")
            assert "secret" not in answered.text


async def test_authzen_discovery_names_the_endpoints(world: World):
    async with world.running("registry", "policy", policy_url="https://pdp.example.com/"):
        url = f"http://127.0.0.1:{world.ports['policy']}"
        async with plain_client(timeout=WITHIN_S, trust_env=False) as http:
            found = await http.get(f"{url}/.well-known/authzen-configuration")
            search = await http.post(f"{url}/access/v1/search/subject", json={})
        assert found.headers["content-type"] == "application/json"
        # What is not offered is not named.
        assert found.json() == {
            "policy_decision_point": "https://pdp.example.com",
            "access_evaluation_endpoint": "https://pdp.example.com/access/v1/evaluation",
            "access_evaluations_endpoint": "https://pdp.example.com/access/v1/evaluations",
        }
        assert search.status_code == 404
