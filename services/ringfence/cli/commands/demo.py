"""`ringfence demo`: the story in a minute."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from ringfence.cli.shared.context import wants_json
from ringfence.cli.shared.output import console, line_width
from ringfence.cli.shared.progress import ProgressLine, progress
from ringfence.cli.shared.tables import list_lines, prose, wrapped
from ringfence.kernel.base.text import visible

if TYPE_CHECKING:
    from ringfence.client.approvals.history_comparison import PendingApproval


_BAD = frozenset({
    "bypass.succeeded", "approval.denied", "request.refused",
    "shell.sent", "shell.merged", "shell.deleted", "shell.hook_written", "shell.helper_left", "shell.token_left",
    "audit.nothing",
})  # fmt: skip
"""Steps at which somebody went too far, or got a no."""


_INDENT = 24
"""Columns before the text of a step: a mark, the step's name, and spaces."""


def demo(
    interactive: Annotated[bool, typer.Option("--interactive", help="You approve or deny.")] = False,
    runner: Annotated[
        bool,
        typer.Option(
            "--runner",
            help="Another story: a reviewer follows an injected instruction, in a shell and then in a run.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a step.")] = False,
) -> None:
    """An agent's task, its credential and its end, on real parts; ends with the trail."""
    if interactive and runner:
        raise typer.BadParameter("nobody is asked in the story of --runner", param_hint="--interactive")
    from ringfence.cli.commands.dev import client_settings, ended_by_signals
    from ringfence.dev.demo import DemoStory
    from ringfence.dev.stack import Stack, StackOptions

    if interactive and not sys.stdin.isatty():
        raise typer.BadParameter(
            "nobody is there to approve or deny: this needs a terminal", param_hint="--interactive"
        )
    narrator = JsonNarrator() if wants_json(as_json) else RichNarrator()
    if runner:
        _demo_of_runs(narrator)
        return
    try:
        with (
            tempfile.TemporaryDirectory(prefix="ringfence-demo-") as folder,
            ended_by_signals(),
            Stack(StackOptions(Path(folder)), say=narrator.waiting) as stack,
        ):
            settings = client_settings(stack.environment())
            asyncio.run(DemoStory(stack, settings, narrator, ask_approval if interactive else None).tell())
    finally:
        narrator.done()
    narrator.next_steps(next_commands(Path()))


def _demo_of_runs(narrator: JsonNarrator | RichNarrator) -> None:
    """Tell the story of a reviewer in a shell and in a run. Raises SandboxMissingError before anything is started."""
    from ringfence.cli.commands.dev import client_settings, ended_by_signals
    from ringfence.dev.runner_demo import RUNNER, RunnerStory, check_sandbox
    from ringfence.dev.stack import Stack, StackOptions

    try:
        # Short names: the gateway's sockets are in it, and a socket's address is short (unix(7)).
        with tempfile.TemporaryDirectory(prefix="rf-demo-") as name, ended_by_signals():
            folder = Path(name)
            asyncio.run(check_sandbox(folder))
            options = StackOptions(folder / "stack", runner=RUNNER)
            with Stack(options, say=narrator.waiting) as stack:
                settings = client_settings(stack.environment())
                asyncio.run(RunnerStory(stack, settings, narrator, folder).tell())
    finally:
        narrator.done()
    narrator.next_steps(_after_runs(Path()))


async def ask_approval(pending: PendingApproval) -> bool:
    """Ask the person at the keyboard for approval; only a yes is one. Returns False at the end of input, too.

    Ctrl-C ends the wait, which it would not in a thread that reads.
    """
    verbs = ", ".join(verb for permission in pending.scope for verb in permission.verbs)
    while True:
        sys.stderr.write(visible(f"  Approve {verbs} for {pending.agent}? [y/N] "))
        sys.stderr.flush()
        answer = (await _line()).strip().lower()
        if answer in ("", "n", "no", "y", "yes"):
            return answer.startswith("y")


async def _line() -> str:
    """Return what was typed up to Enter; empty at the end of input."""
    pressed = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(sys.stdin, pressed.set)
    try:
        await pressed.wait()
    finally:
        loop.remove_reader(sys.stdin)
    if not (line := os.read(sys.stdin.fileno(), 4096)):  # a terminal gives one line at a time
        sys.stderr.write("\n")
    return line.decode(errors="replace")


def next_commands(folder: Path) -> list[str]:
    """Return the commands to try next from this folder. A clone has its own start command and environment."""
    ringfence, dev = _commands_from(folder)
    return [
        f"  {dev:42}  the same stack, to stay",
        f"  {ringfence} --identity .ringfence/users/sam.json approvals watch",
        f"  {f'{ringfence} --help':42}  everything else; a tutorial is in README.md",
    ]


def _after_runs(folder: Path) -> list[str]:
    """Return the commands to try next after the story of runs."""
    ringfence, dev = _commands_from(folder)
    return [
        f"  {dev:27} the same stack, to stay. In another terminal:",
        "  source .ringfence/dev.sh",
        f"  {ringfence} run --assign 'platform:read:env/**' -- sh -c 'id; env; ls -la ~'",
        f"  {f'{ringfence} run --help':27} everything else; docs/runs.md explains it",
    ]


def _commands_from(folder: Path) -> tuple[str, str]:
    """Return how `ringfence` and `ringfence dev` are started from this folder."""
    own = Path(".venv/bin/ringfence")
    return (str(own), "make dev") if (folder / own).exists() else ("ringfence", "ringfence dev")


class RichNarrator:
    """Prints the demo's steps for people."""

    def __init__(self) -> None:
        self._out = console(markup=True)
        self._line: ProgressLine | None = None
        self._shown = contextlib.ExitStack()

    def act(self, title: str) -> None:
        self.done()
        self._out.print(f"\n[heading]{title}[/]\n")

    def step(self, step: str, text: str, **ids: Any) -> None:
        self.done()
        if "rows" in ids:
            self._out.print()
        mark = "[error]✗[/]" if step in _BAD else "[ok]✓[/]"
        width = line_width()
        first, *more = wrapped(visible(text), width - _INDENT) if width is not None else [visible(text)]
        self._out.print(f"{mark} [step]{step:21}[/] ", Text(first), sep="", soft_wrap=True)
        for further in more:
            self._out.print(Text(" " * _INDENT + further), soft_wrap=True)
        if "trace" in ids:
            from ringfence.cli.commands.audit_trace import trace_lines

            self._out.print()
            for line in trace_lines(ids["trace"], width=line_width()):
                self._out.print(line, soft_wrap=True)
        if "rows" in ids:
            self._out.print()
            columns = [prose(title) for title in ids["rows"][0]]
            rows = [list(row.values()) for row in ids["rows"]]
            for line in list_lines(columns, rows, width=line_width()):
                self._out.print(line, soft_wrap=True)

    def waiting(self, text: str) -> None:
        if self._line is None:
            self._line = self._shown.enter_context(progress(text))
        else:
            self._line.say(text)

    def done(self) -> None:
        self._shown.close()
        self._line = None

    def next_steps(self, commands: list[str]) -> None:
        self._out.print("\n[heading]Next:[/]\n" + "\n".join(commands), highlight=False, soft_wrap=True)


class JsonNarrator:
    """Prints the demo's steps for programs: one JSON object per line with `step`, `at` and ids."""

    def act(self, title: str) -> None:
        pass

    def step(self, step: str, text: str, **ids: Any) -> None:
        at = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        sys.stdout.write(json.dumps({"step": step, "at": at, "text": text, **ids}) + "\n")
        sys.stdout.flush()

    def waiting(self, text: str) -> None:
        pass

    def done(self) -> None:
        pass

    def next_steps(self, commands: list[str]) -> None:
        pass
