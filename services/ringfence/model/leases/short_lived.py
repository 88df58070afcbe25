"""What a standing privilege is: a credential that is not short-lived, or that its task does not bound. Pure.

Nothing stands where the answer is "none": that is the aim, and `inventory` and `audit coverage` count what falls short.
"""

from __future__ import annotations

from typing import Final

SHORT_LIVED_S: Final = 3600
"""What lives no longer than this is short-lived, where nobody says otherwise."""
CLOCKS_S: Final = 60
"""So far the clocks may differ that the two ends of a life were measured by."""


def is_short_lived(since_s: float, until_s: float, most_s: int = SHORT_LIVED_S) -> bool:
    """Whether what may be used from `since_s` until `until_s` lives no longer than `most_s`."""
    return until_s - since_s <= most_s + CLOCKS_S


def is_task_bound(until_s: float, task_end_s: float | None) -> bool:
    """Whether it ends no later than its task; `task_end_s` is None where no task is known that it is of."""
    return task_end_s is not None and until_s <= task_end_s + CLOCKS_S
