"""Where ids and names come from: the same services and topics that the commands themselves read.

Each source returns what the caller may see. Errors are for `complete`, which then offers nothing.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ringfence.cli.completion.candidates import Candidate
from ringfence.cli.completion.command_line import Typed
from ringfence.cli.shared.id_lookup import IdKind, known_ids
from ringfence.cli.shared.output import moment, span
from ringfence.client.reports.read_api import ReadApi
from ringfence.client.settings import ClientSettings
from ringfence.kernel.base.settings import load
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
