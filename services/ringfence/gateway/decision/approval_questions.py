"""Approval questions of this gateway: tracks the open ones and their answers, and selects the headers they cover.

A question stays open until it expires, answered or not: a denied question is not asked again, and the number of
questions of one agent is limited. Only the use of an approval makes room. All is pure and bounded. A header can
change the meaning of the same bytes (`Content-Type`, `Content-Encoding`, `Destination`), so an approval covers all
headers that will be forwarded, before the credential is added, and no others are forwarded. Values may be secrets,
and the topic keeps a question for days: the person sees the values of a fixed list, else only names.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from ringfence.backends.http import secret_header
from ringfence.gateway.contract import Attempt, Headers
from ringfence.gateway.domain import Refusal, refuse
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.jws import Signed
from ringfence.messages.approval import (
    MAX_HEADER_NAME_CHARS,
    MAX_HEADERS,
    ActionApproval,
    ActionRequest,
    ShownHeader,
)
from ringfence.messages.codes import Code
from ringfence.messages.credential import Revisions
from ringfence.messages.registry import ActionClass, TargetState
from ringfence.model.verdict import ALLOWED, Allowed

DROPPED: Final = frozenset({"traceparent", "tracestate", "baggage", "date", "x-request-id"})
"""Clients change these with each attempt. They are neither hashed nor forwarded, so that an exact retry matches its
question.
"""
SHOWN_VALUES: Final = frozenset({
    "content-type", "content-encoding", "content-language", "content-range", "content-disposition", "range",
    "if-match", "if-none-match", "if-modified-since", "if-unmodified-since", "if-range", "prefer", "upgrade",
    # WebDAV (RFC 4918)
    "destination", "overwrite", "depth",
    # The operation itself, at targets that read it in a header.
    "x-http-method-override", "x-http-method", "x-method-override", "x-original-method", "x-original-url",
    "x-original-uri", "x-rewrite-url", "soapaction", "x-amz-target", "x-amz-acl", "x-amz-copy-source", "x-goog-acl",
    "x-goog-copy-source",
})  # fmt: skip
"""A person sees the values of these: they change what a request does, and never hold secrets."""
MAX_VALUE_CHARS: Final = 2048
"""For one value that is shown."""
MAX_SHOWN_CHARS: Final = 8000
"""For all names and values together: a person reads no more, and an answer embeds its question."""


def headers_to_approve(attempt: Attempt, target: TargetState) -> Headers | None:
    """The headers of an action that needs approval, as they will be forwarded; None if the gateway has not seen all.

    The gateway does not forward the `DROPPED` ones. A proxy that shows one of them might, so then the result is None.
    """
    headers = attempt.headers() if attempt.headers is not None else None
    if headers is None or (not attempt.sent_by_gateway and any(name in DROPPED for name, _ in headers)):
        return None
    injected = secret_header(target)
    replaced = injected.replace("_", "-") if injected is not None else None
    return tuple(header for header in headers if header[0] not in DROPPED and header[0] != replaced)


def digest_of_headers(headers: Headers) -> str:
    """SHA-256, in hexadecimal, over names and values in order, each preceded by its length.

    A length is four bytes, big-endian. Text is encoded as ISO 8859-1: each byte as it is forwarded.
    """
    hashed = hashlib.sha256()
    for header in headers:
        for text in header:
            raw = text.encode("latin-1")
            hashed.update(len(raw).to_bytes(4, "big") + raw)
    return hashed.hexdigest()


def shown_to_approver(headers: Headers) -> tuple[ShownHeader, ...]:
    """The headers as the person sees them."""
    return tuple(
        ShownHeader(name=name, value=value if name in SHOWN_VALUES else None) for name, value in headers
    )


def unshowable_reason(headers: Headers) -> str | None:
    """Why a person cannot be shown these headers, or None:

    1. The values that are shown are printable ASCII.
    2. There are not too many headers, and none has too long a name.
    3. No value that is shown is too long.
    4. All together are not too long.
    """
    shown_values = [value for name, value in headers if name in SHOWN_VALUES]
    if not all(" " <= char <= "~" for value in shown_values for char in value):
        names = ", ".join(sorted(SHOWN_VALUES & {name for name, _ in headers}))
        return f"the values of {names} have to be printable ASCII"
    if len(headers) > MAX_HEADERS or any(len(name) > MAX_HEADER_NAME_CHARS for name, _ in headers):
        return f"it may have {MAX_HEADERS} headers, with names of {MAX_HEADER_NAME_CHARS} characters"
    if max(map(len, shown_values), default=0) > MAX_VALUE_CHARS:
        return f"a header whose value is shown may have {MAX_VALUE_CHARS} characters"
    if sum(len(name) for name, _ in headers) + sum(map(len, shown_values)) > MAX_SHOWN_CHARS:
        return f"its headers are more than the {MAX_SHOWN_CHARS} characters that a person is shown"
    return None


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
    waiting: dict[asyncio.Future[None], int] = field(default_factory=dict)
    """By request that waits: when its wait ends, in ms."""

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

    def wake(self, until_ms: float = math.inf) -> None:
        """Wake the requests that wait for it: all, or those whose wait ends by `until_ms`."""
        for waiter, ends_ms in self.waiting.items():
            if not waiter.done() and ends_ms <= until_ms:
                waiter.set_result(None)


class OpenQuestions:
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
        self.sweep(now_ms)
        return self._by_key.get(key)

    def by_digest(self, request_digest: str) -> Question | None:
        return self._by_digest.get(request_digest)

    def was_used(self, request_digest: str) -> bool:
        return request_digest in self._used

    def check_open(self, agent_id: str) -> Allowed | Refusal:
        """Check whether one more question may be asked for this agent now."""
        return _check_count("questions to people", self._open, agent_id, self._per_agent, self._in_total)

    def check_waiting(self, agent_id: str) -> Allowed | Refusal:
        """Check whether one more request of this agent may wait now."""
        return _check_count(
            "requests that wait for people", self._waiting, agent_id, self._per_agent, self._in_total
        )

    def add(self, question: Question) -> None:
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

    def add_waiter(self, question: Question, waiter: asyncio.Future[None], ends_ms: int) -> None:
        """Add a request that waits for the answer, until `ends_ms`."""
        question.waiting[waiter] = ends_ms
        self._waiting[question.approval_key.agent_id] += 1

    def stop_waiting(self, question: Question, waiter: asyncio.Future[None]) -> None:
        question.waiting.pop(waiter, None)
        _less(self._waiting, question.approval_key.agent_id)

    def sweep(self, now_ms: int) -> None:
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


def _check_count(
    counted: str, counts: Counter[str], agent_id: str, per_agent: int, in_total: int
) -> Allowed | Refusal:
    if counts[agent_id] >= per_agent:
        message = f"agent {agent_id} has {per_agent} {counted}; wait until they are answered, or over"
    elif counts.total() >= in_total:
        message = f"there are {in_total} {counted} here; ask again later"
    else:
        return ALLOWED
    return refuse(Code.APPROVALS_PENDING_LIMIT, message)


def _less(counts: Counter[str], agent_id: str) -> None:
    counts[agent_id] -= 1
    if counts[agent_id] <= 0:
        del counts[agent_id]
