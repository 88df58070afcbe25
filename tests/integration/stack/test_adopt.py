"""`ringfence adopt`: a key in a file, and after it an agent that works without the key; against the whole stack."""

from __future__ import annotations

import asyncio
import json
import shlex
import stat
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.types import TextContent

from ringfence.dev.stack import Stack
from tests.gateway.model_server import respond
from tests.gateway.target import Target
from tests.support.adopter import PROGRAM, Adopter
from tests.support.scan_corpus import Maker

MAKE = Maker(43)
OPENAI = f"sk-proj-{MAKE.token(40)}T3BlbkFJ{MAKE.token(40)}"
ANTHROPIC = f"sk-ant-api03-{MAKE.token(93)}AA"
ASK = {"model": "m-1", "max_tokens": 9, "messages": [{"role": "user", "content": "Hello"}]}
_CALL = """
import json, os, sys, httpx
headers = json.loads(sys.argv[3])
with httpx.stream("POST", sys.argv[1], json=json.loads(sys.argv[2]), headers=headers) as answer:
    print(answer.status_code, answer.read().decode())
"""
"""What an agent's program does: it knows the URL of its provider, and the proxy of its environment."""

_KILLED = """
import os, sys
from ringfence.cli.adopt import steps
from ringfence.cli.main import main
left = int(os.environ["STEPS"])
def killed(real):
    def do(self, place):
        global left
        real(self, place)
        left -= 1
        if left == 0:
            os._exit(9)
    return do
for one in (steps.MoveSecret, steps.RecordStep, steps.MakeAgentKey, steps.AssignTask, steps.Trial, steps.EditFile):
    one.do = killed(one.do)
sys.exit(main(sys.argv[1:]))
"""
"""Dies after the effect of a step, before it is marked as done."""
STEPS = 8


@pytest.fixture
async def reader(stack: Stack, tmp_path: Path) -> Adopter:
    return await Adopter(stack, tmp_path, uuid.uuid4().hex[:8]).make()


@pytest.fixture
async def server() -> AsyncIterator[Target]:
    async with Target(respond=respond).serving() as running:
        yield running


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("variable", "secret", "path", "header", "value"),
    [
        ("OPENAI_API_KEY", OPENAI, "/v1/chat/completions", "authorization", "Bearer {}"),
        ("ANTHROPIC_API_KEY", ANTHROPIC, "/v1/messages", "x-api-key", "{}"),
    ],
    ids=["openai", "anthropic"],
)
async def test_key_of_a_model_provider_in_a_dotenv_file(
    reader: Adopter, server: Target, variable: str, secret: str, path: str, header: str, value: str
) -> None:
    dotenv = reader.folder / ".env"
    before = f"DEBUG=1\n{variable}={secret}\nOTHER=x\n"
    dotenv.write_text(before)
    dotenv.chmod(0o640)
    reader.secrets.append(secret)
    target, url = f"llm-{reader.mark}", f"http://127.0.0.1:{server.port}"
    words = (
        ".env", "--target", target, "--url", url, "--agent", reader.agent,
        "--allow", f"{target}:generate:model/m-1",
    )  # fmt: skip

    shown = await reader.adopt(*words, "--dry-run")
    assert url in shown
    assert f"target add {target}" in shown
    assert not reader.state()
    assert not reader.place(target).exists()

    printed = await reader.adopt(*words)
    assert "agent_can_read" in printed
    assert dotenv.read_text() == before.replace(secret, "replaced-by-ringfence")
    assert stat.S_IMODE(dotenv.stat().st_mode) == 0o640
    assert reader.place(target).read_text() == secret
    assert stat.S_IMODE(reader.place(target).stat().st_mode) == 0o600
    assert reader.state()[f"{target}.old"].decode() == before
    assert secret.encode() not in reader.state()[f"{target}.json"]
    assert [one.values(header) for one in server.requests] == [[value.format(secret)]]

    # The agent's program, started as adopt said.
    launch = next(line for line in printed.splitlines() if line.endswith(" COMMAND"))
    program = shlex.split(launch.removesuffix(" COMMAND"))
    program = [part for word in program for part in (PROGRAM if word == "ringfence" else (word,))]
    own = {"Authorization": "Bearer replaced-by-ringfence", "x-api-key": "replaced-by-ringfence"}
    for asked, status in ((ASK, 200), ({**ASK, "stream": True}, 200), ({**ASK, "model": "m-2"}, 403)):
        call = (sys.executable, "-c", _CALL, f"{url}{path}", json.dumps(asked), json.dumps(own))
        answer = await reader.run(*program, *call)
        assert f"{status} " in answer, answer
    assert [one.values(header) for one in server.requests] == [[value.format(secret)]] * 3

    # The exposed key is not what it ends with.
    refused = await reader.adopt("--target", target, "--finish", status=1)
    assert "rotate" in refused
    rotated = secret[::-1]
    reader.secrets.append(rotated)
    reader.place(target).write_text(rotated)
    assert "agent_can_read" in await reader.adopt("--target", target, "--finish", status=1)
    why = "one developer, one machine"
    await reader.adopt("--target", target, "--finish", "--accept-agent-can-read", why)
    assert not reader.state()
    async with asyncio.timeout(60):
        while why not in await reader.ringfence("--operator", "--json", "audit", "trace", reader.agent):
            pass
    call = (sys.executable, "-c", _CALL, f"{url}{path}", json.dumps(ASK), json.dumps(own))
    assert "200 " in await reader.run(*program, *call)
    assert server.requests[-1].values(header) == [value.format(rotated)]


def dotenv_with_key(reader: Adopter, server: Target) -> tuple[Path, str, tuple[str, ...]]:
    """A file with an OpenAI key, the new target's id, and the words that begin its adoption."""
    dotenv = reader.folder / ".env"
    dotenv.write_text(f"OPENAI_API_KEY={OPENAI}\n")
    reader.secrets.append(OPENAI)
    target = f"llm-{reader.mark}"
    url = f"http://127.0.0.1:{server.port}"
    return (
        dotenv,
        target,
        (
            ".env",
            "--target",
            target,
            "--url",
            url,
            "--agent",
            reader.agent,
            "--allow",
            f"{target}:generate:model/m-1",
        ),
    )


@pytest.mark.timeout(300)
async def test_adoption_goes_on_after_each_interruption_and_goes_back(
    reader: Adopter, server: Target
) -> None:
    dotenv, target, words = dotenv_with_key(reader, server)
    before = dotenv.read_text()
    for number in range(STEPS):
        # The step that was not marked is done again, and then the next one.
        reader.environment["STEPS"] = "2" if number else "1"
        await reader.adopt(*words, status=9, program=(sys.executable, "-c", _KILLED))
    await reader.adopt("--target", target)
    assert OPENAI not in dotenv.read_text()
    active = json.loads(await reader.ringfence("--user", "--json", "task", "list"))
    assert len(active) == 1

    await reader.adopt("--target", target, "--undo")
    assert dotenv.read_text() == before
    assert not reader.place(target).exists()
    assert not reader.state()
    (task,) = json.loads(await reader.ringfence("--user", "--json", "task", "list"))
    assert task["state"]["status"] == "ended"
    shown = json.loads(await reader.ringfence("--operator", "--json", "target", "show", target))
    assert shown["state"]["status"] == "removed"
    shown = json.loads(await reader.ringfence("--sponsor", "--json", "agent", "show", reader.agent))
    assert shown["state"]["ceiling"] == []
    shown = json.loads(await reader.ringfence("--operator", "--json", "user", "show", f"maria-{reader.mark}"))
    assert shown["state"]["entitlements"]["scope"] == []

    # And once more, with the agent that is there already.
    await reader.adopt(*words)
    assert OPENAI not in dotenv.read_text()


@pytest.mark.timeout(300)
async def test_each_person_runs_what_adopt_prints(reader: Adopter, server: Target) -> None:
    dotenv, target, words = dotenv_with_key(reader, server)
    maria = ("--on-behalf-of", f"maria-{reader.mark}")
    printed = await reader.adopt(*words, *maria, without=["--operator"], status=1)
    for step in ("target", "entitlement"):
        assert f"stopped at: {step}" in printed
        await reader.as_printed(printed, "--operator")
        printed = await reader.adopt("--target", target, without=["--operator", "--sponsor"], status=1)
    assert "stopped at: agent" in printed
    await reader.as_printed(printed, "--sponsor")
    printed = await reader.adopt("--target", target, without=["--user"], status=1)
    assert "stopped at: task" in printed
    assert OPENAI in dotenv.read_text()
    await reader.as_printed(printed, "--user")
    await reader.adopt("--target", target, without=["--user"])
    assert OPENAI not in dotenv.read_text()


_HUB = """
import os, httpx
from mcp.server.fastmcp import FastMCP
server = FastMCP("hub")
@server.tool()
def get(path: str) -> str:
    answer = httpx.get(os.environ["HUB_URL"] + path, headers={"Authorization": "Bearer " + os.environ["GITHUB_TOKEN"]})
    return f"{answer.status_code} {os.environ['GITHUB_TOKEN']}"
server.run()
"""
"""An MCP server with a token of its own, as many are started."""


@pytest.mark.timeout(300)
async def test_github_token_in_the_configuration_of_an_mcp_client(reader: Adopter) -> None:
    token = MAKE.crc_token("ghp")
    reader.secrets.append(token)
    (reader.folder / "hub.py").write_text(_HUB)
    config = reader.folder / ".cursor" / "mcp.json"
    config.parent.mkdir()
    target = f"hub-{reader.mark}"
    async with Target().serving() as server:
        url = f"http://127.0.0.1:{server.port}"
        started = [sys.executable, str(reader.folder / "hub.py")]
        env = {"GITHUB_TOKEN": token, "HUB_URL": url}
        entry = {"command": started[0], "args": started[1:], "env": env}
        before = json.dumps({"mcpServers": {"hub": entry}, "other": [1, "ä"]})
        config.write_text(before)
        words = ("--target", target, "--url", url, "--agent", reader.agent, "--trial", "/repos/acme/shop")
        printed = await reader.adopt(".cursor/mcp.json", *words)
        assert f"{config} starts hub so already" in " ".join(printed.split())
        assert [one.target for one in server.requests] == ["/repos/acme/shop"]

        changed = json.loads(config.read_text())
        hub = changed["mcpServers"]["hub"]
        assert changed["other"] == [1, "ä"]
        assert hub["env"] == {"GITHUB_TOKEN": "replaced-by-ringfence", "HUB_URL": url}
        assert hub["args"][-2:] == started
        how = StdioServerParameters(
            command=hub["command"], args=hub["args"], env=reader.environment | hub["env"], cwd=reader.folder
        )
        with (reader.folder / "stderr").open("w") as errors:
            async with stdio_client(how, errors) as streams, ClientSession(*streams) as session:
                await session.initialize()
                answers = [
                    await session.call_tool("get", {"path": path}) for path in ("/repos/acme/site", "/user")
                ]
        texts = [one.text for answer in answers for one in answer.content if isinstance(one, TextContent)]
        assert texts == ["200 replaced-by-ringfence", "403 replaced-by-ringfence"]
        assert [one.target for one in server.requests] == ["/repos/acme/shop", "/repos/acme/site"]
        assert {one.values("authorization")[0] for one in server.requests} == {f"Bearer {token}"}
    await reader.adopt("--target", target, "--undo")
    assert config.read_text() == before


async def test_password_is_no_key_of_an_api(reader: Adopter) -> None:
    (reader.folder / ".my.cnf").write_text(f"[client]\nuser=app\npassword={MAKE.token(20)}\n")
    printed = await reader.adopt(".my.cnf", "--target", "shop", "--url", "http://127.0.0.1:1", status=1)
    assert "only keys of HTTP APIs" in printed


async def test_host_in_the_file_gets_no_secret(reader: Adopter) -> None:
    (reader.folder / ".env").write_text(f"OPENAI_BASE_URL=https://evil.example/v1\nOPENAI_API_KEY={OPENAI}\n")
    allow = f"llm-{reader.mark}:generate:model/m-1"
    shown = await reader.adopt(".env", "--target", f"llm-{reader.mark}", "--allow", allow, "--dry-run")
    assert "sends it to https://api.openai.com, of the template" in shown
    assert "evil" not in shown


@pytest.mark.timeout(300)
async def test_file_that_changed_meanwhile_is_left_alone(reader: Adopter, server: Target) -> None:
    dotenv, target, words = dotenv_with_key(reader, server)
    printed = await reader.adopt(*words, without=["--sponsor"], status=1)
    changed = f"OPENAI_API_KEY={OPENAI}\nNEW=1\n"
    dotenv.write_text(changed)
    printed = await reader.adopt("--target", target, status=1)
    assert "changed since it was looked at" in printed
    assert dotenv.read_text() == changed
    assert "not done yet: file" in await reader.adopt("--target", target, "--finish", status=1)


@pytest.mark.timeout(300)
async def test_trial_that_the_provider_refuses_leaves_the_key_in_the_file(reader: Adopter) -> None:
    refusal = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n"
    async with Target(respond=lambda _: refusal).serving() as server:
        dotenv, _, words = dotenv_with_key(reader, server)
        printed = await reader.adopt(*words, status=1)
        assert "stopped at: trial" in printed
        assert "/v1/models: 401" in printed
        assert OPENAI in dotenv.read_text()


_SERVER = """
import os
from mcp.server.fastmcp import FastMCP
from mcp.types import ToolAnnotations
server = FastMCP("notes")
@server.tool(annotations=ToolAnnotations(readOnlyHint=True))
def get_note(folder: str) -> str:
    return folder
@server.tool()
def delete_notes(folder: str) -> str:
    return folder
@server.tool(name="x' ; touch planted ; '", annotations=ToolAnnotations(readOnlyHint=True))
def odd() -> str:
    return "odd"
assert not [name for name in os.environ if name.startswith("RINGFENCE")]
server.run()
"""


@pytest.mark.timeout(300)
async def test_suggestion_for_an_mcp_server_is_run_as_it_is_printed(reader: Adopter) -> None:
    program = reader.folder / "notes.py"
    program.write_text(_SERVER)
    target = f"notes-{reader.mark}"
    wrap = ("mcp", "wrap", "--suggest", "--target", target, "--", sys.executable, str(program))
    printed = await reader.ringfence("--user", *wrap)
    commands = [line for line in printed.splitlines() if line.startswith("ringfence ")]
    assert [line.split()[1:3] for line in commands] == [
        ["target", "add"], ["user", "set"], ["agent", "register"], ["task", "assign"], ["mcp", "wrap"],
    ]  # fmt: skip
    assert "planted" not in "".join(commands)
    assert f"  {target}:call:tool/delete_notes" in printed.splitlines()
    for role, line in zip(("--operator", "--operator", "--sponsor", "--user"), commands, strict=False):
        known = {
            "USER": f"maria-{reader.mark}",
            "AGENT": reader.agent,
            "runner=RUNNER life=1h": "runner=r-1 life=1h",
        }
        await reader.ringfence(role, *(known.get(word, word) for word in shlex.split(line)[1:]))
    task = json.loads(await reader.ringfence("--user", "--json", "task", "list"))[0]["state"]
    allowed = {(one["verbs"][0], *one["resources"]) for one in task["scope"]}
    assert allowed == {("connect", "server"), ("read", "tool/get_note")}


async def test_suggestion_says_that_a_program_is_no_mcp_server(reader: Adopter) -> None:
    wrap = ("mcp", "wrap", "--suggest", "--target", "notes", "--", sys.executable, "-c", "print('hello')")
    assert "did not list its tools" in await reader.run(*PROGRAM, *wrap, status=1)
