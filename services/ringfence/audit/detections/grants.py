"""The rule about grants that answer what already waits. Pure.

A grant is given ahead, and then there is no question that it could be too quick for. But one that comes after a
question answers it (policy looks again at what waits): a script that says yes by grants would never be seen at its
approvals.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ringfence.audit.detections.rule import About, Finding, Seen
from ringfence.audit.memory import Recent

REMEMBERED = 20_000
"""So many tasks of agents."""
_ANSWERED = frozenset({"approval.given", "approval.denied", "request.allowed", "request.refused"})
Task = tuple[str, str]
"""An agent, and a task of it."""


class QuickGrant:
    """A person gives a grant faster after the first question that it could answer than anybody reads."""

    def __init__(self, least_s: float) -> None:
        self._least_ms = int(least_s * 1000)
        self._open: Recent[Task, About | None] = Recent(REMEMBERED)
        """The first question since something was answered."""
        self._given: Recent[Task, About] = Recent(REMEMBERED)

    def wants(self, code: str, log_name: str) -> bool:
        return code in ("approval.requested", "grant.given") or code in _ANSWERED

    def take(self, seen: Seen, now_ms: int) -> Iterator[Finding]:
        agent, id = seen.about.word("agent"), seen.about.word("task")
        if agent is None or id is None:
            return
        task = (agent, id)
        if seen.code == "approval.requested":
            if self._open.get(task) is None:
                self._open.put(task, seen.about)
                given = self._given.get(task)
                if given is not None:  # the topics are read side by side: it may be the later one
                    yield from self._judged(seen.about, given)
        elif seen.code == "grant.given":
            given = seen.about._replace(
                words={
                    **seen.about.words,
                    "approver": seen.event.get("actor", {}).get("user", {}).get("name"),
                }
            )
            self._given.put(task, given)
            asked = self._open.get(task)
            if asked is not None:
                yield from self._judged(asked, given)
                self._open.put(task, None)
        elif seen.code in _ANSWERED and self._open.get(task) is not None:
            self._open.put(task, None)

    def _judged(self, asked: About, given: About) -> Iterator[Finding]:
        took_ms = given.time_ms - asked.time_ms
        if not 0 <= took_ms < self._least_ms:
            return
        who = given.word("approver") or "somebody"
        yield Finding(
            "quick_approval",
            (asked.word("request") or asked.uid, given.uid),
            given.time_ms,
            f"{who} gave a grant {took_ms} ms after being asked for what agent {given.word('agent')} wanted; "
            f"nobody reads in less than {self._least_ms / 1000:g} s",
            given,
            (asked.uid, given.uid),
            words={"waited_ms": took_ms, "approvers": [who], "request": asked.word("request")},
        )

    def due(self, now_ms: int) -> Iterable[Finding]:
        return ()
