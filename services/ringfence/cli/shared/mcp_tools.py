"""The tools of an MCP server on standard input and output, and what a target, a ceiling and a task need for them.

What a server says is a stranger's text: a tool is named in a command only if its name is a plain word, and a hint gives
nothing that the person does not run as a command of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from ringfence import __version__
from ringfence.cli.shared.arguments import write_permission
from ringfence.client.errors import InvalidCallError
from ringfence.kernel.base.text import Lines
from ringfence.messages.base import Permission

_REVISION: Final = "2025-11-25"
_WITHIN_S: Final = 60.0
_END_S: Final = 10.0
_LONGEST_LINE: Final = 4 * 1024 * 1024
_MOST_PAGES: Final = 20
_MOST_TOOLS: Final = 64
"""So many resources fit in a permission."""
_PLAIN: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_LAST_LINES: Final = 12

Process = asyncio.subprocess.Process
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    reads: bool
    """The server's own word (`readOnlyHint`), unverified."""

    @property
    def verb(self) -> str:
        return "read" if self.reads else "call"


class MessageRefusedError(ValueError):
    """Raised for a JSON-RPC error."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code
        """The gateway's code; empty if the error is the server's own."""


def plain_tools(tools: Iterable[Tool]) -> list[Tool]:
    """Return the tools that a command may name, at most `_MOST_TOOLS`."""
    return [one for one in tools if _PLAIN.fullmatch(one.name)][:_MOST_TOOLS]


def target_options(tools: Iterable[Tool]) -> tuple[str, ...]:
    """Return the options of `ringfence target add` for a server in a run with these tools."""
    reading = [one.name for one in tools if one.reads]
    rules = [f"MCP /mcp read tool/{name} message:tools/call={name}" for name in reading]
    return (
        "--template", "mcp", "--backend", "jwt", "--setting", "url=stdio://run",
        *(["--verb", "read"] if reading else []), *(word for rule in rules for word in ("--request", rule)),
    )  # fmt: skip


def tool_permissions(target: str, tools: Iterable[Tool]) -> tuple[str, ...]:
    """Return the permissions to connect, and to call the tools that only read, in the form of `--allow`."""
    reading = tuple(f"tool/{one.name}" for one in tools if one.reads)
    scope = [Permission(target=target, verbs=("connect",), resources=("server",))]
    scope += [Permission(target=target, verbs=("read",), resources=reading)] if reading else []
    return tuple(map(write_permission, scope))


def with_server(
    server: Sequence[str], work: Callable[[Process], Awaitable[T]], environment: Mapping[str, str]
) -> T:
    """Start a server, do something with it, and end it. Raises InvalidCallError.

    `environment`: all that it gets, besides an empty home folder where that has none.
    """
    return asyncio.run(_with_server(server, work, environment))


async def _with_server(
    server: Sequence[str], work: Callable[[Process], Awaitable[T]], environment: Mapping[str, str]
) -> T:
    pipe = asyncio.subprocess.PIPE
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryFile() as errors:
        try:
            process = await asyncio.create_subprocess_exec(
                *server, stdin=pipe, stdout=pipe, stderr=errors, env={"HOME": home, **environment},
                limit=_LONGEST_LINE,
            )  # fmt: skip
        except OSError as error:
            raise InvalidCallError(f"{server[0]} does not start: {error.strerror}") from None
        try:
            async with asyncio.timeout(_WITHIN_S):
                return await work(process)
        except (TimeoutError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError):
            errors.seek(0)
            said = errors.read().decode(errors="replace").splitlines()[-_LAST_LINES:]
            problem = f"{server[0]} did not list its tools within {_WITHIN_S:.0f} s, as MCP has it"
            raise InvalidCallError(Lines([problem, *said])) from None
        finally:
            await _end(process)


async def _end(process: Process) -> None:
    """Close a server's input, as MCP ends it, and kill it if it stays."""
    assert process.stdin is not None
    process.stdin.close()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_END_S):
            await process.wait()
            return
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()


async def list_tools(process: Process) -> list[Tool]:
    """Return the tools of a server that has just started. Raises EOFError, and ValueError and its like for bad JSON."""
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


async def call_refused(process: Process, tool: str) -> str:
    """Call a tool without arguments, after `list_tools`. Returns the gateway's code; empty if it refused nothing."""
    try:
        await _ask(process, _MOST_PAGES + 1, "tools/call", name=tool, arguments={})
    except MessageRefusedError as error:
        return error.code
    return ""


async def _ask(process: Process, number: int, method: str, **params: Any) -> Any:
    """Return the result of a request; skips other messages of the server. Raises MessageRefusedError, EOFError."""
    await _send(process, {"id": number, "method": method, "params": params})
    assert process.stdout is not None
    while line := await process.stdout.readline():
        answer = json.loads(line)
        if answer.get("id") == number and "method" not in answer:
            if "result" not in answer:
                data = answer["error"].get("data")
                raise MessageRefusedError(str(data.get("code", "")) if isinstance(data, dict) else "")
            return answer["result"]
    raise EOFError


async def _send(process: Process, message: dict[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")
    await process.stdin.drain()
