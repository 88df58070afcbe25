"""The SDK against running services: commands, requests, approvals, verification; and what forgers achieve: nothing."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

import httpx
import pytest

from ringfence.client.admin.administrator import Administrator
from ringfence.client.agent.agent import Agent
from ringfence.client.approvals.sponsor import Sponsor
from ringfence.client.errors import (
    ApiError,
    InvalidCallError,
    NotAnsweredError,
    RefusedError,
    RequestDeniedError,
    TokenRejectedError,
)
from ringfence.client.reports.read_api import ReadApi
from ringfence.client.resource_server.verifier import TokenVerifier
from ringfence.dev.processes import free_port
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.crypto.jws import sign
from ringfence.messages.operations import ServiceEvent
from ringfence.messages.registry import BackendSettings, VerbFloor
from ringfence.messages.topics import REGISTRY_COMMAND, SERVICE_EVENT
from ringfence.model.scope.globs import ScopeError
from tests.support.benches.sdk_clients import READ, WRITE, Elsewhere, administrator, client, first
from tests.support.world import WITHIN_S, World, scope

# --- commands ---------------------------------------------------------------------------------------------------------


async def test_a_whole_organisation_by_signed_commands(world: World) -> None:
    sam, bot, platform = (
        world.party("user", "sam"),
        world.party("agent", "bot"),
        world.party("target", "staging"),
    )
    async with world.running("registry"):
        async with administrator(world, world.operator) as olga:
            set_sam = await olga.set_user(
                "sam", name="Sam", roles=["sponsor"], keys=[sam.key], entitlements=READ
            )
            assert set_sam.command == "user.set"
            await olga.set_target(
                "staging",
                description="a platform",
                backend=BackendSettings(kind="jwt"),
                verbs=[VerbFloor(verb="read"), VerbFloor(verb="deploy", floor="sponsor")],
                keys=[platform.key],
            )
        async with administrator(world, sam) as admin:
            await admin.register_agent("bot", description="reads", keys=[bot.key], ceiling=READ)
            await admin.set_ceiling("bot", READ + WRITE)
            task = await admin.assign_task("bot", purpose="look", scope=READ, ends_in_s=600)
            await admin.suspend_agent("bot", reason="lunch")
            await admin.resume_agent("bot", reason="back")
            ended = await admin.assign_task("bot", purpose="look again", scope=READ, ends_in_s=600)
            await admin.end_task(ended, reason="done")

            directory = await admin.directory()
            agent, assigned, over = directory.agent("bot"), directory.task(task), directory.task(ended)
            assert agent is not None
            assert (agent.state.status, agent.state.sponsor, agent.state.ceiling) == (
                "active",
                "sam",
                READ + WRITE,
            )
            assert assigned is not None
            assert (assigned.state.on_behalf_of, assigned.state.status) == ("sam", "active")
            assert over is not None
            assert over.state.status == "ended"

            await admin.decommission_agent("bot", reason="old")
        async with administrator(world, world.operator) as olga:
            await olga.remove_target("staging", reason="gone")
            await olga.disable_user("sam", reason="left")


async def test_a_refusal_carries_the_registrys_reason(world: World) -> None:
    async with world.running("registry"):
        sam = await world.user("sam", ("sponsor",))
        petra = await world.user("petra", ("sponsor",))
        await world.agent("bot", sam)
        async with administrator(world, petra) as admin:
            with pytest.raises(RefusedError, match=r"only the sponsor of bot \(sam\)") as refused:
                await admin.suspend_agent("bot", reason="mine now")
            assert refused.value.code == "not_sponsor"
            assert refused.value.by == "registry"
            with pytest.raises(RefusedError):
                await admin.set_user("petra", name="Petra", roles=["operator"], keys=[petra.key])


async def test_commands_side_by_side_get_their_own_answers(world: World) -> None:
    async with world.running("registry"), administrator(world, world.operator) as olga:
        results = await asyncio.gather(
            *(
                olga.set_user(f"user-{n}", name=f"U{n}", keys=[world.party("user", f"user-{n}").key])
                if n % 2
                else olga.transfer_agent(f"nobody-{n}", sponsor="x")
                for n in range(10)
            ),
            return_exceptions=True,
        )
    assert [isinstance(result, RefusedError) for result in results] == [n % 2 == 0 for n in range(10)]
    for n in range(0, 10, 2):
        assert f"nobody-{n}" in str(results[n])


async def test_command_without_an_answer_raises_not_answered_error(world: World) -> None:
    async with administrator(world, world.operator, timeout_s=0.5) as olga:
        with pytest.raises(
            NotAnsweredError, match=r"the registry did not answer the agent\.suspend within 0\.5 s"
        ):
            await olga.suspend_agent("bot", reason="x")
        with pytest.raises(NotAnsweredError, match=r"stands on Kafka .*ringfence lease list"):
            await olga.revoke(agent_id="bot", reason="x")
        with pytest.raises(NotAnsweredError, match="It may still be carried out"):
            await olga.revoke(lease_id=str(uuid.uuid4()), reason="x")


async def test_a_command_that_counts_for_nothing_says_why(world: World) -> None:
    stranger = world.party("user", "stranger")
    async with world.running("registry"), administrator(world, stranger) as admin:
        with pytest.raises(NotAnsweredError, match=r"counted for nothing.*key_unknown"):
            await admin.suspend_agent("bot", reason="x")


async def test_an_answer_that_is_not_the_registrys_or_not_to_us_is_none(world: World) -> None:
    async with administrator(world, world.operator, timeout_s=1.0) as olga:
        waiting = asyncio.create_task(olga.suspend_agent("bot", reason="x"))
        command = await world.consume_until(
            REGISTRY_COMMAND, lambda record: record.headers["ce_type"] == "ringfence.agent.suspend.v1"
        )
        # Somebody else may send a command with the same `jti`: the answer to theirs is not the answer to ours.
        for forger, actor in (
            (world.key("policy"), world.operator.id),
            (world.operator.key, world.operator.id),
            (world.key("registry"), world.party("user", "mallory").id),
        ):
            forged = ServiceEvent(
                iss=forger.id,
                aud=world.td,
                iat=int(time.time()),
                jti=str(uuid.uuid4()),
                kind="accepted",
                subject="agent.suspend",
                actor=actor,
                ref=command.headers["ce_id"],
                at_ms=int(time.time() * 1000),
            )
            await world.send(SERVICE_EVENT, "registry", sign(forged, forger))
        with pytest.raises(NotAnsweredError):
            await waiting


async def test_invalid_command_is_not_sent(world: World) -> None:
    async with administrator(world, world.operator) as olga:
        with pytest.raises(InvalidCallError):
            await olga.suspend_agent("Not A Name", reason="x")
        with pytest.raises(ScopeError):
            await olga.set_ceiling("bot", scope("staging", ("read",), ("a//b",)))
        with pytest.raises(InvalidCallError, match="either ends_in_s or not_after"):
            await olga.assign_task("bot", purpose="x", scope=READ)
        with pytest.raises(InvalidCallError, match="and not both"):
            await olga.revoke(reason="x", lease_id=str(uuid.uuid4()), task_id=str(uuid.uuid4()))
        with pytest.raises(InvalidCallError, match="exactly one"):
            await olga.revoke(reason="x")
    assert [r.headers["ce_type"] for r in await world.records(REGISTRY_COMMAND)] == ["ringfence.user.set.v1"]


async def test_a_task_on_behalf_of_somebody_who_consents(world: World) -> None:
    async with world.running("registry"):
        sam = await world.user("sam", ("sponsor",))
        maria = await world.user("maria", entitlements=READ)
        await world.agent("bot", sam, READ)
        async with administrator(world, maria) as hers, administrator(world, sam) as his:
            terms = hers.terms("bot", purpose="look", scope=READ, ends_in_s=600)
            consent = await hers.consent_to_task(terms)
            task = await his.assign_terms(terms, on_behalf_of="maria", consent=consent)
            entry = (await his.directory()).task(task)
            assert entry is not None
            assert (entry.state.on_behalf_of, entry.state.assigned_by) == ("maria", "sam")
            wider = terms.model_copy(update={"purpose": "something else"})
            with pytest.raises(RefusedError) as refused:
                await his.assign_terms(wider, on_behalf_of="maria", consent=consent)
            assert refused.value.code == "on_behalf_of_unsigned"


async def test_the_preview_says_what_is_cut_and_by_which_side(world: World) -> None:
    async with world.running("registry"):
        sam = await world.user("sam", ("sponsor",), READ)
        await world.target("staging")
        await world.agent("bot", sam, scope("staging", ("read", "deploy"), ("env/staging/*",)))
        async with administrator(world, sam) as admin:
            wanted = READ + WRITE + scope("staging", ("paint",), ("env/staging/*",))
            shown = await admin.preview(admin.terms("bot", purpose="x", scope=wanted, ends_in_s=60))
            assert shown.effective == scope("staging", ("read",), ("env/staging/*",))
            cuts = {(cut.limit, cut.permission.verbs, cut.permission.resources) for cut in shown.cuts}
            assert cuts == {
                ("ceiling:bot", ("read",), ("env/**",)),
                ("ceiling:bot", ("paint",), ("env/staging/*",)),
                ("entitlements:sam", ("deploy",), ("env/staging/*",)),
                ("entitlements:sam", ("paint",), ("env/staging/*",)),
            }
            assert shown.warnings == ("staging has no verb paint; it has deploy, read",)
            with pytest.raises(InvalidCallError, match="there is no agent nobody"):
                await admin.preview(admin.terms("nobody", purpose="x", scope=READ, ends_in_s=60))


async def test_entitlements_past_their_age_allow_nothing(world: World) -> None:
    async with world.running("registry"):
        sam = await world.user("sam", ("sponsor",), READ)
        await world.target("staging")
        await world.agent("bot", sam, READ)
        settings = client(world, entitlements_max_age_s=1)
        async with Administrator.connect(sam.key, settings) as admin:
            terms = admin.terms("bot", purpose="x", scope=READ, ends_in_s=60)
            async with asyncio.timeout(WITHIN_S):
                while (shown := await admin.preview(terms)).effective:
                    await asyncio.sleep(0.05)
            assert any("too old" in warning for warning in shown.warnings)


# --- reading ----------------------------------------------------------------------------------------------------------


async def test_the_read_api_shows_each_their_own(world: World) -> None:
    async with world.running("registry"):
        sam = await world.user("sam", ("sponsor",))
        petra = await world.user("petra", ("sponsor",))
        await world.agent("bot", sam, READ)
        async with ReadApi(sam.key, client(world)) as api:
            assert [item["id"] for item in await api.records("agent")] == ["bot"]
            assert (await api.record("agent", "bot"))["state"]["sponsor"] == "sam"
            with pytest.raises(ApiError) as missing:
                await api.record("agent", "../users")
            assert missing.value.status == 404
        async with ReadApi(petra.key, client(world)) as api:
            assert await api.records("agent") == []
            with pytest.raises(ApiError, match="there is no agent bot that petra may see") as hidden:
                await api.record("agent", "bot")
            assert (hidden.value.status, hidden.value.code) == (404, "not_found")
        async with ReadApi(world.party("user", "sam").key, client(world)) as api:
            with pytest.raises(ApiError) as unauthenticated:
                await api.records("agent")
            assert unauthenticated.value.status == 401


async def test_a_service_that_is_not_there_is_named(world: World) -> None:
    settings = client(world, registry_url="http://127.0.0.1:1")
    async with ReadApi(world.operator.key, settings) as api:
        with pytest.raises(ApiError, match="RINGFENCE_REGISTRY_URL"):
            await api.records("agent")


# --- connecting -------------------------------------------------------------------------------------------------------


async def test_another_root_than_the_pinned_one_is_not_believed(world: World) -> None:
    settings = client(world, trust_root=world.party("user", "x").key.kid)
    with pytest.raises(
        UnavailableError, match=r"is signed by root .* another installation, or the wrong fingerprint"
    ):
        async with Agent.connect(world.party("agent", "bot").key, settings):
            pass


async def test_a_broker_that_is_not_there_is_named(world: World) -> None:
    settings = client(world, kafka="127.0.0.1:1")
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1 does not answer"):
        async with Sponsor.connect(world.operator.key, settings):
            pass


# --- all parts together -----------------------------------------------------------------------------------------------


async def test_from_request_to_release_with_every_service_running(world: World) -> None:
    issuer = f"http://127.0.0.1:{free_port()}"
    async with world.running("registry", "policy", "issuer", "revoker", issuer_url=issuer):
        issuer_http = f"http://127.0.0.1:{world.ports['issuer']}"
        sam = await world.user("sam", ("sponsor",), READ + WRITE)
        maria = await world.user("maria", (), READ + WRITE)
        staging = await world.target(
            "staging", (VerbFloor(verb="read"), VerbFloor(verb="deploy", floor="sponsor"))
        )
        bot = await world.agent("bot", sam, READ + WRITE)
        settings = client(world)
        async with (
            administrator(world, maria) as hers,
            Sponsor.connect(sam.key, settings) as sponsor,
            Agent.connect(bot.key, settings) as agent,
            httpx.AsyncClient(transport=Elsewhere(issuer, issuer_http), timeout=WITHIN_S) as http,
        ):
            task = await hers.assign_task("bot", purpose="release 41", scope=READ + WRITE, ends_in_s=600)
            verifier = TokenVerifier(issuer, staging.id, staging.key, http=http)
            told: list[str] = []

            async def ask(verb: str, resource: str) -> Any:
                return await agent.request(
                    task=task, target="staging", verbs=[verb], resources=[resource], reason="release 41",
                    timeout_s=WITHIN_S, on_pending=lambda pending: told.append(str(pending)),
                )  # fmt: skip

            with pytest.raises(RequestDeniedError) as denied:
                await ask("deploy", "env/production/web")
            sides = {reason.side for reason in denied.value.reasons}
            assert sides == {"task", "ceiling:bot", "entitlements:maria"}

            asked = asyncio.create_task(ask("deploy", "env/staging/web"))
            pending = await first(sponsor)
            assert (pending.agent, pending.on_behalf_of, pending.scope[0].verbs) == (
                "bot",
                "maria",
                ("deploy",),
            )
            await sponsor.approve(pending)
            credential = await asked
            assert told == ["waiting for the approval of the agent's sponsor"]

            token = await verifier.verify_header(credential.headers()["Authorization"])
            assert (token.agent, token.sponsor, token.on_behalf_of) == (bot.id, sam.id, maria.id)
            assert (token.task, token.lease_id) == (task, credential.lease_id)
            assert token.key_thumbprint is None
            assert token.allows("deploy", "env/staging/web")
            assert not token.allows("deploy", "env/staging/api")

            await agent.release(credential, timeout_s=WITHIN_S)
            with pytest.raises(TokenRejectedError) as rejected:
                await verifier.verify(credential.value)
            assert rejected.value.code == "inactive"
            with pytest.raises(RefusedError):
                async with administrator(world, await world.user("petra", ("sponsor",))) as petra:
                    await petra.revoke(reason="not hers", lease_id=credential.lease_id)

            second = await ask("read", "env/staging/web")
            async with administrator(world, sam) as his:
                ended = await his.revoke(reason="enough", agent_id="bot")
            assert ended.result == "1"
            with pytest.raises(TokenRejectedError):
                await verifier.verify(second.value)
