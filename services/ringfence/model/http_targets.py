"""HTTP targets: maps requests, those of the Model Context Protocol too, to verbs and resources. Pure.

The rules are ordered, and the first that matches applies. A request that matches no rule, or whose meaning is
uncertain, has no verb, and nothing allows it. A request that two readers could understand differently is uncertain.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, get_args
from urllib.parse import unquote_to_bytes

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.strict_json import case_folded, json_object
from ringfence.messages.codes import Code
from ringfence.messages.registry import (
    ActionClass,
    ApprovalClass,
    GitOperation,
    ModelApi,
    RequestRule,
    VerbFloor,
)
from ringfence.model.git.endpoints import GitEndpoint, git_endpoint, is_near_endpoint
from ringfence.model.git.push import RefUpdate
from ringfence.model.mcp.messages import McpMessage, McpMessageError, read_message
from ringfence.model.mcp.rules import (
    ARGUMENT,
    HOLE,
    CannotTellError,
    CompiledMcpRule,
    McpRuleError,
    captured,
    check_segments,
    meets,
    takes_arguments,
)
from ringfence.model.model_requests import ModelRequestError, read_model_request
from ringfence.model.scope.globs import ScopeError, parse_glob, parse_name
from ringfence.model.unknown_fields import names_of, unknown_fields

MAX_TARGET_CHARS: Final = 8192
MAX_BODY_BYTES: Final = 1024 * 1024
"""The longest body that rules inspect. A rule with conditions on a longer body does not match."""

_MAX_SEGMENTS: Final = 256
"""No resource has more segments; more would only cost time."""

_FLOORS: Final[tuple[ApprovalClass, ...]] = get_args(ApprovalClass)
_ASKS: Final[tuple[ActionClass | None, ...]] = (None, *get_args(ActionClass))
_MCP: Final = "MCP"
"""The method of rules for MCP messages; no HTTP request has it."""
_MODEL: Final = "model*"
"""The capture of a model's name."""
_GIT: Final = "GIT"
"""The method of rules for Git servers; it matches no HTTP request."""
_REF: Final = "ref*"
"""The capture of a ref."""
_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,31}")
_LITERAL: Final = re.compile(r"[A-Za-z0-9._~!$&'()+,=:@-]+")
_RAW_SEGMENT: Final = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,=:@-]|%[0-9A-Fa-f]{2})+")
_PLAIN_PATH: Final = re.compile(r"(?:/[A-Za-z0-9_~!$&'()*+,=:@-][A-Za-z0-9._~!$&'()*+,=:@-]*)+")
_NOT_IN_A_SEGMENT: Final = re.compile(r"[/\\%;\x00-\x1f\x7f]")
_NOT_OF_A_NAME: Final = re.compile(r"[\[\]_. \t-]")
_OVERRIDES: Final = frozenset({"_method", "x-http-method-override", "x-http-method", "x-method-override"})
"""Parameters that make servers treat a POST as another method."""


class RequestMapError(RingfenceError):
    """A rule of the map is invalid. The message names the rule, and says what to write."""

    code = Code.REQUEST_MAP_INVALID


@dataclass(frozen=True, slots=True)
class Action:
    """What a request does: one verb on one resource."""

    verb: str
    resource: str


@dataclass(frozen=True, slots=True)
class _Rule:
    segments: tuple[str | None, ...]
    """Literal segments; None for a captured one."""
    names: tuple[str | None, ...]
    rest: str | None
    """The name of the capture at the end that takes one segment or more."""
    rule: RequestRule = field(repr=False)
    mcp: CompiledMcpRule | None
    unknown: str
    """The names of fields of it that this version does not know."""

    def folded(self) -> _Rule:
        """The same rule for paths in lower case."""
        return replace(
            self, segments=tuple(case_folded(one) if one is not None else None for one in self.segments)
        )

    @property
    def conditions(self) -> frozenset[tuple[str, str]]:
        """Where the rule has a condition: the query, the body or the arguments, and the name there.

        A rule for requests to models without server tools has a condition on the whole body.
        """
        arguments = self.rule.mcp.arguments if self.rule.mcp is not None else None
        given = {"query": self.rule.query, "body": self.rule.body, "argument": arguments}
        named = frozenset((where, name) for where, some in given.items() for name in some or ())
        model = self.rule.model
        return named | {("body", "")} if model is not None and not model.server_tools else named

    @property
    def reads_body(self) -> bool:
        """Whether the rule has to see the body."""
        return bool(self.rule.body) or self.rule.model is not None

    @property
    def _depth(self) -> tuple[int, float]:
        """How many segments a path may have, at least and at most."""
        known = len(self.segments)
        return (known + 1, math.inf) if self.rest else (known, known)

    def overlaps(self, other: _Rule) -> bool:
        """Whether a request may match both rules, their conditions aside."""
        (least, most), (its_least, its_most) = self._depth, other._depth
        return (
            max(least, its_least) <= min(most, its_most)
            and all(
                None in pair or pair[0] == pair[1]
                for pair in zip(self.segments, other.segments, strict=False)
            )
            and (self.mcp is None or other.mcp is None or self.mcp.overlaps(other.mcp))
        )

    def covers(self, other: _Rule) -> bool:
        """Whether all requests that the other may match certainly match this one, their conditions aside."""
        (least, most), (its_least, its_most) = self._depth, other._depth
        return (
            least <= its_least
            and most >= its_most
            and all(one in (None, two) for one, two in zip(self.segments, other.segments, strict=False))
            and (self.mcp is None or other.mcp is None or self.mcp.covers(other.mcp))
        )

    def captures(self, segments: Sequence[str]) -> dict[str, str] | None:
        """The captures of a path; None if it does not match."""
        known = len(self.segments)
        if len(segments) < known + 1 if self.rest else len(segments) != known:
            return None
        found = {}
        for want, name, got in zip(self.segments, self.names, segments, strict=False):
            if name is not None:
                found[name] = got
            elif want != got:
                return None
        if self.rest:
            found[f"{self.rest}*"] = "/".join(segments[known:])
        return found


class RequestMap:
    """The compiled request map of one target."""

    def __init__(self, rules: Sequence[RequestRule]) -> None:
        """Raises RequestMapError if a rule is invalid."""
        self._by_method: dict[str, list[_Rule]] = {}
        self._mcp: list[_Rule] = []
        self._git: list[_Rule] = []
        for rule in map(_compiled, rules):
            some = (
                self._mcp
                if rule.mcp is not None
                else self._git
                if rule.rule.git is not None
                else self._by_method.setdefault(rule.rule.method, [])
            )
            some.append(rule)
        self._looked_at = {
            method for method, some in self._by_method.items() if any(one.reads_body for one in some)
        }
        """The methods with a rule that reads the body."""
        self._models = [one for one in self._by_method.get("POST", ()) if one.rule.model is not None]
        self._nearly = [rule.folded() for rule in self._mcp]

    def check_order(self, verbs: Sequence[VerbFloor]) -> None:
        """Check that requests without a condition need the stronger verb. Raises RequestMapError.

        A later rule that leaves one of a rule's conditions open has its verb or a stronger one, until a rule without
        conditions takes all the rest. Of a stronger verb the floor or the approval of single actions is higher, and
        none is lower.
        """
        demands = {one.verb: (_FLOORS.index(one.floor), _ASKS.index(one.ask)) for one in verbs}
        for rules in (*self._by_method.values(), self._mcp):
            for place, rule in enumerate(rules):
                for later in rules[place + 1 :] if rule.conditions else ():
                    if not rule.conditions <= later.conditions and rule.overlaps(later):
                        _check_stronger(rule.rule, later.rule, demands)
                    if not later.conditions and later.covers(rule):
                        break

    def speaks_mcp(self, target: str) -> bool:
        """Whether `target` is an endpoint of the Model Context Protocol. `target` as in `action`."""
        return bool(self._mcp) and self._endpoint(target) is not None

    def _is_nearly_endpoint(self, segments: Sequence[str]) -> bool:
        """Whether a path differs from an MCP endpoint only in case. Some servers would take it for the endpoint."""
        folded = [case_folded(segment) for segment in segments]
        return any(rule.captures(folded) is not None for rule in self._nearly)

    def _endpoint(self, target: str) -> tuple[str, ...] | None:
        """The segments of the path if it is an MCP endpoint, else None."""
        segments = _decoded(target.partition("?")[0]) if len(target) <= MAX_TARGET_CHARS else None
        if segments is None or not any(rule.captures(segments) is not None for rule in self._mcp):
            return None
        return segments

    def reads_body(self, method: str, target: str) -> bool:
        """Whether a rule that may apply to the request inspects the body: then the caller has to buffer the body first.

        `method` and `target` as in `action`.
        """
        if method == "POST" and self.speaks_mcp(target):
            return True
        if method not in self._looked_at or self.git_endpoint(method, target) is not None:
            return False
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
            except CannotTellError:
                return False
            return rule.reads_body
        return False

    def action(self, method: str, target: str, body: bytes | None = None) -> Action | None:
        """The action of a request; None if no rule gives one, or if the rule that applies has an unknown field.

        Args:
            method: as it was sent; case matters.
            target: path and query as they were sent (origin-form, RFC 9112, 3.2.1), nothing decoded.
            body: as it was sent; None if it was not buffered, or is not declared as JSON.
        """
        found = self._found(method, target, body)
        return found if isinstance(found, Action) else None

    def not_understood(self, method: str, target: str, body: bytes | None = None) -> str | None:
        """The reason if a request has no action because the rule that applies has an unknown field, else None.

        With an unknown field, nobody can say what the request does. Later rules do not apply either: they are for
        requests that this rule does not match. Arguments as for `action`.
        """
        found = self._found(method, target, body)
        if not isinstance(found, _Rule):
            return None
        return (
            f"the rule for {found.rule.method} {found.rule.path} has a field that is not known here, and may limit it: "
            f"{found.unknown}; upgrade the gateway, or have an operator set the target without that field"
        )

    def _found(self, method: str, target: str, body: bytes | None) -> Action | _Rule | None:
        """The action of a request; the rule that applies, if it has an unknown field; or None."""
        if len(target) > MAX_TARGET_CHARS:
            return None
        if method == "POST" and self.speaks_mcp(target):
            try:
                return self._found_of_message(target, read_message(body or b"")) if _is_seen(body) else None
            except McpMessageError:
                return None
        path, _, query = target.partition("?")
        segments = _decoded(path)
        if segments is None or "#" in query or (method == "POST" and _overrides(query)):
            return None
        if self._nearly and method == "POST" and self._is_nearly_endpoint(segments):
            return None
        if self._git and is_near_endpoint(segments):
            return None
        for rule in self._by_method.get(method, ()):
            captures = rule.captures(segments)
            if captures is None:
                continue
            try:
                if not (_query_fits(rule.rule.query, query) and _body_fits(rule.rule.body, body)):
                    continue
                if rule.unknown:
                    return rule
                if rule.rule.model is not None:
                    request = read_model_request(rule.rule.model.api, query, body if _is_seen(body) else None)
                    if request.uses_server_tools and not rule.rule.model.server_tools:
                        continue
                    captures[_MODEL] = request.model
                return _action(rule.rule, captures)
            except CannotTellError:
                return None
        return None

    def model_api(self, method: str, target: str) -> ModelApi | None:
        """The API whose shape such a request to a model has; None if it is none. Arguments as for `action`."""
        if method != "POST" or not self._models or len(target) > MAX_TARGET_CHARS:
            return None
        segments = _decoded(target.partition("?")[0])
        for rule in self._models if segments is not None else ():
            if rule.rule.model is not None and rule.captures(segments or ()) is not None:
                return rule.rule.model.api
        return None

    def model_request_problem(self, method: str, target: str, body: bytes | None) -> str | None:
        """What is wrong with a request to a model that has no action; None if it is none, or nothing is wrong.

        Arguments as for `action`.
        """
        path, _, query = target.partition("?")
        segments = _decoded(path) if len(target) <= MAX_TARGET_CHARS else None
        for rule in self._by_method.get(method, ()) if segments is not None else ():
            if rule.rule.model is not None and rule.captures(segments or ()) is not None:
                try:
                    read_model_request(rule.rule.model.api, query, body if _is_seen(body) else None)
                except ModelRequestError as error:
                    return str(error)
        return None

    def git_endpoint(self, method: str, target: str) -> GitEndpoint | None:
        """The endpoint of a Git server that a request is for; None if it is for none. Arguments as for `action`."""
        path, _, query = target.partition("?")
        segments = _decoded(path) if self._git and len(target) <= MAX_TARGET_CHARS else None
        found = git_endpoint(method, segments, query) if segments is not None else None
        if found is None or not any(rule.captures(found.repository) is not None for rule in self._git):
            return None
        return found

    def git_actions(self, endpoint: GitEndpoint, updates: Sequence[RefUpdate]) -> tuple[Action, ...] | None:
        """The actions of a fetch, or of each update of a push, which all have to be allowed; None if one has none."""
        if endpoint.service == "git-upload-pack":
            wanted: list[tuple[GitOperation, str | None]] = [("fetch", None)]
        else:
            wanted = [(one.operation, one.ref.removeprefix("refs/")) for one in updates]
        actions = [self._git_action(endpoint, operation, ref) for operation, ref in wanted]
        found = tuple(action for action in actions if action is not None)
        return found if len(found) == len(actions) else None

    def _git_action(self, endpoint: GitEndpoint, operation: GitOperation, ref: str | None) -> Action | None:
        for rule, captures in self._git_rules(endpoint):
            if rule.git is not None and rule.git.operation == operation:
                return _action(rule, captures if ref is None else {**captures, _REF: ref})
        return None

    def git_offers(self, endpoint: GitEndpoint) -> tuple[Action, ...]:
        """The actions that a push to this repository may come to, for any ref. Their resources are globs."""
        found: list[Action] = []
        for rule, captures in self._git_rules(endpoint):
            if rule.git is not None and rule.git.operation != "fetch":
                with contextlib.suppress(ScopeError):
                    found.append(_offered(rule, captures))
        return tuple(found)

    def _git_rules(self, endpoint: GitEndpoint) -> Iterator[tuple[RequestRule, dict[str, str]]]:
        """The rules for a repository, up to one with an unknown field, which may be for any operation."""
        for rule in self._git:
            captures = rule.captures(endpoint.repository)
            if captures is not None and rule.unknown:
                return
            if captures is not None:
                yield rule.rule, captures

    def mcp_actions(self, target: str, message: McpMessage) -> tuple[Action, ...] | None:
        """The actions of all parts of an MCP message, which all have to be allowed; None if a part has none."""
        actions = [self.mcp_action(target, part) for part in message.parts()]
        found = tuple(action for action in actions if action is not None)
        return found if len(found) == len(actions) else None

    def mcp_action(self, target: str, message: McpMessage) -> Action | None:
        """The action of an MCP message posted to an endpoint, or None, as for `action`."""
        found = self._found_of_message(target, message)
        return found if isinstance(found, Action) else None

    def _found_of_message(self, target: str, message: McpMessage) -> Action | _Rule | None:
        segments = self._endpoint(target)
        if segments is None or "#" in target:
            return None
        for rule in self._mcp:
            assert rule.mcp is not None
            of_name = rule.mcp.named(message.method, message.name)
            of_path = rule.captures(segments) if of_name is not None else None
            if of_path is None or of_name is None:
                continue
            try:
                if not rule.mcp.fits(message):
                    continue
                if rule.unknown:
                    return rule
                return _action(rule.rule, _captured_of(rule.rule, of_path, of_name, message))
            except CannotTellError:
                return None
        return None

    def mcp_offers(self, target: str, method: str, name: str) -> tuple[Action, ...]:
        """The actions that a tool, prompt or resource may come to, for any arguments. Their resources are globs."""
        segments = self._endpoint(target)
        found: list[Action] = []
        if segments is None:
            return ()
        for rule in self._mcp:
            assert rule.mcp is not None
            of_name = rule.mcp.named(method, name)
            of_path = rule.captures(segments) if of_name is not None else None
            if of_path is None or of_name is None:
                continue
            if not rule.unknown:
                with contextlib.suppress(CannotTellError, ScopeError):
                    found.append(_offered(rule.rule, {**_checked(of_name), **of_path}))
            if not rule.mcp.conditional:
                break
        return tuple(found)

    def mcp_offers_of(self, target: str, method: str) -> tuple[Action, ...]:
        """The actions that a method may come to, for any name and any arguments. Their resources are globs."""
        segments = self._endpoint(target)
        found: list[Action] = []
        for rule in self._mcp if segments is not None else ():
            assert rule.mcp is not None
            of_path = rule.captures(segments) if rule.mcp.is_for(method) and segments is not None else None
            if of_path is not None and not rule.unknown:
                with contextlib.suppress(ScopeError):
                    found.append(_offered(rule.rule, of_path))
        return tuple(found)


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
        hole = HOLE.fullmatch(part)
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
    mcp = _compiled_mcp(rule, wrong)
    found = {name for name in (*names, rest and f"{rest}*") if name is not None}
    if mcp is not None and (twice := found & set(mcp.captures)):
        raise wrong(f"{{{min(twice)}}} is captured twice, of the path and of the name")
    if rule.model is not None:
        if rule.method != "POST" or rule.query or rule.body or mcp is not None or {"model", _MODEL} & found:
            raise wrong(
                "a rule for requests to models is for POST, without other conditions, and the path captures no model"
            )
        found.add(_MODEL)
    if (rule.git is not None) != (rule.method == _GIT):
        raise wrong("a rule with the method GIT says which operation it means, and no other rule does")
    if rule.git is not None:
        if rule.query or rule.body or mcp is not None or rule.model is not None or _REF in found:
            raise wrong("a rule for Git has no other conditions, and the path captures no ref")
        if rule.git.operation != "fetch":
            found.add(_REF)
    _check_resource(rule, found | set(mcp.captures if mcp is not None else ()), wrong)
    return _Rule(tuple(segments), tuple(names), rest, rule, mcp, names_of(unknown_fields(rule)))


def _compiled_mcp(rule: RequestRule, wrong: Any) -> CompiledMcpRule | None:
    if rule.mcp is None and rule.method != _MCP:
        return None
    if rule.mcp is None or rule.method != _MCP or rule.query or rule.body:
        raise wrong(
            "a rule with the method MCP says which message it means, and has conditions on arguments alone"
        )
    try:
        return CompiledMcpRule(rule.mcp)
    except McpRuleError as error:
        raise wrong(str(error)) from None


def _check_resource(rule: RequestRule, known: set[str], wrong: Any) -> None:
    holes = set(HOLE.findall(rule.resource))
    of_arguments = {hole for hole in holes if ARGUMENT.fullmatch(hole)}
    if of_arguments and (rule.mcp is None or not takes_arguments(rule.mcp.method)):
        raise wrong(
            f"the resource {rule.resource!r} uses {{{min(of_arguments)}}}, and there are no arguments"
        )
    for hole in of_arguments:
        if hole.endswith("*") and not f"/{rule.resource}".endswith(f"/{{{hole}}}"):
            raise wrong(f"the resource {rule.resource!r}: {{{hole}}} is a segment by itself, the last one")
    unknown = holes - known - of_arguments
    if unknown:
        raise wrong(
            f"the resource {rule.resource!r} uses {{{min(unknown)}}}, which the path does not capture"
        )
    try:
        parse_name(HOLE.sub("x", rule.resource))
    except ScopeError as error:
        raise wrong(f"the resource {rule.resource!r} is none: {error}") from None


def _captured_of(
    rule: RequestRule, of_path: Mapping[str, str], of_name: Mapping[str, str], message: McpMessage
) -> dict[str, str]:
    """All captures for the resource of an MCP rule. Raises CannotTellError."""
    of_arguments = {
        hole: captured(message, hole) for hole in HOLE.findall(rule.resource) if ARGUMENT.fullmatch(hole)
    }
    return {**of_arguments, **_checked(of_name), **of_path}


def _checked(of_name: Mapping[str, str]) -> dict[str, str]:
    """Raises CannotTellError."""
    for name, value in of_name.items():
        check_segments(value, several=name.endswith("*"))
    return dict(of_name)


def _offered(rule: RequestRule, captures: Mapping[str, str]) -> Action:
    """Raises ScopeError if the result is no resource, whatever the arguments."""

    def filled(hole: re.Match[str]) -> str:
        return captures[hole[1]] if hole[1] in captures else "**" if hole[1].endswith("*") else "*"

    return Action(rule.verb, str(parse_glob(HOLE.sub(filled, rule.resource))))


def _check_stronger(rule: RequestRule, later: RequestRule, demands: Mapping[str, tuple[int, int]]) -> None:
    """Raises RequestMapError. A verb that the target does not have is the strongest: it is never allowed."""
    never = len(_FLOORS), len(_ASKS)
    weak, strong = demands.get(rule.verb, never), demands.get(later.verb, never)
    if rule.verb == later.verb or (weak != strong and weak[0] <= strong[0] and weak[1] <= strong[1]):
        return
    raise RequestMapError(
        f"'{later.method} {later.path}': requests that do not meet the conditions of the verb {rule.verb} need the "
        f"verb {later.verb}, which is not stronger: put the conditions on the weaker verb, and give the other a higher "
        "floor or --ask"
    )


def _is_seen(body: bytes | None) -> bool:
    return body is not None and len(body) <= MAX_BODY_BYTES


def _action(rule: RequestRule, captures: Mapping[str, str]) -> Action | None:
    """None if the captures do not form a valid resource name: nobody could have been allowed it."""
    resource = HOLE.sub(lambda hole: captures[hole[1]], rule.resource)
    try:
        parse_name(resource)
    except ScopeError:
        return None
    return Action(rule.verb, resource)


# --- requests ---------------------------------------------------------------------------------------------------------


def _decoded(path: str) -> tuple[str, ...] | None:
    """The segments of a path, each decoded once; None if other readers might read the path differently."""
    if path == "/":
        return ()
    if not path.startswith("/") or path.count("/") > _MAX_SEGMENTS:
        return None
    if _PLAIN_PATH.fullmatch(path):  # nothing to decode, and no segment of dots
        return tuple(path[1:].split("/"))
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
    return _fit(conditions, _query(query))


def _fit(conditions: Mapping[str, tuple[str, ...]], given: Mapping[str, Any]) -> bool:
    """Whether all conditions are met. Raises CannotTellError if other readers might take one of the given names for the
    name of a condition, or its value for another.
    """
    meant = {plain for name in conditions for plain in _plainly(name)}
    if any(not meant.isdisjoint(_plainly(name)) for name in given if name not in conditions):
        raise CannotTellError
    met = [name in given and meets(given[name], values) for name, values in conditions.items()]
    return all(met)


def _plainly(name: str) -> set[str]:
    """The names that lenient readers might take a name for: without case, without separators, without an index
    (`mode[]` is `mode` to some).
    """
    name = case_folded(name.partition("\x00")[0])
    return {_NOT_OF_A_NAME.sub("", one) for one in (name, name.partition("[")[0])}


def _overrides(query: str) -> bool:
    """Whether a parameter may change the method of the request (`_method=DELETE`)."""
    if "ethod" not in query.lower() and "%" not in query:
        return False
    for pair in re.split("[&;]", query):
        name = unquote_to_bytes(re.split("[=\\[]", pair.lstrip("+"), maxsplit=1)[0]).decode("latin-1")
        if re.sub(r"^[ .[]|[.]", "_", name.partition("\x00")[0].strip()).lower() in _OVERRIDES:
            return True
    return False


def _query(query: str) -> dict[str, str]:
    """The decoded parameters. Raises CannotTellError if one comes twice, or cannot be decoded."""
    found: dict[str, str] = {}
    for pair in query.split("&") if query else ():
        name, _, value = (_word(part) for part in pair.partition("="))
        if name in found:
            raise CannotTellError
        found[name] = value
    return found


def _word(raw: str) -> str:
    # Whether `+` is a space, and `;` parts parameters, is for each server to say.
    if re.search(r"[+;]|%(?![0-9A-Fa-f]{2})", raw):
        raise CannotTellError
    try:
        return unquote_to_bytes(raw).decode("utf-8")
    except UnicodeDecodeError:
        raise CannotTellError from None


def _body_fits(conditions: Mapping[str, tuple[str, ...]] | None, body: bytes | None) -> bool:
    if not conditions:
        return True
    return _fit(conditions, _json_object(body))


def _json_object(body: bytes | None) -> dict[str, Any]:
    """The members of a JSON object. Raises CannotTellError for anything else, and for duplicate names."""
    if body is None or len(body) > MAX_BODY_BYTES:
        raise CannotTellError
    try:
        return json_object(body)
    except ValueError:
        raise CannotTellError from None
