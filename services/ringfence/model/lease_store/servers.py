"""What the servers behind Redis say of themselves: what time it is there, and whether they evict what they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ringfence.kernel.base.clock_skew import SkewCheck

QUESTIONS = (("INFO", "memory"), ("INFO", "stats"), ("TIME",))
"""The time last: it is held against ours when the answer comes."""
NOEVICTION = "noeviction"


class Servers:
    """What was heard of each: one where Redis stands alone, every node that holds keys where it is a cluster."""

    def __init__(self) -> None:
        self._skews: dict[str, SkewCheck] = {}
        self._evicting: dict[str, str] = {}
        """The policies by which some may evict."""
        self._epoch = ""
        self._evicted: dict[str, int] = {}
        """In this epoch: how many keys each had evicted when that was asked first."""

    def heard(self, said: Mapping[str, tuple[int, Sequence[Any]]], *, epoch: str) -> list[str]:
        """Take in answers to `QUESTIONS`, by the server's name, each with when it came, in ms.

        Returns those that have evicted keys in this epoch.
        """
        whose = {name: "Redis" if len(said) == 1 else f"Redis at {name}" for name in said}
        self._skews = {name: self._skews.get(name) or SkewCheck(whose[name]) for name in said}
        self._evicting = {}
        if epoch != self._epoch:
            self._epoch, self._evicted = epoch, {}
        forgetful = []
        for name, (now_ms, (memory, stats, (seconds, micros))) in said.items():
            self._skews[name].heard(int(seconds) * 1000 + int(micros) // 1000, now_ms)
            if int(memory["maxmemory"]) and memory["maxmemory_policy"] != NOEVICTION:
                self._evicting[name] = memory["maxmemory_policy"]
            evicted = int(stats["evicted_keys"])
            # Fewer than before: it was started anew, and its epoch is over anyway.
            if evicted > self._evicted.setdefault(name, evicted):
                forgetful.append(name)
        return forgetful

    def ahead_ms(self) -> int:
        """How far our clock is ahead of that from which it differs most (below 0: behind)."""
        return max((skew.ahead_ms() or 0 for skew in self._skews.values()), key=abs, default=0)

    def unready(self) -> str | None:
        """Why our clock cannot be trusted, or None."""
        return next((reason for skew in self._skews.values() if (reason := skew.unready())), None)

    def warning(self) -> str | None:
        """That leases may be evicted, or None."""
        if not self._evicting:
            return None
        which = ", ".join(f"{name} ({policy})" for name, policy in self._evicting.items())
        return f"Redis may evict leases: set maxmemory-policy to {NOEVICTION} at {which}"
