"""Detection rule `quick_approval` for grants that answer a pending request. Pure.

A grant is normally given ahead, so there is no question that it could answer too quickly. But a grant after a question
answers it, as policy looks again at pending requests. Without this rule a script that approves by grants would pass
unseen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ringfence.audit.detections.rule import EventSummary, Finding, TrailEvent
from ringfence.kernel.base.replay_memory import BoundedDict

MAX_REMEMBERED = 20_000
"""The most (agent, task) pairs remembered."""
_ANSWERED = frozenset({"approval.given", "approval.denied", "request.allowed", "request.refused"})
Task = tuple[str, str]
"""(agent id, task id)."""


class QuickGrant:
    """A person gave a grant faster after the first question that it answers than anybody can read."""

    def __init__(self, least_s: float) -> None:
        self._least_ms = int(least_s * 1000)
        self._questions: BoundedDict[Task, EventSummary | None] = BoundedDict(MAX_REMEMBERED)
        """The first question since the last answer. None after an answer."""
        self._grants: BoundedDict[Task, EventSummary] = BoundedDict(MAX_REMEMBERED)

    def wants(self, code: str, log_name: str) -> bool:
        return code in ("approval.requested", "grant.given") or code in _ANSWERED

    def observe(self, event: TrailEvent, now_ms: int) -> Iterator[Finding]:
        agent, id = event.summary.field("agent"), event.summary.field("task")
        if agent is None or id is None:
            return
        task = (agent, id)
        if event.code == "approval.requested":
            if self._questions.get(task) is None:
                self._questions[task] = event.summary
                answer = self._grants.get(task)
                # Topics are read concurrently: the question may be read after the grant.
                if answer is not None:
                    yield from self._findings_of(event.summary, answer)
        elif event.code == "grant.given":
            answer = event.summary._replace(
                fields={
                    **event.summary.fields,
                    "approver": event.body.get("actor", {}).get("user", {}).get("name"),
                }
            )
            self._grants[task] = answer
            question = self._questions.get(task)
            if question is not None:
                yield from self._findings_of(question, answer)
                self._questions[task] = None
        elif event.code in _ANSWERED and self._questions.get(task) is not None:
            self._questions[task] = None

    def _findings_of(self, question: EventSummary, answer: EventSummary) -> Iterator[Finding]:
        took_ms = answer.time_ms - question.time_ms
        if not 0 <= took_ms < self._least_ms:
            return
        grantor = answer.field("approver") or "somebody"
        yield Finding(
            "quick_approval",
            (question.field("request") or question.uid, answer.uid),
            answer.time_ms,
            f"{grantor} gave a grant {took_ms} ms after being asked for what agent {answer.field('agent')} wanted; "
            f"nobody reads in less than {self._least_ms / 1000:g} s",
            answer,
            (question.uid, answer.uid),
            fields={"waited_ms": took_ms, "approvers": [grantor], "request": question.field("request")},
        )

    def due(self, now_ms: int) -> Iterable[Finding]:
        return ()
