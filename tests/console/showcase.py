"""An organisation in which something of everything happened, for pages to show: in tests, and in the pictures of docs.

pia, an operator who also sponsors agents, has a passkey. Everybody else has key files.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from ringfence.cli.commands.dev import client_settings
from ringfence.client.admin.administrator import Administrator
from ringfence.client.agent.agent import Agent
from ringfence.client.approvals.grants import Grantor
from ringfence.client.approvals.sponsor import Sponsor
from ringfence.dev.stack import Stack
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import Outbound
from ringfence.messages.approval import ActionRequest, ShownHeader
from ringfence.messages.base import Permission
from ringfence.messages.credential import Reason
from ringfence.messages.operations import ActionAnswered, ActionDecided, ModelUsage
from ringfence.messages.registry import BackendSettings, Role, VerbFloor
from ringfence.messages.topics import ACTION, APPROVAL_REQUEST
from ringfence.model.requests.facts import load_records
from tests.passkeys.browser import Person
from tests.passkeys.organisation import Organisation
from tests.support.sign_page import FROZEN
from tests.support.stack import RunningStack, first_pending

DAY_S: Final = 86_400
PRODUCTION: Final = "env/production/web"
AGENTS: Final = {
    "deploy-bot": ("ships builds of the shop", "sam"),
    "review-bot": ("reviews pull requests", "sam"),
    "report-bot": ("writes the weekly report", "sam"),
    "support-bot": ("answers customers", "leo"),
    "night-bot": ("cleans up at night", "sam"),
}
"""By id: what it does, and who registers it."""


class NamedRealm(RunningStack):
    """The one realm of a stack whose names are plain."""

    @property
    def target(self) -> str:
        return "shop"

    @property
    def agent(self) -> str:
        return "deploy-bot"

    def name(self, who: str) -> str:
        return who

    def agent_as(self, agent_id: str) -> Agent:
        """One of its agents."""
        return Agent.connect(self.key("agent", agent_id), self.settings)


@dataclass
class Showcase:
    """The organisation, and ids of what is in it."""

    organisation: Organisation
    user_id: str
    """Who looks: pia."""
    ids: dict[str, str]


@asynccontextmanager
async def showcase(
    stack: Stack, person: Person, environment: dict[str, str], folder: Path, odd: str = ""
) -> AsyncIterator[Showcase]:
    """Furnish a stack. `odd`: a text that agents and people say besides, to see what pages make of it."""
    realm = NamedRealm(stack, client_settings(stack.environment()))
    async with AsyncExitStack() as exits:
        organisation = await exits.enter_async_context(Organisation(realm, environment, folder))
        await _people_and_targets(realm)
        await organisation.enrol(person, "pia", ("sponsor", "operator"))
        await _agents(realm, odd)
        tasks = await _tasks(realm, odd)
        waiting: list[asyncio.Task[Any]] = []

        def later(work: Any) -> None:
            waiting.append(asyncio.create_task(work))

        bots = {id: await exits.enter_async_context(realm.agent_as(id)) for id in tasks}
        await _approved_before(realm, bots["deploy-bot"], tasks["deploy-bot"])
        use = await _break_glass(organisation, bots["deploy-bot"], tasks["deploy-bot"])
        await _hand_over(realm)
        grant = await _grant(realm, tasks["report-bot"])
        leases = {
            id: (await _ask(bots[id], tasks[id], "read", "env/staging/web", "to look", ttl_s)).lease_id
            for id, ttl_s in {"deploy-bot": 1500, "review-bot": 2400, "report-bot": 3000}.items()
        }
        await _ask(bots["deploy-bot"], tasks["deploy-bot"], "read", "env/staging/db", "to compare", 3300)
        await _blocked(realm, tasks, leases)
        await send_answers(realm, "deploy-bot", tasks["deploy-bot"], {"gpt-5": 1200, "claude-opus": 45_000})
        for build in (421, 422, 423):
            reason = f"deploy build {build}"
            later(_ask(bots["deploy-bot"], tasks["deploy-bot"], "write", "env/staging/web", reason, 300))
        later(
            _ask(bots["deploy-bot"], tasks["deploy-bot"], "write", PRODUCTION, "the release of today", 1800)
        )
        if odd:
            later(_ask(bots["review-bot"], tasks["review-bot"], "write", "env/staging/web", odd, 300))
        action = await _action(realm, bots["deploy-bot"], tasks["deploy-bot"], leases["deploy-bot"])
        ids = {
            "agent": "deploy-bot", "task": tasks["deploy-bot"], "lease": leases["deploy-bot"], "grant": grant,
            "use": use, "action": action,
        }  # fmt: skip
        yield Showcase(organisation, "pia", ids)
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


def _everything(target: str) -> list[Permission]:
    return [Permission(target=target, verbs=("read", "write"), resources=("env/**",))]


async def _people_and_targets(realm: NamedRealm) -> None:
    async with realm.as_operator() as olga:
        for name, role in {"sam": "sponsor", "leo": "sponsor", "maria": None, "otto": "operator"}.items():
            roles = [cast(Role, role)] if role else []
            await olga.set_user(
                name, name=name.title(), roles=roles, keys=[realm.key("user", name)],
                entitlements=[*_everything("shop"), *_everything("warehouse")],
            )  # fmt: skip
        for target, description in (("shop", "the shop"), ("warehouse", "what is in stock")):
            await olga.set_target(
                target, description=description, backend=BackendSettings(kind="jwt"),
                verbs=[VerbFloor(verb="read"), VerbFloor(verb="write", floor="sponsor")],
                keys=[realm.key("target", target)],
            )  # fmt: skip


async def _agents(realm: NamedRealm, odd: str) -> None:
    now_s = int(time.time())
    for id, (description, by) in AGENTS.items():
        key = realm.key("agent", id)
        soon = id == "night-bot"
        async with Administrator.connect(realm.key("user", by), realm.settings) as person:
            await person.register_agent(
                id, description=odd or description, keys=[key.record(now_s + (2 if soon else 200) * DAY_S)],
                ceiling=[*_everything("shop"), *(_everything("warehouse") if id != "review-bot" else ())],
            )  # fmt: skip
    async with realm.administrator("sam") as sam, realm.as_operator() as olga:
        await sam.suspend_agent("night-bot", reason=odd or "it deleted too much")
        await olga.disable_user("leo", reason="left")


async def _hand_over(realm: NamedRealm) -> None:
    """From now on pia answers for two of the agents."""
    async with realm.as_operator() as olga:
        for id in ("deploy-bot", "review-bot"):
            await olga.transfer_agent(id, sponsor="pia", without_consent=True)


async def _tasks(realm: NamedRealm, odd: str) -> dict[str, str]:
    purposes = {
        "deploy-bot": ("release 4.2 of the shop", ("shop", "warehouse")),
        "review-bot": (odd or "review pull request 421", ("shop",)),
        "report-bot": ("the report of the week", ("shop", "warehouse")),
    }
    async with realm.administrator("maria") as maria:
        return {
            id: await maria.assign_task(
                id, purpose=purpose, scope=[one for target in targets for one in _everything(target)],
                ends_in_s=4 * 3600,
            )
            for id, (purpose, targets) in purposes.items()
        }  # fmt: skip


async def _ask(
    agent: Agent, task: str, verb: str, resource: str, reason: str, ttl_s: int, *, break_glass: bool = False
) -> Any:
    return await agent.request(
        task=task, target="shop", verbs=[verb], resources=[resource], reason=reason, ttl_s=ttl_s, timeout_s=3000,
        break_glass=break_glass,
    )  # fmt: skip


async def _approved_before(realm: NamedRealm, bot: Agent, task: str) -> None:
    """What is usual: sam approved writes to staging."""
    async with realm.sponsor("sam") as sam:
        for build in (419, 420):
            asked = asyncio.create_task(
                _ask(bot, task, "write", "env/staging/web", f"deploy build {build}", 300)
            )
            await sam.approve(await first_pending(sam))
            await asked


async def _break_glass(organisation: Organisation, bot: Agent, task: str) -> str:
    realm = organisation.realm
    asked = asyncio.create_task(_ask(bot, task, "read", PRODUCTION, FROZEN, 600, break_glass=True))
    for key in (organisation.operator(), realm.key("user", "otto")):
        async with Sponsor.connect(key, realm.settings) as operator:
            await operator.approve(await first_pending(operator))
    request_id: str = (await asked).request_id
    return request_id


async def _grant(realm: NamedRealm, task: str) -> str:
    async with Grantor.connect(realm.key("user", "sam"), realm.settings) as sam:
        proposal = await sam.propose(
            task, [Permission(target="warehouse", verbs=("write",), resources=("env/reports/*",))], count=5,
            lasts_s=3 * 3600, comment="for the report of the week",
        )  # fmt: skip
        return str((await sam.give(proposal)).result)


async def _blocked(realm: NamedRealm, tasks: dict[str, str], leases: dict[str, str]) -> None:
    """Two hundred blocked actions of the last day, as gateways tell them."""
    chance, now_ms = random.Random(7), int(time.time() * 1000)
    reasons = ("not_granted", "out_of_scope", "unknown_destination", "denied_by_policy")
    async with realm.publisher() as publisher:
        sent = []
        for number in range(240):
            agent = chance.choice([*tasks])
            write = chance.random() < 0.3
            code = chance.choices(reasons, (5, 3, 2, 1))[0]
            event = ActionDecided(
                action_id=str(uuid.uuid4()), gateway=f"spiffe://{realm.settings.trust_domain}/service/gateway",
                agent_id=agent, task_id=tasks[agent],
                lease_id=leases[agent] if number % 6 == 0 else None, target_id=chance.choice(("shop", "warehouse")),
                verb="write" if write else "read", resource="env/production/db", allowed=number % 6 == 0,
                access="write" if write else "read", method="PUT" if write else "GET",
                at_ms=now_ms - int(abs(chance.gauss(0, 5)) * 3_600_000) % 86_000_000,
                reasons=() if number % 6 == 0 else (Reason(code=code, message="no lease allows it"),),
            )  # fmt: skip
            sent.append(
                await publisher.send(
                    ACTION,
                    "action",
                    Outbound(agent, event.model_dump_json(exclude_none=True), id=event.action_id),
                )
            )
        await asyncio.gather(*sent)


async def send_answers(realm: RunningStack, agent: str, task: str, tokens: Mapping[str, int]) -> None:
    """Answers of language models now, as gateways tell them. `tokens`: by model."""
    async with realm.publisher() as publisher:
        for model, count in tokens.items():
            event = ActionAnswered(
                action_id=str(uuid.uuid4()), gateway=f"spiffe://{realm.settings.trust_domain}/service/gateway",
                agent_id=agent, task_id=task, target_id="llm", verb="generate", resource=f"model/{model}",
                answer="result", http_status=200, usage=ModelUsage(tokens=count, counted="usage"),
                at_ms=int(time.time() * 1000),
            )  # fmt: skip
            outbound = Outbound(agent, event.model_dump_json(exclude_none=True), id=event.action_id)
            await (await publisher.send(ACTION, "action", outbound))


async def _action(realm: NamedRealm, bot: Agent, task: str, lease_id: str) -> str:
    gateway = SigningKey.load(realm.stack.trust.service_key("gateway"))
    records = load_records(await bot.connection.directory(), "deploy-bot", task, "shop")
    now = int(time.time())
    nothing = hashlib.sha256().hexdigest()
    headers: Sequence[ShownHeader] = (ShownHeader(name="content-type", value="application/json"),)
    question = ActionRequest(
        iss=gateway.id, aud=realm.settings.trust_domain, iat=now, exp=now + 3600, jti=secrets.token_urlsafe(32),
        action_id="an-action", agent_id="deploy-bot", task_id=task, lease_id=lease_id, target_id="shop", verb="write",
        resource=PRODUCTION, method="DELETE", url="https://shop.example/env/production/web/cache", body_digest=nothing,
        body_bytes=0, headers_digest=nothing, headers=tuple(headers), required="sponsor",
        revisions=records.revisions("some-policy"),
    )  # fmt: skip
    async with realm.publisher() as publisher:
        await publisher.publish_signed(APPROVAL_REQUEST, "pia", question, gateway)
    return message_id(question.iss, question.jti)
