"""`ringfence __complete`: what the scripts of the shells ask when somebody presses TAB.

It prints candidates or nothing. It never asks a question and never prints an error. Where ids have to be looked up, it
ends within `LIMIT_S`.

Where ids and names come from: the same services and topics that the commands themselves read.

Each source returns what the caller may see. Errors are for `complete`, which then offers nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

from ringfence.cli.completion import command_line
from ringfence.cli.completion.command_line import (
    NOTHING,
    Candidate,
    Completion,
    Slot,
    Typed,
    found_completion,
    static_completion,
)
from ringfence.cli.shared.id_lookup import IdKind, known_ids
from ringfence.cli.shared.output import moment
from ringfence.client.reports.read_api import ReadApi
from ringfence.client.settings import ClientSettings
from ringfence.kernel.base.settings import load
from ringfence.kernel.base.text import span
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.registry import TaskState

NEW_NAMES: Final = frozenset({("agent", "register"), ("user", "add"), ("target", "add")})
"""Commands whose argument names what is not there yet."""
_TIMEOUT_S: Final = 1.5


@dataclass(frozen=True, slots=True)
class Lookup:
    """The caller of a completion, and the rest of the command line."""

    typed: Typed
    settings: ClientSettings
    key: SigningKey
    """The key of the identity that the command would use."""
    agent: str | None
    """The agent whose key that is; None for people's keys."""

    def api(self) -> ReadApi:
        """Return the read API, as the person who asks.

        Services answer people only. For an agent's key that `--identity` names, the person is the one in the settings.
        """
        key = self.key
        if self.agent is not None and self.settings.identity is not None:
            key = SigningKey.load(self.settings.identity)
        return ReadApi(key, self.settings, timeout_s=_TIMEOUT_S)


Source = Callable[[Lookup], Awaitable[list[Candidate]]]


def lookup(typed: Typed, identity: Path | None) -> Lookup:
    """Return the lookup for a command line. Raises SettingsError, KeyFileError, IdentityError."""
    from ringfence.client.key_file import load_key
    from ringfence.model.identity.spiffe_ids import subject_of

    settings = load(ClientSettings)
    key = load_key(identity, settings)
    return Lookup(typed, settings, key, subject_of(settings.trust_domain, key.id, "agent"))


async def _agents(ask: Lookup) -> list[Candidate]:
    async with ask.api() as api:
        states = [item["state"] for item in await api.records("agent")]
    return [
        Candidate(one["agent_id"], f"{one['status']}, sponsor {one['sponsor']}: {one['description']}")
        for one in states
    ]


async def _users(ask: Lookup) -> list[Candidate]:
    async with ask.api() as api:
        states = [item["state"] for item in await api.records("user")]
    return [
        Candidate(one["user_id"], ", ".join([one["status"], *one.get("roles", ()), one["name"]]))
        for one in states
    ]


async def _provisioners(ask: Lookup) -> list[Candidate]:
    async with ask.api() as api:
        states = [item["state"] for item in await api.records("user")]
    return [
        Candidate(one["user_id"], f"{one['status']}, {one['name']}")
        for one in states
        if one.get("delegation")
    ]


async def _targets(ask: Lookup) -> list[Candidate]:
    async with ask.api() as api:
        states = [item["state"] for item in await api.records("target")]
    return [
        Candidate(one["target_id"], f"{one['status']}, {one['backend']['kind']}: {one['description']}")
        for one in states
    ]


_ENDED_TASKS_TOO: Final = frozenset({("task", "show"), ("audit", "export"), ("audit", "tail")})


async def _tasks(ask: Lookup) -> list[Candidate]:
    """Return tasks, the next to end first. Those that ended are offered only where one may ask about them."""
    if ask.agent is not None and ask.settings.identity is None:
        states = await _own_tasks(ask)
    else:
        async with ask.api() as api:
            states = [item["state"] for item in await api.records("task", agent=ask.agent)]
    now_s = time.time()
    running = [one for one in states if one["status"] == "active" and one["not_after"] > now_s]
    ended = [one for one in states if one not in running] if ask.typed.path in _ENDED_TASKS_TOO else []
    return [
        Candidate(one["task_id"], f"{one['agent_id']}, {_ends(one['not_after'], now_s)}: {one['purpose']}")
        for one in [
            *sorted(running, key=lambda one: int(one["not_after"])),
            *sorted(ended, key=lambda one: -int(one["not_after"])),
        ]
    ]


async def _own_tasks(ask: Lookup) -> list[dict[str, Any]]:
    """Return an agent's tasks from the topics, whose records it verifies itself: no API answers agents."""
    from ringfence.client.connection import Connection

    async with Connection(ask.key, ask.settings) as connection:
        directory = await connection.directory()
        states = [entry.state for entry in directory.entries("task")]
    return [
        one.model_dump(include={"task_id", "agent_id", "status", "not_after", "purpose"})
        for one in states
        if isinstance(one, TaskState) and one.agent_id == ask.agent
    ]


async def _leases(ask: Lookup) -> list[Candidate]:
    async with ask.api() as api:
        leases = (await api.leases(agent=ask.agent))["leases"]
    now_s = time.time()
    return [
        Candidate(
            one["id"],
            f"{one['agent_id']}, {', '.join(item['target'] for item in one['scope'])}, {_ends(one['deadline'], now_s)}",
        )
        for one in leases
        if ask.agent is None or one["agent_id"] == ask.agent
    ]


async def _runs(ask: Lookup) -> list[Candidate]:
    """Return runs, the latest first. Those that are over are offered only where one may ask about them."""
    async with ask.api() as api:
        runs = (await api.runs(agent=ask.agent, all=ask.typed.path == ("run", "show")))["runs"]
    return [Candidate(one["id"], f"{one['agent_id']}, {one['status']}, by {one['runner']}") for one in runs]


async def _requests(ask: Lookup) -> list[Candidate]:
    """Return the requests that wait for the caller; for other commands those that they take."""
    if ask.typed.path == ("policy", "explain"):
        return await _from_audit(ask, "request")
    if ask.typed.path == ("break-glass", "review"):
        async with ask.api() as api:
            uses = await api.break_glass(unreviewed=True)
        return [
            Candidate(
                str(one["request_id"]),
                f"{one['agent']}, {moment(one['at_ms'] / 1000)}: {one['reason'] or ''}",
            )
            for one in uses
        ]
    from ringfence.client.approvals.sponsor import Sponsor

    now_s = time.time()
    async with Sponsor.connect(ask.key, ask.settings) as sponsor:
        everyone = ask.typed.path == ("approvals", "show")
        found = [
            Candidate(
                one.request_id,
                f"{one.agent}, {one.target}, {_ends(one.expires_at, now_s)}: {one.reason}",
            )
            for one in sponsor.pending(everyone=everyone)
        ]
        if ask.typed.path == ("approvals", "grant"):
            return found  # only a request is like another one
        return found + [
            Candidate(
                one.request_id,
                f"{one.agent}, {one.target}, {_ends(one.expires_at, now_s)}: one action, {one.verb}",
            )
            for one in sponsor.actions(everyone=everyone)
        ]


async def _grants(ask: Lookup) -> list[Candidate]:
    async with ask.api() as api:
        grants = (await api.get("policy", "grants"))["grants"]
    now_s = time.time()
    return [
        Candidate(
            str(one["grant_id"]),
            f"{one['agent_id']}, {one['used']} of {one['count']} used, {_ends(one['ends_at'], now_s)}",
        )
        for one in grants
        if one["status"] == "active"
    ]


async def _proposals(ask: Lookup) -> list[Candidate]:
    async with ask.api() as api:
        listed = await api.proposals()
    return [Candidate(one["id"], f"{one['typ']} {one['subject']}, by {one['author']}") for one in listed]


async def _any(ask: Lookup) -> list[Candidate]:
    """Return what a trace can begin with."""
    kind = ask.typed.option("kind")
    if kind == "agent":
        return await _agents(ask)
    if kind == "user":
        return await _users(ask)
    if kind in ("task", "lease", "request"):
        return await _from_audit(ask, kind)  # type: ignore[arg-type]
    return [*await _agents(ask), *await _from_audit(ask, None)]


async def _from_audit(ask: Lookup, kind: IdKind | None) -> list[Candidate]:
    async with ask.api() as api:
        return [Candidate(id, words) for id, words in (await known_ids(api, kind)).items()]


SOURCES: Final[Mapping[str, Source]] = {
    "AGENT": _agents,
    "GRANT": _grants,
    "ID": _any,
    "LEASE": _leases,
    "PROPOSAL": _proposals,
    "PROPOSAL...": _proposals,
    "PROVISIONER": _provisioners,
    "REQUEST": _requests,
    "RUN": _runs,
    "TARGET": _targets,
    "TASK": _tasks,
    "[TASK]": _tasks,
    "USER": _users,
}
"""By the placeholder of an argument or option."""


def _ends(at_s: float, now_s: float) -> str:
    return f"expires in {span(at_s - now_s)}" if at_s > now_s else "ended"


def words_of(path: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """Return the words by placeholder or by option, for the options of one command."""
    match tuple(path):
        case ("dev",):
            from ringfence.client.admin.trust_setup import ON_DEMAND

            return {"SERVICE": tuple(ON_DEMAND)}
        case ("serve",):
            from ringfence.client.admin.trust_setup import BY_NAME, ON_DEMAND, SERVICE_ROLES

            return {"SERVICE...": (*SERVICE_ROLES, *ON_DEMAND, *BY_NAME, "sign-page")}
        case ("init",):
            from ringfence.client.admin.trust_setup import ON_DEMAND, SERVICE_ROLES

            return {
                "--add-service": tuple(ON_DEMAND),
                "--rotate-service": (*SERVICE_ROLES, *ON_DEMAND),
                "USE": ("users", "instances"),
            }
        case ("user", _):
            from ringfence.messages.registry import Role

            return {"ROLE": get_args(Role)}
        case ("target", "add"):
            from ringfence.cli.commands.target_templates import TEMPLATES
            from ringfence.model.target_settings import CREDENTIAL_KINDS

            return {"--backend": tuple(CREDENTIAL_KINDS), "--template": tuple(TEMPLATES)}
        case ("request",) | ("release",) | ("mcp", "serve"):
            return {"SOURCE": ("file:", "github", "gcp")}
        case ("completion",):
            return {"SHELL": ("bash", "zsh", "fish")}
    return {}


LOOKUP_S: Final = 1.5
"""How long services and Kafka may take to name ids."""
LIMIT_S: Final = 2.0
"""How long a lookup may take with all that surrounds it. After this time the process ends."""
_BASH_LISTS: Final = frozenset({9, 33, 63, 64})
"""Values of COMP_TYPE (TAB, `!`, `?`, `@`) with which bash shows a list, and inserts only what all lines begin with."""
_GAP: Final = "  "


def main(root: Any, helps: dict[str, str], words: Sequence[str]) -> int:
    """Print candidates for a shell. Never fails.

    Args:
        root: the group of all commands.
        helps: the one-line help of each of its commands.
        words: the shell, and what its script passes on.
    """
    _go_silent()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    with contextlib.suppress(Exception):  # nothing may disturb who types
        sys.stdout.write(answer(root, helps, words))
        sys.stdout.flush()
    return 0


def answer(root: Any, helps: dict[str, str], words: Sequence[str]) -> str:
    """Return what `__complete` prints: the kind of completion, then a candidate on each line."""
    shell, *rest = words
    if shell == "bash":
        current, line, comp_type, columns = rest
        *before, typed_word = command_line.split(line)
        completion = complete(root, helps, command_line.without_command(before), typed_word)
        return _lines(completion, _for_bash(completion, typed_word, current, int(comp_type), int(columns)))
    *before, typed_word = rest
    completion = complete(root, helps, command_line.without_command(before), typed_word)
    shown = map(_for_zsh if shell == "zsh" else _for_fish, completion.candidates)
    return _lines(completion, shown)


def complete(root: Any, helps: dict[str, str], before: Sequence[str], current: str) -> Completion:
    """Return what completes `current`, after the finished words `before`. Never raises for what is typed."""
    typed = command_line.read(root, before)
    if typed is None or (where := command_line.slot(typed, current)) is None:
        return NOTHING
    completion = static_completion(typed, where, helps, words_of(typed.path))
    return completion if completion is not None else _looked_up(typed, where)


def _looked_up(typed: Typed, where: Slot) -> Completion:
    source = SOURCES.get(where.param.metavar)
    if source is None or (where.param.param_type_name == "argument" and typed.path in NEW_NAMES):
        return NOTHING
    named = typed.option("me") or typed.option("identity")
    identity = Path(named).expanduser() if named else None  # the shell would have expanded it

    async def work() -> list[Candidate]:
        async with asyncio.timeout(LOOKUP_S):
            return await source(lookup(typed, identity))

    with _ended_after(LIMIT_S):
        return found_completion(where, asyncio.run(work()))


@contextlib.contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """End the process after this time, whatever it waits for: a name server, a key file that is a pipe."""
    watchdog = threading.Timer(seconds, os._exit, [0])
    watchdog.daemon = True
    watchdog.start()
    try:
        yield
    finally:
        watchdog.cancel()


def _lines(completion: Completion, lines: Any) -> str:
    return "".join(f"{line}\n" for line in (completion.kind, *lines))


def _for_bash(completion: Completion, word: str, current: str, comp_type: int, columns: int) -> list[str]:
    """Return the lines of COMPREPLY.

    Bash puts in what it gets, so a description may stand only where bash shows a list: then it puts in what all lines
    begin with, and as values differ and have no spaces, that is part of a value. Bash ends a word at some characters
    too (`=`, `:`), and replaces only what comes after.
    """
    kept = (
        len(word) - len(current) if current and word.endswith(current) else (len(word) if not current else 0)
    )
    values = [(one.value[kept:], one.description) for one in completion.candidates]
    if len(values) < 2 or comp_type not in _BASH_LISTS:
        return [value for value, _ in values]
    width = max(len(value) for value, _ in values)
    room = columns - width - len(_GAP) - 1
    return [
        f"{value:{width}}{_GAP}{description[:room]}" if description and room > 10 else value
        for value, description in values
    ]


def _for_zsh(one: Candidate) -> str:
    """Return a line for `_describe`, which ends the value at the first colon."""
    value = one.value.replace(":", "\\:")
    return f"{value}:{one.description.replace(chr(92), chr(92) * 2)}" if one.description else value


def _for_fish(one: Candidate) -> str:
    return f"{one.value}\t{one.description}" if one.description else one.value


def _go_silent() -> None:
    """Leave stdout alone, and make stdin and stderr the null device: nothing is asked, nothing is said."""
    logging.disable(logging.CRITICAL)
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 2):
        os.dup2(null, number)
