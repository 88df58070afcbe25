"""Sessions and tasks of MCP servers, each bound to the lease that opened it. They end with the lease."""

from __future__ import annotations

import re
from typing import Final

_ID: Final = re.compile(r"[!-~]{1,256}")
_MAX_BOUND: Final = 256
"""Per lease. A new id evicts the oldest."""


class BindingTable:
    """Maps ids that servers give out, at each target, to the leases that they belong to."""

    def __init__(self) -> None:
        self._lease: dict[tuple[str, str], str] = {}
        self._of: dict[str, dict[tuple[str, str], None]] = {}

    def open(self, target_id: str, id: str, lease_id: str) -> bool:
        """Bind an id to a lease. False if it is bound to another one, or if it is no valid id."""
        if _ID.fullmatch(id) is None:
            return False
        key = (target_id, id)
        if self._lease.setdefault(key, lease_id) != lease_id:
            return False
        bound = self._of.setdefault(lease_id, {})
        bound[key] = None
        if len(bound) > _MAX_BOUND:
            oldest = next(iter(bound))
            del bound[oldest], self._lease[oldest]
        return True

    def lease_of(self, target_id: str, id: str) -> str | None:
        """The live lease that an id is bound to."""
        return self._lease.get((target_id, id))

    def end(self, lease_id: str) -> None:
        """Forget all ids of a lease that ended."""
        for key in self._of.pop(lease_id, {}):
            del self._lease[key]
