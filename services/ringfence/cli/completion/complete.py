"""`ringfence __complete`: what the scripts of the shells ask when somebody presses TAB.

It prints candidates or nothing. It never asks a question and never prints an error. Where ids have to be looked up, it
ends within `LIMIT_S`.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, get_args

from ringfence.cli.completion import command_line
from ringfence.cli.completion.candidates import NOTHING, Candidate, Completion
from ringfence.cli.completion.command_line import Slot, Typed, found_completion, static_completion


def words_of(path: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """Return the words by placeholder or by option, for the options of one command."""
    match tuple(path):
        case ("dev",):
            from ringfence.client.admin.trust_setup import ON_DEMAND

            return {"SERVICE": tuple(ON_DEMAND)}
        case ("serve",):
            from ringfence.client.admin.trust_setup import BY_NAME, ON_DEMAND, SERVICE_ROLES

            return {"SERVICE...": (*SERVICE_ROLES, *ON_DEMAND, *BY_NAME, "sign-page")}
        case ("init",):
            from ringfence.client.admin.trust_setup import ON_DEMAND, SERVICE_ROLES

            return {
                "--add-service": tuple(ON_DEMAND),
                "--rotate-service": (*SERVICE_ROLES, *ON_DEMAND),
                "USE": ("users", "instances"),
            }
        case ("user", _):
            from ringfence.messages.registry import Role

            return {"ROLE": get_args(Role)}
        case ("target", "add"):
            from ringfence.cli.commands.target_templates import TEMPLATES
            from ringfence.model.target_settings import CREDENTIAL_KINDS

            return {"--backend": tuple(CREDENTIAL_KINDS), "--template": tuple(TEMPLATES)}
        case ("request",) | ("release",) | ("mcp", "serve"):
            return {"SOURCE": ("file:", "github", "gcp")}
        case ("completion",):
            return {"SHELL": ("bash", "zsh", "fish")}
    return {}


LOOKUP_S: Final = 1.5
"""How long services and Kafka may take to name ids."""
LIMIT_S: Final = 2.0
"""How long a lookup may take with all that surrounds it. After this time the process ends."""
_BASH_LISTS: Final = frozenset({9, 33, 63, 64})
"""Values of COMP_TYPE (TAB, `!`, `?`, `@`) with which bash shows a list, and inserts only what all lines begin with."""
_GAP: Final = "  "


def main(root: Any, helps: dict[str, str], words: Sequence[str]) -> int:
    """Print candidates for a shell. Never fails.

    Args:
        root: the group of all commands.
        helps: the one-line help of each of its commands.
        words: the shell, and what its script passes on.
    """
    _go_silent()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    with contextlib.suppress(Exception):  # nothing may disturb who types
        sys.stdout.write(answer(root, helps, words))
        sys.stdout.flush()
    return 0


def answer(root: Any, helps: dict[str, str], words: Sequence[str]) -> str:
    """Return what `__complete` prints: the kind of completion, then a candidate on each line."""
    shell, *rest = words
    if shell == "bash":
        current, line, comp_type, columns = rest
        *before, typed_word = command_line.split(line)
        completion = complete(root, helps, command_line.without_command(before), typed_word)
        return _lines(completion, _for_bash(completion, typed_word, current, int(comp_type), int(columns)))
    *before, typed_word = rest
    completion = complete(root, helps, command_line.without_command(before), typed_word)
    shown = map(_for_zsh if shell == "zsh" else _for_fish, completion.candidates)
    return _lines(completion, shown)


def complete(root: Any, helps: dict[str, str], before: Sequence[str], current: str) -> Completion:
    """Return what completes `current`, after the finished words `before`. Never raises for what is typed."""
    typed = command_line.read(root, before)
    if typed is None or (where := command_line.slot(typed, current)) is None:
        return NOTHING
    completion = static_completion(typed, where, helps, words_of(typed.path))
    return completion if completion is not None else _looked_up(typed, where)


def _looked_up(typed: Typed, where: Slot) -> Completion:
    from ringfence.cli.completion.sources import NEW_NAMES, SOURCES, lookup

    source = SOURCES.get(where.param.metavar)
    if source is None or (where.param.param_type_name == "argument" and typed.path in NEW_NAMES):
        return NOTHING
    named = typed.option("me") or typed.option("identity")
    identity = Path(named).expanduser() if named else None  # the shell would have expanded it

    async def work() -> list[Candidate]:
        async with asyncio.timeout(LOOKUP_S):
            return await source(lookup(typed, identity))

    with _ended_after(LIMIT_S):
        return found_completion(where, asyncio.run(work()))


@contextlib.contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """End the process after this time, whatever it waits for: a name server, a key file that is a pipe."""
    watchdog = threading.Timer(seconds, os._exit, [0])
    watchdog.daemon = True
    watchdog.start()
    try:
        yield
    finally:
        watchdog.cancel()


def _lines(completion: Completion, lines: Any) -> str:
    return "".join(f"{line}\n" for line in (completion.kind, *lines))


def _for_bash(completion: Completion, word: str, current: str, comp_type: int, columns: int) -> list[str]:
    """Return the lines of COMPREPLY.

    Bash puts in what it gets, so a description may stand only where bash shows a list: then it puts in what all lines
    begin with, and as values differ and have no spaces, that is part of a value. Bash ends a word at some characters
    too (`=`, `:`), and replaces only what comes after.
    """
    kept = (
        len(word) - len(current) if current and word.endswith(current) else (len(word) if not current else 0)
    )
    values = [(one.value[kept:], one.description) for one in completion.candidates]
    if len(values) < 2 or comp_type not in _BASH_LISTS:
        return [value for value, _ in values]
    width = max(len(value) for value, _ in values)
    room = columns - width - len(_GAP) - 1
    return [
        f"{value:{width}}{_GAP}{description[:room]}" if description and room > 10 else value
        for value, description in values
    ]


def _for_zsh(one: Candidate) -> str:
    """Return a line for `_describe`, which ends the value at the first colon."""
    value = one.value.replace(":", "\\:")
    return f"{value}:{one.description.replace(chr(92), chr(92) * 2)}" if one.description else value


def _for_fish(one: Candidate) -> str:
    return f"{one.value}\t{one.description}" if one.description else one.value


def _go_silent() -> None:
    """Leave stdout alone, and make stdin and stderr the null device: nothing is asked, nothing is said."""
    logging.disable(logging.CRITICAL)
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 2):
        os.dup2(null, number)
