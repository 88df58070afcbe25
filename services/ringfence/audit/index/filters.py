"""Filters over audit events: parsed from the query parameters of the HTTP API, rendered as SQL conditions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from ringfence.kernel.base.api_errors import WrongQueryError
from ringfence.kernel.service.http import number_in

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
