"""The local run of `ringfence run`: a command in a fresh sandbox on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ringfence.cli.shared import connect
from ringfence.cli.shared.options import run, settings, wants_json
from ringfence.cli.shared.output import note, print_json_line, visible
from ringfence.cli.shared.settings_check import import_settings
from ringfence.kernel.base.errors import SettingsError
from ringfence.messages.codes import Code

if TYPE_CHECKING:
    from ringfence.client.settings import ClientSettings
    from ringfence.messages.registry import TaskState
    from ringfence.messages.run import RunLimits
    from ringfence.model.records.directory import Directory
    from ringfence.runner.lifecycle.execution import RunExecution, RunnerHost
    from ringfence.runner.lifecycle.plan import PlannedMount, RunPlan
    from ringfence.runner.lifecycle.report import RunReport
    from ringfence.runner.sandbox.backend import SandboxBackend

_FORWARDED = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH,
)  # fmt: skip
_VARIABLE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_NOT_A_NAME = re.compile(r"[^a-z0-9._-]+")
_TASK_MARGIN_S = 60
"""A task made for a run lasts so much longer: the run is destroyed by its own deadline, not by its task's."""


@dataclass(frozen=True, slots=True)
class LocalRun:
    """A command for a fresh sandbox on this machine, as the options of `run` and `mcp wrap` describe it."""

    command: tuple[str, ...]
    mounts: tuple[PlannedMount, ...]
    environment: dict[str, str]
    limits: RunLimits
    ttl_s: int
    image: str | None
    backend: str | None

    def deadline_s(self, task: TaskState, now_s: int) -> int:
        """The end of the run if it begins at `now_s`, in seconds since 1970: its task may end earlier."""
        return min(now_s + self.ttl_s, task.not_after)

    def plan(self, runner: str, task: TaskState, argv: tuple[str, ...], deadline_s: int) -> RunPlan:
        """The plan of the run. `runner`: the SPIFFE ID of this machine's runner; `argv`: what the sandbox starts."""
        from ringfence.model.records.runs import run_id_of
        from ringfence.runner.lifecycle.plan import RunPlan

        nonce = secrets.token_hex(16)
        return RunPlan(
            run_id=run_id_of(runner, nonce=nonce),
            agent_id=task.agent_id,
            task_id=task.task_id,
            argv=argv,
            deadline_s=deadline_s,
            limits=self.limits,
            nonce=nonce,
            environment=self.environment,
            mounts=self.mounts,
            image=self.image,
            image_digest=self.image if self.image is not None and self.image.startswith("sha256:") else None,
        )


@dataclass(frozen=True, slots=True)
class TaskChoice:
    """The task of a run: an existing one, or the scope of one that is assigned for the run."""

    task: str | None
    scope: Sequence[Any]
    agent: str | None
    """Of a new task. None: the only one that this runner may start runs of."""
    me: Path | None
    """The key file of the person who assigns it."""


def run_local(local: LocalRun, choice: TaskChoice, *, as_json: bool) -> None:
    """Run a command in a fresh sandbox on this machine, and exit with its status."""
    report = run(_run(local, choice, awaits_events=wants_json(as_json)))
    for line in remarks(report):
        note(visible(line), "warning")
    if wants_json(as_json):
        sys.stdout.flush()
        with contextlib.redirect_stdout(sys.stderr):
            print_json_line(report.as_json())
    raise typer.Exit(report.code)


async def _run(local: LocalRun, choice: TaskChoice, *, awaits_events: bool) -> RunReport:
    from ringfence.runner.lifecycle.execution import RunExecution
    from ringfence.runner.lifecycle.plan import RunRefusedError
    from ringfence.runner.pool import guarded
    from ringfence.runner.sandbox.backend import Streams

    signals = SignalForwarder()
    with signals.taken():
        async with (
            connected_host(local.backend) as host,
            task_of_run(local, choice, host.name) as task_id,
        ):
            entry = (await host.connection.current_directory()).task(task_id)
            if entry is None:
                raise RunRefusedError(f"there is no task {task_id}", code=Code.TASK_UNKNOWN).with_remedy(
                    "see: ringfence task list"
                )
            task = entry.state
            plan = local.plan(
                host.connection.key.id, task, local.command, local.deadline_s(task, int(time.time()))
            )
            # Without --json nobody sees what was blocked.
            execution = RunExecution(host, plan, Streams(0, 1, 2), awaits_events=awaits_events)
            signals.execution = execution
            async with guarded(host.connection, plan, execution):
                return await execution.execute()


@contextlib.asynccontextmanager
async def connected_host(backend: str | None) -> AsyncIterator[RunnerHost]:
    """Connect as this machine's runner, and remove what earlier ones left. Raises SettingsError, RunRefusedError."""
    from ringfence.client.connection import Connection
    from ringfence.runner.lifecycle.execution import RunnerHost
    from ringfence.runner.lifecycle.sweep import sweep

    import_settings()  # no mount shows what any of them names
    own = settings()
    if own.runner_key_file is None:
        raise SettingsError(
            "RINGFENCE_RUNNER_KEY_FILE is not set: a run needs the key of a runner. Add one with: ringfence init "
            "--add-runner NAME --publish"
        )
    if own.gateway_sockets is None:
        raise SettingsError(
            "RINGFENCE_GATEWAY_SOCKETS is not set: a run reaches its targets through the gateway of this machine; set "
            "it to the folder that the gateway has"
        )
    sandboxes = await _backend(backend, own)
    async with Connection(own.runner_key_file, own) as connection:
        await sweep(connection, [sandboxes], state=own.runner_state or _state_folder())
        yield RunnerHost(connection, sandboxes, own.gateway_sockets, own.gateway_ca_file)


async def _backend(name: str | None, own: ClientSettings) -> SandboxBackend:
    """The backend that was named, or the first that works here. Raises RunRefusedError with each reason."""
    from ringfence.runner.lifecycle.plan import BACKENDS, RunRefusedError, make_backend

    state = own.runner_state or _state_folder()
    reasons = []
    for one in (name,) if name is not None else BACKENDS:
        try:
            found = make_backend(
                one, state, oci_socket=own.runner_oci_socket, oci_runtime=own.runner_oci_runtime
            )
        except RunRefusedError as error:
            reasons.append(f"{one}: {error}")
            continue
        if not (problems := await found.available()):
            return found
        reasons.append(f"{one}: {'; '.join(problems)}")
    raise RunRefusedError(
        f"no sandbox can be made here. {' '.join(reasons)}", code=Code.SANDBOX_UNAVAILABLE
    ).with_remedy("see what this machine lacks: ringfence doctor")


def _state_folder() -> Path:
    """The folder of a user's programs for their state (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "ringfence" / "runner"


@contextlib.asynccontextmanager
async def task_of_run(local: LocalRun, choice: TaskChoice, runner: str) -> AsyncIterator[str]:
    """The task of the run: the named one, or one that is assigned now and ends with the run."""
    if choice.task is not None:
        yield choice.task
        return
    async with connect.administrator(choice.me) as administrator:
        agent = (
            choice.agent
            or settings().agent
            or _only_agent(await administrator.directory(), administrator.id, runner)
        )
        purpose = visible(f"run {' '.join(local.command)}")[:200]
        task_id = await administrator.assign_task(
            agent, purpose=purpose, scope=choice.scope, ends_in_s=local.ttl_s + _TASK_MARGIN_S
        )
        try:
            yield task_id
        finally:
            await administrator.end_task(task_id, reason="its run has ended")


def _only_agent(directory: Directory, user_id: str, runner: str) -> str:
    """The agent that a task is assigned to where none is named: the only one that this runner may start runs of.

    Of several, the only one whose sponsor the caller is. Raises RunRefusedError.
    """
    from ringfence.messages.registry import AgentState
    from ringfence.runner.lifecycle.plan import RunRefusedError

    states = [entry.state for entry in directory.entries("agent") if isinstance(entry.state, AgentState)]
    possible = [
        state
        for state in states
        if state.status == "active" and any(selector.runner == runner for selector in state.attestation)
    ]
    own = [state for state in possible if state.sponsor == user_id]
    for found in (possible, own):
        if len(found) == 1:
            return found[0].agent_id
    if possible:
        names = ", ".join(state.agent_id for state in possible)
        raise RunRefusedError(f"{runner} may start runs of {names}").with_remedy("name one: --agent AGENT")
    raise RunRefusedError(f"no agent lets {runner} start runs of it").with_remedy(
        f"its sponsor does: ringfence agent set-attestation AGENT --selector runner={runner}"
    )


class SignalForwarder:
    """Signals to this process: they are the command's. Before there is one, each of them cancels what is under way."""

    def __init__(self) -> None:
        self.execution: RunExecution | None = None
        self._task = asyncio.current_task()

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Take them until the end of the block."""
        loop = asyncio.get_running_loop()
        for number in _FORWARDED:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in _FORWARDED:
                loop.remove_signal_handler(number)

    def _on_signal(self, number: signal.Signals) -> None:
        if self.execution is not None:
            self.execution.signal(number)
        elif number not in (signal.SIGWINCH, signal.SIGUSR1, signal.SIGUSR2) and self._task is not None:
            self._task.cancel()


def remarks(report: RunReport) -> Iterator[str]:
    """Remarks on the end for a person. The command's own output is not repeated."""
    if report.reason is not None:
        yield f"run {report.run_id} was ended: {report.reason}"
    if not report.destruction.complete:
        yield f"not all of the run could be removed: {', '.join(report.destruction.remained)}"
    for change in report.left_in_mounts:
        yield f"changed by the run, where other programs may execute it: {change}"
    if report.changed_in_mounts:
        yield "other files in mounted folders changed too: ringfence run --json lists them"
    if not report.published:
        yield "the end of the run is not on Kafka: its leases end when the runner is silent, or at its deadline"
    if report.live_leases:
        yield f"leases that have not ended yet: {', '.join(report.live_leases)}"


def parse_environment(given: list[str]) -> dict[str, str]:
    found = {}
    for text in given:
        match = _VARIABLE.fullmatch(text)
        if match is None:
            name = visible(text.partition("=")[0])
            raise typer.BadParameter(
                f"{name!r} is no NAME=VALUE; nothing is inherited, so give the value too", param_hint="--env"
            )
        found[match[1]] = match[2]
    return found


def parse_mounts(given: list[str], hide: Sequence[str] = ()) -> tuple[PlannedMount, ...]:
    """Parse `DIR`, `DIR:rw` and `DIR:rw-as-root`. Each folder stands inside at its own path.

    `hide`: paths below these folders that the command sees empty.
    """
    from ringfence.runner.lifecycle.plan import PlannedMount

    found: dict[str, PlannedMount] = {}
    hidden = [Path(os.path.normpath(Path(path).absolute())) for path in hide]
    for text in given:
        folder, colon, mode = text.rpartition(":")
        if not colon or mode not in ("rw", "ro", "rw-as-root"):
            folder, mode = text, "ro"
        path = Path(os.path.normpath(Path(folder).absolute()))
        if not folder or not path.is_dir():
            raise typer.BadParameter(f"{visible(folder)!r} is no folder", param_hint="--mount")
        name = slug = _NOT_A_NAME.sub("-", path.name.lower()).strip("-._")[:60] or "mount"
        number = 2
        while name in found:
            name, number = f"{slug}-{number}", number + 1
        found[name] = PlannedMount(
            name,
            path,
            str(path),
            writable=mode != "ro",
            as_root=mode == "rw-as-root",
            hidden=tuple(str(one.relative_to(path)) for one in hidden if path in one.parents),
        )
    for one in hidden:
        if not any(mount.host in one.parents for mount in found.values()):
            raise typer.BadParameter(f"{visible(str(one))!r} is in no mounted folder", param_hint="--hide")
    return tuple(found.values())
