"""The sockets of runs: one for each run that goes on, on which only its own instance and its task count."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import stat
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from ringfence.client.agent.agent import Agent
from ringfence.client.approvals.history_comparison import PendingApproval
from ringfence.client.approvals.sponsor import Sponsor
from ringfence.kernel.crypto.jwe import ReplyKey
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.credential import CredentialDecision, CredentialRequest
from ringfence.messages.operations import ActionDecided
from ringfence.messages.registry import TaskEnd, VerbFloor
from ringfence.messages.run import RunStatus
from ringfence.messages.topics import ACTION, CREDENTIAL_REQUEST, REVOCATION_REQUEST
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.gateway.raw import connected_unix
from tests.support.benches.agent_api_bench import Caller, Posted
from tests.support.benches.gateway_flows import action, gateway
from tests.support.benches.live_runs import KEYS, OTHER, RUNNER, agent_of
from tests.support.benches.run_bench import ASK, RunBench, run_bench, through, until_there
from tests.support.benches.sdk_clients import client
from tests.support.world import WITHIN_S, Party, scope

ASK_WRITE = scope("hub", ("write",), ("path/a",))


@pytest.fixture(scope="module")
async def bench(
    kafka: Kafka, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunBench]:
    async with run_bench(kafka, redis_server, tmp_path_factory.mktemp("runs")) as found:
        yield found


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


async def published(bench: RunBench, message: Posted) -> bool:
    """Whether a posted message stands on Kafka."""
    found = [
        *await bench.world.records(CREDENTIAL_REQUEST),
        *await bench.world.records(REVOCATION_REQUEST),
    ]
    return message.compact.encode() in {record.value for record in found}


# --- what goes well ---------------------------------------------------------------------------------------------------


async def test_a_run_asks_on_its_socket_for_its_first_lease_and_uses_it_there(bench: RunBench) -> None:
    agent = await bench.agent()
    run = bench.run(agent, await bench.task(agent))
    assert not run.socket.exists()
    async with run.started():
        assert stat.S_IMODE(run.socket.stat().st_mode) == 0o600
        handle = await run.lease()
        await run.known(handle)
        assert (await run.get()).status_code == 200, "a handle is not needed there"
        given_back = run.release(handle)
        answer = await run.caller().post(given_back)
        assert answer.status_code == 202
        assert await published(bench, given_back)
        asked = run.request()
        assert (await run.caller().post(asked)).status_code == 202
        assert (await run.caller().get(asked, "?wait=30s")).status_code == 200
        assert (await run.caller().post(run.withdraw(asked))).status_code == 202


@pytest.mark.parametrize("end", ["ended", "lost"])
async def test_with_the_end_of_the_run_its_socket_and_all_connections_are_gone(
    bench: RunBench, end: RunStatus
) -> None:
    agent = await bench.agent()
    run = bench.run(agent, await bench.task(agent))
    async with run.started():
        await run.known(await run.lease())
        left = run.socket.with_suffix(".stdio")
        left.touch()  # of an MCP server whose runner was killed
        async with connected_unix(str(run.socket)) as idle, connected_unix(str(run.socket)) as waits:
            assert (await idle.ask(b"GET /hub/a HTTP/1.1\r\nHost: gateway\r\n\r\n")).status == 200
            asked = run.request(scope=ASK_WRITE)
            await run.caller().post(asked)
            await waits.send(
                f"GET {asked.status}?wait=60s&after=5 HTTP/1.1\r\nHost: ringfence\r\n\r\n".encode()
            )
            await run.live.say(end)
            assert await asyncio.wait_for(idle.ended(), WITHIN_S)
            assert await asyncio.wait_for(waits.ended(), WITHIN_S)
        await until_there(run.socket, gone=True)
        await until_there(left, gone=True)
        await run.live.say("started")
        other = bench.run(agent, run.live.task)
        async with other.started():
            assert not run.socket.exists(), "a run that is over never starts again"


async def test_with_the_deadline_of_the_run_its_socket_is_gone(bench: RunBench) -> None:
    agent = await bench.agent()
    run = bench.run(agent, await bench.task(agent))
    run.live.deadline = int(time.time()) + 3
    run.live.kid = SigningKey.generate(agent.id).kid
    await run.live.say("claimed")
    await run.live.say("started")
    await until_there(run.socket)
    async with connected_unix(str(run.socket)) as idle:
        assert await asyncio.wait_for(idle.ended(), WITHIN_S)
    assert time.time() >= run.live.deadline
    await until_there(run.socket, gone=True)


async def test_with_the_end_of_its_task_the_socket_of_a_run_is_gone(bench: RunBench) -> None:
    agent = await bench.agent()
    run = bench.run(agent, await bench.task(agent))
    async with run.started():
        claims = bench.world.claims(TaskEnd, bench.user, task_id=run.live.task, reason="done")
        await bench.world.accepted(claims, bench.user)
        await until_there(run.socket, gone=True)


# --- whose leases count -----------------------------------------------------------------------------------------------


async def own_lease(bench: RunBench, agent: Party, task: str) -> str:
    """A lease that the agent asked for with its own key, over Kafka."""
    async with Agent.connect(agent.key, settings=client(bench.world)) as sdk:
        return (await sdk.request(task=task, **ASK)).lease_id


async def test_on_the_socket_of_a_run_only_its_own_leases_count(bench: RunBench) -> None:
    agent = await bench.agent(has_key=True)
    task, elsewhere = await bench.task(agent), await bench.task(agent)
    run, beside, there = bench.run(agent, task), bench.run(agent, task), bench.run(agent, elsewhere)
    async with run.started(), beside.started(), there.started():
        handle, theirs = await run.lease(), await beside.lease()
        other_task = await there.lease()
        agents = await own_lease(bench, agent, task)
        await run.known(handle)
        await beside.known(theirs)
        await there.known(other_task)
        await until_there(bench.task_socket(task))
        async with asyncio.timeout(WITHIN_S):
            while (await through(bench.task_socket(task), handle=agents)).status_code != 200:
                await asyncio.sleep(0.02)
        before = len(bench.target.requests)

        # The same request is allowed on one socket after another, so no decision is taken from a cache of the other.
        for _ in range(2):
            assert code(await run.get(handle=theirs)) == (403, "socket_other_run")
            assert code(await run.get(handle=agents)) == (403, "socket_other_run")
            assert code(await run.get(handle=other_task)) == (403, "handle_other_task")
            assert code(await beside.get(handle=handle)) == (403, "socket_other_run")
            # On a task's socket only what is no run's.
            assert code(await through(bench.task_socket(task), handle=handle)) == (403, "lease_of_run")
            assert code(await through(bench.task_socket(elsewhere), handle=other_task)) == (
                403,
                "lease_of_run",
            )
            assert code(await through(bench.task_socket(elsewhere))) == (403, "lease_of_run")
        assert len(bench.target.requests) == before, "nothing of it reached the target"
        event = await action(bench.world, task_id=task, allowed=False, lease_id=theirs)
        assert (event.agent_id, event.reasons[0].code) == (agent.name, "socket_other_run")
        event = await action(bench.world, task_id=task, allowed=False, lease_id=handle)
        assert event.reasons[0].code in ("socket_other_run", "lease_of_run")

        # Without a handle each socket uses its own, for one and the same request.
        owners = {run.socket: handle, beside.socket: theirs, bench.task_socket(task): agents}
        for _ in range(2):
            for way in owners:
                assert (await through(way, "/a/same")).status_code == 200
        used: list[str | None] = []
        async with asyncio.timeout(WITHIN_S):
            while len(used) < 6:
                events = [
                    ActionDecided.model_validate_json(record.value)
                    for record in await bench.world.records(ACTION)
                ]
                used = [event.lease_id for event in events if event.resource == "path/a/same"]
        assert used == [*owners.values(), *owners.values()]

        # A run without a lease of its own has none of its neighbour's.
        await run.live.say("ended")
        await until_there(run.socket, gone=True)
        fourth = bench.run(agent, task)
        async with fourth.started():
            answer = await fourth.get()
            assert code(answer) == (403, "socket_other_run")
            assert "--delivery gateway" in answer.json()["ask"]


# --- whose messages count ---------------------------------------------------------------------------------------------


async def test_on_the_socket_of_a_run_only_messages_of_its_instance_count(bench: RunBench) -> None:
    agent = await bench.agent(has_key=True)
    task, elsewhere = await bench.task(agent), await bench.task(agent)
    run, beside = bench.run(agent, task), bench.run(agent, task)
    async with run.started(), beside.started():
        await run.known(await run.lease())
        theirs = await beside.lease()
        await beside.known(theirs)
        caller, posted = run.caller(), beside.request()
        stranger = SigningKey.generate(agent.id)
        attacks = {
            "another instance of the task": beside.request(),
            "the agent's own key": run.request(key=agent.key, enrolment=None),
            "the agent's own key, with the run's enrolment": run.request(key=agent.key),
            "the run's key, with another's enrolment": run.request(enrolment=beside.sdk.connection.enrolment),
            "the run's key without its enrolment": run.request(enrolment=None),
            "a stranger's key": run.request(key=stranger),
            "another task": run.request(task_id=elsewhere),
            "a lease of another run": run.release(theirs),
            "a release by another run": beside.release(theirs),
        }
        refused = {}
        for name, message in attacks.items():
            refused[name] = code(await caller.post(message))
            assert not await published(bench, message), name
        assert refused == {
            "another instance of the task": (403, "socket_other_run"),
            "the agent's own key": (403, "socket_other_run"),
            "the agent's own key, with the run's enrolment": (403, "key_unknown"),
            "the run's key, with another's enrolment": (403, "key_unknown"),
            "the run's key without its enrolment": (403, "key_unknown"),
            "a stranger's key": (403, "key_unknown"),
            "another task": (403, "socket_other_task"),
            "a lease of another run": (403, "socket_other_run"),
            "a release by another run": (403, "socket_other_run"),
        }
        event = await action(bench.world, task_id=task, allowed=False, method="POST")
        assert (event.agent_id, event.run_id) == (agent.name, run.live.id)

        # What another instance posted on its own socket: its reply is not for this one, nor may it be withdrawn here.
        assert (await beside.caller().post(posted)).status_code == 202
        assert (await beside.caller().get(posted, "?wait=30s")).status_code == 200
        assert code(await caller.get(posted)) == (403, "socket_other_run")
        withdrawal = run.withdraw(posted)
        assert code(await caller.post(withdrawal)) == (403, "socket_other_run")
        assert not await published(bench, withdrawal)
        # Nor is what went over a listener, by the agent's own key, or what nobody has heard of.
        over_tcp = run.request(key=agent.key, enrolment=None)
        listener = Caller(f"http://127.0.0.1:{bench.port}/ringfence", agent.key)
        assert (await listener.post(over_tcp)).status_code == 202
        assert code(await caller.get(over_tcp)) == (403, "socket_other_run")
        unknown = run.request()
        assert code(await caller.get(unknown)) == (404, "request_unknown")
        assert code(await caller.post(run.withdraw(unknown))) == (403, "socket_other_run")


async def waiting_request(sponsor: Sponsor, request_id: str) -> PendingApproval:
    """A request that waits for somebody."""
    async with asyncio.timeout(WITHIN_S):
        async for pending in sponsor.watch():
            if pending.request_id == request_id:
                return pending
    raise AssertionError("the watch ended")


@pytest.mark.parametrize("memory", ["kept", "lost"])
async def test_a_run_waits_on_over_a_restart_of_the_gateway(bench: RunBench, memory: str) -> None:
    """The reply to a held request is fetched on the run's socket, by the SDK and without it, and so is a withdrawal."""
    world, name = bench.world, f"asks-{uuid.uuid4().hex[:8]}"
    wanted = scope(name, ("read",), ("**",))
    await world.target(name, verbs=(VerbFloor(verb="read", floor="sponsor"),))
    user = await world.user(f"u-{uuid.uuid4().hex[:8]}", entitlements=wanted)
    agent = await agent_of(bench.yard, RUNNER, wanted)
    task = await world.task(agent, by=user, scope=wanted)
    with tempfile.TemporaryDirectory(prefix="rf-") as short:
        here = replace(bench, folder=Path(short))

        def spool(number: int) -> Path:
            return here.folder / ("spool" if memory == "kept" else f"spool-{number}")

        run, beside = here.run(agent, task), here.run(agent, task)
        async with contextlib.AsyncExitStack() as runs:
            async with gateway(world, sockets=here.folder, spool=spool(1)):
                await runs.enter_async_context(run.started())
                await runs.enter_async_context(beside.started())
                plain, given_up = (run.request(scope=wanted, exp=int(time.time()) + 30) for _ in range(2))
                for posted in (plain, given_up):
                    assert (await run.caller().post(posted)).status_code == 202
                    assert (await run.caller().get(posted, "?wait=60s")).status_code == 200
                pending = asyncio.get_running_loop().create_future()
                ask = {"target": name, "resources": ["**"], "on_pending": pending.set_result}
                by_sdk = asyncio.create_task(run.lease_of(**ask, delivery="agent"))
                await pending
            async with gateway(world, sockets=here.folder, spool=spool(2)):
                await until_there(run.socket)
                await until_there(beside.socket)
                answer = await run.caller().get(plain, "?after=1")
                if memory == "lost":
                    assert (answer.status_code, answer.json()["code"]) == (404, "request_unknown")
                    assert "post the same bytes again" in answer.json()["detail"]
                    refused = await run.caller().post(run.withdraw(given_up))
                    assert code(refused) == (403, "socket_other_run")
                    assert "post the request again" in refused.json()["detail"]
                    for posted in (plain, given_up):
                        assert (await run.caller().post(posted)).status_code == 202
                    answer = await run.caller().get(plain, "?after=1")
                assert answer.status_code == 202
                assert (await beside.caller().get(plain)).status_code in (403, 404), "that is another run"
                assert (await run.caller().post(run.withdraw(given_up))).status_code == 202
                final = await run.caller().get(given_up, "?after=1&wait=60s")
                reply = json.loads(given_up.reply_key.open(final.content))
                decision = parse(reply["decision"]).unverified_claims(CredentialDecision)
                assert [reason.code for reason in decision.reasons] == ["withdrawn"]
                async with Sponsor.connect(bench.yard.sam.key, client(world)) as sam:
                    for request_id in (plain.id, (await pending).request_id):
                        await sam.approve(await waiting_request(sam, request_id))
                assert (await run.caller().get(plain, "?after=1&wait=60s")).status_code == 200
                credential = await by_sdk
                assert credential.target == name


async def test_a_key_of_the_agents_record_is_no_instance_even_if_the_run_has_the_same(
    bench: RunBench,
) -> None:
    """Without its enrolment a message is one of the agent, whose limits are not those of a run."""
    agent = await bench.agent(has_key=True)
    run = bench.run(agent, await bench.task(agent))
    run.live.kid = agent.key.kid
    await run.live.say("claimed")
    await run.live.say("started")
    await until_there(run.socket)
    claims = bench.world.claims(
        CredentialRequest, agent, task_id=run.live.task, scope=ASK_WRITE, ttl_s=600, reason="x",
        reply_key=ReplyKey().public,
    )  # fmt: skip
    message = Posted(claims, sign(claims, agent.key), ReplyKey())
    assert code(await run.caller().post(message)) == (403, "socket_other_run")
    assert not await published(bench, message)


# --- which runs have sockets ------------------------------------------------------------------------------------------


async def test_forged_records_of_runs_open_and_close_no_sockets(bench: RunBench) -> None:
    agent = await bench.agent()
    task = await bench.task(agent)
    honest, forged, claimed = (bench.run(agent, task) for _ in range(3))
    stranger = SigningKey.generate(KEYS[RUNNER].id)
    forged.live.kid = stranger.kid
    for status in ("claimed", "started"):
        await forged.live.say(status, stranger)
        await forged.live.say(status, KEYS[OTHER], iss=KEYS[OTHER].id)
        await forged.live.say(status, bench.world.key("issuer"), iss=bench.world.key("issuer").id)
    await claimed.live.say("claimed")
    async with honest.started():  # it is there, and the records before have been read
        assert not forged.socket.exists()
        assert not claimed.socket.exists()
        await honest.live.say("ended", stranger)
        await honest.live.say("ended", KEYS[OTHER])
        later = bench.run(agent, task)
        async with later.started():
            assert (await honest.caller().call("GET", "/v1/trust")).status_code == 200


async def test_only_runs_of_the_runners_that_are_named_have_sockets_and_old_sockets_are_removed(
    bench: RunBench, tmp_path: Path
) -> None:
    agent = await bench.agent()
    task, sockets = await bench.task(agent), tmp_path / "sockets"
    mine, other = bench.run(agent, task), bench.run(agent, task, runner=OTHER)
    sockets.mkdir(mode=0o700)
    left = sockets / "left.sock"
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(left))
    for run in (mine, other):
        run.live.kid = SigningKey.generate(agent.id).kid
        await run.live.say("claimed")
        await run.live.say("started")
    own = {"sockets": sockets, "spool": tmp_path / "spool", "runners": (OTHER,)}
    async with gateway(bench.world, **own):
        await until_there(sockets / other.socket.name)
        await until_there(mine.socket)
        assert not (sockets / mine.socket.name).exists()
        assert not left.exists()
    assert list(sockets.iterdir()) == []
