"""The commands of a page, in the order in which a reader meets them, run in one shell.

What a page says about its blocks, each in a comment before the block:

- `<!-- not run: WHY -->`: no test runs it.
- `<!-- run by: PATH -->`: another test runs it. PATH is a file that names the page, or `.ci/run`: then the block is
  `make` with targets that are stages of the gate.
- `<!-- run: exit N -->`: its last command ends with this status.
- `<!-- commands: run by PATH, PATH -->` and `<!-- commands: not run: WHY -->`, once on a page: all its other blocks.

A block with a title (```` ```python title="agent.py" ````) is a file that the reader saves; `title="FILE (at the end)"`
and `title="FILE (before: WORD)"` add to a file, before its only line with a word. Lines of a `console` block
that begin with `$ ` are commands; the others are what they print. A block of commands for root (`# `) needs the first
mark.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHELLS = ("console", "sh", "bash", "shell")
WITHIN_S = 300
_END_CHILDREN = "trap 'jobs -p | xargs -r kill 2>/dev/null' EXIT"
_BLOCK = re.compile(
    r"(?:^[ ]*<!-- (?P<mark>not run|run by|run): (?P<text>.*?) -->\s*\n\s*)?"
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
    title: str | None
    not_run: str | None
    run_by: str | None
    exit_status: int

    def commands(self) -> list[str]:
        """Its commands; a line that ends with a backslash goes on in the next one."""
        if self.language not in SHELLS:
            return []
        lines = self.body.replace("\\\n", " ").splitlines()
        if self.language != "console":
            return [self.body]
        return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


def blocks_of(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page. Raises ValueError for a mark that is none."""
    text = page.read_text()
    for found in _BLOCK.finditer(text):
        indent, mark, said = found["indent"], found["mark"], found["text"] or ""
        body = "".join(line.removeprefix(indent) for line in found["body"].splitlines(keepends=True))
        title = _TITLE.search(found["info"])
        status = _EXIT.fullmatch(said) if mark == "run" else None
        if mark == "run" and status is None:
            raise ValueError(f"{page}: 'run: {said}' is no mark; write 'run: exit N'")
        yield Block(
            text.count("\n", 0, found.start("fence")) + 1,
            found["language"],
            body,
            title[1] if title else None,
            said if mark == "not run" else None,
            said if mark == "run by" else None,
            int(status[1]) if status else 0,
        )


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


def script_of(
    page: Path,
    replaced: Mapping[str, str] | None = None,
    before: str = "",
    blocks: Iterable[Block] | None = None,
) -> str:
    """A shell script that does what a reader of the page does. It ends at the first command that does not as it says.

    Args:
        replaced: texts of commands and files, such as addresses, and what the test has in their place.
        before: what the page takes for done.
        blocks: those that are run; all of the page where None.
    """
    lines = [
        "set -o pipefail",
        _END_CHILDREN,
        'failed() { echo "@@ line $1 of the page: exit $2: $3" >&2; exit 1; }',
    ]
    if before:
        lines.append(f"set -e\n{before}set +e")
    for block in blocks_of(page) if blocks is None else blocks:
        if block.not_run is not None or block.run_by is not None:
            continue
        body = block.body
        for old, new in (replaced or {}).items():
            body = body.replace(old, new)
        if block.title is not None:
            lines.append(_saved(block.title, body, block.line))
            continue
        commands = replace(block, body=body).commands()
        for command in commands:
            wanted = block.exit_status if command is commands[-1] else 0
            lines.append(f"echo {shlex.quote('@@ ' + command)} >&2")
            lines.append(command)
            lines.append(f"s=$?; [ $s -eq {wanted} ] || failed {block.line} $s {shlex.quote(command)}")
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
    """Run a page's commands in a folder. Returns what they printed; fails the test where one does not as it says."""
    text = page.read_text()
    gone = [old for old in replaced or {} if old not in text]
    assert not gone, f"{page.relative_to(ROOT)} has no {gone}"
    done = subprocess.run(
        ["bash", "-c", script_of(page, replaced, before, blocks)],
        cwd=folder, env=dict(environment), capture_output=True, text=True, timeout=WITHIN_S, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, (
        f"{page.relative_to(ROOT)}:\n{done.stderr[-4000:]}\n--- stdout\n{done.stdout[-2000:]}"
    )
    assert "@@" in done.stderr, f"{page.relative_to(ROOT)} has no command"
    return done.stdout + done.stderr
