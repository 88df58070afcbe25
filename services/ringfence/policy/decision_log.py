"""Decision log: the state of requests that were decided or are being decided, rebuilt from policy's own decisions.

Nothing here is stored anywhere else. A decision names the position of its request. So a day of `credential.decision`,
read back, tells a redelivery from a replay, and a pending approval from a final answer.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import orjson

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import digest, message_id
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.crypto.claims import MAX_LIFE_S
from ringfence.kernel.crypto.jws import Signed, parse, verify
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.messages.approval import MAX_GRANT_LIFE_S, Approval
from ringfence.messages.credential import CredentialDecision, CredentialRequest, Outcome
from ringfence.messages.registry import UserState
from ringfence.model.identity.spiffe_ids import SubjectKind, subject_of
from ringfence.model.records.directory import Directory

log = logging.getLogger(__name__)

MOST_DENIALS = 2000
"""The most denials of each partition whose text is kept: more than could be delivered again after a failure or a
crash.
"""
ANSWER_EXPIRED_WITHIN_MS = 5 * 60 * 1000
"""A request that was appended up to this long after its `exp` is answered with a denial. A later one is
dead-lettered.
"""
KEEP_MS = 15 * 60 * 1000
"""How long a final decision is remembered after its request has expired.

It is longer than `ANSWER_EXPIRED_WITHIN_MS`, so a forgotten request is too old to be decided a second time.
"""
MAX_AGE_MS = MAX_LIFE_S * 1000
"""The longest life of a request, and the longest wait for approvals."""
HISTORY_MS = MAX_AGE_MS + 60 * 60 * 1000
"""How far back decisions are read at start."""


class RecordPosition(NamedTuple):
    partition: int
    offset: int


@dataclass(slots=True)
class RequestState:
    request_id: str
    agent_id: str
    at: RecordPosition
    """The position of the request. The same id at another position is a replay."""
    exp: int
    """The request's `exp`, in seconds since 1970."""
    outcome: Outcome | None = None
    """None while it is being decided for the first time."""
    tried: bool = False
    """Whether this process has begun to publish a decision. One may be on Kafka without an acknowledgement."""
    ttl_s: int | None = None
    decision_id: str | None = None
    decided_at: RecordPosition | None = None
    jws: str | None = None
    """The decision, where it may be needed again: while approvals are pending, and for recent denials."""
    pending: CredentialDecision | None = None
    traceparent: str | None = None
    forget_at_ms: int = 0
    approvals: dict[str, tuple[str, RecordPosition | None]] = field(default_factory=dict)
    """The approvals in the decision by id: digest, and position if this process has seen it."""

    withdrawal: tuple[str, RecordPosition] | None = None
    """The digest and position of the withdrawal that ended it, if this process has seen it."""

    @property
    def is_final(self) -> bool:
        return self.outcome in ("allowed", "denied")

    def saw(self, approval: Signed[Approval], at: RecordPosition) -> None:
        """Remember the position of an approval that this process has processed."""
        id = message_id(approval.claims.iss, approval.claims.jti)
        self.approvals[id] = (approval.digest, at)


class DecisionLog:
    """The state of each request, fed by what it publishes and by what it reads back.

    Its time is the append time of the decisions in each partition, not the clock. So it remembers whatever could be
    delivered again after a crash, however long the service was down.
    """

    def __init__(
        self,
        trust: TrustStore,
        on_allowed: Callable[[CredentialDecision, str, int], None] = lambda decision, agent_id, at_ms: None,
        on_decision: Callable[[CredentialDecision, str], None] = lambda decision, agent_id: None,
    ) -> None:
        """`on_allowed` receives every valid `allowed` decision, with the agent's id and the append time.

        `on_decision` receives every added decision, perhaps twice.
        """
        self._on_decision = on_decision
        self._trust = trust
        self._on_allowed = on_allowed
        self._known: dict[str, RequestState] = {}
        self._pending: dict[str, RequestState] = {}
        self._waiting: Counter[str] = Counter()
        self._ends: dict[int, list[tuple[int, str]]] = {}
        self._reached: dict[int, int] = {}
        self._denials: dict[int, deque[RequestState]] = {}
        self._published: set[RecordPosition] = set()
        self._unread: dict[int, list[tuple[int, int, Received]]] | None = {}
        self._settling = asyncio.Lock()

    # --- requests and decisions ---

    def claim(
        self, request_id: str, agent_id: str, at: RecordPosition, *, at_ms: int, exp: int
    ) -> RequestState:
        """Return the state of a verified request. An unknown request is added.

        `at_ms` is its append time, `exp` its expiry in seconds since 1970.
        """
        state = self._known.get(request_id)
        if state is None:
            state = self._known[request_id] = RequestState(request_id, agent_id, at, exp)
            self._forget_at(at.partition, _end_ms(exp, at_ms), state)
            self._reach(at)
        return state

    def get(self, request_id: str) -> RequestState | None:
        """Return the state of a request, or None."""
        return self._known.get(request_id)

    def keep(
        self, decision: CredentialDecision, jws: str, at: RecordPosition, at_ms: int, traceparent: str | None
    ) -> RequestState:
        """Add a decision of this service at position `at`, appended at `at_ms`. The first final one counts."""
        before = self._known.get(decision.request_id)
        if before is None or before.decided_at != at:  # otherwise it was read back before it was acknowledged
            self._published.add(at)
        return self._take(decision, jws, at, at_ms, traceparent)

    def reached(self, partition: int) -> int:
        """Return the offset of the last known request in a partition; -1 if there is none."""
        return self._reached.get(partition, -1)

    def pending(self) -> Iterator[RequestState]:
        """Yield all requests that wait for approvals."""
        yield from list(self._pending.values())

    def waiting(self) -> Mapping[str, int]:
        """Return the number of requests that wait for approvals, by agent. Do not change the mapping."""
        return self._waiting

    # --- reading back ---

    def on_records(self, records: Sequence[Received]) -> None:
        """Add decisions from the topic, in the order of each partition."""
        for record in records:
            place = RecordPosition(record.partition, record.offset)
            if place in self._published:
                self._published.discard(place)
                continue
            if self._unread is None:
                self._read(record)
            else:
                self._keep_unread(record)

    async def settle(self) -> None:
        """Verify what was read back at start. Await it before the first request is processed.

        Until then only decisions that could still matter are kept, unverified: most decisions of a day are over.
        """
        async with self._settling:
            while self._unread:
                aside, self._unread = self._unread, {}
                for records in aside.values():
                    for number, (_, _, record) in enumerate(sorted(records, key=lambda item: item[1])):
                        self._read(record)
                        if number % 50 == 49:
                            await asyncio.sleep(0)
            self._unread = None

    def unready(self) -> str | None:
        """Return the reason why nothing can be decided yet, or None."""
        return None if self._unread is None else "what was decided before is not known yet"

    def _keep_unread(self, record: Received) -> None:
        assert self._unread is not None
        try:
            unverified = orjson.loads(parse(record.value).payload)
            request = orjson.loads(parse(unverified["request"]).payload)
            # Unverified, only to drop expired decisions; dropping trusts nothing.
            end_ms = _end_ms(request["exp"], record.appended_at_ms)
            if unverified["outcome"] == "approval_required":
                end_ms = max(end_ms, unverified["expires_at"] * 1000 + MAX_AGE_MS)
            elif unverified["outcome"] == "allowed":
                end_ms = max(end_ms, record.appended_at_ms + (unverified.get("ttl_s") or 0) * 1000)
            if unverified.get("grants"):
                end_ms = max(end_ms, record.appended_at_ms + MAX_GRANT_LIFE_S * 1000)
        except (InvalidMessageError, ValueError, TypeError, KeyError) as error:
            log.warning(
                "ignored a decision at %s@%d: %r",
                record.topic_name,
                record.offset,
                error,
                extra=rate_limited(record.topic_name, type(error).__name__),
            )
            return
        unread = self._unread.setdefault(record.partition, [])
        heapq.heappush(unread, (end_ms, record.offset, record))
        while unread[0][0] < record.appended_at_ms:
            heapq.heappop(unread)

    def _read(self, record: Received) -> None:
        try:
            signed = verify(
                parse(record.value), CredentialDecision,
                self._trust.finder(*CredentialDecision.signed_by, at_s=record.appended_at_ms / 1000),
                audience=self._trust.trust_domain,
            )  # fmt: skip
            place = RecordPosition(record.partition, record.offset)
            self._take(signed.claims, signed.compact, place, record.appended_at_ms, record.traceparent)
        except InvalidMessageError as error:
            log.error(
                "ignored a decision at %s@%d: %s",
                record.topic_name,
                record.offset,
                error,
                extra=rate_limited(record.topic_name, error.code),
            )

    # --- shared steps ---

    def _take(
        self, decision: CredentialDecision, jws: str, at: RecordPosition, at_ms: int, traceparent: str | None
    ) -> RequestState:
        id, source = decision.request_id, RecordPosition(decision.source.partition, decision.source.offset)
        state = self._known.get(id)
        if state is None:
            # The request is inside a decision that this service signed, and was verified before.
            request = parse(decision.request).unverified_claims(CredentialRequest)
            agent_id = subject_of(decision.aud, request.iss, "agent") or ""
            state = self._known[id] = RequestState(id, agent_id, source, request.exp)
        self._reach(source)
        self._on_decision(decision, state.agent_id)
        final = decision.outcome != "approval_required"
        if state.decided_at is None or self._replaces(state, final, at):
            state.at, state.outcome, state.ttl_s = source, decision.outcome, decision.ttl_s
            state.decision_id, state.decided_at = decision.jti, at
            state.traceparent = traceparent or state.traceparent
            state.jws = None if decision.outcome == "allowed" else jws
            state.pending = None if final else decision
            if decision.outcome == "denied":
                self._keep_text(state, at.partition)
            state.approvals = {
                id: (approval, state.approvals.get(id, (approval, None))[1])
                for id, approval in _approvals_of(decision)
            }
            if final:
                self._waits_no_more(id)
                if decision.outcome == "allowed":
                    self._on_allowed(decision, state.agent_id, at_ms)
            else:
                if id not in self._pending:
                    self._waiting[state.agent_id] += 1
                self._pending[id] = state
        end_ms = _end_ms(state.exp, at_ms)
        if decision.expires_at is not None:
            end_ms = max(end_ms, decision.expires_at * 1000 + MAX_AGE_MS)
        self._forget_at(at.partition, end_ms, state)
        self._forget_until(at.partition, at_ms)
        return state

    def _reach(self, at: RecordPosition) -> None:
        self._reached[at.partition] = max(self._reached.get(at.partition, -1), at.offset)

    def _replaces(self, state: RequestState, final: bool, at: RecordPosition) -> bool:
        assert state.decided_at is not None
        if state.is_final:
            return final and at.offset < state.decided_at.offset
        return final or at.offset > state.decided_at.offset

    # --- removal ---

    def _forget_at(self, partition: int, end_ms: int, state: RequestState) -> None:
        if end_ms > state.forget_at_ms:
            state.forget_at_ms = end_ms
            heapq.heappush(self._ends.setdefault(partition, []), (end_ms, state.request_id))

    def _forget_until(self, partition: int, at_ms: int) -> None:
        ends = self._ends.get(partition, [])
        while ends and ends[0][0] < at_ms:
            _, id = heapq.heappop(ends)
            state = self._known.get(id)
            if state is not None and state.forget_at_ms < at_ms:
                del self._known[id]
                self._waits_no_more(id)

    def _keep_text(self, denied: RequestState, partition: int) -> None:
        """Keep the text of a denial, and drop that of an older one: the text is most of its memory."""
        denials = self._denials.setdefault(partition, deque())
        denials.append(denied)
        if len(denials) > MOST_DENIALS:
            denials.popleft().jws = None

    def _waits_no_more(self, id: str) -> None:
        state = self._pending.pop(id, None)
        if state is not None:
            self._waiting[state.agent_id] -= 1
            if not self._waiting[state.agent_id]:
                del self._waiting[state.agent_id]


class Approvers:
    """The users who may approve anything at all: those with the role sponsor or operator."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._ids: tuple[str, ...] | None = None
        directory.on_change(self._on_change)

    def ids(self) -> tuple[str, ...]:
        """Return their ids, sorted."""
        if self._ids is None:
            users = (cast(UserState, entry.state) for entry in self._directory.entries("user"))
            self._ids = tuple(
                user.user_id
                for user in users
                if user.status == "active" and not {"sponsor", "operator"}.isdisjoint(user.roles)
            )
        return self._ids

    def _on_change(self, kind: SubjectKind, id: str) -> None:
        if kind == "user":
            self._ids = None


def _end_ms(exp: int, at_ms: int) -> int:
    """Return until when a request is remembered that expires at `exp` (seconds) and was added or decided at `at_ms`."""
    return max(min(exp * 1000, at_ms + MAX_AGE_MS), at_ms) + KEEP_MS


def _approvals_of(decision: CredentialDecision) -> Iterator[tuple[str, str]]:
    """Yield (id, digest) of each approval in a decision of this service, which verified them before it signed."""
    for jws in decision.approvals:
        claims = parse(jws).unverified_claims(Approval)
        yield message_id(claims.iss, claims.jti), digest(jws)
