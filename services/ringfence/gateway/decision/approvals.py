"""Approval of single actions: the gateway asks a person, and holds the request until there is a signed approval.

An approval counts only if it answers exactly this question, in time, for the first time, and by a person who may give
it. All other answers have no effect. An approved request is authorized once more before it is forwarded: see
`DecisionGate`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections.abc import Coroutine, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Final

from aiokafka.errors import KafkaError

from ringfence.gateway.contract import Headers, HoldableRequest
from ringfence.gateway.decision.approval_questions import (
    ApprovalKey,
    OpenQuestions,
    Question,
    digest_of_headers,
    revisions_text,
    shown_to_approver,
    unshowable_reason,
)
from ringfence.gateway.domain import ApprovalRequired, ChosenLease, Refusal, refuse, refuse_for
from ringfence.gateway.state.leases import LeaseTable
from ringfence.kernel.base import metrics
from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError, SignatureError
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.crypto.claims import ExpiredError
from ringfence.kernel.crypto.jws import Signed, UnverifiedJws, parse, sign, verify
from ringfence.kernel.crypto.webauthn import VerificationKey
from ringfence.kernel.kafka.record import Outbound, Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.approval import ActionApproval, ActionRequest
from ringfence.messages.base import typ_header
from ringfence.messages.codes import Code
from ringfence.messages.credential import Reason
from ringfence.messages.topics import APPROVAL_REQUEST
from ringfence.model.http_targets import MAX_BODY_BYTES, Action
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.requests.approvals import check_understood, may_approve
from ringfence.model.requests.approver_keys import check_approver_key
from ringfence.model.requests.facts import DeniedError, RecordContext, load_records
from ringfence.model.verdict import ALLOWED, Allowed, Refused, refused

log = logging.getLogger(__name__)

MAX_URL_CHARS: Final = 8000
MAX_ANSWER_BYTES: Final = 64 * 1024
MAX_ANSWERS_IN_PROGRESS: Final = 1000
"""The most answers that are handled at a time. Otherwise anybody who can write to the topic could fill the memory."""
_PUBLISH_TIMEOUT_S: Final = 5.0
"""The timeout for publishing a question to Kafka."""
_TYP: Final = typ_header(ActionApproval)


@dataclass(frozen=True, slots=True)
class ActionToApprove:
    """A request that needs approval."""

    action_id: str
    method: str
    url: str
    body: bytes
    """As it is forwarded; of an MCP message its canonical form, from which the forwarded one is built."""
    headers: Headers
    """All headers that are forwarded, without those of the credential."""
    chosen: ChosenLease
    action: Action
    approval: ApprovalRequired


@dataclass(slots=True, eq=False)
class Approvals:
    """Asks people to approve actions, and takes in their answers."""

    runtime: Runtime
    directory: Directory
    table: LeaseTable
    questions: OpenQuestions
    _: KW_ONLY
    wait_s: float
    """The longest time for which a request is held; `life_s`: the life of a question. In seconds."""
    life_s: int
    _tasks: set[asyncio.Task[None]] = field(default_factory=set, init=False)

    # --- questions ---

    async def wait_for_answer(
        self, pending: ActionToApprove, holdable: HoldableRequest | None, *, wait_s: float | None = None
    ) -> tuple[Question | None, Allowed | Refusal]:
        """Ask, or join an open question, and wait. Returns the question, if any, and whether a person approved.

        If allowed, there is an approval, which the request may use (`use_approval`). `holdable`: the request, as the
        data plane has it; None if the data plane cannot tell whether its client is still there. `wait_s`: a shorter
        time to wait; with 0 the request is not held at all. The checks:

        1. A person can be shown the request (`_check_showable`).
        2. For a new question: the agent may have one more (`OpenQuestions.check_open`).
        3. For a new question, if the request is held: it may wait (`OpenQuestions.check_waiting`).
        4. For a new question: Kafka takes it (`_publish_question`).
        5. While the question has no answer: the request may be held (`approval_pending`), and may wait
           (`OpenQuestions.check_waiting`).
        6. There is an answer in time (`_wait`), and it approves the request (`_check_answer`).
        """
        wait_s = self.wait_s if wait_s is None else min(wait_s, self.wait_s)
        if isinstance(showable := _check_showable(pending), Refusal):
            return None, showable
        claims = self._claims(pending)
        agent_id = claims.agent_id
        question = self.questions.approval_key(ApprovalKey.of(claims), self.runtime.clock.now_ms())
        if question is None:
            if isinstance(room := self.questions.check_open(agent_id), Refusal):
                return None, room
            if wait_s and isinstance(room := self.questions.check_waiting(agent_id), Refusal):
                return None, room
            question = Question(Signed(claims, sign(claims, self.runtime.key)), ApprovalKey.of(claims))
            self.questions.add(question)
            if isinstance(published := await self._publish_question(question, pending), Refusal):
                return None, published
        if question.settled:
            return question, _check_answer(question)
        if not wait_s:
            return question, self._timeout_refusal(question)
        if isinstance(room := self.questions.check_waiting(agent_id), Refusal):
            return question, room
        return question, await self._wait(question, pending, holdable, wait_s)

    def approval_key(self, pending: ActionToApprove) -> ApprovalKey:
        """The key of questions whose approval would cover this request."""
        return ApprovalKey.of(self._claims(pending))

    def use_approval(self, question: Question) -> Allowed | Refusal:
        """Use an approval, once. The caller must await nothing after it. The checks:

        1. The question is open, so the approval was not used (`approval_used`).
        2. Neither question nor answer has expired (`approval_timeout`).
        3. All records can be read, and none has changed since the question (`approval_stale`).
        4. The person may still approve this (`approval_stale`).
        5. The person's key still counts (`_check_key`).
        """
        claims = question.signed.claims
        if self.questions.by_digest(question.signed.digest) is not question:
            message = (
                "an approval counts once, and another request just like this one used it, or its time is over"
            )
            return refuse(Code.APPROVAL_USED, f"{message}; send it again to ask anew")
        if self.runtime.clock.now_ms() >= question.ends_ms:
            return refuse(
                Code.APPROVAL_TIMEOUT, "the time of the approval is over; send it again to ask anew"
            )
        try:
            ground = load_records(self.directory, claims.agent_id, claims.task_id, claims.target_id)
        except DeniedError as error:
            return refuse(error.code, error.reason.message)
        if revisions_text(ground.revisions(claims.revisions.policy)) != revisions_text(claims.revisions):
            return refuse(
                Code.APPROVAL_STALE, "records changed since it was approved; send it again to ask anew"
            )
        if not may_approve(self.directory, question.answered_by or "", claims.required, ground):
            self.questions.drop(question)
            return refuse(
                Code.APPROVAL_STALE, f"{question.answered_by} cannot approve this any more; ask anew"
            )
        if question.answer is not None:
            key = self._check_key(question.answer, question, ground, self.runtime.clock.now_ms())
            if isinstance(key, Refused):
                self.questions.drop(question)
                return Refusal(403, (key.reason,))
        self.questions.use(question)
        return ALLOWED

    def _claims(self, pending: ActionToApprove) -> ActionRequest:
        lease, ground, now_s = (
            pending.chosen.lease,
            pending.chosen.ground,
            self.runtime.clock.now_ms() // 1000,
        )
        return ActionRequest(
            iss=self.runtime.key.id,
            aud=self.runtime.settings.trust_domain,
            iat=now_s,
            exp=min(now_s + self.life_s, lease.deadline),
            jti=secrets.token_urlsafe(32),
            action_id=pending.action_id,
            agent_id=lease.agent_id,
            task_id=lease.task_id,
            lease_id=lease.lease_id,
            target_id=lease.target_id,
            verb=pending.action.verb,
            resource=pending.action.resource,
            method=pending.method,
            url=pending.url,
            body_digest=hashlib.sha256(pending.body).hexdigest(),
            body_bytes=len(pending.body),
            headers_digest=digest_of_headers(pending.headers),
            headers=shown_to_approver(pending.headers),
            required=pending.approval.required,
            revisions=ground.revisions(pending.approval.policy),
        )

    async def _publish_question(self, question: Question, pending: ActionToApprove) -> Allowed | Refusal:
        """Publish a new question. Refused if Kafka does not take it; then it is closed."""
        claims = question.signed.claims
        try:
            async with asyncio.timeout(_PUBLISH_TIMEOUT_S):
                sent = await self.runtime.publisher.send(
                    APPROVAL_REQUEST, claims.typ,
                    Outbound(pending.chosen.ground.agent.state.sponsor, question.signed.compact, id=question.id),
                    content_type="application/jose",
                )  # fmt: skip
                await sent
        except (TimeoutError, KafkaError, RingfenceError, OSError) as error:
            log.warning("a person could not be asked: %r", error)
            refusal = refuse(Code.APPROVAL_UNAVAILABLE, "nobody can be asked now; try again later")
            self._close(question, refusal)
            return refusal
        except BaseException:
            self._close(question, refuse(Code.APPROVAL_UNAVAILABLE, "nobody was asked"))
            raise
        return ALLOWED

    async def _wait(
        self, question: Question, pending: ActionToApprove, holdable: HoldableRequest | None, wait_s: float
    ) -> Allowed | Refusal:
        """Wait for the answer to a question, and check it:

        1. It comes in time (`approval_pending`, or `approval_timeout` once the question has expired).
        2. The client is still there (`client_gone`).
        3. It approves the request (`_check_answer`).
        4. Without an answer, the wait ended with the lease (`LeaseTable.check_live`), or as the view got stale
           (`stale_view`).
        """
        lease, has_left = pending.chosen.lease, False
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def wake() -> None:
            if not waiter.done():
                waiter.set_result(None)

        def on_left() -> None:
            nonlocal has_left
            has_left = True
            wake()

        now_ms = self.runtime.clock.now_ms()
        ends_ms = min(now_ms + int(wait_s * 1000), question.signed.claims.exp * 1000)
        self.questions.add_waiter(question, waiter, ends_ms)
        metrics.ACTIONS_WAITING.inc()
        unwatch = self.table.watch(lease.lease_id, wake)
        stay = holdable.on_disconnect(on_left) if holdable is not None else None
        try:
            async with asyncio.timeout(max(0.0, (ends_ms - now_ms) / 1000)):
                await waiter
        except TimeoutError:
            return _check_answer(question) if question.settled else self._timeout_refusal(question)
        finally:
            self.questions.stop_waiting(question, waiter)
            metrics.ACTIONS_WAITING.dec()
            unwatch()
            if stay is not None:
                stay()
        if has_left:
            return refuse(Code.CLIENT_GONE, "whoever sent this did not wait for the answer")
        if question.settled:
            return _check_answer(question)
        if isinstance(live := self.table.check_live(lease), Refused):
            return refuse_for(live.reason)
        if self.runtime.clock.now_ms() >= ends_ms:
            return self._timeout_refusal(question)
        return refuse(Code.STALE_VIEW, "what this gateway knows got too old while this waited")

    def end_waits(self) -> None:
        """End the waits whose time is over by the gateway's clock. Timers end them unless that clock was moved."""
        for question in self.questions:
            question.wake(self.runtime.clock.now_ms())

    def _timeout_refusal(self, question: Question) -> Refusal:
        """The refusal of a request whose question has no answer yet, and that waits no longer."""
        claims = question.signed.claims
        if self.runtime.clock.now_ms() >= claims.exp * 1000:
            message = (
                f"nobody answered question {question.id} in time; send the same request again to ask anew"
            )
            return refuse(Code.APPROVAL_TIMEOUT, message)
        message = (
            f"{_APPROVERS[claims.required]} has not answered yet (question {question.id}); send exactly the same "
            f"request again until {claims.exp} (seconds since 1970): a yes counts for the next one, once"
        )
        return refuse(Code.APPROVAL_PENDING, message)

    def _close(self, question: Question, refusal: Refusal) -> None:
        question.closed = refusal
        self.questions.drop(question)
        question.wake()

    # --- answers ---

    def on_records(self, records: Sequence[Received]) -> None:
        """Process records of `approval.response` that concern questions of this gateway."""
        for record in records:
            jws = self._to_this_gateway(record)
            if jws is not None and len(self._tasks) < MAX_ANSWERS_IN_PROGRESS:
                self._run_in_background(self._handle_answer(jws, record))

    def _to_this_gateway(self, record: Received) -> UnverifiedJws | None:
        """The unverified answer in a record, if this gateway has to handle it:

        1. It is not too long.
        2. It is a JWS, and an answer by its type.
        3. It names a question that is open here, or it quotes a question of this gateway.
        """
        try:
            if len(record.value) > MAX_ANSWER_BYTES:
                return None
            jws = parse(record.value)
            if jws.header.typ != _TYP:
                return None
            claimed = jws.unverified_claims(ActionApproval)
            if self.questions.by_digest(claimed.request_digest) is not None:
                return jws
            request = parse(claimed.request).unverified_claims(ActionRequest)
        except InvalidMessageError:
            return None  # not an answer; audit reports it
        return jws if request.iss == self.runtime.key.id else None

    async def _handle_answer(self, jws: UnverifiedJws, record: Received) -> None:
        try:
            answer = await self._verify(jws, record)
        except (InvalidMessageError, ChainError) as error:
            log.warning(
                "no answer: %s/%d@%d: %s",
                record.topic_name,
                record.partition,
                record.offset,
                error,
                extra=rate_limited(record.topic_name, error.code),
            )
            return
        # The person may have seen records that have not arrived here yet.
        await self.runtime.tables_caught_up(self.runtime.settings.grace_s)
        if isinstance(applied := self._apply(answer, record), Refused):
            await self._report_refused(answer, applied.reason, record)

    async def _verify(self, jws: UnverifiedJws, record: Received) -> Signed[ActionApproval]:
        """Raises InvalidMessageError, ChainError."""

        def find(iss: str, kid: str) -> VerificationKey | None:
            return self.directory.user_key(iss, kid, record.appended_at_ms / 1000)

        def opened() -> Signed[ActionApproval]:
            return verify(
                jws, ActionApproval, find,
                audience=self.runtime.settings.trust_domain, appended_at_ms=record.appended_at_ms,
            )  # fmt: skip

        try:
            return opened()
        except ExpiredError:
            raise
        except SignatureError as error:
            if error.code != Code.KEY_UNKNOWN:
                raise
            await self.runtime.tables_caught_up(self.runtime.settings.grace_s)
            return opened()

    def _apply(self, answer: Signed[ActionApproval], record: Received) -> Allowed | Refused:
        """Apply a verified answer to its question, if it counts:

        1. The question is known here (`request_unknown`).
        2. Its approval was not used (`approval_replayed`).
        3. The answer is valid (`_check_signed_answer`).
        """
        claims = answer.claims
        question = self.questions.by_digest(claims.request_digest)
        if question is None and not self.questions.was_used(claims.request_digest):
            return refused(
                Code.REQUEST_UNKNOWN, "no such question stands here: it is over, or was never asked"
            )
        if question is None:
            return refused(
                Code.APPROVAL_REPLAYED, "this question was answered, and the answer used; each counts once"
            )
        if isinstance(valid := self._check_signed_answer(question, answer, record), Refused):
            return valid
        question.answer, question.answered_by = answer, subject_of(claims.aud, claims.iss, "user")
        question.wake()
        return ALLOWED

    def _check_signed_answer(
        self, question: Question, answer: Signed[ActionApproval], record: Received
    ) -> Allowed | Refused:
        """Check a verified answer:

        1. It is a signature over exactly this question (`approval_other_request`).
        2. The Kafka key and the agent in it are the question's agent (`key_unexpected`).
        3. A user signed it (`not_a_person`).
        4. It is the first answer (`already_decided`), and came in time (`approval_expired`).
        5. If it approves, it has no unknown field (`check_understood`).
        6. No record has changed since the question (`_check_records`).
        7. The user may approve this, by a key that counts (`_check_approver`).
        """
        claims, request = answer.claims, question.signed
        if (claims.request, claims.request_digest) != (request.compact, request.digest):
            return refused(Code.APPROVAL_OTHER_REQUEST, "the answer is a signature over another question")
        if (record.key, claims.agent_id) != (request.claims.agent_id, request.claims.agent_id):
            return refused(
                Code.KEY_UNEXPECTED,
                f"the Kafka key of an answer is the agent's id, {request.claims.agent_id}",
            )
        user_id = subject_of(claims.aud, claims.iss, "user")
        if user_id is None:
            return refused(Code.NOT_A_PERSON, f"{claims.iss} is no user; only people approve")
        if question.answer is not None:
            return refused(Code.ALREADY_DECIDED, f"{question.answered_by} answered before, and that stands")
        if record.appended_at_ms >= request.claims.exp * 1000:
            return refused(Code.APPROVAL_EXPIRED, "the time in which answers counted is over")
        if isinstance(understood := check_understood(claims), Refused):
            return understood
        if isinstance(records := self._check_records(question), Refused):
            return records
        return self._check_approver(question, answer, user_id, record.appended_at_ms)

    def _check_records(self, question: Question) -> Allowed | Refused:
        """Close a question if records have changed since it was asked: the person might answer differently now."""
        claims = question.signed.claims
        try:
            ground = load_records(self.directory, claims.agent_id, claims.task_id, claims.target_id)
        except DeniedError as error:
            self._close(question, Refusal(403, (error.reason,)))
            return Refused(error.reason)
        if revisions_text(ground.revisions(claims.revisions.policy)) == revisions_text(claims.revisions):
            return ALLOWED
        changed = refused(
            Code.APPROVAL_STALE, "agent, user, task or target changed since it was asked; ask anew"
        )
        self._close(question, Refusal(403, (changed.reason,)))
        return changed

    def _check_approver(
        self, question: Question, answer: Signed[ActionApproval], user_id: str, at_ms: int
    ) -> Allowed | Refused:
        """Check that the user may approve this (`not_approver`), by a key that counts (`_check_key`)."""
        claims = question.signed.claims
        ground = load_records(self.directory, claims.agent_id, claims.task_id, claims.target_id)
        if not may_approve(self.directory, user_id, claims.required, ground):
            return refused(
                Code.NOT_APPROVER, f"{user_id} cannot give what is asked for here: {claims.required}"
            )
        return self._check_key(answer, question, ground, at_ms)

    def _check_key(
        self, answer: Signed[ActionApproval], question: Question, ground: RecordContext, at_ms: int
    ) -> Allowed | Refused:
        """Check whether the key of an approval counts at `at_ms`. A denial counts by any key."""
        if answer.claims.verdict != "approved":
            return ALLOWED
        verbs = {question.signed.claims.verb}
        return check_approver_key(answer, self.directory, ground, verbs, at_ms=at_ms)

    async def _report_refused(self, answer: Signed[ActionApproval], reason: Reason, record: Received) -> None:
        """Report that a signed answer does not count, because the person who gave it expects an effect."""
        try:
            await self.runtime.event(
                "refused",
                ActionApproval.typ,
                about=(record.topic_name, record.partition, record.offset),
                actor=answer.claims.iss,
                ref=answer.claims.jti,
                reasons=(reason,),
                source=record.coordinates,
                traceparent=record.traceparent,
                agent_id=answer.claims.agent_id,
            )
        except (KafkaError, RingfenceError, OSError) as error:
            log.warning("that an answer does not count could not be said: %r", error)

    def _run_in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name="approval")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


_APPROVERS: Final = {
    "sponsor": "the agent's sponsor",
    "second_person": "another sponsor",
    "operator": "an operator",
}


def _check_showable(pending: ActionToApprove) -> Allowed | Refusal:
    """Check whether a person can be shown a request:

    1. Its body is no longer than what a data plane reads whole (`body_unseen`).
    2. Its URL is ASCII, and short enough (`action_unshowable`).
    3. Its headers can be shown (`unshowable_reason`).
    """
    if len(pending.body) > MAX_BODY_BYTES:
        return refuse(Code.BODY_UNSEEN, f"a request that waits for a person may have {MAX_BODY_BYTES} bytes")
    if len(pending.url) > MAX_URL_CHARS or not all("!" <= one <= "~" for one in pending.url):
        message = f"nobody can be shown this URL: it has to be ASCII, {MAX_URL_CHARS} characters at most"
        return refuse(Code.ACTION_UNSHOWABLE, message)
    if (reason := unshowable_reason(pending.headers)) is not None:
        return refuse(Code.ACTION_UNSHOWABLE, f"nobody can be shown this request: {reason}")
    return ALLOWED


def _check_answer(question: Question) -> Allowed | Refusal:
    """Check that a settled question was answered, and approved."""
    if question.closed is not None:
        return question.closed
    answer = question.answer
    if answer is None or answer.claims.verdict != "approved":
        comment = f": {answer.claims.comment[:500]}" if answer is not None and answer.claims.comment else ""
        return refuse(Code.APPROVAL_DENIED, f"{question.answered_by} denied it{comment}")
    return ALLOWED
