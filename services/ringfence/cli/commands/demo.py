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
from ringfence.kernel.base.text import visible

if TYPE_CHECKING:
    from ringfence.client.approvals.pending_approval import PendingApproval


_BAD = frozenset({"bypass.succeeded", "approval.denied", "request.refused"})
"""Steps at which somebody went too far, or got a no."""


def demo(
    interactive: Annotated[bool, typer.Option("--interactive", help="You approve or deny.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a step.")] = False,
) -> None:
    """An agent's task, its credential and its end, on real parts; ends with the trail."""
    from ringfence.cli.commands.dev import client_settings, ended_by_signals
    from ringfence.dev.demo import DemoStory
    from ringfence.dev.organisation import seed
    from ringfence.dev.stack import Stack, StackOptions

    if interactive and not sys.stdin.isatty():
        raise typer.BadParameter(
            "nobody is there to approve or deny: this needs a terminal", param_hint="--interactive"
        )
    narrator = JsonNarrator() if wants_json(as_json) else RichNarrator()
    try:
        with (
            tempfile.TemporaryDirectory(prefix="ringfence-demo-") as folder,
            ended_by_signals(),
            Stack(StackOptions(Path(folder)), say=narrator.waiting) as stack,
        ):
            settings = client_settings(stack.environment())

            async def play() -> None:
                narrator.waiting("making a small organisation")
                await seed(stack.trust, settings, stack.options.operator)
                await DemoStory(stack, settings, narrator, ask_approval if interactive else None).tell()

            asyncio.run(play())
    finally:
        narrator.done()
    narrator.next_steps()


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
    own = Path(".venv/bin/ringfence")
    ringfence, dev = (str(own), "make dev") if (folder / own).exists() else ("ringfence", "ringfence dev")
    return [
        f"  {dev:42}  the same stack, to stay",
        f"  {ringfence} --identity .ringfence/users/sam.json approvals watch",
        f"  {f'{ringfence} --help':42}  everything else; a tutorial is in README.md",
    ]


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
        mark = "[error]✗[/]" if step in _BAD else "[ok]✓[/]"
        self._out.print(f"{mark} [step]{step:21}[/] ", Text(visible(text)), sep="")
        if "trace" in ids:
            from ringfence.cli.commands.audit_trace import trace_lines

            self._out.print()
            for line in trace_lines(ids["trace"], width=line_width()):
                self._out.print(line, soft_wrap=True)

    def waiting(self, text: str) -> None:
        if self._line is None:
            self._line = self._shown.enter_context(progress(text))
        else:
            self._line.say(text)

    def done(self) -> None:
        self._shown.close()
        self._line = None

    def next_steps(self) -> None:
        self._out.print(
            "\n[heading]Next:[/]\n" + "\n".join(next_commands(Path())), highlight=False, soft_wrap=True
        )


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

    def next_steps(self) -> None:
        pass
