"""Completion in real shells: bash, zsh and fish, with ids of a running stack, and with text of an attacker."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ringfence.cli.commands.dev import write_config
from ringfence.cli.completion.command import SCRIPTS, Shell
from tests.support.stack import RunningStack, first_pending
from tests.support.terminal import ESCAPES, WITHIN_S, Terminal

pytestmark = [pytest.mark.tools, pytest.mark.timeout(300)]

TRIES = 8
"""A lookup gives up after 1.5 s. On a machine that others use as well it may take longer; then TAB is pressed again."""
HOSTILE = (
    "$(touch pwned) `touch pwned`; touch pwned",
    "line\ntouch pwned '\"\\ %F{red} \x1b[31mred",
    "\x1b]0;title\x07 \u202e {a,b} !! *",
)

_SHOW = {
    "bash": """shown() { echo "LINE=<$READLINE_LINE>"; }; bind -x '"\\C-g": shown'""",
    "zsh": """shown() { print -r -- "LINE=<$BUFFER>" }; zle -N shown; bindkey '^G' shown; unsetopt beep""",
}
_START = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
}


@pytest.fixture
def place(realm: RunningStack, tmp_path: Path) -> Path:
    """A folder with the settings, the keys of the realm's people, and the scripts."""
    write_config(realm.stack.environment(), tmp_path / "settings.toml")
    for who in ("sam", "maria"):
        realm.key("user", realm.name(who)).save(tmp_path / f"{who}.json")
    realm.key("agent", realm.agent).save(tmp_path / "bot.json")
    for shell, script in SCRIPTS.items():
        (tmp_path / f"completion.{shell}").write_text(script)
    return tmp_path


def environment(place: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RINGFENCE_")}
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(place),
        "HISTFILE": "",
        "LC_ALL": "C.UTF-8",
        "RINGFENCE_CONFIG": str(place / "settings.toml"),
        "RINGFENCE_IDENTITY": str(place / "sam.json"),
    }


class Line:
    """A shell that waits for a command line."""

    def __init__(self, shell: Shell, terminal: Terminal) -> None:
        self.shell = shell
        self._terminal = terminal

    def completed(self, line: str) -> str:
        """Type a line and TAB. Returns what stands on the command line then."""
        found = ""
        for _ in range(TRIES):
            self._terminal.send(f"\x15{line}\t\x07")
            found = self._terminal.until("LINE=<(.*?)>")[1]
            if found.rstrip() != line.rstrip():
                break
        return found

    def listed(self, line: str, pattern: str) -> str:
        """Type a line and TAB until a list with `pattern` comes. Returns all that the terminal got since, visibly."""
        shown = ""
        for _ in range(TRIES):
            self._terminal.send(f"\x15{line}\t\t\t\x07")
            shown = self._terminal.until("(.*?)LINE=<(.*?)>")[1]
            if re.search(pattern, ESCAPES.sub("", shown)):
                return shown
        raise AssertionError(f"no list with {pattern}: {shown!r}")


@contextmanager
def shell_in(shell: Shell, place: Path) -> Iterator[Line]:
    with Terminal(_START[shell], environment(place), folder=place, width=160) as terminal:
        first = "autoload -U compinit; compinit -u -D; " if shell == "zsh" else ""
        # The prompt is in two parts here, so that the typed line is no prompt.
        terminal.send(f"{first}source ./completion.{shell}; {_SHOW[shell]}; PS1='READ''Y> '\n")
        terminal.until("READY> ")
        yield Line(shell, terminal)


def fish(place: Path, line: str, until: Callable[[list[str]], bool] = bool) -> list[str]:
    """What fish offers for a line, each with its description."""
    found: list[str] = []
    for _ in range(TRIES):
        done = subprocess.run(
            ["fish", "--no-config", "-c", "source completion.fish; complete -C $argv[1]", line],
            env=environment(place), cwd=place, capture_output=True, text=True, check=True, timeout=WITHIN_S,
        )  # fmt: skip
        assert done.stderr == ""
        found = done.stdout.splitlines()
        if until(found):
            break
    return found


def test_the_shells_are_there() -> None:
    assert [shell for shell in SCRIPTS if shutil.which(shell) is None] == []


@pytest.mark.parametrize("shell", ["bash", "zsh"])
async def test_a_line_is_completed(shell: Shell, realm: RunningStack, place: Path) -> None:
    with shell_in(shell, place) as line:
        assert line.completed("ringfence appro") == "ringfence approvals "
        assert line.completed("ringfence lease list --stat") == "ringfence lease list --status "
        assert line.completed("ringfence lease list --status=act") == "ringfence lease list --status=active "
        assert line.completed("ringfence lease list --status act") == "ringfence lease list --status active "
        assert line.completed("ringfence --identity mar") == "ringfence --identity maria.json "
        assert line.completed("ringfence --identity=mar") == "ringfence --identity=maria.json "
        shown = f"ringfence agent show {realm.agent} "
        assert line.completed(f"ringfence agent show {realm.agent[:-2]}") == shown
        assert line.completed(f"ringfence agent show '{realm.agent[:-2]}").startswith("ringfence agent show ")
        line.listed("ringfence completion ", "bash.*zsh.*fish|bash.*fish.*zsh")
        line.listed("ringfence lease list --st", "--status")
        # Who is named on the line asks: maria sees her task, and sees no agent of sam's.
        assert line.completed("ringfence --identity maria.json task show ") == (
            f"ringfence --identity maria.json task show {realm.task} "
        )


def test_fish_completes_a_line(realm: RunningStack, place: Path) -> None:
    assert fish(place, "ringfence appro") == [
        "approvals\tAs a sponsor: see what waits, approve, deny; approve ahead."
    ]
    assert fish(place, "ringfence lease list --status=act") == ["--status=active"]
    assert fish(place, "ringfence --identity mar") == ["maria.json"]
    assert fish(place, "ringfence --identity=mar") == ["--identity=maria.json"]
    assert fish(place, f"ringfence agent show {realm.agent[:5]}") == [
        f"{realm.agent}\tactive, sponsor {realm.name('sam')}: a bot"
    ]
    assert fish(place, "RINGFENCE_KAFKA=x ringfence completion ba") == ["bash"]
    assert fish(place, "ringfence dev --state ", lambda found: True) == []


@pytest.mark.parametrize("shell", SCRIPTS)
async def test_whole_ids_are_completed_with_what_they_are(
    shell: Shell, realm: RunningStack, place: Path
) -> None:
    async with realm.as_agent() as agent, realm.sponsor() as sam:
        lease = (await realm.read(agent)).lease_id
        asked = asyncio.create_task(
            agent.request(
                task=realm.task, target=realm.target, verbs=["write"], resources=["env/staging/web"],
                reason="to deploy", timeout_s=None,
            )
        )  # fmt: skip
        try:
            request = (await first_pending(sam)).request_id
            expected = {
                f"ringfence target show {realm.target[:-1]}": (realm.target, "a shop"),
                "ringfence user show ": (realm.name("sam"), "active"),
                "ringfence --identity bot.json request --task ": (realm.task, "a test"),
                "ringfence --identity bot.json task delegate ": (realm.task, "a test"),
                "ringfence --identity bot.json release ": (lease, realm.target),
                "ringfence lease show ": (lease, realm.agent),
                "ringfence approvals approve --yes ": (request, "to deploy"),
                "ringfence approvals deny ": (request, f"{realm.agent}, {realm.target}, expires in"),
            }
            for typed, (id, description) in expected.items():
                await _check(shell, place, typed, id, description)
        finally:
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)


async def _check(shell: Shell, place: Path, typed: str, id: str, description: str) -> None:
    if shell == "fish":
        found = await asyncio.to_thread(fish, place, typed)
        assert [one.partition("\t")[0] for one in found] == [id], typed
        assert description in found[0].partition("\t")[2], typed
        return

    def complete() -> str:
        with shell_in(shell, place) as line:
            return line.completed(typed)

    assert (await asyncio.to_thread(complete)).strip().endswith(f" {id}"), typed


@pytest.mark.parametrize("shell", SCRIPTS)
async def test_text_of_an_attacker_runs_nothing_and_moves_no_cursor(
    shell: Shell, realm: RunningStack, place: Path
) -> None:
    async with realm.administrator("sam") as sam:
        for number, text in enumerate(HOSTILE):
            await sam.register_agent(
                f"{realm.agent}-{number}", description=text, keys=[realm.key("agent", f"{realm.agent}-{number}")],
                ceiling=[realm.permission(["read"], "env/**")],
            )  # fmt: skip
    typed = f"ringfence agent show {realm.agent}-"
    if shell == "fish":
        found = await asyncio.to_thread(fish, place, typed)
        assert len(found) == len(HOSTILE)
        shown = "\n".join(found)
    else:

        def see() -> str:
            with shell_in(shell, place) as line:
                shown = line.listed(typed, "-2 .*title")
                assert line.completed(f"{typed}0").rstrip() == f"{typed}0"
                return shown

        shown = await asyncio.to_thread(see)
        # The shell has sequences of its own; these are the attacker's.
        assert "\x1b[31m" not in shown
        assert "\x1b]0;" not in shown
    visible = ESCAPES.sub("", shown)
    assert "$(touch pwned) `touch pwned`; touch pwned" in visible
    assert "%F{red} ‹U+001B›[31mred" in visible
    assert "‹U+001B›]0;title‹U+0007› ‹U+202E› {a,b} !! *" in visible
    assert list(place.glob("pwned*")) == []


@pytest.mark.parametrize("shell", SCRIPTS)
def test_completion_without_an_answer_prints_nothing(shell: Shell, realm: RunningStack, place: Path) -> None:
    (place / "settings.toml").write_text('identity = "nowhere.json"\n')
    typed = "ringfence agent show "
    if shell == "fish":
        assert fish(place, typed, lambda found: True) == []
        return
    with shell_in(shell, place) as line:
        line._terminal.send(f"\x15{typed}\t\x07")
        found = line._terminal.until("(.*?)LINE=<(.*?)>")
        assert found[2] == typed
        assert "error" not in found[1]
        assert "Traceback" not in found[1]
