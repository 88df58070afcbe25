"""What `ringfence` alone prints: where to start, by who you are, and what is set up here.

It fits 80 columns, and imports and asks nothing: it looks at the environment and at files of this folder only.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from ringfence.cli.shared.styles import painted
from ringfence.kernel.base.config_file import read_config, unread_here
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.text import visible_name

_STARTS: Final[Mapping[str, Sequence[tuple[str, str]]]] = {
    "New here": (
        ("ringfence demo", "the story in a minute"),
        ("ringfence dev", "the whole stack, locally"),
    ),
    "Sponsor": (
        ("ringfence approvals list", "what waits for you"),
        ("ringfence agent list", "the agents you answer for"),
    ),
    "Operator": (
        ("ringfence init", "make trust root and keys"),
        ("ringfence doctor", "check all it depends on"),
        ("ringfence inventory", "all agents, and their reach"),
    ),
    "Agent developer": (
        ("ringfence request --help", "ask for a credential"),
        ("from ringfence import Agent", "the same in Python"),
    ),
    "Auditor": (
        ("ringfence audit who --target T", "who could, and who did"),
        ("ringfence audit trace ID", "back to the human behind it"),
    ),
}
_WIDTH: Final = 80
_MAX_KEY_BYTES: Final = 64 * 1024


def print_start_screen(identity: Path | None) -> None:
    """Print the screen on stdout. `identity`: the key file that the command line names."""
    out = sys.stdout
    lines = ["Ringfence: a credential broker for AI agents.", ""]
    for who, commands in _STARTS.items():
        for number, (command, what) in enumerate(commands):
            name = f"{who if not number else '':15}"
            lines.append(f"  {painted(name, 'heading', out) if not number else name}  {command:30}  {what}")
    lines += [
        "",
        *here(identity),
        "",
        "All commands: ringfence --help     Completion: ringfence completion --help",
    ]
    out.write("\n".join(lines) + "\n")


def here(identity: Path | None) -> list[str]:
    """Return what is set up: the settings file, and who is calling. None of it is verified."""
    settings, content = _settings()
    named = identity or os.environ.get("RINGFENCE_IDENTITY") or content.get("identity")
    named = named.get("path") if isinstance(named, dict) else named
    lines = []
    if settings:
        lines.append(settings)
    elif not any(name.startswith("RINGFENCE_") for name in os.environ):
        lines.append("Nothing is set up in this folder yet: begin with ringfence dev.")
    if named:
        lines.append(_who(Path(str(named))))
    elif settings:
        lines.append("Nobody is calling yet: name a key file with --identity or RINGFENCE_IDENTITY.")
    return [line if len(line) <= _WIDTH else line[: _WIDTH - 3] + "..." for line in lines]


def _settings() -> tuple[str, Mapping[str, object]]:
    """Return a sentence about the settings file, and its content."""
    try:
        file = read_config()
    except RingfenceError:
        return "The settings file cannot be read: ringfence config show says why.", {}
    if file is not None:
        return f"Settings: {visible_name(file.path)}", file.content
    return ("If you started ringfence dev here, first: source .ringfence/dev.sh" if unread_here() else ""), {}


def _who(file: Path) -> str:
    """Return a sentence about a key file, of which only the id is read."""
    shown = visible_name(str(file))
    try:
        if not stat.S_ISREG(file.stat().st_mode) or file.stat().st_size > _MAX_KEY_BYTES:
            raise ValueError
        id = json.loads(file.read_bytes())["id"]
        kind, name = str(id).split("/")[-2:]
    except (OSError, ValueError, KeyError, TypeError):
        return f"Identity: {shown}, which is no key file; make one with: ringfence key new"
    return f"You are {visible_name(kind)} {visible_name(name)} ({shown})."
