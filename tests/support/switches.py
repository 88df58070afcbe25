"""Optional parts of services that a run of the tests switches off (options of `tests/conftest.py`).

Services work without these parts, which only save time. A run with a switch off shows that.
"""

from __future__ import annotations

from typing import Any

_OFF: dict[str, dict[str, bool]] = {}


def switch_off(role: str, part: str) -> None:
    """Build services of this role without this part from now on. `part`: the argument of their `build()`."""
    _OFF.setdefault(role, {})[part] = False


def build_options(role: str) -> dict[str, Any]:
    """What to pass to `build()` of a service, or to the parts of it that a test builds by itself."""
    return dict(_OFF.get(role, {}))


def is_on(role: str, part: str) -> bool:
    """Whether services of this role have this part in this run."""
    return _OFF.get(role, {}).get(part, True)
