"""Detection rules about the order and timing of events: approvals, reviews, leases and their use. Pure.

Topics are read concurrently, so an earlier event may be read later. The rules accept either order. An event counts as
missing only after audit has been up to date for a while.

Detection rule `quick_approval` for grants that answer a pending request. Pure.

A grant is normally given ahead, so there is no question that it could answer too quickly. But a grant after a question
answers it, as policy looks again at pending requests. Without this rule a script that approves by grants would pass
unseen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from ringfence.audit.detections.rule import EventSummary, Finding, TrailEvent, TrailQueries
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


"""The most entries of each kind that a rule remembers."""
_QUESTIONS = {"approval.requested": "request", "action.approval_requested": "question"}
_ANSWERS = {"approval.given": "request", "action.approved": "question"}
_ENDS = frozenset({"lease.ending", "credential.released", "credential.revoked", "lease.expired"})
_ALLOWED = ("request.allowed", "break_glass.used")
_ISSUED = ("credential.issued",)
_AHEAD_MS = 60_000
"""An answer may precede its question by this much: the question follows the pending decision, and a person may answer
from the decision. An answer further ahead belongs to an earlier question."""


class QuickApproval:
    """A person approved faster than anybody reads: a script answers, or the person no longer reads."""

    def __init__(self, least_s: float) -> None:
        self._least_ms = int(least_s * 1000)
        self._questions: BoundedDict[str, EventSummary] = BoundedDict(MAX_REMEMBERED)
        self._answers: BoundedDict[str, list[EventSummary]] = BoundedDict(MAX_REMEMBERED)

    def wants(self, code: str, log_name: str) -> bool:
        return code in _QUESTIONS or code in _ANSWERS

    def observe(self, event: TrailEvent, now_ms: int) -> Iterator[Finding]:
        id_field = _QUESTIONS.get(event.code) or _ANSWERS.get(event.code)
        id = event.field(id_field) if id_field else None
        if not isinstance(id, str):
            return
        if event.code in _QUESTIONS:
            if id in self._questions:
                return  # several approvers are asked; each could read from the first question on
            self._questions[id] = event.summary
            for answer in self._answers.pop(id, ()):
                yield from self._findings_of(id, event.summary, answer)
            return
        answer = event.summary._replace(
            fields={
                **event.summary.fields,
                "approver": event.body.get("actor", {}).get("user", {}).get("name"),
            }
        )
        question = self._questions.get(id)
        if question is not None:
            yield from self._findings_of(id, question, answer)
        else:
            self._answers[id] = [*self._answers.get(id, ()), answer][:8]

    def _findings_of(self, id: str, question: EventSummary, answer: EventSummary) -> Iterator[Finding]:
        took_ms = answer.time_ms - question.time_ms
        if not -_AHEAD_MS <= took_ms < self._least_ms:
            return
        approver = answer.field("approver") or "somebody"
        when = f"{took_ms} ms after" if took_ms >= 0 else f"{-took_ms} ms before"
        yield Finding(
            "quick_approval",
            (id, answer.uid),
            answer.time_ms,
            f"{approver} approved what agent {answer.field('agent')} asked for {when} being asked; nobody reads "
            f"in less than {self._least_ms / 1000:g} s",
            answer,
            (question.uid, answer.uid),
            fields={"waited_ms": took_ms, "approvers": [approver]},
        )

    def due(self, now_ms: int) -> Iterable[Finding]:
        return ()


class UnreviewedBreakGlass:
    """Nobody reviewed a use of break glass within `after_s`."""

    def __init__(self, after_s: int) -> None:
        self._after_ms = after_s * 1000
        self._pending: BoundedDict[str, EventSummary] = BoundedDict(MAX_REMEMBERED)
        self._reviewed: BoundedDict[str, bool] = BoundedDict(MAX_REMEMBERED)

    def wants(self, code: str, log_name: str) -> bool:
        return code in ("break_glass.used", "break_glass.reviewed")

    def observe(self, event: TrailEvent, now_ms: int) -> Iterator[Finding]:
        request = event.summary.field("request")
        if request is not None and event.code == "break_glass.used" and request not in self._reviewed:
            self._pending[request] = event.summary
        elif request is not None and event.code == "break_glass.reviewed":
            self._pending.pop(request, None)
            self._reviewed[request] = True
        yield from ()

    def due(self, now_ms: int) -> Iterator[Finding]:
        for request, used in list(self._pending.items()):
            if used.time_ms + self._after_ms <= now_ms:
                del self._pending[request]
                yield Finding(
                    "unreviewed",
                    (request,),
                    used.time_ms + self._after_ms,
                    f"nobody reviewed the break glass of agent {used.field('agent')} (request {request}) within "
                    f"{self._after_ms / 3_600_000:g} h",
                    used,
                    (used.uid,),
                    standing=True,
                )


@dataclass(slots=True)
class _LeaseUse:
    """The use of one lease: its last allowed action, and its end."""

    last_action: EventSummary
    end_uid: str | None = None
    """Uid of the event that shows its end."""
    ended_at_ms: int | None = None


@dataclass(slots=True)
class _UnexplainedEvent:
    """An event whose predecessor has not been read."""

    read_at_ms: int
    summary: EventSummary


class ImpossibleSequences:
    """Sequences of events that correct services never produce.

    These are: a credential that no decision allowed, an action by a lease that was never issued, and an action by a
    lease after its end.
    """

    def __init__(self, trail: TrailQueries, *, settle_s: int, late_s: int, back_s: int) -> None:
        """Args:
            trail: queries over the whole trail so far.
            settle_s: how long a predecessor may be missing while audit is up to date.
            late_s: how much later than the end of its lease an action may be reported.
            back_s: older events are not judged.
        """  # fmt: skip
        self._trail = trail
        self._settle_ms = settle_s * 1000
        self._late_ms = late_s * 1000
        self._back_ms = back_s * 1000
        self._behind_ms = 0
        self._uses: BoundedDict[str, _LeaseUse] = BoundedDict(MAX_REMEMBERED)
        self._allowed: BoundedDict[str, bool] = BoundedDict(MAX_REMEMBERED)
        """Requests that were allowed lately: a cache in front of `trail`."""
        self._undecided: BoundedDict[str, _UnexplainedEvent] = BoundedDict(MAX_REMEMBERED)
        self._unissued: BoundedDict[str, _UnexplainedEvent] = BoundedDict(MAX_REMEMBERED)

    def wants(self, code: str, log_name: str) -> bool:
        return True  # the age of every event shows whether audit is up to date

    def observe(self, event: TrailEvent, now_ms: int) -> Iterator[Finding]:
        summary = event.summary
        if now_ms - summary.time_ms > self._settle_ms:
            self._behind_ms = now_ms  # audit is behind: a missing predecessor may still come
        if now_ms - summary.time_ms > self._back_ms:
            return
        lease, request = summary.field("lease"), summary.field("request")
        if event.code in _ALLOWED and request is not None:
            self._allowed[request] = True
        if lease is None:
            return
        if event.code == "credential.issued" and request is not None:
            if request not in self._allowed and not self._trail.has_event("request", request, _ALLOWED):
                self._undecided[request] = _UnexplainedEvent(now_ms, summary)
            deadline = event.field("deadline")
            if isinstance(deadline, int):
                yield from self._on_end(lease, summary, deadline * 1000)
        elif event.code in _ENDS:
            yield from self._on_end(lease, summary, summary.time_ms)
        elif event.code == "action.allowed":
            yield from self._on_action(lease, summary)
            if not self._trail.has_event("lease", lease, _ISSUED) and lease not in self._unissued:
                self._unissued[lease] = _UnexplainedEvent(now_ms, summary)

    def due(self, now_ms: int) -> Iterator[Finding]:
        yield from self._missing(now_ms, self._undecided, "request", _ALLOWED, "issued_undecided")
        yield from self._missing(now_ms, self._unissued, "lease", _ISSUED, "used_unissued")

    def _missing(
        self,
        now_ms: int,
        waiting: BoundedDict[str, _UnexplainedEvent],
        kind: Literal["request", "lease"],
        codes: tuple[str, ...],
        sequence: str,
    ) -> Iterator[Finding]:
        for id, waiting_event in list(waiting.items()):
            if max(waiting_event.read_at_ms, self._behind_ms) + self._settle_ms > now_ms:
                continue
            del waiting[id]
            if not self._trail.has_event(kind, id, codes):
                yield _impossible(sequence, id, waiting_event.summary, (waiting_event.summary.uid,))

    def _on_end(self, lease: str, summary: EventSummary, ended_at_ms: int) -> Iterator[Finding]:
        use = self._uses.get(lease)
        if use is None:
            return  # `_on_action` asks the trail for the end of a lease
        if use.ended_at_ms is None or ended_at_ms < use.ended_at_ms:
            use.end_uid, use.ended_at_ms = summary.uid, ended_at_ms
        yield from self._after_end(lease, use)

    def _on_action(self, lease: str, summary: EventSummary) -> Iterator[Finding]:
        use = self._uses.get(lease)
        if use is None:
            use = _LeaseUse(summary, *(self._trail.ended_at(lease, _ENDS) or ()))
        if summary.time_ms > use.last_action.time_ms:
            use.last_action = summary
        self._uses[lease] = use
        yield from self._after_end(lease, use)

    def _after_end(self, lease: str, use: _LeaseUse) -> Iterator[Finding]:
        if use.end_uid is None or use.ended_at_ms is None:
            return
        if use.last_action.time_ms - use.ended_at_ms > self._late_ms:
            yield _impossible("used_ended", lease, use.last_action, (use.end_uid, use.last_action.uid))


_SEQUENCE_TEXTS = {
    "issued_undecided": "a credential was issued to agent {agent} that no decision on the trail allowed (request {id})",
    "used_unissued": "an action of agent {agent} was let pass by lease {id}, which was never issued",
    "used_ended": "an action of agent {agent} was let pass by lease {id} after its end",
}


def _impossible(sequence: str, id: str, summary: EventSummary, evidence: tuple[str, ...]) -> Finding:
    return Finding(
        "impossible",
        (sequence, id),
        summary.time_ms,
        _SEQUENCE_TEXTS[sequence].format(agent=summary.field("agent") or "unknown", id=id),
        summary,
        evidence,
        fields={"sequence": sequence},
    )
