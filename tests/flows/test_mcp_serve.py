"""`ringfence mcp serve` as a process, with a client of the official SDK, and a policy that the test plays."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client

from ringfence.messages.base import Permission
from ringfence.messages.credential import Reason
from ringfence.messages.topics import CREDENTIAL_REQUEST, REVOCATION_REQUEST
from tests.flows.test_client_agent import arrived, revocation, withdrawal
from tests.support.benches.agent_api_bench import WIDE, by_gateway
from tests.support.world import WITHIN_S, Party, World

SECRET = "s3cret-canary-7f1c"
READ = [{"target": "hub", "verbs": ["read"], "resources": ["path/a"]}]


class Serving:
    """A running server, its client, and everything that came out of it."""

    def __init__(self, session: ClientSession, task: str, bot: Party, stderr: Path) -> None:
        self.session = session
        self.task = task
        self.bot = bot
        self._stderr = stderr
        self.said: list[str] = []

    async def call(self, tool: str, **arguments: Any) -> tuple[bool, Any]:
        """Whether it is an error, and the object."""
        result = await self.session.call_tool(tool, arguments)
        self.said.append(result.model_dump_json())
        (text,) = result.content
        assert text.type == "text"
        found = json.loads(text.text)
        if not result.isError:
            assert result.structuredContent == found
        return bool(result.isError), found

    def call_soon(self, tool: str, **arguments: Any) -> asyncio.Task[tuple[bool, Any]]:
        return asyncio.create_task(self.call(tool, **arguments))

    def leaks(self) -> bool:
        return SECRET in "".join([*self.said, self._stderr.read_text()])


def environment(world: World, bot: Party, folder: Path, door: str) -> dict[str, str]:
    key_file = folder / "bot.json"
    bot.key.save(key_file)
    settings = world.settings("registry")
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "RINGFENCE_CONFIG": os.devnull,
        "RINGFENCE_IDENTITY": str(key_file),
        "RINGFENCE_DOOR": door,
        "RINGFENCE_TRUST_ROOT": settings.trust_root,
        "RINGFENCE_TRUST_DOMAIN": settings.trust_domain,
    }


@asynccontextmanager
async def serving(world: World, folder: Path, *options: str, **variables: str) -> AsyncIterator[Serving]:
    async with by_gateway(world, folder) as behind:
        assert behind.door is not None
        sam, maria = await world.user("sam", roles=("sponsor",)), await world.user("maria", entitlements=WIDE)
        bot = await world.agent("bot", sponsor=sam, ceiling=WIDE)
        task = await world.task(bot, by=maria, scope=WIDE)
        given = environment(world, bot, folder, behind.door) | {"RINGFENCE_TASK": task} | variables
        words = ["-m", "ringfence.cli.main", "mcp", "serve", *options]
        stderr = folder / "stderr.txt"
        parameters = StdioServerParameters(command=sys.executable, args=words, env=given)
        with stderr.open("w") as log:
            async with (
                stdio_client(parameters, errlog=log) as (read, write),
                ClientSession(read, write) as session,
            ):
                await session.initialize()
                yield Serving(session, task, bot, stderr)


@pytest.fixture
async def served(world: World, tmp_path: Path) -> AsyncIterator[Serving]:
    # The SDK's client has to be left by the task that entered it, which a fixture does not promise.
    ready: asyncio.Future[Serving] = asyncio.get_running_loop().create_future()
    done = asyncio.Event()

    async def hold() -> None:
        async with serving(world, tmp_path) as found:
            ready.set_result(found)
            await done.wait()
            assert not found.leaks()

    holding = asyncio.create_task(hold())
    started: tuple[asyncio.Future[Any], ...] = (holding, ready)
    await asyncio.wait(started, return_when=asyncio.FIRST_COMPLETED)
    if holding.done():
        holding.result()
    yield ready.result()
    done.set()
    await holding


async def test_tools_are_described_with_schemas_of_arguments_and_results(served: Serving) -> None:
    listed = (await served.session.list_tools()).tools
    assert [tool.name for tool in listed] == [
        "show_task", "request_credential", "wait_for_approval", "withdraw_request", "list_leases", "release_credential",
    ]  # fmt: skip
    for tool in listed:
        assert tool.description
        assert tool.inputSchema["additionalProperties"] is False
        assert all(
            field.get("description") or "$ref" in str(field)
            for field in tool.inputSchema["properties"].values()
        )
        assert tool.outputSchema is not None
    names = json.dumps([tool.outputSchema for tool in listed])
    assert not any(word in names for word in ('"value"', '"secret"', '"token"', '"credential"'))


async def test_an_agent_looks_at_its_task(served: Serving) -> None:
    failed, task = await served.call("show_task")
    assert not failed, task
    assert (task["task_id"], task["agent_id"], task["status"]) == (served.task, "bot", "active")
    assert task["permissions"] == [json.loads(one.model_dump_json()) for one in WIDE]
    failed, other = await served.call("show_task", task_id=str(uuid.uuid4()))
    assert failed
    assert other["error"]["code"] == "task_other"


async def test_a_request_gives_a_handle_and_its_release_ends_it(world: World, served: Serving) -> None:
    asked = served.call_soon("request_credential", permissions=READ, reason="look")
    played = await arrived(world)
    assert (played.claims.reason, played.claims.task_id, played.claims.delivery) == (
        "look",
        served.task,
        "gateway",
    )
    lease_id = await played.issue(SECRET, delivery="gateway")
    failed, result = await asked
    assert not failed, result
    assert (result["status"], result["lease"]["handle"], result["lease"]["target"]) == (
        "allowed",
        lease_id,
        "hub",
    )
    failed, released = await served.call("release_credential", lease_id=lease_id)
    assert (failed, released) == (False, {"lease_id": lease_id, "status": "released"})
    record = await world.consume_until(REVOCATION_REQUEST, lambda record: True)
    assert revocation(record).lease_id == lease_id


async def test_lease_of_another_task_is_not_released(world: World, served: Serving) -> None:
    failed, refused = await served.call("release_credential", lease_id=str(uuid.uuid4()))
    assert (failed, refused["error"]["code"]) == (True, "task_other")
    asked = served.call_soon("request_credential", permissions=READ, reason="look")
    lease_id = await (await arrived(world)).issue(SECRET, delivery="gateway")
    assert not (await asked)[0]
    failed, released = await served.call("release_credential", lease_id=lease_id)
    assert not failed, released
    record = await world.consume_until(REVOCATION_REQUEST, lambda record: True)
    assert revocation(record).lease_id == lease_id, "the first release that was sent"


async def test_a_credential_that_comes_instead_of_a_handle_is_not_passed_on(
    world: World, served: Serving
) -> None:
    """An issuer that forgets what was asked for, or somebody in its name: the reply is no answer."""
    asked = served.call_soon("request_credential", permissions=READ, reason="look", wait_s=1)
    played = await arrived(world)
    lease_id = await played.issue(SECRET, delivery="agent")
    failed, result = await asked
    assert (failed, result["status"]) == (False, "waiting")
    assert lease_id not in json.dumps(result)
    later = served.call_soon("wait_for_approval", request=result["request"])
    await played.issue(SECRET, delivery="gateway")
    failed, result = await later
    assert (failed, result["lease"]["handle"]) == (False, lease_id)


async def test_an_approval_is_waited_for_over_several_calls(world: World, served: Serving) -> None:
    asked = served.call_soon("request_credential", permissions=READ, reason="look", wait_s=1)
    played = await arrived(world)
    await played.reply(
        played.decision(
            "approval_required", required=("sponsor",), expires_at=int(time.time()) + 600, delivery="gateway"
        )
    )
    failed, waiting = await asked
    assert not failed, waiting
    assert waiting["status"] == "waiting"
    request = waiting["request"]
    failed, listed = await served.call("list_leases")
    assert not failed, listed
    assert [one["request"] for one in listed["waiting"]] == [request]
    failed, still = await served.call("wait_for_approval", request=request, wait_s=0)
    assert (failed, still["status"], still["waiting_for"]) == (
        False, "waiting", "waiting for the approval of the agent's sponsor",
    )  # fmt: skip
    later = served.call_soon("wait_for_approval", request=request)
    lease_id = await played.issue(SECRET, delivery="gateway")
    failed, allowed = await later
    assert (failed, allowed["status"], allowed["lease"]["lease_id"]) == (False, "allowed", lease_id)


async def test_a_denial_says_what_is_missing_on_which_side_and_who_gives_it(
    world: World, served: Serving
) -> None:
    asked = served.call_soon("request_credential", permissions=READ, reason="look")
    played = await arrived(world)
    permission = Permission(target="hub", verbs=("read",), resources=("path/a",))
    reasons = (
        Reason(
            code="beyond_scope", message="the ceiling lacks it", permission=permission, side="ceiling:bot"
        ),
        Reason(
            code="beyond_scope", message="maria lacks it", permission=permission, side="entitlements:maria"
        ),
    )
    await played.reply(played.decision("denied", reasons=reasons, delivery="gateway"))
    failed, result = await asked
    assert failed
    error = result["error"]
    assert error["code"] == "beyond_scope"
    assert [one["side"] for one in error["reasons"]] == ["ceiling:bot", "entitlements:maria"]
    assert error["reasons"][0]["permission"]["resources"] == ["path/a"]
    assert "ringfence agent set-ceiling bot --add hub:read:path/a" in error["ask"]
    assert "ringfence user set maria --add hub:read:path/a" in error["ask"]


async def test_calls_that_make_no_request_say_why(world: World, served: Serving) -> None:
    for tool, arguments, code in (
        ("request_credential", {"permissions": READ}, "call_invalid"),
        ("request_credential", {"permissions": READ, "reason": "x", "delivery": "agent"}, "call_invalid"),
        (
            "request_credential",
            {"permissions": [*READ, {**READ[0], "target": "b"}], "reason": "x"},
            "several_targets",
        ),
        ("wait_for_approval", {"request": "r9"}, "request_unknown"),
        ("release_credential", {"lease_id": "none"}, "call_invalid"),
        ("reveal_credential", {}, "tool_unknown"),
    ):
        failed, result = await served.call(tool, **arguments)
        assert (failed, result["error"]["code"]) == (True, code)
    assert list(await world.records(CREDENTIAL_REQUEST)) == []


async def test_arguments_of_a_refused_call_are_not_repeated(served: Serving) -> None:
    failed, result = await served.call(
        "request_credential", permissions=READ, reason="x", token=SECRET, ttl_s=SECRET
    )
    served.said.clear()
    assert failed
    assert SECRET not in json.dumps(result)


async def test_a_withdrawn_request_is_withdrawn(world: World, served: Serving) -> None:
    asked = served.call_soon("request_credential", permissions=READ, reason="look", wait_s=0)
    _, waiting = await asked
    played = await arrived(world)
    failed, ended = await served.call("withdraw_request", request=waiting["request"])
    assert (failed, ended["status"]) == (False, "withdrawn")
    _, claims = await withdrawal(world)
    assert claims.request_id == played.request_id


async def test_client_disconnect_withdraws_requests_and_releases_leases(world: World, tmp_path: Path) -> None:
    async with serving(world, tmp_path) as served:
        first = served.call_soon("request_credential", permissions=READ, reason="held")
        lease_id = await (await arrived(world, lambda p: p.claims.reason == "held")).issue(
            SECRET, delivery="gateway"
        )
        assert not (await first)[0]
        await served.call("request_credential", permissions=READ, reason="waits", wait_s=0)
        waits = await arrived(world, lambda p: p.claims.reason == "waits")
    async with asyncio.timeout(WITHIN_S):
        _, claims = await withdrawal(world)
        assert claims.request_id == waits.request_id
        record = await world.consume_until(REVOCATION_REQUEST, lambda record: True)
        assert revocation(record).lease_id == lease_id


async def test_a_signal_to_end_withdraws_what_waits(world: World, tmp_path: Path) -> None:
    """As clients end a server that does not end by itself. Its standard input stays open."""
    async with by_gateway(world, tmp_path) as behind:
        assert behind.door is not None
        bot = await world.agent("bot", sponsor=await world.user("sam", roles=("sponsor",)))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "ringfence.cli.main", "mcp", "serve", "--task", str(uuid.uuid4()),
            env=environment(world, bot, tmp_path, behind.door), stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdin is not None
        hello = {
            "protocolVersion": "2025-06-18",
            "capabilities": {},
            "clientInfo": {"name": "t", "version": "1"},
        }
        given = {"name": "request_credential", "arguments": {"permissions": READ, "reason": "waits"}}
        for message in (
            {"id": 1, "method": "initialize", "params": hello},
            {"method": "notifications/initialized"},
            {"id": 2, "method": "tools/call", "params": given},
        ):
            process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")
        played = await arrived(world)
        process.send_signal(signal.SIGTERM)
        _, claims = await withdrawal(world)
        assert claims.request_id == played.request_id
        assert await asyncio.wait_for(process.wait(), WITHIN_S) == 128 + signal.SIGTERM
