"""Preview of leases that a change would end: asks the revoker before the change is signed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ringfence.client.errors import ApiError
from ringfence.client.reports.read_api import ReadApi
from ringfence.messages.permission import Permission, Scope
from ringfence.model.scope.scope import missing


@dataclass(frozen=True, slots=True)
class Loss:
    """A condition under which leases of one agent, sponsor, target or user end."""

    agent: str | None = None
    sponsor: str | None = None
    target: str | None = None
    user: str | None = None
    fits: Scope = ()
    """A lease whose scope is within this one continues. If it is empty, none does."""
    selectors: frozenset[str] | None = None
    """If given, only leases of instances that enrolled by one of these selectors end, whatever their scope."""


@dataclass(frozen=True, slots=True)
class EndingLeases:
    """The leases that a change would end, as far as the revoker can tell."""

    ids: tuple[str, ...] = ()
    more: bool = False
    """Whether the revoker listed only some leases, so that more may end."""
    gap: str | None = None
    """Why the leases are unknown; `ids` is empty then."""

    def describe(self) -> str:
        """Return a text for people: `2: ID, ID`, or why the leases are unknown."""
        if self.gap is not None:
            return f"not known: {self.gap}"
        if not self.ids and not self.more:
            return "none"
        listed = ", ".join(self.ids[:_SHOWN]) + (", ..." if len(self.ids) > _SHOWN else "")
        return f"{'at least ' if self.more else ''}{len(self.ids)}{': ' if listed else ''}{listed}"

    def as_json(self) -> dict[str, Any]:
        is_known = self.gap is None
        return {
            "count": len(self.ids) if is_known else None,
            "ids": self.ids,
            "more": self.more,
            "gap": self.gap,
        }


_SHOWN = 5


async def ending_leases(api: ReadApi, losses: Iterable[Loss]) -> EndingLeases:
    """Return the leases that would end now. Leases issued later are not included."""
    ids: dict[str, None] = {}
    more = False
    for loss in losses:
        try:
            page = await api.leases(
                agent=loss.agent, sponsor=loss.sponsor, target=loss.target, user=loss.user
            )
        except ApiError as error:
            return EndingLeases(gap=str(error))
        ids |= dict.fromkeys(lease["id"] for lease in page["leases"] if _ends(lease, loss))
        more = more or bool(page["more"])
    return EndingLeases(tuple(ids), more)


def _ends(lease: Mapping[str, Any], loss: Loss) -> bool:
    if lease["status"] == "ending":
        return False  # it is ending already
    if loss.selectors is not None:
        return (lease.get("instance") or {}).get("selector") in loss.selectors
    # Not strict: JSON has no tuples.
    scope = tuple(Permission.model_validate(one, strict=False) for one in lease["scope"])
    return not loss.fits or bool(missing(scope, loss.fits))
