"""`ringfence mcp wrap --suggest`: the tools of an MCP server, and the commands that would put it behind a target.

The server runs once, outside of a sandbox, with an empty environment: there is no task yet that a run could be in. What
it says is a stranger's text: a tool is named in a command only if its name is a plain word, and a hint gives nothing
that the person does not run as a command of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ringfence import __version__
from ringfence.cli.shared.output import note, print_table, say
from ringfence.client.errors import InvalidCallError
from ringfence.messages.base import Permission

_REVISION: Final = "2025-11-25"
_WITHIN_S: Final = 30.0
_LONGEST_LINE: Final = 4 * 1024 * 1024
_MOST_PAGES: Final = 20
_MOST_TOOLS: Final = 64
"""So many resources fit in a permission."""
_PLAIN: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    reads: bool
    """The server's own word (`readOnlyHint`), unverified."""

    @property
    def verb(self) -> str:
        return "read" if self.reads else "call"


def suggest(target: str, server: Sequence[str]) -> None:
    """Print a server's tools, and commands to put it behind a target. Raises InvalidCallError if it does not answer."""
    tools = sorted(asyncio.run(_tools_of(server)), key=lambda tool: (not tool.reads, tool.name))
    print_table(["verb", "tool"], ([one.verb, one.name] for one in tools), empty="the server has no tools")
    plain = [one for one in tools if _PLAIN.fullmatch(one.name)][:_MOST_TOOLS]
    if left := len(tools) - len(plain):
        note(f"{left} of them have no plain name, or are too many: nothing below allows them", "warning")
    note("read is what the server says of itself; look at these tools before you run the commands", "warning")
    for line in _commands(target, plain, server):
        say(line)


def _commands(target: str, tools: Sequence[Tool], server: Sequence[str]) -> Iterator[str]:
    reading = tuple(one.name for one in tools if one.reads)
    calling = tuple(one.name for one in tools if not one.reads)
    scope = [_short(target, "connect", ["server"])]
    scope += [_short(target, "read", [f"tool/{name}" for name in reading])] if reading else []
    allow = [word for one in scope for word in ("--allow", one)]
    rules = [
        word
        for name in reading
        for word in ("--request", f"MCP /mcp read tool/{name} message:tools/call={name}")
    ]
    verb = ["--verb", "read"] if reading else []
    yield _line(
        "target", "add", target, "--description", "an MCP server on standard input and output", "--template", "mcp",
        "--backend", "jwt", "--setting", "url=stdio://run", *verb, *rules,
    )  # fmt: skip
    yield _line("user", "set", "USER", *(word for one in scope for word in ("--add", one)))
    yield _line(
        "agent",
        "register",
        "AGENT",
        "--description",
        f"uses {target}",
        "--selector",
        "runner=RUNNER life=1h",
        *allow,
    )
    yield _line("task", "assign", "AGENT", "--purpose", f"use {target}", *allow, "--for", "1h")
    yield _line("mcp", "wrap", "--task", "TASK", "--target", target, "--", *server)
    if calling:
        say("Each of these may change something; add to user, agent and task only what is needed:", "heading")
        yield from (f"  {_short(target, 'call', [f'tool/{name}'])}" for name in calling)


def _short(target: str, verb: str, resources: Sequence[str]) -> str:
    from ringfence.cli.shared.arguments import write_permission

    return write_permission(Permission(target=target, verbs=(verb,), resources=tuple(resources)))


def _line(*words: str) -> str:
    return shlex.join(("ringfence", *words))


async def _tools_of(server: Sequence[str]) -> list[Tool]:
    """Start the server, ask for its tools, and end it. Raises InvalidCallError."""
    pipe = asyncio.subprocess.PIPE
    with tempfile.TemporaryDirectory() as home:
        environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": home}
        try:
            process = await asyncio.create_subprocess_exec(
                *server, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL, env=environment,
                limit=_LONGEST_LINE,
            )  # fmt: skip
        except OSError as error:
            raise InvalidCallError(f"{server[0]} does not start: {error.strerror}") from None
        try:
            async with asyncio.timeout(_WITHIN_S):
                return await _listed(process)
        except (TimeoutError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError):
            raise InvalidCallError(
                f"{server[0]} did not list its tools within {_WITHIN_S:.0f} s, as MCP has it"
            ) from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def _listed(process: asyncio.subprocess.Process) -> list[Tool]:
    client = {"name": "ringfence", "version": __version__}
    await _ask(process, 0, "initialize", protocolVersion=_REVISION, capabilities={}, clientInfo=client)
    await _send(process, {"method": "notifications/initialized"})
    tools: list[Tool] = []
    cursor: dict[str, Any] = {}
    for number in range(1, _MOST_PAGES + 1):
        page = await _ask(process, number, "tools/list", **cursor)
        for one in page["tools"]:
            hints = one.get("annotations") or {}
            tools.append(Tool(str(one["name"]), hints.get("readOnlyHint") is True))
        if not page.get("nextCursor"):
            break
        cursor = {"cursor": page["nextCursor"]}
    return tools


async def _ask(process: asyncio.subprocess.Process, number: int, method: str, **params: Any) -> Any:
    """Return the result of a request; other messages of the server are ignored. Raises LookupError for an error."""
    await _send(process, {"id": number, "method": method, "params": params})
    assert process.stdout is not None
    while line := await process.stdout.readline():
        answer = json.loads(line)
        if answer.get("id") == number and "method" not in answer:
            return answer["result"]
    raise EOFError


async def _send(process: asyncio.subprocess.Process, message: dict[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")
    await process.stdin.drain()
