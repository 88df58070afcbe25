"""Actions that wait for a person: the gateway asks, waits, and goes on with a signature over exactly that question.

Whatever is not a yes to this one question, by somebody who may give it, in time and for the first time, changes
nothing. What a yes allows is weighed anew at the moment of going on: see `DecisionGate`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final

from aiokafka.errors import KafkaError

from ringfence.gateway.contract import Headers, HoldableRequest
from ringfence.gateway.decision.approval_questions import Question, Questions, Same, written
from ringfence.gateway.decision.approved_headers import digest_of_headers, shown, unshowable
from ringfence.gateway.domain import UNAVAILABLE, Ask, Chosen, Refusal, refused, refused_for
from ringfence.gateway.state.leases import LeaseTable
from ringfence.kernel.base import metrics
from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError, SignatureError
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.crypto.claims import ExpiredError
from ringfence.kernel.crypto.jws import Signed, UnverifiedJws, parse, sign, verify
from ringfence.kernel.crypto.keys import PublicKey
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.approval import ActionApproval, ActionRequest
from ringfence.messages.base import typ_header
from ringfence.messages.credential import Reason
from ringfence.messages.topics import APPROVAL_REQUEST
from ringfence.model.http_targets.request_map import MAX_BODY_BYTES, Action
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.requests.approvals import may_approve, not_understood
from ringfence.model.requests.facts import DeniedError, load_records

log = logging.getLogger(__name__)

MAX_URL_CHARS: Final = 8000
MAX_ANSWER_BYTES: Final = 64 * 1024
MAX_HEARD: Final = 1000
"""So many answers are looked at at a time: who can write to the topic fills no memory."""
_ASK_WITHIN_S: Final = 5.0
"""So long Kafka may take to have the question."""
_TYP: Final = typ_header(ActionApproval)


@dataclass(frozen=True, slots=True)
class Waiting:
    """One request that wants a person's word."""

    action_id: str
    method: str
    url: str
    body: bytes
    headers: Headers
    """All that go on but for the credential's."""
    chosen: Chosen
    action: Action
    ask: Ask


class Approvals:
    """Asks people about actions, and knows what they answered."""

    def __init__(
        self, runtime: Runtime, directory: Directory, table: LeaseTable, questions: Questions,
        *, wait_s: float, life_s: int,
    ) -> None:  # fmt: skip
        """`wait_s`: how long one request waits; `life_s`: how long a question stands."""
        self._runtime = runtime
        self._directory = directory
        self._table = table
        self._questions = questions
        self._wait_s = wait_s
        self._life_s = life_s
        self._tasks: set[asyncio.Task[None]] = set()

    # --- asking ---

    async def answered(
        self, waiting: Waiting, patient: HoldableRequest | None
    ) -> tuple[Question | None, Refusal | None]:
        """The question that this request waited for, where there is one, and why it does not go on.

        Without a refusal there is a yes, which it may take (`take`). `patient`: the request, as the data plane has it;
        None where nobody tells whether it is still there.
        """
        if (refusal := _unaskable(waiting)) is not None:
            return None, refusal
        claims = self._claims(waiting)
        agent_id = claims.agent_id
        question = self._questions.same(Same.of(claims), self._runtime.clock.now_ms())
        if question is None:
            if (refusal := self._questions.full(agent_id) or self._questions.crowded(agent_id)) is not None:
                return None, refusal
            question = Question(Signed(claims, sign(claims, self._runtime.key)), Same.of(claims))
            self._questions.add(question)
            if (refusal := await self._asked(question, waiting)) is not None:
                return None, refusal
        if not question.settled:
            if (refusal := self._questions.crowded(agent_id)) is not None:
                return question, refusal
            if (refusal := await self._wait(question, waiting, patient)) is not None:
                return question, refusal
        return question, _refusal(question)

    def same(self, waiting: Waiting) -> Same:
        """What an approval of this would have to be over."""
        return Same.of(self._claims(waiting))

    def take(self, question: Question) -> Refusal | None:
        """Use the yes, once: why it cannot be used any more, or None. Nothing may be awaited after it."""
        claims = question.signed.claims
        if self._questions.about(question.signed.digest) is not question:
            message = (
                "an approval counts once, and another request just like this one used it, or its time is over"
            )
            return refused("approval_used", f"{message}; send it again to ask anew")
        if self._runtime.clock.now_ms() >= question.ends_ms:
            return refused("approval_timeout", "the time of the approval is over; send it again to ask anew")
        try:
            ground = load_records(self._directory, claims.agent_id, claims.task_id, claims.target_id)
        except DeniedError as error:
            return refused(error.reason.code, error.reason.message)
        if written(ground.revisions(claims.revisions.policy)) != written(claims.revisions):
            return refused(
                "approval_stale", "records changed since it was approved; send it again to ask anew"
            )
        if not may_approve(self._directory, question.by or "", claims.required, ground):
            self._questions.drop(question)
            return refused("approval_stale", f"{question.by} cannot approve this any more; ask anew")
        self._questions.use(question)
        return None

    def _claims(self, waiting: Waiting) -> ActionRequest:
        lease, ground, now_s = (
            waiting.chosen.lease,
            waiting.chosen.ground,
            self._runtime.clock.now_ms() // 1000,
        )
        return ActionRequest(
            iss=self._runtime.key.id,
            aud=self._runtime.settings.trust_domain,
            iat=now_s,
            exp=min(now_s + self._life_s, lease.deadline),
            jti=secrets.token_urlsafe(32),
            action_id=waiting.action_id,
            agent_id=lease.agent_id,
            task_id=lease.task_id,
            lease_id=lease.lease_id,
            target_id=lease.target_id,
            verb=waiting.action.verb,
            resource=waiting.action.resource,
            method=waiting.method,
            url=waiting.url,
            body_digest=hashlib.sha256(waiting.body).hexdigest(),
            body_bytes=len(waiting.body),
            headers_digest=digest_of_headers(waiting.headers),
            headers=shown(waiting.headers),
            required=waiting.ask.required,
            revisions=ground.revisions(waiting.ask.policy),
        )

    async def _asked(self, question: Question, waiting: Waiting) -> Refusal | None:
        claims = question.signed.claims
        try:
            async with asyncio.timeout(_ASK_WITHIN_S):
                sent = await self._runtime.publisher.send(
                    APPROVAL_REQUEST, waiting.chosen.ground.agent.state.sponsor, question.signed.compact,
                    id=question.id, type=claims.typ, content_type="application/jose",
                )  # fmt: skip
                await sent
        except (TimeoutError, KafkaError, RingfenceError, OSError) as error:
            log.warning("a person could not be asked: %r", error)
            refusal = refused(
                "approval_unavailable", "nobody can be asked now; try again later", status=UNAVAILABLE
            )
            self._end(question, refusal)
            return refusal
        except BaseException:
            self._end(question, refused("approval_unavailable", "nobody was asked", status=UNAVAILABLE))
            raise
        return None

    async def _wait(
        self, question: Question, waiting: Waiting, patient: HoldableRequest | None
    ) -> Refusal | None:
        """Wait for the answer: None where there may be one; else why this request waits no longer."""
        lease, gone = waiting.chosen.lease, False
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def wake() -> None:
            if not waiter.done():
                waiter.set_result(None)

        def left() -> None:
            nonlocal gone
            gone = True
            wake()

        now_s = self._runtime.clock.now_ms() / 1000
        self._questions.wait(question, waiter)
        metrics.ACTIONS_WAITING.inc()
        unwatch = self._table.watch(lease.lease_id, wake)
        stay = patient.on_gone(left) if patient is not None else None
        try:
            async with asyncio.timeout(max(0.0, min(self._wait_s, question.signed.claims.exp - now_s))):
                await waiter
        except TimeoutError:
            return self._out_of_time(question)
        finally:
            self._questions.leave(question, waiter)
            metrics.ACTIONS_WAITING.dec()
            unwatch()
            if stay is not None:
                stay()
        if gone:
            return refused("client_gone", "whoever sent this did not wait for the answer")
        if question.settled:
            return None
        problem = self._table.problem(lease)
        if problem is not None:
            return refused_for(problem)
        return refused(
            "stale_view", "what this gateway knows got too old while this waited", status=UNAVAILABLE
        )

    def _out_of_time(self, question: Question) -> Refusal | None:
        claims = question.signed.claims
        if question.settled:
            return None
        if self._runtime.clock.now_ms() >= claims.exp * 1000:
            message = (
                f"nobody answered question {question.id} in time; send the same request again to ask anew"
            )
            return refused("approval_timeout", message)
        message = (
            f"{_WHO[claims.required]} has not answered yet (question {question.id}); send exactly the same request "
            f"again until {claims.exp} (seconds since 1970): a yes counts for the next one, once"
        )
        return refused("approval_pending", message)

    def _end(self, question: Question, why: Refusal) -> None:
        question.over = why
        self._questions.drop(question)
        question.wake()

    # --- what people answer ---

    def on_records(self, records: Sequence[Received]) -> None:
        """Take in what came on `approval.response`: what is about a question of this gateway."""
        for record in records:
            jws = self._to_this_gateway(record)
            if jws is not None and len(self._tasks) < MAX_HEARD:
                self._in_the_background(self._heard(jws, record))

    def _to_this_gateway(self, record: Received) -> UnverifiedJws | None:
        """The answer in a record, where it is for this gateway to say what becomes of it. Nothing of it is verified."""
        try:
            if len(record.value) > MAX_ANSWER_BYTES:
                return None
            jws = parse(record.value)
            if jws.header.typ != _TYP:
                return None
            claimed = jws.unverified_claims(ActionApproval)
            if self._questions.about(claimed.request_digest) is not None:
                return jws
            asked = parse(claimed.request).unverified_claims(ActionRequest)
        except InvalidMessageError:
            return None  # no answer to anything; audit says so
        return jws if asked.iss == self._runtime.key.id else None

    async def _heard(self, jws: UnverifiedJws, record: Received) -> None:
        try:
            answer = await self._verified(jws, record)
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
        # Whoever answers may have seen records that are not here yet.
        await self._runtime.tables_caught_up(self._runtime.settings.grace_s)
        problem = self._weighed(answer, record)
        if problem is not None:
            await self._refuse(answer, problem, record)

    async def _verified(self, jws: UnverifiedJws, record: Received) -> Signed[ActionApproval]:
        """Raises InvalidMessageError, ChainError."""

        def find(iss: str, kid: str) -> PublicKey | None:
            return self._directory.user_key(iss, kid, record.appended_at_ms / 1000)

        def opened() -> Signed[ActionApproval]:
            return verify(
                jws, ActionApproval, find,
                audience=self._runtime.settings.trust_domain, appended_at_ms=record.appended_at_ms,
            )  # fmt: skip

        try:
            return opened()
        except ExpiredError:
            raise
        except SignatureError as error:
            if error.code != "key_unknown":
                raise
            await self._runtime.tables_caught_up(self._runtime.settings.grace_s)
            return opened()

    def _weighed(self, answer: Signed[ActionApproval], record: Received) -> Reason | None:
        """Why a verified answer changes nothing; None where it did."""
        claims = answer.claims
        question = self._questions.about(claims.request_digest)
        if question is None and not self._questions.was_used(claims.request_digest):
            return _reason("request_unknown", "no such question stands here: it is over, or was never asked")
        if question is None:
            return _reason(
                "approval_replayed", "this question was answered, and the answer used; each counts once"
            )
        problem = self._problem(question, answer, record)
        if problem is not None:
            return problem
        question.answer, question.by = answer, subject_of(claims.aud, claims.iss, "user")
        question.wake()
        return None

    def _problem(self, question: Question, answer: Signed[ActionApproval], record: Received) -> Reason | None:
        claims, asked = answer.claims, question.signed
        if (claims.request, claims.request_digest) != (asked.compact, asked.digest):
            return _reason("approval_other_request", "the answer is a signature over another question")
        if (record.key, claims.agent_id) != (asked.claims.agent_id, asked.claims.agent_id):
            return _reason(
                "key_unexpected", f"the Kafka key of an answer is the agent's id, {asked.claims.agent_id}"
            )
        user_id = subject_of(claims.aud, claims.iss, "user")
        if user_id is None:
            return _reason("not_a_person", f"{claims.iss} is no user; only people approve")
        if question.answer is not None:
            return _reason("already_decided", f"{question.by} answered before, and that stands")
        if record.appended_at_ms >= asked.claims.exp * 1000:
            return _reason("approval_expired", "the time in which answers counted is over")
        return not_understood(claims) or self._stale(question) or self._not_theirs(question, user_id)

    def _stale(self, question: Question) -> Reason | None:
        """Records changed since it was asked: nobody knows whether the same would be answered."""
        claims = question.signed.claims
        try:
            ground = load_records(self._directory, claims.agent_id, claims.task_id, claims.target_id)
        except DeniedError as error:
            self._end(question, Refusal(403, (error.reason,)))
            return error.reason
        if written(ground.revisions(claims.revisions.policy)) == written(claims.revisions):
            return None
        reason = _reason("approval_stale", "agent, user, task or target changed since it was asked; ask anew")
        self._end(question, Refusal(403, (reason,)))
        return reason

    def _not_theirs(self, question: Question, user_id: str) -> Reason | None:
        claims = question.signed.claims
        ground = load_records(self._directory, claims.agent_id, claims.task_id, claims.target_id)
        if may_approve(self._directory, user_id, claims.required, ground):
            return None
        return _reason("not_approver", f"{user_id} cannot give what is asked for here: {claims.required}")

    async def _refuse(self, answer: Signed[ActionApproval], why: Reason, record: Received) -> None:
        """Say that a signed answer does not count: whoever gave it waits for something that will not come."""
        try:
            await self._runtime.event(
                "refused",
                ActionApproval.typ,
                about=(record.topic_name, record.partition, record.offset),
                actor=answer.claims.iss,
                ref=answer.claims.jti,
                reasons=(why,),
                source=record.coordinates,
                traceparent=record.traceparent,
                agent_id=answer.claims.agent_id,
            )
        except (KafkaError, RingfenceError, OSError) as error:
            log.warning("that an answer does not count could not be said: %r", error)

    def _in_the_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name="approval")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


_WHO: Final = {
    "sponsor": "the agent's sponsor",
    "second_person": "another sponsor",
    "operator": "an operator",
}


def _unaskable(waiting: Waiting) -> Refusal | None:
    if len(waiting.body) > MAX_BODY_BYTES:
        return refused(
            "body_unseen", f"a request that waits for a person may have {MAX_BODY_BYTES} bytes", status=413
        )
    if len(waiting.url) > MAX_URL_CHARS or not all("!" <= one <= "~" for one in waiting.url):
        message = f"nobody can be shown this URL: it has to be ASCII, {MAX_URL_CHARS} characters at most"
        return refused("action_unshowable", message)
    if (why := unshowable(waiting.headers)) is not None:
        return refused("action_unshowable", f"nobody can be shown this request: {why}")
    return None


def _refusal(question: Question) -> Refusal | None:
    """Why a request does not go on whose question is settled; None where there is a yes."""
    if question.over is not None:
        return question.over
    answer = question.answer
    if answer is None or answer.claims.verdict != "approved":
        comment = f": {answer.claims.comment[:500]}" if answer is not None and answer.claims.comment else ""
        return refused("approval_denied", f"{question.by} denied it{comment}")
    return None


def _reason(code: str, message: str) -> Reason:
    return Reason(code=code, message=message[:1000])
