"""Splits what is typed into words, and finds what may come next by the commands' own declarations.

A new command, option or choice needs nothing here. A new kind of id needs a row in `complete.SOURCES`; a test fails for
a placeholder (`metavar`) that is neither there nor in `NOT_COMPLETED`.

Candidates of a completion, made safe for a shell.

Ids and descriptions come from records that agents and strangers wrote. A value is put on the command line of whoever
presses TAB, so a value is offered only if it is made of characters that mean nothing to any shell. A description is
shown and never put on the command line: it is one short line without control characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args, get_origin

from ringfence.kernel.base.text import visible

MAX_DESCRIPTION: Final = 100
"""Characters of a description. A longer one is cut, and marked."""
MAX_CANDIDATES: Final = 500
"""More are no help at a prompt, and a terminal asks before it shows them."""
_SAFE_VALUE = re.compile(r"-{0,2}[A-Za-z0-9][A-Za-z0-9_:./-]{0,127}", re.ASCII)
_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
"""An id that is no option either: one that began with `-` would change what the command does."""

Kind = Literal["words", "files", "folders"]
"""The completion of a word: the candidates, or the shell's own completion of files or folders."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A word that may be put on the command line, and what it stands for."""

    value: str
    description: str = ""


@dataclass(frozen=True, slots=True)
class Completion:
    """The candidates for the last word, or that the shell completes files or folders there."""

    kind: Kind
    candidates: tuple[Candidate, ...] = ()


FILES: Final = Completion("files")
FOLDERS: Final = Completion("folders")
NOTHING: Final = Completion("words")


def safe(
    candidates: Iterable[Candidate], beginning: str = "", *, only_ids: bool = False
) -> tuple[Candidate, ...]:
    """Return the candidates that begin with `beginning` and mean nothing to a shell, with safe descriptions.

    Each value comes once, in the order given. `only_ids`: they come from records, so that options are no candidates.
    """
    pattern = _SAFE_ID if only_ids else _SAFE_VALUE
    found: dict[str, Candidate] = {}
    for one in candidates:
        if len(found) >= MAX_CANDIDATES:
            break
        if one.value.startswith(beginning) and pattern.fullmatch(one.value):
            found.setdefault(one.value, Candidate(one.value, one_line(one.description)))
    return tuple(found.values())


def one_line(text: str) -> str:
    """Return a description as one short line without characters that act on a terminal."""
    # Each invisible character becomes several visible ones, so it is cut twice: a long text costs no time.
    line = " ".join(visible(" ".join(text[: 4 * MAX_DESCRIPTION].split())).split())
    return line if len(line) <= MAX_DESCRIPTION else line[: MAX_DESCRIPTION - 3] + "..."


_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=", re.ASCII)
_WORD_ENDS: Final = frozenset(" \t\n")
_OPERATORS: Final = frozenset("|&;")

FILE_METAVARS: Final = frozenset({"FILE", "[FILE]", "PATH", "[PATH]", "[PATH...]"})
FOLDER_METAVARS: Final = frozenset({"DIR", "DIR[:rw]", "FOLDER"})
COMMAND_METAVARS: Final = frozenset({"[-- COMMAND...]", "[-- SERVER...]"})
"""A program's own words: the shell completes file names there."""
NOT_COMPLETED: Final = frozenset({
    "CLAIM", "CODE", "DAYS", "DIGEST", "DOMAIN", "DURATION", "HOST:PORT", "HOURS", "IMAGE", "KIB", "KID", "MOMENT",
    "NAME=NUMBER", "NAME=VALUE", "NAME[:rw]", "NUMBER", "ORIGIN", "PARTY=PRINCIPAL", "PERCENT", "PERMISSION", "POOL",
    "PORT", "RESOURCE", "RUNNER", "SECONDS", "SELECTOR", "SIZE", "TAG", "TARGET=PLACE", "TEXT", "THUMBPRINT", "TIME",
    "URL", "UTC", "VERB", "VERB=KIND", "VERB[=CLASS]", "VERB[=FLOOR]", "WHEN",
})  # fmt: skip
"""Placeholders of what only the caller knows."""


@dataclass(slots=True)
class Typed:
    """The words before the one that is completed."""

    command: Any
    path: tuple[str, ...] = ()
    """The names of the command, without `ringfence`."""
    options: dict[str, list[str]] = field(default_factory=dict)
    """The values given, by the parameter's name."""
    arguments: list[str] = field(default_factory=list)
    waiting: Any = None
    """The option whose value comes next."""
    only_arguments: bool = False
    """`--` was given: nothing is an option any more."""

    def option(self, name: str) -> str | None:
        """Return the last value of an option, by the parameter's name."""
        return self.options[name][-1] if self.options.get(name) else None


def split(line: str) -> list[str]:
    """Return the words of a bash command line up to the cursor; the last one may be unfinished, or empty.

    Quotes and backslashes are removed. Nothing is expanded. Words before the last `|`, `&` or `;` are of another
    command.
    """
    words, word, quote, escaped, began = [], "", "", False, False
    for char in line:
        if escaped:
            word, escaped = word + char, False
        elif char == "\\" and quote != "'":
            escaped = began = True
        elif quote:
            quote, word = ("", word) if char == quote else (quote, word + char)
        elif char in "'\"":
            quote, began = char, True
        elif char in _WORD_ENDS or char in _OPERATORS:
            words += [word] if word or began else []
            word, began = "", False
            if char in _OPERATORS:
                words = []
        else:
            word += char
    return [*words, word]


def without_command(words: Sequence[str]) -> list[str]:
    """Return the words after the name of the program, which assignments may precede (`NAME=VALUE ringfence ...`)."""
    rest = list(words)
    while rest and _ASSIGNMENT.match(rest[0]):
        rest.pop(0)
    return rest[1:]


def read(root: Any, words: Sequence[str]) -> Typed | None:
    """Return what the finished words say; None where they name no command."""
    typed = Typed(root)
    for word in words:
        if typed.waiting is not None:
            _take(typed, typed.waiting, word)
            typed.waiting = None
        elif word == "--" and not typed.only_arguments:
            typed.only_arguments = True
        elif word.startswith("-") and word != "-" and not typed.only_arguments:
            _read_option(typed, word)
        elif _takes_command(typed):
            inner = typed.command.get_command(None, word)
            if inner is None:
                return None
            typed.command, typed.path = inner, (*typed.path, word)
        else:
            typed.arguments.append(word)
    return typed


def _read_option(typed: Typed, word: str) -> None:
    name, equals, value = word.partition("=")
    param = _options(typed.command).get(name)
    if param is None:
        return
    if _is_flag(param):
        _take(typed, param, "")
    elif equals:
        _take(typed, param, value)
    else:
        typed.waiting = param


def _take(typed: Typed, param: Any, value: str) -> None:
    typed.options.setdefault(param.name, []).append(value)


@dataclass(frozen=True, slots=True)
class Slot:
    """What is completed: a value of a parameter, an option's name, or the name of a command."""

    kind: Literal["value", "option", "command"]
    param: Any = None
    beginning: str = ""
    before: str = ""
    """What stands in the same word before the value: `--agent=`."""


def slot(typed: Typed, current: str) -> Slot | None:
    """Return what the current word completes; None where nothing comes there."""
    if typed.waiting is not None:
        return Slot("value", typed.waiting, current)
    if current.startswith("-") and not typed.only_arguments:
        name, equals, value = current.partition("=")
        param = _options(typed.command).get(name)
        if equals:
            usable = param is not None and not _is_flag(param)
            return Slot("value", param, value, f"{name}=") if usable else None
        return Slot("option", None, current)
    if _takes_command(typed):
        return Slot("command", None, current)
    places = [param for param in typed.command.params if param.param_type_name == "argument"]
    index = len(typed.arguments)
    if index < len(places):
        return Slot("value", places[index], current)
    if places and places[-1].nargs == -1:
        return Slot("value", places[-1], current)
    return Slot("option", None, current) if not current else None


def static_completion(
    typed: Typed, where: Slot, helps: Mapping[str, str], words: Mapping[str, Sequence[str]]
) -> Completion | None:
    """Return what completes a word without asking any service; None where ids have to be looked up.

    Args:
        helps: the one-line help of each command of the root, which then need not be imported.
        words: by placeholder or by option, the words that may stand there.
    """
    if where.kind == "command":
        return Completion("words", safe(_commands(typed, helps), where.beginning))
    if where.kind == "option":
        return Completion("words", safe(_option_names(typed), where.beginning))
    param, metavar = where.param, where.param.metavar or ""
    fixed = [*_choices(param), *words.get(metavar, ()), *words.get(param.opts[0], ())]
    if fixed:
        given = typed.options.get(param.name, ()) if param.param_type_name == "option" else typed.arguments
        new = [word for word in fixed if word not in given or word == where.beginning]
        return Completion("words", _after(where, safe(map(Candidate, new), where.beginning)))
    if metavar in FOLDER_METAVARS:
        return FOLDERS
    if metavar in FILE_METAVARS or metavar in COMMAND_METAVARS:
        return FILES
    if metavar in NOT_COMPLETED or not metavar:
        return NOTHING
    return None


def found_completion(where: Slot, found: Sequence[Candidate]) -> Completion:
    """Return the completion by ids that were looked up."""
    return Completion("words", _after(where, safe(found, where.beginning, only_ids=True)))


def _after(where: Slot, candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    return tuple(Candidate(where.before + one.value, one.description) for one in candidates)


def _commands(typed: Typed, helps: Mapping[str, str]) -> Iterator[Candidate]:
    for name in typed.command.list_commands(None):
        if not typed.path:
            yield Candidate(name, helps.get(name, ""))
            continue
        inner = typed.command.get_command(None, name)
        if inner is not None and not inner.hidden:
            yield Candidate(name, _first_sentence(inner.help or ""))


def _option_names(typed: Typed) -> Iterator[Candidate]:
    seen = set()
    for name, param in _options(typed.command).items():
        repeated = getattr(param, "multiple", False)
        if getattr(param, "hidden", False) or (param.name in typed.options and not repeated):
            continue
        if name.startswith("--"):
            seen.add(name)
            yield Candidate(name, _first_sentence(getattr(param, "help", "") or ""))
    if "--help" not in seen:
        yield Candidate("--help", "Show this message and exit.")


def _first_sentence(text: str) -> str:
    return text.partition("\n")[0].partition(". ")[0].rstrip(".")


def _options(command: Any) -> dict[str, Any]:
    return {
        name: param
        for param in command.params
        if param.param_type_name == "option"
        for name in (*param.opts, *param.secondary_opts)
    }


def _choices(param: Any) -> tuple[str, ...]:
    """Return the values that a parameter can have, where its type or its placeholder lists them."""
    annotation = getattr(getattr(param, "type_descriptor", None), "annotation", None)
    if get_origin(annotation) is Literal:
        return tuple(map(str, get_args(annotation)))
    metavar = param.metavar or ""
    return tuple(metavar.split("|")) if re.fullmatch(r"[a-z0-9_-]+(\|[a-z0-9_-]+)+", metavar) else ()


def _is_group(command: Any) -> bool:
    return hasattr(command, "list_commands")


def _takes_command(typed: Typed) -> bool:
    """Return whether the next word names a command.

    A group with arguments of its own (`run`) takes one only as its first word.
    """
    if not _is_group(typed.command):
        return False
    own = any(param.param_type_name == "argument" for param in typed.command.params)
    return not own or not (typed.options or typed.arguments or typed.only_arguments)


def _is_flag(param: Any) -> bool:
    return bool(getattr(param, "is_flag", False) or getattr(param, "count", False))
