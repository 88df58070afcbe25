"""`ringfence mcp wrap --suggest`: the tools of an MCP server, and the commands that would put it behind a target.

The server runs once, outside of a sandbox, with an empty environment: there is no task yet that a run could be in.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence

from ringfence.cli.shared.arguments import write_permission
from ringfence.cli.shared.mcp_tools import (
    Tool,
    list_tools,
    plain_tools,
    target_options,
    tool_permissions,
    with_server,
)
from ringfence.cli.shared.output import note, print_table, say
from ringfence.messages.base import Permission


def suggest(target: str, server: Sequence[str]) -> None:
    """Print a server's tools, and commands to put it behind a target. Raises InvalidCallError if it does not answer."""
    found = with_server(server, list_tools, {"PATH": os.environ.get("PATH", os.defpath)})
    tools = sorted(found, key=lambda tool: (not tool.reads, tool.name))
    print_table(["verb", "tool"], ([one.verb, one.name] for one in tools), empty="the server has no tools")
    plain = plain_tools(tools)
    if left := len(tools) - len(plain):
        note(f"{left} of them have no plain name, or are too many: nothing below allows them", "warning")
    note("read is what the server says of itself; look at these tools before you run the commands", "warning")
    for line in _commands(target, plain, server):
        say(line)


def _commands(target: str, tools: Sequence[Tool], server: Sequence[str]) -> Iterator[str]:
    scope = tool_permissions(target, tools)
    allow = [word for one in scope for word in ("--allow", one)]
    yield _line(
        "target", "add", target, "--description", "an MCP server on standard input and output",
        *target_options(tools),
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
    if calling := [one.name for one in tools if not one.reads]:
        say("Each of these may change something; add to user, agent and task only what is needed:", "heading")
        for name in calling:
            permission = Permission(target=target, verbs=("call",), resources=(f"tool/{name}",))
            yield f"  {write_permission(permission)}"


def _line(*words: str) -> str:
    return shlex.join(("ringfence", *words))
