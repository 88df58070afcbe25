"""Matching of Model Context Protocol messages against the rules of a target's request map, and captures. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ringfence.kernel.base.strict_json import MAX_EXACT, case_folded
from ringfence.messages.registry import McpRule
from ringfence.model.mcp.messages import NAMED_BY, WITH_ARGUMENTS, McpMessage, clash

ARGUMENT: Final = re.compile(r"arguments\.([A-Za-z0-9_.$-]{1,64}?)(\*?)")
"""A placeholder for an argument in a resource: its name, and whether it may hold several segments."""
HOLE: Final = re.compile(r"\{([^{}]*)\}")

_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,31}")
_ANY_NOTIFICATION: Final = "notifications/*"
_MOST_HOLES: Final = 2
_WORDS: Final[Mapping[str, Any]] = {"true": True, "false": False, "null": None}
_WHOLE: Final = re.compile(r"0|-?[1-9][0-9]{0,14}")
_LENIENT_WORDS: Final = {
    **dict.fromkeys(("true", "yes", "on", "t", "y"), "1.0"),
    **dict.fromkeys(("false", "no", "off", "f", "n", "null", "none", "nil", "undefined"), ""),
}
_NOT_IN_A_SEGMENT: Final = re.compile(r"[/\\%;\x00-\x1f\x7f]")


class McpRuleError(ValueError):
    """Raised when a rule has no meaning. The message says what is wrong."""


class CannotTellError(Exception):
    """Raised when a condition or capture cannot be evaluated. Falling through to a weaker rule would be a guess."""


class CompiledMcpRule:
    """One rule, ready to match messages."""

    __slots__ = ("_conditions", "_method", "_name", "_template", "captures", "conditional")

    def __init__(self, rule: McpRule) -> None:
        """Raises McpRuleError if the rule has no meaning."""
        self._method = rule.method
        if rule.name is not None and rule.method not in NAMED_BY:
            raise McpRuleError(f"a message {rule.method} names nothing: leave the name out")
        if rule.arguments and rule.method not in WITH_ARGUMENTS:
            raise McpRuleError(f"a message {rule.method} has no arguments")
        self._template = rule.name if rule.name is not None else "{any*}"
        self._name, self.captures = _compiled_template(rule.name)
        self._conditions = {
            name: tuple(_literal(value) for value in values)
            for name, values in (rule.arguments or {}).items()
        }
        self.conditional = bool(self._conditions)

    def is_for(self, method: str) -> bool:
        return self._method == method or (
            self._method == _ANY_NOTIFICATION and method.startswith("notifications/")
        )

    def named(self, method: str, name: str | None) -> dict[str, str] | None:
        """Return what the template captures of a name, or None if method or name do not match."""
        if not self.is_for(method):
            return None
        if self._name is None:
            return {}
        match = self._name.fullmatch(name or "")
        return dict(zip(self.captures, match.groups(), strict=True)) if match is not None else None

    def fits(self, message: McpMessage) -> bool:
        """Return whether the arguments meet the rule's conditions. Raises CannotTellError if any is uncertain."""
        met = []
        for name, values in self._conditions.items():
            given = argument(message, name)
            met.append(meets(given, values) if name in message.arguments else None in values)
        return all(met)

    def overlaps(self, other: CompiledMcpRule) -> bool:
        """Return False if no message can match both, whatever its arguments. Compares two templates by their ends."""
        one, two = self._template, other._template
        if self._method != other._method:
            return False
        if "{" not in one or "{" not in two:
            return self.covers(other) or other.covers(self)
        heads = one.partition("{")[0], two.partition("{")[0]
        tails = one.rpartition("}")[2], two.rpartition("}")[2]
        return (heads[0].startswith(heads[1]) or heads[1].startswith(heads[0])) and (
            tails[0].endswith(tails[1]) or tails[1].endswith(tails[0])
        )

    def covers(self, other: CompiledMcpRule) -> bool:
        """Return True if all messages that the other may match certainly match this one, whatever their arguments."""
        mine, its = self._template, other._template
        if self._method != other._method:
            return False
        if mine == its or (HOLE.fullmatch(mine) and mine.endswith("*}")):
            return True
        return "{" not in its and self.named(other._method, its) is not None


def takes_arguments(method: str) -> bool:
    """Return whether a resource can be built from the arguments of such a message."""
    return method in WITH_ARGUMENTS


def argument(message: McpMessage, name: str) -> Any:
    """Return one argument, or None if it is missing.

    Raises CannotTellError if another name differs only in case, or if readers understand the number differently.
    """
    if name not in message.arguments and clash((name, *message.arguments)):
        raise CannotTellError
    value = message.arguments.get(name)
    if isinstance(value, int) and abs(value) > MAX_EXACT:
        raise CannotTellError
    return value


def meets(given: Any, wanted: Sequence[Any]) -> bool:
    """Return whether a value is one of those that a condition names, as JSON compares: 1 is not true.

    Raises CannotTellError if it is not, and either has the JSON type of none of them, or a lenient reader could take
    it for one. Servers do: for many, `"true"`, `1` and `[true]` are true.
    """
    if any(type(given) is type(one) and given == one for one in wanted):
        return True
    types = {type(one) for one in wanted if one is not None}  # next to null alone, values have any type
    if (types and type(given) not in types) or _leniently(given) in map(_leniently, wanted):
        raise CannotTellError
    return False


def captured(message: McpMessage, hole: str) -> str:
    """Return what an argument puts into a resource.

    Raises CannotTellError if it is missing or has an unusable value.
    """
    match = ARGUMENT.fullmatch(hole)
    assert match is not None, "checked when the rule was compiled"
    value = argument(message, match[1])
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise CannotTellError
    check_segments(value, several=bool(match[2]))
    return value


def check_segments(value: str, *, several: bool) -> None:
    """Raise CannotTellError unless a text is one valid segment of a name, or with `several` a path of them."""
    for segment in value.split("/") if several else [value]:
        if segment in ("", ".", "..") or _NOT_IN_A_SEGMENT.search(segment):
            raise CannotTellError


def _compiled_template(text: str | None) -> tuple[re.Pattern[str] | None, tuple[str, ...]]:
    if text is None:
        return None, ()
    pattern, names, end = "", [], 0
    for hole in HOLE.finditer(text):
        name, star = hole[1].removesuffix("*"), hole[1].endswith("*")
        if not _NAME.fullmatch(name) or name == "arguments" or hole[1] in names:
            raise McpRuleError(f"{hole[0]}: a capture has a name of its own, of a-z, 0-9 and _")
        if star and hole.end() != len(text):
            raise McpRuleError(f"nothing can stand after {hole[0]}, which takes all that is left")
        names.append(hole[1])
        pattern += re.escape(text[end : hole.start()]) + ("(.+)" if star else "([^/]+)")
        end = hole.end()
    rest = text[end:]
    if len(names) > _MOST_HOLES or re.search(r"[{}*]", HOLE.sub("", text)):
        raise McpRuleError(
            f"{text!r}: a name is written out, with at most {_MOST_HOLES} captures {{name}} in it"
        )
    return re.compile(pattern + re.escape(rest), re.DOTALL), tuple(names)


def _literal(text: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    return int(text) if _WHOLE.fullmatch(text) else text


def _leniently(value: Any) -> str:
    """Return one text for all values that lenient readers could take for each other."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    text = case_folded(str(value or "")).strip()
    try:
        number = float(text)
    except ValueError:
        return _LENIENT_WORDS.get(text, text)
    return str(number) if number else ""
