"""`ringfence mcp wrap`: a server of the official SDK in a real sandbox, its client, and the gateway between them."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mcp
import pytest
from mcp import ClientSession, McpError, StdioServerParameters
from mcp.client.stdio import stdio_client

from tests.runner.installation import WITHIN_S, Installation, until

SITE = Path(mcp.__file__).parents[1]
PYTHON = Path(os.path.realpath(sys.executable))
SERVER = Path(__file__).with_name("mcp_server.py")
TOOL_RULES = (
    "MCP /mcp read folder/{arguments.folder} message:tools/call=get_{what}",
    "MCP /mcp delete folder/{arguments.folder} message:tools/call=delete_notes",
)
MAY = ("--allow", "noted:connect:server", "--allow", "noted:read:folder/today")


@dataclass
class Wrapping:
    """An installation with a target that is a server in a run, and a task for it."""

    here: Installation
    task: str
    folder: Path
    """Mounted, writable: what got to the server stands there."""

    def words(self, *more: str, server: tuple[str, ...] | None = None) -> list[str]:
        base = Path(os.path.realpath(sys.base_prefix))
        mounts = [] if base.is_relative_to("/usr") else ["--mount", str(base)]
        given = server or (str(PYTHON), str(self.folder / "mcp_server.py"), str(self.folder))
        return [
            "mcp", "wrap", "--task", self.task, "--target", "noted", *mounts, "--mount", str(SITE),
            "--mount", f"{self.folder}:rw-as-root", "--env", f"PYTHONPATH={SITE}", *more, "--", *given,
        ]  # fmt: skip

    @property
    def calls(self) -> list[str]:
        file = self.folder / "calls.txt"
        return file.read_text().splitlines() if file.exists() else []

    @asynccontextmanager
    async def session(self, *more: str, **how: Any) -> AsyncIterator[ClientSession]:
        """A client of the official SDK, which starts the command as its server."""
        program, *words = [*self.here.program, *self.words(*more)]
        parameters = StdioServerParameters(
            command=program, args=words, env=self.here.environment(), cwd=self.here.folder
        )
        with (self.folder / "stderr.txt").open("w") as log:
            async with (
                stdio_client(parameters, errlog=log) as (read, write),
                ClientSession(read, write, **how) as session,
            ):
                await session.initialize()
                yield session

    @contextmanager
    def raw(self, *more: str, server: tuple[str, ...] | None = None) -> Iterator[subprocess.Popen[bytes]]:
        """The command, for a test that writes the lines itself."""
        process = self.here.start(*self.words(*more, server=server), stdin=subprocess.PIPE)
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def noted(here: Installation) -> str:
    """The target, which Maria may use, and reader-bot."""
    rules = [word for rule in TOOL_RULES for word in ("--request", rule)]
    here.say(
        "target", "add", "noted", "--description", "notes over MCP", "--template", "mcp", "--backend", "jwt",
        "--setting", "url=stdio://run", "--verb", "read", "--verb", "delete", *rules, who="olga",
    )  # fmt: skip
    here.say(
        "user",
        "set",
        "maria",
        "--add",
        "noted:connect:server",
        "--add",
        "noted:read,delete:folder/*",
        "--yes",
        who="olga",
    )
    here.say(
        "agent",
        "set-ceiling",
        "reader-bot",
        "--add",
        "noted:connect:server",
        "--add",
        "noted:read:folder/*",
        "--yes",
    )
    return "noted"


@pytest.fixture
def wrapping(here: Installation, noted: str, tmp_path_factory: pytest.TempPathFactory) -> Wrapping:
    folder = tmp_path_factory.mktemp("server")
    (folder / "mcp_server.py").write_text(SERVER.read_text())
    task = here.say(
        "task",
        "assign",
        "reader-bot",
        "--purpose",
        "read notes",
        *MAY,
        "--allow",
        "notes:read:note/*",
        "--for",
        "30m",
        who="maria",
    )["task_id"]
    return Wrapping(here, task, folder)


def code_of(error: McpError) -> str:
    assert error.error.data is not None
    return str(error.error.data["code"])


def sockets_of(here: Installation) -> Path:
    folder = here.settings().gateway_sockets
    assert folder is not None
    return folder


def text(result: Any) -> str:
    (content,) = result.content
    return str(content.text)


async def test_tools_are_decided_by_name_and_arguments(wrapping: Wrapping) -> None:
    async with wrapping.session() as session:
        listed = [tool.name for tool in (await session.list_tools()).tools]
        assert "get_note" in listed
        assert "delete_notes" not in listed
        assert text(await session.call_tool("get_note", {"folder": "today"})) == "a note of today"
        for tool, folder in (("get_note", "private"), ("delete_notes", "today")):
            with pytest.raises(McpError) as refused:
                await session.call_tool(tool, {"folder": folder})
            assert refused.value.error.code == 403
            assert code_of(refused.value) in ("beyond_scope", "beyond_lease")
    assert wrapping.calls == ["get_note today"], "what was refused never got to the server"


async def test_server_notifications_reach_the_client_through_the_gateway(wrapping: Wrapping) -> None:
    told: list[str] = []

    async def on_message(message: Any) -> None:
        told.append(type(getattr(message, "root", message)).__name__)

    steps: list[float] = []

    async def on_progress(progress: float, total: float | None, message: str | None) -> None:
        steps.append(progress)

    async with wrapping.session(message_handler=on_message) as session:
        result = await session.call_tool("get_changed", {"folder": "today"}, progress_callback=on_progress)
        assert text(result) == "told"
        async with asyncio.timeout(WITHIN_S):
            while "ToolListChangedNotification" not in told or not steps:
                await asyncio.sleep(0.02)
    assert steps == [1.0]


async def test_static_keys_stay_out_of_the_server_and_its_target_gets_the_real_one(
    wrapping: Wrapping,
) -> None:
    """The server sends what its environment has, a placeholder; the gateway puts the credential in its place."""
    wanted = (*MAY, "--allow", "notes:read:note/*", "--env", "NOTES_TOKEN=placeholder")
    address = f"http://127.0.0.1:{wrapping.here.notes.port}"
    async with wrapping.session(*wanted) as session:
        call = session.call_tool
        seen = json.loads(text(await call("get_environment", {"folder": "today"})))
        outside = wrapping.here.environment()
        assert [
            name for name in seen if name in outside and seen[name] == outside[name] and name != "LANG"
        ] == []
        assert seen["NOTES_TOKEN"] == "placeholder"
        page = text(await call("get_page", {"folder": "today", "url": f"{address}/notes/today"}))
        assert page == "200 buy milk\n"
        beyond = text(await call("get_page", {"folder": "today", "url": "http://127.0.0.1:9/"}))
        assert not beyond.startswith("200")
    (authorization,) = wrapping.here.notes.authorizations
    assert authorization.startswith("Bearer ey")


async def test_revoked_lease_destroys_the_server(wrapping: Wrapping) -> None:
    here = wrapping.here
    with wrapping.raw() as process:
        ask(process, 1, "initialize", INITIALIZE)
        assert answer(process, 1)["result"]["serverInfo"]["name"] == "noted"
        (lease,) = here.say("lease", "list", "--task", wrapping.task)["leases"]
        here.say("revoke", "--lease", lease["id"], "--reason", "test", "--yes", who="olga")
        assert process.stdout is not None
        assert process.stdout.read() == b"", "and its client sees the end"
        assert process.wait(WITHIN_S) == 137
    assert process.stderr is not None
    await_end(here, wrapping.task)


async def test_client_disconnect_ends_server_and_lease(wrapping: Wrapping) -> None:
    here = wrapping.here
    with wrapping.raw() as process:
        ask(process, 1, "initialize", INITIALIZE)
        answer(process, 1)
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
        assert process.wait(WITHIN_S) == 0
    await_end(here, wrapping.task)
    assert list(sockets_of(here).glob("*.stdio")) == []


async def test_malformed_message_is_rejected_before_the_server(wrapping: Wrapping) -> None:
    call = {"name": "get_note", "arguments": {"folder": "today"}}
    message = {"jsonrpc": "2.0", "id": 5, "method": "tools/call", "params": call}
    twice = json.dumps(message).replace('"folder": "today"', '"folder": "private", "folder": "today"')
    with wrapping.raw() as process:
        assert process.stdin is not None
        ask(process, 1, "initialize", INITIALIZE)
        answer(process, 1)
        tell(process, "notifications/initialized")
        for line, code in (
            (json.dumps([message]), "mcp_batch"),
            ("no json", "mcp_unreadable"),
            (twice, "mcp_unreadable"),
            (json.dumps({**message, "jsonrpc": "1.0"}), "mcp_invalid"),
        ):
            process.stdin.write(f"{line}\n".encode())
            process.stdin.flush()
            assert next_message(process)["error"]["data"]["code"] == code
        process.stdin.write(b"x" * (3 * 1024 * 1024) + b"\n")
        process.stdin.flush()
        assert next_message(process)["error"]["data"]["code"] == "body_unseen"
        # And it goes on.
        ask(process, 6, "tools/call", call)
        assert answer(process, 6)["result"]["content"][0]["text"] == "a note of today"
    assert wrapping.calls == ["get_note today"]


async def test_a_cancelled_call_is_cancelled_at_the_server(wrapping: Wrapping) -> None:
    with wrapping.raw() as process:
        ask(process, 1, "initialize", INITIALIZE)
        answer(process, 1)
        tell(process, "notifications/initialized")
        ask(process, 2, "tools/call", {"name": "get_slow", "arguments": {"folder": "today"}})
        until(lambda: "get_slow began" in wrapping.calls, "the call")
        ask(process, 2, "tools/call", {"name": "get_note", "arguments": {"folder": "today"}})
        assert answer(process, 2)["error"]["data"]["code"] == "mcp_id_taken"
        tell(process, "notifications/cancelled", requestId=2)
        until(lambda: "get_slow was cancelled" in wrapping.calls, "its end")
        ask(process, 3, "tools/call", {"name": "get_note", "arguments": {"folder": "today"}})
        assert answer(process, 3)["result"]["content"][0]["text"] == "a note of today"


HOSTILE = """
import json, sys
def say(line): sys.stdout.write(line + "\\n"); sys.stdout.flush()
say("no message")
say(json.dumps({"jsonrpc": "2.0", "id": 99, "result": {"nobody": "asked"}}))
say(json.dumps({"jsonrpc": "2.0"}))
for line in sys.stdin:
    asked = json.loads(line)
    if "id" not in asked: continue
    method, id = asked["method"], asked["id"]
    if method == "initialize":
        result = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}}
        result["serverInfo"] = {"name": "h", "version": "1"}
    elif method == "tools/list":
        names = ["get_note", "delete_notes", "x"]
        result = {"tools": [{"name": name, "inputSchema": {"type": "object"}} for name in names]}
    else:
        result = {"content": [{"type": "text", "text": "line one\\u2028\\rline two"}]}
        first = {"tools": [{"name": "delete_notes", "inputSchema": {}}]}
        if method != "ping": say(json.dumps({"jsonrpc": "2.0", "id": id, "result": first}))
    say(json.dumps({"jsonrpc": "2.0", "id": id, "result": result}, ensure_ascii=False))
"""


async def test_a_hostile_server_adds_nothing_to_what_the_client_may_see(wrapping: Wrapping) -> None:
    with wrapping.raw(server=("/usr/bin/env", "python3", "-c", HOSTILE)) as process:
        ask(process, 1, "initialize", INITIALIZE)
        assert answer(process, 1)["result"]["serverInfo"]["name"] == "h"
        tell(process, "notifications/initialized")
        ask(process, 2, "tools/list", {})
        assert [tool["name"] for tool in answer(process, 2)["result"]["tools"]] == ["get_note"]
        ask(process, 3, "tools/call", {"name": "get_note", "arguments": {"folder": "today"}})
        assert answer(process, 3)["result"]["tools"] == [], "its first answer counts, filtered"
        ask(process, 4, "ping", {})
        assert answer(process, 4)["result"]["content"][0]["text"] == "line one\u2028\rline two"


async def test_a_server_in_a_run_is_reached_by_no_other_way(wrapping: Wrapping) -> None:
    here = wrapping.here
    message = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}})
    curl = (
        "curl -s --max-time 20 -X POST -H 'Content-Type: application/json' "
        "-H 'Accept: application/json, text/event-stream' "
        f"-d '{message}' --unix-socket"
    )
    with wrapping.raw() as process:
        ask(process, 1, "initialize", INITIALIZE)
        answer(process, 1)
        sockets = sockets_of(here)
        until(lambda: (sockets / f"{wrapping.task}.sock").exists(), "the socket of the task")
        done = subprocess.run(
            f"{curl} {sockets / wrapping.task}.sock http://gateway/noted/mcp",
            shell=True,
            capture_output=True,
            check=False,
        )
        assert json.loads(done.stdout)["error"]["data"]["code"] == "stdio_outside_run", done
        # Another run of the same task has a lease, and no server.
        asked = " ".join(f"'{word}'" for word in MAY)
        inside = (
            f"ringfence request --task $RINGFENCE_TASK {asked} --reason look --delivery gateway >&2; "
            f"{curl} /run/ringfence/gateway.sock http://gateway/noted/mcp"
        )
        other = here.run("--", "sh", "-c", inside, task=wrapping.task)
        assert json.loads(other.stdout)["code"] == "target_unreachable", other
        (bridge,) = sockets.glob("*.stdio")
        assert bridge.stat().st_mode & 0o777 == 0o600


async def test_the_trail_has_each_call_of_the_run(wrapping: Wrapping) -> None:
    here = wrapping.here
    async with wrapping.session() as session:
        await session.call_tool("get_note", {"folder": "today"})
        with pytest.raises(McpError):
            await session.call_tool("get_note", {"folder": "private"})
    run = here.say("run", "list", "--task", wrapping.task, "--all")["runs"][0]["id"]
    until(
        lambda: "folder/private" in json.dumps(here.say("run", "show", run).get("denied", [])),
        "the denial in the trail",
    )
    story = json.dumps(here.say("audit", "trace", run, who="ali"))
    assert "folder/today" in story


async def test_without_its_lease_no_server_starts(wrapping: Wrapping) -> None:
    words = wrapping.words("--allow", "noted:connect:server", "--allow", "noted:delete:folder/today")
    done = wrapping.here.call(*words)
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"does not allow delete on folder/today" in done.stderr
    assert wrapping.calls == []
    await_end(wrapping.here, wrapping.task)


@pytest.mark.parametrize("given", ["--env", "argument"])
async def test_a_static_key_is_refused_before_anything_starts(wrapping: Wrapping, given: str) -> None:
    key = "8f14e45fceea167a5a36dedd4bea2543"
    more = ("--env", f"NOTES_API_KEY={key}") if given == "--env" else ()
    words = [*wrapping.words(*more), *([f"--api-key={key}"] if given == "argument" else [])]
    done = wrapping.here.call("--json", *words)
    assert done.returncode == 1
    said = (done.stdout + done.stderr).decode()
    assert "static_key" in said
    assert key not in said


async def test_an_agent_in_a_run_asks_by_the_tools_of_serve(wrapping: Wrapping) -> None:
    """By the socket and the key of the run, which its environment names."""
    here = wrapping.here
    words = [*here.program, "run", "--task", wrapping.task, "--", "ringfence", "mcp", "serve"]
    parameters = StdioServerParameters(
        command=words[0], args=words[1:], env=here.environment(), cwd=here.folder
    )
    wanted = {
        "permissions": [{"target": "notes", "verbs": ["read"], "resources": ["note/*"]}],
        "reason": "look",
    }
    log = wrapping.folder / "stderr.txt"
    with log.open("w") as file:
        async with (
            stdio_client(parameters, errlog=file) as (read, write),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            task = json.loads(text(await session.call_tool("show_task", {})))
            assert (task["task_id"], task["agent_id"]) == (wrapping.task, "reader-bot")
            asked = json.loads(text(await session.call_tool("request_credential", wanted)))
            assert asked["status"] == "allowed", asked
            handle = asked["lease"]["handle"]
            (lease,) = here.say("lease", "list", "--task", wrapping.task)["leases"]
            assert (lease["id"], lease["delivery"]) == (handle, "gateway")
            listed = json.loads(text(await session.call_tool("list_leases", {})))
            assert ([one["handle"] for one in listed["leases"]], listed["complete"]) == ([handle], True)
            await session.call_tool("release_credential", {"lease_id": handle})
            assert "eyJ" not in json.dumps([task, asked, listed])
    assert "eyJ" not in log.read_text()
    await_end(here, wrapping.task)


@pytest.mark.parametrize(("target", "why"), [("nothing", "target_unknown"), ("notes", "not_stdio")])
async def test_target_that_is_no_stdio_server_is_refused(wrapping: Wrapping, target: str, why: str) -> None:
    words = wrapping.words()
    words[words.index("noted")] = target
    done = wrapping.here.call("--json", *words)
    assert done.returncode == 1
    assert why in (done.stdout + done.stderr).decode()


# --- a client that writes its lines itself ----------------------------------------------------------------------------

INITIALIZE = {
    "protocolVersion": "2025-06-18",
    "capabilities": {},
    "clientInfo": {"name": "test", "version": "1"},
}


def write(process: subprocess.Popen[bytes], message: dict[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")
    process.stdin.flush()


def ask(process: subprocess.Popen[bytes], id: int, method: str, params: dict[str, Any]) -> None:
    write(process, {"id": id, "method": method, "params": params})


def tell(process: subprocess.Popen[bytes], method: str, **params: Any) -> None:
    write(process, {"method": method, "params": params})


def next_message(process: subprocess.Popen[bytes]) -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.stderr and process.stderr.read().decode()
    return json.loads(line)


def answer(process: subprocess.Popen[bytes], id: int) -> Any:
    """The answer to a request; what comes before it is passed over."""
    while (message := next_message(process)).get("id") != id or "method" in message:
        pass
    return message


def await_end(here: Installation, task: str) -> None:
    """The runs of a task have ended, and their leases with them."""
    until(lambda: not here.say("run", "list", "--task", task)["runs"], "the end of the run")
    until(lambda: not here.say("lease", "list", "--task", task)["leases"], "the end of its lease")
