"""Which HTTP request is which verb on which resource: the ordered map of a target, evaluated. Pure.

The first rule that matches counts; what matches none, or cannot be told for certain, is no verb at all, and nothing
allows it. A request that two readers could understand differently is such a one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import unquote_to_bytes

from ringfence.kernel.errors import RingfenceError
from ringfence.kernel.strict_json import json_object
from ringfence.messages.registry import RequestRule
from ringfence.model.scope import ScopeError, parse_name

MAX_TARGET_CHARS: Final = 8192
MAX_BODY_BYTES: Final = 1024 * 1024
"""So much of a body is looked at: a rule with conditions on the body of a larger one matches nothing."""

_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,31}")
_LITERAL: Final = re.compile(r"[A-Za-z0-9._~!$&'()+,=:@-]+")
_HOLE: Final = re.compile(r"\{([^{}]*)\}")
_RAW_SEGMENT: Final = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,=:@-]|%[0-9A-Fa-f]{2})+")
_NOT_IN_A_SEGMENT: Final = re.compile(r"[/\\%;\x00-\x1f\x7f]")


class RequestMapError(RingfenceError):
    """A rule of a target's map cannot be used. The message names it, and says what to write."""

    code = "request_map_invalid"


@dataclass(frozen=True, slots=True)
class Action:
    """What a request does: one verb on one resource."""

    verb: str
    resource: str


@dataclass(frozen=True, slots=True)
class _Rule:
    segments: tuple[str | None, ...]
    """The literals; None where one is captured."""
    names: tuple[str | None, ...]
    rest: str | None
    """The name of what captures one segment or more, at the end."""
    rule: RequestRule = field(repr=False)

    def captures(self, segments: Sequence[str]) -> dict[str, str] | None:
        """What the template captures of a path, or None where it does not match."""
        known = len(self.segments)
        if len(segments) < known + 1 if self.rest else len(segments) != known:
            return None
        if any(
            want is not None and want != got
            for want, got in zip(self.segments, segments[:known], strict=True)
        ):
            return None
        found = {
            name: got for name, got in zip(self.names, segments[:known], strict=True) if name is not None
        }
        if self.rest:
            found[f"{self.rest}*"] = "/".join(segments[known:])
        return found


class _CannotTellError(Exception):
    """A condition that cannot be judged: falling through to a weaker rule would be a guess."""


class RequestMap:
    """The map of one target, compiled once."""

    def __init__(self, rules: Sequence[RequestRule]) -> None:
        """Raises RequestMapError where a rule says something that has no meaning."""
        self._by_method: dict[str, list[_Rule]] = {}
        for rule in rules:
            self._by_method.setdefault(rule.method, []).append(_compiled(rule))

    def reads_body(self, method: str, target: str) -> bool:
        """Whether a rule that may come to apply to such a request looks at its body: then it must be seen whole first.

        `method` and `target` as in `action`.
        """
        path, _, query = target.partition("?")
        segments = _decoded(path) if len(target) <= MAX_TARGET_CHARS and "#" not in query else None
        if segments is None:
            return False
        for rule in self._by_method.get(method, ()):
            if rule.captures(segments) is None:
                continue
            try:
                if not _query_fits(rule.rule.query, query):
                    continue
            except _CannotTellError:
                return False
            return bool(rule.rule.body)
        return False

    def action(self, method: str, target: str, body: bytes | None = None) -> Action | None:
        """What a request does, or None where no rule says so.

        Args:
            method: as it was sent; case matters.
            target: path and query as they were sent (origin-form, RFC 9112, 3.2.1), nothing decoded.
            body: as it was sent, or None where it was not seen.
        """
        if len(target) > MAX_TARGET_CHARS:
            return None
        path, _, query = target.partition("?")
        segments = _decoded(path)
        if segments is None or "#" in query:
            return None
        for rule in self._by_method.get(method, ()):
            captures = rule.captures(segments)
            if captures is None:
                continue
            try:
                if _query_fits(rule.rule.query, query) and _body_fits(rule.rule.body, body):
                    return _action(rule.rule, captures)
            except _CannotTellError:
                return None
        return None


# --- templates --------------------------------------------------------------------------------------------------------


def _compiled(rule: RequestRule) -> _Rule:
    def wrong(message: str) -> RequestMapError:
        return RequestMapError(f"'{rule.method} {rule.path}': {message}")

    if not rule.path.startswith("/"):
        raise wrong("a path begins with '/'")
    parts = rule.path[1:].split("/") if rule.path != "/" else []
    segments: list[str | None] = []
    names: list[str | None] = []
    rest: str | None = None
    for part in parts:
        if rest is not None:
            raise wrong(f"nothing can stand after {{{rest}*}}, which takes all that is left")
        hole = _HOLE.fullmatch(part)
        if hole is None:
            if not _LITERAL.fullmatch(part) or part in (".", ".."):
                raise wrong(
                    f"{part!r} is neither a segment as it is after decoding, nor {{name}} or {{name*}} as a whole"
                )
            segments.append(part)
            names.append(None)
            continue
        name, star = hole[1].removesuffix("*"), hole[1].endswith("*")
        if not _NAME.fullmatch(name) or name in names:
            raise wrong(f"{part!r}: a capture has a name of its own, of a-z, 0-9 and _")
        if star:
            rest = name
        else:
            segments.append(None)
            names.append(name)
    captured = {name for name in (*names, rest and f"{rest}*") if name is not None}
    _check_resource(rule, captured, wrong)
    return _Rule(tuple(segments), tuple(names), rest, rule)


def _check_resource(rule: RequestRule, captured: set[str], wrong: Any) -> None:
    unknown = set(_HOLE.findall(rule.resource)) - captured
    if unknown:
        raise wrong(
            f"the resource {rule.resource!r} uses {{{min(unknown)}}}, which the path does not capture"
        )
    try:
        parse_name(_HOLE.sub("x", rule.resource))
    except ScopeError as error:
        raise wrong(f"the resource {rule.resource!r} is none: {error}") from None


def _action(rule: RequestRule, captures: Mapping[str, str]) -> Action | None:
    """None where what was captured is no resource: nobody could have been allowed it."""
    resource = _HOLE.sub(lambda hole: captures[hole[1]], rule.resource)
    try:
        parse_name(resource)
    except ScopeError:
        return None
    return Action(rule.verb, resource)


# --- requests ---------------------------------------------------------------------------------------------------------


def _decoded(path: str) -> tuple[str, ...] | None:
    """The segments of a path, each decoded once; None for every path that others might read otherwise."""
    if path == "/":
        return ()
    if not path.startswith("/"):
        return None
    segments = []
    for raw in path[1:].split("/"):
        if not _RAW_SEGMENT.fullmatch(raw):
            return None
        try:
            segment = unquote_to_bytes(raw).decode("utf-8")
        except UnicodeDecodeError:
            return None
        if segment in (".", "..") or _NOT_IN_A_SEGMENT.search(segment):
            return None
        segments.append(segment)
    return tuple(segments)


def _query_fits(conditions: Mapping[str, tuple[str, ...]] | None, query: str) -> bool:
    if not conditions:
        return True
    given = _query(query)
    return all(given.get(name) in values for name, values in conditions.items())


def _query(query: str) -> dict[str, str]:
    """The parameters, decoded. Raises _CannotTellError where one comes twice, or cannot be decoded."""
    found: dict[str, str] = {}
    for pair in query.split("&") if query else ():
        name, _, value = (_word(part) for part in pair.partition("="))
        if name in found:
            raise _CannotTellError
        found[name] = value
    return found


def _word(raw: str) -> str:
    # Whether `+` is a space, and `;` parts parameters, is for each server to say.
    if re.search(r"[+;]|%(?![0-9A-Fa-f]{2})", raw):
        raise _CannotTellError
    try:
        return unquote_to_bytes(raw).decode("utf-8")
    except UnicodeDecodeError:
        raise _CannotTellError from None


def _body_fits(conditions: Mapping[str, tuple[str, ...]] | None, body: bytes | None) -> bool:
    if not conditions:
        return True
    given = _json_object(body)
    return all(given.get(name) in values for name, values in conditions.items())


def _json_object(body: bytes | None) -> dict[str, Any]:
    """The members of a JSON object. Raises _CannotTellError for anything else, and where a name comes twice."""
    if body is None or len(body) > MAX_BODY_BYTES:
        raise _CannotTellError
    try:
        return json_object(body)
    except ValueError:
        raise _CannotTellError from None
