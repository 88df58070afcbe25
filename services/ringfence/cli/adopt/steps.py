"""The steps of an adoption. Each says what it does, does it, and undoes it; each may be repeated.

Records are made by commands of this program, in processes of their own, so that what is shown, what is done and what
another person is told to run are the same words.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from ringfence.cli.adopt import files
from ringfence.cli.adopt.adoption import (
    LEASE_TTL,
    AdoptFolder,
    Adoption,
    AdoptStoppedError,
    WrappedServer,
    each,
)
from ringfence.cli.shared.arguments import parse_permission
from ringfence.cli.shared.mcp_tools import Process, Tool, call_refused, list_tools, with_server
from ringfence.cli.shared.options import settings
from ringfence.cli.shared.output import note, say
from ringfence.client.errors import ApiError
from ringfence.client.reports.read_api import ReadApi
from ringfence.kernel.base.text import Lines
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.base import Permission
from ringfence.model.identity.spiffe_ids import spiffe_id
from ringfence.model.scope.scope import missing

Role = Literal["operator", "sponsor", "user"]
_PROGRAM = (sys.executable, "-P", "-m")
_THIS = (*_PROGRAM, "ringfence.cli.main")
_TRIAL_TTL = "2m"


@dataclass(frozen=True, slots=True)
class Place:
    """Input of the steps: the adoption, its folder, and the key files of the persons."""

    adoption: Adoption
    folder: AdoptFolder
    keys: Mapping[Role, Path]

    def command(self, role: Role, words: Sequence[str]) -> str:
        """Run a command of this program as a person; returns its stdout. Raises AdoptStoppedError."""
        key = self.keys.get(role)
        if key is None:
            raise AdoptStoppedError(
                f"the {role} has to run this; then run adopt again: ringfence {shlex.join(words)}"
            )
        return run_program((*_THIS, "--identity", str(key), *words))

    def found(self, question: Callable[[ReadApi], Awaitable[Any]]) -> Any:
        """Ask the registry as one of the persons; None if none may see it."""

        async def ask() -> Any:
            for key in self.keys.values():
                try:
                    async with ReadApi(key) as api:
                        return await question(api)
                except ApiError:
                    continue
            return None

        return asyncio.run(ask())

    def proposals(self, role: Role, subject: str) -> list[str]:
        """Return the ids of a person's own open proposals about a record, oldest first."""
        key = self.keys.get(role)
        if key is None:
            return []

        async def ask() -> list[str]:
            author = SigningKey.load(key).id.rpartition("/")[2]
            async with ReadApi(key) as api:
                return [
                    one["id"]
                    for one in await api.proposals()
                    if (one["status"], one["author"], one["subject"]) == ("open", author, subject)
                ]

        return asyncio.run(ask())

    @property
    def scope(self) -> tuple[Permission, ...]:
        return tuple(map(parse_permission, self.adoption.granted))


class Step(Protocol):
    @property
    def name(self) -> str: ...

    def describe(self, place: Place) -> Iterator[str]: ...

    def do(self, place: Place) -> None: ...

    def undo(self, place: Place) -> None: ...


class MoveSecret:
    """Moves the credential to the place where Ringfence's own secret for the target is."""

    name = "secret"

    def describe(self, place: Place) -> Iterator[str]:
        one = place.adoption
        typed = "as you typed it" if one.typed else "of the template"
        to = f"vault:{one.vault}" if one.vault else f"{one.place} (mode 0600)"
        if one.kind == "postgres":
            yield f"write {one.url}, with the password, to {to}, unless a URL is there already:"
            yield "Ringfence logs in with it, and makes a role for each lease"
            return
        yield f"copy the {one.title} to {to}; Ringfence sends it to {one.url}, {typed}"

    def do(self, place: Place) -> None:
        files.put_secret(place.adoption, place.folder.fingerprinter)

    def undo(self, place: Place) -> None:
        if left := files.remove_secret(place.adoption, place.folder.fingerprinter):
            note(left, "warning")


@dataclass(frozen=True, slots=True)
class RecordStep:
    """A command that makes a record, as one person; done if the record says so."""

    name: str
    role: Role
    words: tuple[str, ...]
    undo_words: tuple[str, ...]
    holds: Callable[[ReadApi, Place], Awaitable[bool]]

    def describe(self, place: Place) -> Iterator[str]:
        yield f"as the {self.role}: ringfence {shlex.join(self.words)}"

    def do(self, place: Place) -> None:
        if self._holds(place):
            return
        if waiting := place.proposals(self.role, self._subject):
            raise AdoptStoppedError(
                f"the change of {self._subject} waits for a second person, who runs: ringfence proposal second "
                f"{waiting[0][:12]}; then run adopt again"
            )
        place.command(self.role, self.words)

    def undo(self, place: Place) -> None:
        for proposal in place.proposals(self.role, self._subject):
            place.command(self.role, ("proposal", "withdraw", proposal))
        if self._holds(place):
            place.command(self.role, self.undo_words)

    @property
    def _subject(self) -> str:
        """The record as `proposal list` names it. A command is its kind, a verb, its id."""
        return f"{self.words[0]} {self.words[2]}"

    def _holds(self, place: Place) -> bool:
        return bool(place.found(lambda api: self.holds(api, place)))


class MakeAgentKey:
    """Makes the agent's key file, unless it is there."""

    name = "agent key"

    def describe(self, place: Place) -> Iterator[str]:
        yield f"key file of agent {place.adoption.agent}: {place.adoption.agent_key}, made if it is missing"

    def do(self, place: Place) -> None:
        one = place.adoption
        if not one.agent_key.exists():
            SigningKey.generate(spiffe_id(settings().trust_domain, "agent", one.agent)).save(one.agent_key)

    def undo(self, place: Place) -> None:
        """Keep the key: the agent keeps its name, and may hold other things."""


class AssignTask:
    """Assigns the task; its id is known from the command, or found by its purpose where the user runs it."""

    name = "task"

    def _words(self, place: Place) -> tuple[str, ...]:
        one = place.adoption
        return (
            "task",
            "assign",
            one.agent,
            "--purpose",
            one.purpose,
            *each("--allow", one.granted),
            "--for",
            one.lasts,
        )

    def describe(self, place: Place) -> Iterator[str]:
        yield f"as the user: ringfence {shlex.join(self._words(place))}"

    def do(self, place: Place) -> None:
        one = place.adoption
        one.task = place.found(lambda api: _task_of(api, one))
        if one.task is None:
            one.task = str(json.loads(place.command("user", ("--json", *self._words(place))))["task_id"])

    def undo(self, place: Place) -> None:
        one = place.adoption
        if one.task and place.found(lambda api: _task_of(api, one)) == one.task:
            place.command("user", ("task", "end", one.task, "--reason", "ringfence adopt --undo"))


async def _task_of(api: ReadApi, one: Adoption) -> str | None:
    """Return the id of this adoption's task, if it is active."""
    for record in await api.records("task"):
        state = record["state"]
        if (state["agent_id"], state["purpose"], state["status"]) == (one.agent, one.purpose, "active"):
            return str(record["id"])
    return None


class Trial:
    """Makes a call that must succeed and one that must be refused, in the way in which the agent will start."""

    name = "trial"

    def describe(self, place: Place) -> Iterator[str]:
        one = place.adoption
        way = "with a role of a lease" if one.kind == "postgres" else "through the gateway"
        yield f"{way}, as the agent: {one.allowed} must succeed, and {one.refused} must be refused"

    def do(self, place: Place) -> None:
        one = place.adoption
        words = (*one.launch(_TRIAL_TTL, "try it", _THIS), *_PROGRAM)
        if one.kind == "postgres":
            words += ("ringfence.cli.adopt.database_trial", one.allowed, one.refused)
        else:
            requests = (_at(one.url, text) for text in (one.allowed, one.refused))
            words += ("ringfence.cli.adopt.trial", *requests, json.dumps(one.headers))
        for line in run_program(words).splitlines():
            say(f"  {line}")

    def undo(self, place: Place) -> None:
        """Do nothing: the lease was released."""


@dataclass(frozen=True, slots=True)
class ServerTrial:
    """Starts the MCP server in its sandbox: it must list its tools, and another tool must be refused."""

    wrapped: WrappedServer
    name = "server trial"

    def describe(self, place: Place) -> Iterator[str]:
        tools = ", ".join(self.wrapped.tools) or "none"
        yield f"in its sandbox, {shlex.join(self.wrapped.command)} must list its tools that read:"
        yield f"{tools}; the gateway must refuse a call of {_NO_TOOL}"

    def do(self, place: Place) -> None:
        async def tried(process: Process) -> tuple[list[Tool], str]:
            return await list_tools(process), await call_refused(process, _NO_TOOL)

        tools, refused = with_server(place.adoption.server_launch(_THIS), tried, os.environ)
        names = {one.name for one in tools}
        say(f"  {self.wrapped.target}: {len(names)} tools; {_NO_TOOL}: {refused or 'not refused'}")
        if not refused or not names.issuperset(self.wrapped.tools):
            raise AdoptStoppedError(
                "the wrapped server lists other tools than before, or a call without a permission passed"
            )

    def undo(self, place: Place) -> None:
        """Do nothing: the run ended."""


_NO_TOOL = "ringfence-trial"
"""No server has this tool, and no rule allows it."""


def _at(url: str, request: str) -> str:
    method, _, path = request.partition(" ")
    return f"{method} {url}{path}"


def run_program(words: Sequence[str]) -> str:
    """Run a command to its end; returns its stdout. Raises AdoptStoppedError with the end of its output."""
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AdoptStoppedError(Lines([*done.stdout.splitlines()[-12:], *done.stderr.splitlines()[-12:]]))
    return done.stdout


class EditFile:
    """Takes the credential out of the file, and keeps a private copy of it as it was."""

    name = "file"

    def describe(self, place: Place) -> Iterator[str]:
        one = place.adoption
        yield f"only then write {files.PLACEHOLDER} in the place of {one.field} in {one.file};"
        if one.server:
            how = "mcp wrap, in a sandbox" if one.wrapped else "request --exec, behind the gateway"
            yield f"there, {one.server[-1]} starts by: ringfence {how};"
        yield f"the file as it was is kept in {place.folder.copy_file(one.target)}"
        yield "(mode 0600) until --finish, at most seven days"

    def do(self, place: Place) -> None:
        files.edit_file(place.adoption, place.folder)

    def undo(self, place: Place) -> None:
        files.restore_file(place.adoption, place.folder)


def steps_of(place: Place) -> list[Step]:
    """Return the steps, in the order in which they are done."""
    one = place.adoption
    url = () if one.kind == "postgres" else ("--setting", f"url={one.url}")
    add = ("target", "add", one.target, "--description", f"{one.title}, adopted", *one.add, *url)
    agent: tuple[str, ...] = ("agent", "set-ceiling", one.agent, *each("--add", one.granted))
    if one.new_agent:
        agent = (
            "agent", "register", one.agent, "--description", f"acts on {one.target}", *each("--allow", one.granted),
            "--key-file", str(one.agent_key),
            *(("--selector", f"runner={one.wrapped.runner} life={LEASE_TTL}") if one.wrapped else ()),
        )  # fmt: skip
    removed = (*each("--remove", one.granted), "--yes")
    wrapped = [one.wrapped] if one.wrapped else []
    return [
        MoveSecret(),
        _add_target("target", one.target, add),
        *(
            _add_target(
                "server target", server.target,
                ("target", "add", server.target, "--description", f"{one.server[-1]}, an MCP server", *server.add),
            )
            for server in wrapped
        ),
        RecordStep(
            "entitlement", "operator", ("user", "set", one.user, *each("--add", one.granted), "--yes"),
            ("user", "set", one.user, *removed), _has_entitlement,
        ),
        MakeAgentKey(),
        RecordStep("agent", "sponsor", agent, ("agent", "set-ceiling", one.agent, *removed), _has_ceiling),
        AssignTask(),
        Trial(),
        *map(ServerTrial, wrapped),
        EditFile(),
    ]  # fmt: skip


def _add_target(name: str, target: str, add: tuple[str, ...]) -> RecordStep:
    async def is_active(api: ReadApi, place: Place) -> bool:
        return bool((await api.record("target", target))["state"]["status"] == "active")

    remove = ("target", "remove", target, "--reason", "ringfence adopt --undo", "--yes")
    return RecordStep(name, "operator", add, remove, is_active)


async def _has_entitlement(api: ReadApi, place: Place) -> bool:
    state = (await api.record("user", place.adoption.user))["state"]
    return not missing(place.scope, _scope(state["entitlements"]["scope"]))


async def _has_ceiling(api: ReadApi, place: Place) -> bool:
    state = (await api.record("agent", place.adoption.agent))["state"]
    return not missing(place.scope, _scope(state["ceiling"]))


def _scope(permissions: Sequence[Any]) -> tuple[Permission, ...]:
    # Not strict: JSON has no tuples.
    return tuple(Permission.model_validate(one, strict=False) for one in permissions)
