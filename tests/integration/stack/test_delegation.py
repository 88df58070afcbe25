"""An agent hands part of its task to another, on the running stack: the story by the SDK, and how it ends."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from ringfence import Agent
from ringfence.client.errors import ApiError, RefusedError, RequestDeniedError, TokenRejectedError
from ringfence.client.reports.read_api import ReadApi
from ringfence.client.resource_server.verifier import TokenVerifier
from ringfence.messages.topics import AUDIT, LEASE
from tests.support.stack import WITHIN_S, RunningStack, first_pending


class Crew:
    """The realm's agent, and one of sue's that it hands parts of its task to."""

    def __init__(self, realm: RunningStack) -> None:
        self.realm = realm
        self.below = f"below-{realm.mark}"
        self.part = ""

    async def make(self) -> Crew:
        realm = self.realm
        async with realm.as_operator() as olga:
            await olga.set_user(
                realm.name("sue"), name="Sue", roles=["sponsor"], keys=[realm.key("user", realm.name("sue"))]
            )
        async with realm.administrator("sue") as sue:
            await sue.register_agent(
                self.below, description="migrates", keys=[realm.key("agent", self.below)],
                ceiling=[realm.permission(["read", "write"], "env/**")],
            )  # fmt: skip
        async with realm.as_agent() as agent:
            self.part = await agent.delegate(
                task=realm.task,
                to=self.below,
                purpose="migrate the database",
                scope=[realm.permission(["read", "write"], "env/staging/*")],
                ends_in_s=1800,
            )
        return self

    def as_below(self) -> Agent:
        return Agent.connect(self.realm.key("agent", self.below), self.realm.settings)

    def asked(self, agent: Agent, *verbs: str, resource: str = "env/staging/web") -> Any:
        return agent.request(
            task=self.part, target=self.realm.target, verbs=verbs, resources=[resource], reason="to migrate",
            timeout_s=WITHIN_S,
        )  # fmt: skip

    def verifier(self) -> TokenVerifier:
        realm = self.realm
        key = realm.key("target", realm.target)
        audience = f"spiffe://{realm.settings.trust_domain}/target/{realm.target}"
        return TokenVerifier(realm.settings.issuer_url, audience, introspection_key=key)


async def test_the_sponsor_of_who_asks_approves_and_everybody_is_named(realm: RunningStack) -> None:
    crew = await Crew(realm).make()
    async with crew.as_below() as below, realm.sponsor("sue") as sue, crew.verifier() as server:
        waiting = asyncio.create_task(crew.asked(below, "write"))
        pending = await first_pending(sue)
        assert (pending.agent, pending.delegators) == (crew.below, (realm.agent,))
        assert (pending.on_behalf_of, pending.purpose) == (realm.name("maria"), "migrate the database")
        await sue.approve(pending)
        token = await server.verify((await waiting).value)
    assert [actor.rpartition("/")[2] for actor in token.act] == [crew.below, realm.agent]
    assert token.agent.endswith(crew.below)
    assert token.on_behalf_of.endswith(realm.name("maria"))


async def test_the_end_of_the_task_ends_what_was_handed_on(realm: RunningStack) -> None:
    crew = await Crew(realm).make()
    async with crew.as_below() as below, realm.seen(LEASE, AUDIT) as seen, crew.verifier() as server:
        credential = await crew.asked(below, "read")
        await server.verify(credential.value)
        async with realm.administrator("maria") as maria:
            await maria.end_task(realm.task, reason="done")
        end = await realm.end_of(below, seen, credential.lease_id)
        assert (end.status, end.cause and end.cause.kind) == ("revoked", "task_ended")
        with pytest.raises(TokenRejectedError):
            await server.verify(credential.value)
        reasons = await realm.denial(below, seen, lambda: crew.asked(below, "read"))
        (reason,) = {(one.code, one.message) for one in reasons}
        assert reason[0] == "task_ended"
        assert realm.task in reason[1]


async def test_delegating_agent_ends_its_delegation(realm: RunningStack) -> None:
    crew = await Crew(realm).make()
    async with crew.as_below() as below, realm.as_agent() as agent, realm.seen(LEASE) as seen:
        credential, own = await crew.asked(below, "read"), await realm.read(agent)
        await agent.end_delegated(crew.part, reason="not needed any more")
        end = await realm.end_of(below, seen, credential.lease_id)
        assert end.cause is not None
        assert end.cause.kind == "task_ended"
        assert {lease.status for lease in realm.leases(agent, seen, own.lease_id)} == {"active"}
        with pytest.raises(RefusedError) as refused:
            await below.end_delegated(realm.task, reason="mine now")
        assert refused.value.code == "not_entitled"


async def test_request_beyond_delegation_or_ceiling_is_denied_by_name(realm: RunningStack) -> None:
    """The ceiling of who handed it on, the task, and the part: each is told by name."""
    crew = await Crew(realm).make()
    async with realm.administrator("sam") as sam:
        await sam.set_ceiling(realm.agent, [realm.permission(["read"], "env/staging/api")])
    async with crew.as_below() as below, realm.seen(LEASE) as seen:
        reasons = await realm.denial(
            below, seen, lambda: crew.asked(below, "read", resource="env/staging/web")
        )
        assert {one.side for one in reasons} == {f"ceiling:{realm.agent}"}
        with pytest.raises(RequestDeniedError) as denied:
            await crew.asked(below, "read", resource="env/prod/web")
        assert {one.side for one in denied.value.reasons} == {"task", f"ceiling:{realm.agent}"}
        await crew.asked(below, "read", resource="env/staging/api")


async def test_invalid_delegation_call_is_refused_with_its_code(realm: RunningStack) -> None:
    crew = await Crew(realm).make()
    wide, narrow = realm.permission(["read"], "**"), realm.permission(["read"], "env/staging/*")
    async with realm.as_agent() as agent, crew.as_below() as below:
        for who, call, code in (
            (agent, {"to": crew.below, "scope": [wide]}, "beyond_parent"),
            (agent, {"to": crew.below, "scope": [narrow], "ends_in_s": 7200}, "later_than_parent"),
            (agent, {"to": realm.agent, "scope": [narrow]}, "delegation_loop"),
            (below, {"to": crew.below, "scope": [narrow]}, "not_task_agent"),
            (agent, {"to": "nobody-at-all", "scope": [narrow]}, "unknown_agent"),
        ):
            wish: dict[str, Any] = {"task": realm.task, "purpose": "x", "ends_in_s": 60, **call}
            with pytest.raises(RefusedError) as refused:
                await who.delegate(**wish)
            assert refused.value.code == code


async def test_the_trail_leads_through_the_chain_to_the_human(realm: RunningStack) -> None:
    crew = await Crew(realm).make()
    async with crew.as_below() as below:
        credential = await crew.asked(below, "read")
    for who, id in (("sam", realm.task), ("sue", credential.lease_id), ("maria", crew.part)):
        async with ReadApi(realm.key("user", realm.name(who)), realm.settings) as api:
            maria = await trail(api, id, "credential issued")
        assert maria["id"] == realm.name("maria")
        (task,) = [node for node in maria["children"] if node["kind"] == "task"]
        (part,) = [node for node in task["children"] if node["kind"] == "task"]
        assert (task["id"], part["id"]) == (realm.task, crew.part)
        assert f"handed on by {realm.agent}" in part["title"]
        assert credential.lease_id in json.dumps(part)


async def trail(api: ReadApi, id: str, word: str) -> dict[str, Any]:
    """The one root of the trail of something, once a word is in it."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            try:
                story = await api.get("audit", "trace", id)
            except ApiError as error:
                if error.status != 404:
                    raise
            else:
                if word in json.dumps(story):
                    (root,) = story["roots"]
                    found: dict[str, Any] = root
                    return found
            await asyncio.sleep(0.05)
