"""What events are narrowed down by when somebody asks for them, as conditions over the index."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_EQUAL = ("agent", "task", "request", "lease", "target", "sponsor", "on_behalf_of", "class_uid", "status")
_NO_OTHER_ORDER = frozenset({"agent", "task", "request", "lease", "on_behalf_of", "class_uid"})
"""Where an index gives the events in the order of their numbers, if it gives them at all."""
_LIKE = str.maketrans({"%": r"\%", "_": r"\_", "\\": r"\\"})


@dataclass(frozen=True, slots=True)
class EventFilter:
    """All of these have to be so; None is no condition."""

    agent: str | None = None
    task: str | None = None
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
    """One of these is its `event_code`; a `*` at the end stands for whatever follows."""

    def where(self) -> tuple[list[str], dict[str, Any]]:
        """Conditions in SQL, and the values of their parameters. None of them asks for an index over times."""
        conditions: list[str] = []
        values: dict[str, Any] = {}
        for name in _EQUAL:
            value = getattr(self, name)
            if value is not None:
                # A plus sign keeps SQLite from an index that would give the events in another order.
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
    def looks_at_all(self) -> bool:
        """Whether no index leads to what is wanted, so that others have to be looked at on the way."""
        return any(
            getattr(self, name) is not None for name in ("target", "sponsor", "status", "severity")
        ) or bool(self.codes)


NO_FILTER = EventFilter()


def _pattern(code: str) -> str:
    return code.removesuffix("*").translate(_LIKE) + ("%" if code.endswith("*") else "")
