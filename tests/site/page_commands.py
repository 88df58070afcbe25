"""The commands of a page, in the order in which a reader meets them, run in one shell, and the output that it shows.

What a page says about its blocks, each in a comment before the block:

- `<!-- not run: WHY -->`: no test runs it.
- `<!-- run by: PATH -->`: another test runs it. PATH is a file that names the page, or `.ci/run`: then the block is
  `make` with targets that are stages of the gate.
- `<!-- run: exit N -->`: its last command ends with this status.
- `<!-- not printed: WHY -->`: the output that it shows cannot be compared, or it is no output.
- `<!-- commands: run by PATH, PATH -->` and `<!-- commands: not run: WHY -->`, once on a page: all its other blocks.

A block with a title (```` ```python title="agent.py" ````) is a file that the reader saves; `title="FILE (at the end)"`
and `title="FILE (before: WORD)"` add to a file, before its only line with a word. Lines of a `console` block
that begin with `$ ` are commands; the others are what they print. A block of commands for root (`# `) needs the first
mark.

Output is shown below its commands: in their `console` block, or in a block of `text`, of `json` or of no language that
follows it in the same section. `shown_output.py` says how the two are compared.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tests.site.shown_output import differs

ROOT = Path(__file__).parents[2]
SHELLS = ("console", "sh", "bash", "shell")
OUTPUTS = ("", "text", "json")
WITHIN_S = 300
_MOST_SHOWN = 4000
"""Of an output that differs: so many characters are in the message."""
_END_CHILDREN = "trap 'jobs -p | xargs -r kill 2>/dev/null; wait' EXIT"
_MARK = r"^[ ]*<!-- (not run|run by|run|not printed): (.*?) -->\s*\n\s*"
_MARKS = re.compile(_MARK, re.MULTILINE | re.DOTALL)
_HEADING = re.compile("^#+ ", re.MULTILINE)
_BLOCK = re.compile(
    rf"(?P<marks>(?:{_MARK})*)"
    r"^(?P<indent>[ ]*)(?P<fence>```+)(?P<language>[\w-]*)(?P<info>[^\n]*)\n(?P<body>.*?)^[ ]*(?P=fence)[ ]*$",
    re.MULTILINE | re.DOTALL,
)
_PAGE_MARK = re.compile(r"^<!-- commands: (.+?) -->$", re.MULTILINE)
_TITLE = re.compile(r'title="([^"]+)"')
_PLACE = re.compile(r"(?P<path>\S+)(?: \((?:(?P<end>at the end)|before: (?P<word>.+))\))?")
_EXIT = re.compile(r"exit (\d+)")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    line: int
    language: str
    body: str
    title: str | None = None
    not_run: str | None = None
    run_by: str | None = None
    not_printed: str | None = None
    exit_status: int = 0
    follows: bool = False
    """Whether it is in the section of the block before."""

    def commands(self) -> list[str]:
        """Its commands; a line that ends with a backslash goes on in the next one."""
        return [command for commands, _ in self.steps() for command in commands]

    def steps(self) -> list[tuple[list[str], str]]:
        """Its commands, and the lines that it shows below them."""
        if self.language not in SHELLS:
            return []
        if self.language != "console":
            return [([self.body], "")]
        steps: list[tuple[list[str], str]] = [([], "")]
        for line in self.body.replace("\\\n", " ").splitlines():
            commands, shown = steps[-1]
            if not line.startswith("$ "):
                steps[-1] = commands, f"{shown}{line}\n"
            elif shown:
                steps.append(([line.removeprefix("$ ")], ""))
            else:
                commands.append(line.removeprefix("$ "))
        return steps

    @property
    def runs(self) -> bool:
        """Whether it has commands that are run with the page."""
        return self.language in SHELLS and self.title is None and self.not_run is None and self.run_by is None


@dataclass(frozen=True)
class Shown:
    """Lines that a page shows as the output of commands before them."""

    block: Block
    lines: str
    commands: range
    """The numbers of these commands, among all commands that are run."""


def blocks_of(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page. Raises ValueError for a mark that is none."""
    text, end = page.read_text(), 0
    for found in _BLOCK.finditer(text):
        indent, marks = found["indent"], dict(_MARKS.findall(found["marks"]))
        body = "".join(line.removeprefix(indent) for line in found["body"].splitlines(keepends=True))
        title = _TITLE.search(found["info"])
        status = _EXIT.fullmatch(marks.get("run", "exit 0"))
        if status is None:
            raise ValueError(f"{page}: 'run: {marks['run']}' is no mark; write 'run: exit N'")
        yield Block(
            text.count("\n", 0, found.start("fence")) + 1,
            found["language"],
            body,
            title[1] if title else None,
            marks.get("not run"),
            marks.get("run by"),
            marks.get("not printed"),
            int(status[1]),
            _HEADING.search(text, end, found.start()) is None,
        )
        end = found.end()


def section_of(page: Path, heading: str) -> list[Block]:
    """The blocks under a heading of the second level. Raises ValueError where there is none."""
    lines = page.read_text().splitlines()
    first = lines.index(f"## {heading}") + 1
    last = next((at for at, line in enumerate(lines, 1) if at > first and line.startswith("## ")), len(lines))
    return [block for block in blocks_of(page) if first < block.line <= last]


def page_mark(page: Path) -> str | None:
    """What a page says of all its commands that are not run here, or None."""
    found = _PAGE_MARK.search(page.read_text())
    return found[1] if found else None


def shown_of(blocks: Iterable[Block]) -> Iterator[Shown]:
    """The output that blocks show of commands that are run. Blocks with the mark `not printed` are among them."""
    number, before = 0, range(0)
    for block in blocks:
        if block.runs:
            before = range(0)
            for commands, lines in block.steps():
                before, number = range(number, number + len(commands)), number + len(commands)
                if lines.strip():
                    yield Shown(block, lines, before)
            continue
        if before and block.follows and block.title is None and block.language in OUTPUTS:
            yield Shown(block, block.body, before)
        else:
            before = range(0)


def with_texts(blocks: Iterable[Block], replaced: Mapping[str, str]) -> list[Block]:
    """The blocks, with other texts in the place of some."""
    changed = []
    for block in blocks:
        body = block.body
        for old, new in replaced.items():
            body = body.replace(old, new)
        changed.append(replace(block, body=body))
    return changed


def script_of(blocks: Iterable[Block], before: str = "") -> str:
    """A shell script that does what a reader of the blocks does. It ends at the first command that does not as it says.

    It writes what each command prints to a file of the folder `$PRINTED`, named by the number of the command.

    Args:
        before: what the page takes for done.
    """
    lines = [
        "set -o pipefail",
        _END_CHILDREN,
        'failed() { echo "@@ line $1 of the page: exit $2: $3" >&2; exit 1; }',
    ]
    if before:
        lines.append(f"set -e\n{before}set +e")
    number = 0
    for block in blocks:
        if block.not_run is not None or block.run_by is not None:
            continue
        if block.title is not None:
            lines.append(_saved(block.title, block.body, block.line))
            continue
        commands = block.commands()
        for command in commands:
            wanted = block.exit_status if command is commands[-1] else 0
            lines.append("{ :  # a command may be a comment alone")
            lines.append(command)
            lines.append(f'}} > "$PRINTED/{number}" 2>&1')
            lines.append(f"s=$?; [ $s -eq {wanted} ] || failed {block.line} $s {shlex.quote(command)}")
            number += 1
    return "\n".join(lines) + "\n"


def _saved(title: str, body: str, line: int) -> str:
    """The shell command that writes or changes the file of a title."""
    place = _PLACE.fullmatch(title)
    assert place is not None, title
    path, word = shlex.quote(place["path"]), place["word"]
    if word is None:
        how = ">>" if place["end"] else ">"
        return f"mkdir -p {shlex.quote(str(Path(place['path']).parent))}; cat {how} {path} <<'@@end'\n{body}@@end"
    return (
        f'AT=$(grep -nF {shlex.quote(word)} {path}); [ "$(wc -l <<< "$AT")" = 1 ] && [ -n "$AT" ] || '
        f"failed {line} 1 {shlex.quote(title)}\n"
        f"cat > .addition <<'@@end'\n{body}@@end\n"
        f'sed -i "$((${{AT%%:*}} - 1))r .addition" {path}; rm .addition'
    )


def run_page(
    page: Path,
    folder: Path,
    environment: Mapping[str, str],
    replaced: Mapping[str, str] | None = None,
    before: str = "",
    blocks: Iterable[Block] | None = None,
) -> str:
    """Run a page's commands in a folder. Returns what they printed.

    It fails the test where a command does not as the page says, or prints other than the page shows.

    Args:
        replaced: texts of commands and files, such as addresses, and what the test has in their place.
        before: what the page takes for done.
        blocks: those that are run; all of the page where None.
    """
    name, text = page.relative_to(ROOT), page.read_text()
    gone = [old for old in replaced or {} if old not in text]
    assert not gone, f"{name} has no {gone}"
    run = with_texts(blocks_of(page) if blocks is None else blocks, replaced or {})
    commands = [command for block in run if block.runs for command in block.commands()]
    assert commands, f"{name} has no command"
    with tempfile.TemporaryDirectory() as printed:
        with subprocess.Popen(
            ["bash", "-c", script_of(run, before)],
            cwd=folder, env={**environment, "PRINTED": printed}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        ) as shell:  # fmt: skip
            try:
                _, stderr = shell.communicate(timeout=WITHIN_S)
            except BaseException:
                os.killpg(shell.pid, signal.SIGTERM)  # with what it has started
                raise
        files = (Path(printed) / str(number) for number in range(len(commands)))
        outputs = [file.read_text() for file in files if file.exists()]
    said = "".join(f"@@ {command}\n{output}" for command, output in zip(commands, outputs, strict=False))
    assert shell.returncode == 0, f"{name}:\n{said[-6000:]}\n{stderr[-4000:]}"
    wrong = []
    for shown in shown_of(run):
        possible = [outputs[number] for number in shown.commands]
        line = differs(shown.lines, possible, json=shown.block.language == "json")
        if line is not None and shown.block.not_printed is None:
            wrong.append(
                f"{name}, block at line {shown.block.line}: no command printed this line there:\n{line}\n"
                f"--- printed\n{'---'.join(possible)[:_MOST_SHOWN]}"
            )
    assert not wrong, "\n".join(wrong)
    return said
