"""The summary that `ringfence dev` prints once everything runs: seeded records, and commands that work as printed.

Everything fits 80 columns, except where a path is long.
"""

from __future__ import annotations

import shlex
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from ringfence.cli.shared.output import span
from ringfence.kernel.base.text import visible

SHELL_FILE = "dev.sh"
_WIDTH = 80
_NAME_WIDTH = 12


def shell_file(state: Path, identity: str) -> str:
    """Return what a terminal sources to be set up for this stack.

    `identity`: the key file in `state` that commands use unless they say otherwise. Paths are absolute.
    """
    lines = ["# Written by ringfence dev at each start: source it in a terminal (bash, zsh)."]
    programs = Path(sys.executable).parent
    if (programs / "ringfence").exists():
        lines.append(f'export PATH={shlex.quote(str(programs))}:"$PATH"')
    lines.append(f"export RINGFENCE_CONFIG={shlex.quote(str(state / 'ringfence.toml'))}")
    lines.append(f"export RINGFENCE_IDENTITY={shlex.quote(str(state / identity))}")
    return "\n".join(lines) + "\n"


def organisation_lines(operator: str, task: str | None) -> Iterator[str]:
    """Yield what was made at this start. `task`: the id of deploy-bot's task; None where only an operator was made."""
    from ringfence.dev.organisation import OPERATOR_ABOUT, PEOPLE, PLATFORM, TASK_LIFE_S

    yield from _about(operator, OPERATOR_ABOUT)
    if task is None:
        return
    for person in PEOPLE:
        yield from _about(person.id, person.about)
    yield from _about(PLATFORM, "target: read it, or deploy to it with the sponsor's approval")
    yield from _about("deploy-bot", "agent: may read and deploy")
    yield from _about("review-bot", "agent: may read")
    yield from _about("task", f"{task}, of deploy-bot, on behalf of maria, for {span(TASK_LIFE_S)}")


def command_lines(folder: Path, state: Path, task: str | None) -> Iterator[str]:
    """Yield the commands to try, each with two spaces before it, and what they are for.

    `folder`: the working directory. `state`: the state folder, as it was named.
    """
    whose = "Sam's" if task else "the operator's"
    yield f"Try, in another terminal. First, once; commands are {whose} after it:"
    yield f"  cd {_quoted(folder)} && source {_quoted(state / SHELL_FILE)}"
    yield ""
    if task is None:
        yield "What is registered so far:"
        yield "  ringfence inventory"
        return
    agent = f"ringfence --identity {_quoted(state / 'agents/deploy-bot.json')} request"
    yield "The agent gets a credential to read. To deploy, it waits for Sam's approval:"
    yield from _command(
        agent, f"--task {task}", "--allow platform:read:env/staging/web --reason 'look around'"
    )
    yield from _command(
        agent,
        f"--task {task} --timeout 10m",
        "--allow platform:deploy:env/staging/web --reason 'roll out' &",
    )
    yield ""
    yield "What waits for Sam; 'ringfence approvals approve' takes the id from it:"
    yield "  ringfence approvals list"
    yield ""
    yield "The live credentials, who could act and did, and the whole story:"
    yield "  ringfence lease list"
    yield "  ringfence audit who --target platform"
    yield "  ringfence audit trace deploy-bot"


def _about(name: str, text: str) -> list[str]:
    indent = " " * (_NAME_WIDTH + 2)
    return textwrap.wrap(text, _WIDTH, initial_indent=f"  {name:{_NAME_WIDTH}}", subsequent_indent=indent)


def _command(*parts: str) -> Sequence[str]:
    return [
        ("    " if number else "  ") + part + (" \\" if number < len(parts) - 1 else "")
        for number, part in enumerate(parts)
    ]


def _quoted(path: Path) -> str:
    """Return a path for a shell, safe to print: others may have named its folders."""
    return shlex.quote(visible(str(path)))
