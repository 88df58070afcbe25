"""Filters of audit events, and the gateway report: parses query parameters, renders SQL conditions, groups actions.

The report has numbers of audited actions by agent, target, outcome and reason, blocked actions over time, and blocked
requests to unknown destinations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from starlette.requests import Request

from ringfence.kernel.base.api_errors import WrongQueryError
from ringfence.kernel.base.clock import utc_text
from ringfence.kernel.service.http import number_in
from ringfence.messages.codes import Code

BY: Final = ("agent", "target", "outcome", "access", "reason", "label")
"""The grouping key of actions. A value is None if it is unknown."""

WHERE: Final = ("scheme", "host", "port", "method", "path", "target")
"""The grouping key of unknown destinations. Each value may be None."""
UNKNOWN: Final = frozenset(
    {Code.TARGET_UNKNOWN, Code.TARGET_MISSING, Code.HOST_UNKNOWN, Code.REQUEST_UNMAPPED}
)
"""Reason codes: no target is registered there, or no rule of the target maps the request."""
_BEFORE_DESTINATION: Final = frozenset({
    Code.NO_CREDENTIALS, Code.PROOF_MISSING, Code.HANDLE_MALFORMED, Code.HANDLE_UNKNOWN, Code.HANDLE_OTHER_AGENT,
    Code.INVALID_DPOP_PROOF,
    Code.PROOF_BY_STRANGER, Code.PROOF_OTHER_KEY, Code.PROOFS_FULL, Code.CERTIFICATE_UNKNOWN, Code.TASK_UNKNOWN,
})  # fmt: skip
"""Reason codes of requests that were blocked before the gateway looked at the destination: the sender was not
authenticated. A CONNECT with a handle is one for any unknown host, as no proof comes with it."""
_SEGMENTS: Final = 2


def action_groups(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Groups of API Activity events, by first event: `[{agent, target, outcome, access, reason, label, count}]`.

    `reason` is the first reason code: an action with several reasons counts once. The answer to an action is not
    counted. An event that stands for several actions counts as many.
    """
    counts: Counter[tuple[str | None, ...]] = Counter()
    for event in events:
        if "answer" not in event["unmapped"]:
            counts[_group_key(event)] += int(event.get("count", 1))
    return [{**dict(zip(BY, common, strict=True)), "count": count} for common, count in counts.items()]


_LAST_S: Final = 253_402_300_799
"""The end of the year 9999: forged events have any time."""
USAGE_BY: Final = ("day", "agent", "task", "target", "model")
"""The grouping key of usage of language models."""


def usage_groups(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What requests to language models used, in groups: `[{day, agent, task, target, model, requests, tokens,
    input_tokens, output_tokens, not_stated}]`.

    `day` is the date in UTC. `tokens` are those that count, `input_tokens` and `output_tokens` what answers state.
    Of `not_stated` requests, an estimate or a reservation counts. The events are unsigned: malformed ones are left out.
    """
    sums: dict[tuple[str | None, ...], Counter[str]] = {}
    for event in events:
        fields = event["unmapped"]
        usage = fields.get("usage")
        if not isinstance(usage, dict) or not all(type(usage.get(name, 0)) is int for name in _TOKENS):
            continue
        day = utc_text(max(0, min(event["time"] // 1000, _LAST_S)))[:10]
        resource = fields.get("resource")
        model = resource.removeprefix("model/") if isinstance(resource, str) else None
        key = (day, fields.get("agent"), fields.get("task"), fields.get("target"), model)
        group = sums.setdefault(key, Counter(dict.fromkeys((*_TOKENS, "requests", "not_stated"), 0)))
        group.update({name: usage.get(name, 0) for name in _TOKENS})
        group["requests"] += 1
        group["not_stated"] += usage.get("counted") in ("estimate", "reservation")
    return [{**dict(zip(USAGE_BY, key, strict=True)), **group} for key, group in sums.items()]


_TOKENS: Final = ("tokens", "input_tokens", "output_tokens")


def unknown_destinations(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Blocked requests to unknown destinations: `[{scheme, host, port, method, path, target, count}]`.

    `path` is a prefix of two segments. `target` is None if no target is registered at the destination.
    """
    counts: Counter[tuple[Any, ...]] = Counter()
    for event in events:
        fields = event["unmapped"]
        destination = fields.get("destination")
        if isinstance(destination, dict) and _is_unknown(event):
            origin = [destination.get(name) for name in ("scheme", "host", "port")]
            path, method, target = destination.get("path"), fields.get("method"), fields.get("target")
            prefix = path_prefix(path) if isinstance(path, str) else None
            counts[(*origin, method, prefix, target)] += int(event.get("count", 1))
    return [{**dict(zip(WHERE, where, strict=True)), "count": count} for where, count in counts.items()]


def blocked_over_time(
    events: Iterable[Mapping[str, Any]], since_ms: int, step_ms: int
) -> list[dict[str, Any]]:
    """Blocked actions by time and access, as a chart has them: `[{at_ms, access, count}]`.

    `at_ms` is the beginning of a step of `step_ms` since `since_ms`. What observe mode let through is counted too.
    """
    counts: Counter[tuple[int, str | None]] = Counter()
    for event in events:
        key = dict(zip(BY, _group_key(event), strict=True))
        if "answer" not in event["unmapped"] and key["outcome"] != "allowed":
            step = max(event["time"] - since_ms, 0) // step_ms
            counts[(since_ms + step * step_ms, key["access"])] += int(event.get("count", 1))
    return [{"at_ms": at_ms, "access": access, "count": count} for (at_ms, access), count in counts.items()]


def path_prefix(path: str) -> str:
    """The first two segments of a path: `/repos/acme/*` for `/repos/acme/shop/issues`."""
    parts = path.split("/", _SEGMENTS + 1)
    return path if len(parts) <= _SEGMENTS + 1 else "/".join((*parts[:-1], "*"))


def _is_unknown(event: Mapping[str, Any]) -> bool:
    """Whether a request was blocked for lack of a target or rule, or before the gateway looked for one."""
    fields = event["unmapped"]
    if fields.get("outcome") == "allowed":
        return False
    code = event.get("status_code")
    return code in UNKNOWN or (code in _BEFORE_DESTINATION and fields.get("target") is None)


def _group_key(event: Mapping[str, Any]) -> tuple[str | None, ...]:
    fields = event["unmapped"]
    key = {**{name: fields.get(name) for name in BY}, "reason": event.get("status_code")}
    return tuple(value if isinstance(value, str) else None for value in key.values())


_EQUAL = (
    "agent",
    "task",
    "run",
    "request",
    "lease",
    "target",
    "sponsor",
    "on_behalf_of",
    "class_uid",
    "status",
)
_NO_OTHER_ORDER = frozenset({"agent", "task", "run", "request", "lease", "on_behalf_of", "class_uid"})
"""Columns whose index returns events ordered by `seq`."""
_INDEXED = ("lease", "request", "run", "task", "agent", "on_behalf_of")
"""Columns with an index, from the one that leads to the fewest events."""
_LIKE = str.maketrans({"%": r"\%", "_": r"\_", "\\": r"\\"})
_MAX_CODES = 50
_STATUSES = {"success": 1, "failure": 2, "other": 99}
_SEVERITIES = {"informational": 1, "low": 2, "medium": 3, "high": 4, "critical": 5}


@dataclass(frozen=True, slots=True)
class EventFilter:
    """Conditions on an event, all of which must hold; None is no condition."""

    agent: str | None = None
    task: str | None = None
    run: str | None = None
    request: str | None = None
    lease: str | None = None
    target: str | None = None
    sponsor: str | None = None
    on_behalf_of: str | None = None
    class_uid: int | None = None
    status: int | None = None
    """`status_id`."""
    severity: int | None = None
    """At least this `severity_id`."""
    codes: tuple[str, ...] = ()
    """One of these matches its `event_code`; a `*` at the end matches any suffix."""

    def where(self) -> tuple[list[str], dict[str, Any]]:
        """SQL conditions and the values of their parameters. None of them uses an index over times."""
        conditions: list[str] = []
        values: dict[str, Any] = {}
        for name in _EQUAL:
            value = getattr(self, name)
            if value is not None:
                # A plus sign keeps SQLite from an index that returns events in another order.
                conditions.append(f"{'' if name in _NO_OTHER_ORDER else '+'}{name} = :{name}")
                values[name] = value
        if self.severity is not None:
            conditions.append("severity >= :severity")
            values["severity"] = self.severity
        if self.codes:
            either = []
            for number, code in enumerate(self.codes):
                values[f"code_{number}"] = _pattern(code)
                either.append(f"+code LIKE :code_{number} ESCAPE '\\'")
            conditions.append(f"({' OR '.join(either)})")
        return conditions, values

    @property
    def needs_scan(self) -> bool:
        """Whether no index serves the filter, so that events must be scanned."""
        return any(
            getattr(self, name) is not None
            for name in ("class_uid", "target", "sponsor", "status", "severity")
        ) or bool(self.codes)

    @property
    def index(self) -> str | None:
        """The column of this filter whose index leads to the fewest events; None if no index serves it."""
        return next((name for name in _INDEXED if getattr(self, name) is not None), None)


NO_FILTER = EventFilter()


def _pattern(code: str) -> str:
    return code.removesuffix("*").translate(_LIKE) + ("%" if code.endswith("*") else "")


def filter_of(request: Request) -> EventFilter:
    """The event filter in the query of a request. Raises WrongQueryError."""
    query = request.query_params
    class_uid = query.get("class")
    if class_uid is not None and not class_uid.isdecimal():
        raise WrongQueryError("class is the number of an OCSF class, such as 3003")
    codes = tuple(code for code in query.get("code", "").split(",") if code)
    if any("*" in code[:-1] for code in codes) or len(codes) > _MAX_CODES:
        raise WrongQueryError(
            f"code is at most {_MAX_CODES} event codes with commas between; a * may end one, as in action.*"
        )
    return EventFilter(
        agent=query.get("agent"),
        task=query.get("task"),
        run=query.get("run"),
        request=query.get("request"),
        lease=query.get("lease"),
        target=query.get("target"),
        sponsor=query.get("sponsor"),
        on_behalf_of=query.get("on_behalf_of"),
        class_uid=int(class_uid[:6]) if class_uid else None,
        status=_one_of(request, "status", _STATUSES),
        severity=_one_of(request, "severity", _SEVERITIES),
        codes=codes,
    )


def limit_of(request: Request, default: int, most: int) -> int:
    """The query parameter `limit`, from 1 to `most`. Raises WrongQueryError."""
    text = request.query_params.get("limit", str(default))
    number = number_in(text, 1, most)
    if number is None:
        raise WrongQueryError(f"limit is a number from 1 to {most}")
    return number


def number_of(request: Request, name: str, default: int, most: int) -> int:
    """A query parameter that is a number from 0 to `most`. Raises WrongQueryError."""
    text = request.query_params.get(name, str(default))
    number = number_in(text, 0, most)
    if number is None:
        raise WrongQueryError(f"{name} is a number from 0 to {most}")
    return number


def _one_of(request: Request, name: str, choices: dict[str, int]) -> int | None:
    text = request.query_params.get(name)
    if text is None:
        return None
    if text not in choices:
        raise WrongQueryError(f"{name} is one of {', '.join(choices)}")
    return choices[text]
