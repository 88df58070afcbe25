"""The open approval questions of this gateway: which are open, who waits for them, and their answers. Pure and bounded.

A question stays open until it expires, answered or not. So a denied question is not asked again, and the number of
questions of one agent is limited. Only the use of an approval makes room.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from ringfence.gateway.domain import TOO_MANY_REQUESTS, Refusal, refuse
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.jws import Signed
from ringfence.messages.approval import ActionApproval, ActionRequest
from ringfence.messages.credential import Revisions
from ringfence.messages.registry import ActionClass

_MAX_USED = 10_000


@dataclass(frozen=True, slots=True)
class ApprovalKey:
    """The properties that two requests must share so that one approval covers both."""

    agent_id: str
    lease_id: str
    method: str
    url: str
    body_digest: str
    headers_digest: str
    required: ActionClass
    revisions: str

    @classmethod
    def of(cls, claims: ActionRequest) -> ApprovalKey:
        return cls(
            claims.agent_id, claims.lease_id, claims.method, claims.url, claims.body_digest, claims.headers_digest,
            claims.required, revisions_text(claims.revisions),
        )  # fmt: skip


def revisions_text(revisions: Revisions) -> str:
    """Revisions as text, for comparison."""
    return revisions.model_dump_json()


@dataclass(slots=True, eq=False)
class Question:
    """One question to a person, with its answer."""

    signed: Signed[ActionRequest]
    approval_key: ApprovalKey
    answer: Signed[ActionApproval] | None = None
    answered_by: str | None = None
    """The id of the user who answered."""
    closed: Refusal | None = None
    """The refusal, if no answer can count any more."""
    waiting: set[asyncio.Future[None]] = field(default_factory=set)

    @property
    def id(self) -> str:
        return message_id(self.signed.claims.iss, self.signed.claims.jti)

    @property
    def ends_ms(self) -> int:
        """The expiry in ms: of the question or of its answer, whichever is first."""
        ends = self.signed.claims.exp
        return (min(ends, self.answer.claims.exp) if self.answer is not None else ends) * 1000

    @property
    def settled(self) -> bool:
        """Whether its answer is known, or can no longer count."""
        return self.answer is not None or self.closed is not None

    def wake(self) -> None:
        """Wake all requests that wait for it."""
        for waiter in self.waiting:
            if not waiter.done():
                waiter.set_result(None)


class OpenQuestions:
    """All open questions of this gateway."""

    def __init__(self, *, per_agent: int, in_total: int) -> None:
        """`per_agent`: the most open questions of one agent, and its most waiting requests; `in_total`: of all."""
        self._per_agent = per_agent
        self._in_total = in_total
        self._by_key: dict[ApprovalKey, Question] = {}
        self._by_digest: dict[str, Question] = {}
        self._used: dict[str, int] = {}
        """Digests of questions whose approval was used, with the time (ms) at which the question would have expired."""
        self._open: Counter[str] = Counter()
        self._waiting: Counter[str] = Counter()

    def approval_key(self, key: ApprovalKey, now_ms: int) -> Question | None:
        """The open question with this key, or None."""
        self.sweep(now_ms)
        return self._by_key.get(key)

    def by_digest(self, request_digest: str) -> Question | None:
        """The open question with this digest, or None."""
        return self._by_digest.get(request_digest)

    def was_used(self, request_digest: str) -> bool:
        """Whether an approval of this question was used already."""
        return request_digest in self._used

    def too_many_open(self, agent_id: str) -> Refusal | None:
        """Why no more questions may be asked for this agent now, or None."""
        return _too_many("questions to people", self._open, agent_id, self._per_agent, self._in_total)

    def too_many_waiting(self, agent_id: str) -> Refusal | None:
        """Why no more requests of this agent may wait now, or None."""
        return _too_many(
            "requests that wait for people", self._waiting, agent_id, self._per_agent, self._in_total
        )

    def add(self, question: Question) -> None:
        """Open a question."""
        self._by_key[question.approval_key] = question
        self._by_digest[question.signed.digest] = question
        self._open[question.approval_key.agent_id] += 1

    def use(self, question: Question) -> None:
        """Close a question whose approval is used. Its digest is remembered until it would have expired."""
        self._drop(question)
        self._used[question.signed.digest] = question.signed.claims.exp * 1000
        while len(self._used) > _MAX_USED:
            del self._used[next(iter(self._used))]

    def drop(self, question: Question) -> None:
        """Close a question that could not be asked, or whose subject has changed."""
        self._drop(question)

    def add_waiter(self, question: Question, waiter: asyncio.Future[None]) -> None:
        """Add a request that waits for the answer."""
        question.waiting.add(waiter)
        self._waiting[question.approval_key.agent_id] += 1

    def stop_waiting(self, question: Question, waiter: asyncio.Future[None]) -> None:
        """Remove a request that waited for the answer."""
        question.waiting.discard(waiter)
        _less(self._waiting, question.approval_key.agent_id)

    def sweep(self, now_ms: int) -> None:
        """Drop expired questions and digests."""
        for question in [open_question for open_question in self if open_question.ends_ms <= now_ms]:
            self._drop(question)
        for digest in [digest for digest, until_ms in self._used.items() if until_ms <= now_ms]:
            del self._used[digest]

    def __iter__(self) -> Iterator[Question]:
        return iter(list(self._by_digest.values()))

    def __len__(self) -> int:
        return len(self._by_digest)

    def _drop(self, question: Question) -> None:
        if self._by_digest.pop(question.signed.digest, None) is None:
            return
        if self._by_key.get(question.approval_key) is question:
            del self._by_key[question.approval_key]
        _less(self._open, question.approval_key.agent_id)


def _too_many(
    counted: str, counts: Counter[str], agent_id: str, per_agent: int, in_total: int
) -> Refusal | None:
    if counts[agent_id] >= per_agent:
        message = f"agent {agent_id} has {per_agent} {counted}; wait until they are answered, or over"
    elif counts.total() >= in_total:
        message = f"there are {in_total} {counted} here; ask again later"
    else:
        return None
    return refuse("approvals_pending_limit", message, status=TOO_MANY_REQUESTS)


def _less(counts: Counter[str], agent_id: str) -> None:
    counts[agent_id] -= 1
    if counts[agent_id] <= 0:
        del counts[agent_id]
