"""Verifies incoming records of agents and people, and limits their rate, their waiting time and pending approvals.

Verified are requests of agents, approvals of people, and grants. A refusal by a limit is a signed decision like any
other, and says when a new request may succeed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import ceil
from typing import TypeVar

from ringfence.kernel.base.errors import InvalidMessageError, SignatureError
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.claims import ExpiredError
from ringfence.kernel.crypto.jwe import check_reply_key
from ringfence.kernel.crypto.jws import KeyFinder, Signed, parse
from ringfence.kernel.crypto.webauthn import VerificationKey
from ringfence.kernel.kafka.record import Received, partition_of
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.approval import ActionApproval, Approval, BreakGlassReview, Grant, GrantWithdraw
from ringfence.messages.base import ExpiringClaims, typ_header
from ringfence.messages.codes import Code, ReceivedCode
from ringfence.messages.credential import MAX_REQUEST_BYTES, CredentialRequest, RequestWithdraw
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.records.instances import request_of_held_key
from ringfence.model.records.key_reuse import ReuseReporter
from ringfence.model.records.signed_messages import (
    FindKey,
    SignedMessageVerifier,
    key_of_agent,
)
from ringfence.model.verdict import ALLOWED, Allowed, Refused, Verdict, refused
from ringfence.policy.decision_log import ANSWER_EXPIRED_WITHIN_MS, MAX_AGE_MS, DecisionLog
from ringfence.policy.domain import Case, RequestRefused, refuse
from ringfence.policy.incoming.load_shedding import BacklogMonitor, Stage

C = TypeVar("C", bound=ExpiringClaims)

MAX_APPROVAL_BYTES = 192 * 1024

_FOR_OTHERS = frozenset({typ_header(BreakGlassReview), typ_header(ActionApproval)})


def is_for_others(record: Received) -> bool:
    """Return whether a record claims to be a review of break glass (for audit) or about an action (for gateways)."""
    try:
        return parse(record.value).header.typ in _FOR_OTHERS
    except InvalidMessageError:
        return False


def is_request_withdrawal(record: Received) -> bool:
    """Return whether a record of `credential.request` claims to withdraw a request."""
    try:
        return parse(record.value).header.typ == typ_header(RequestWithdraw)
    except InvalidMessageError:
        return False


class MessageVerifier:
    """Verifies incoming records. An invalid one raises InvalidMessageError and goes to the dead letters."""

    def __init__(self, runtime: Runtime, directory: Directory) -> None:
        self._runtime = runtime
        self._directory = directory
        self._report_reuse = ReuseReporter(runtime, directory)
        self._partitions: list[int] = []

    async def request(self, record: Received) -> tuple[Case, InvalidMessageError | None]:
        """Return the request in a record, signed by an agent, and why it is denied whatever it asks for: it came too
        late, or the key rests on a compromised one. Such an agent is answered, so that it need not wait in vain.
        """
        if self._runtime.clock.now_ms() - record.appended_at_ms > MAX_AGE_MS:
            raise InvalidMessageError(
                "the request has waited longer than any request may live; ask anew", code=Code.TOO_OLD
            )
        request: Signed[CredentialRequest]
        late: InvalidMessageError | None
        try:
            request, late = await self._verified(record, CredentialRequest, key_of_agent, MAX_REQUEST_BYTES)
        except SignatureError as error:
            if error.code != Code.KEY_UNKNOWN:
                raise
            request, late = self._of_held_key(record, error)
        claims = request.claims
        if (
            isinstance(late, ExpiredError)
            and record.appended_at_ms - claims.exp * 1000 > ANSWER_EXPIRED_WITHIN_MS
        ):
            raise late
        agent_id = subject_of(claims.aud, claims.iss, "agent") or ""
        if record.key != agent_id:
            raise InvalidMessageError(
                f"the Kafka key of a request is the agent's id, {agent_id}", code=Code.KEY_UNEXPECTED
            )
        placement = await self.check_placement(record, agent_id)
        if isinstance(placement, Refused):
            raise InvalidMessageError(placement.reason.message, code=ReceivedCode(placement.reason.code))
        check_reply_key(claims.reply_key)
        id = message_id(claims.iss, claims.jti)
        return Case(request, id, agent_id, record.coordinates, record.traceparent), late

    def _of_held_key(
        self, record: Received, unknown: SignatureError
    ) -> tuple[Signed[CredentialRequest], InvalidMessageError]:
        """Return a request by a key that rests on a compromised one, and the reason to deny it. Raises `unknown` if it
        is no such key.
        """
        held = request_of_held_key(
            self._directory, record.value, self._runtime.settings.trust_domain, record.appended_at_ms
        )
        if held is None:
            raise unknown
        signed, reason = held
        return signed, InvalidMessageError(reason.message, code=ReceivedCode(reason.code))

    async def check_placement(self, record: Received, agent_id: str) -> Verdict:
        """Check that a record about an agent is in the agent's partition.

        One replica processes all requests of an agent and the answers to them, in order. Two replicas that evaluate
        concurrently do not know what the other allows. A producer can write a key to any partition.
        """
        if self._partitions and record.partition == partition_of(agent_id, self._partitions):
            return ALLOWED
        self._partitions = await self._runtime.publisher.partitions(record.topic)
        right = partition_of(agent_id, self._partitions)
        if record.partition == right:
            return ALLOWED
        return refused(
            Code.PARTITION_UNEXPECTED,
            f"what is about agent {agent_id} belongs in partition {right} of {record.topic_name}: use Kafka's default "
            "partitioner (murmur2 of the key)",
        )

    async def approval(self, record: Received) -> tuple[Signed[Approval], ExpiredError | None]:
        """Return the approval in a record, signed by a user (active or not) or an agent, and the error if it came too
        late.

        A signature by a disabled user or by an agent is accepted here, so that the evaluation can refuse it by name.
        """
        return await self._verified(record, Approval, self._person_key, MAX_APPROVAL_BYTES)

    async def grant(self, record: Received) -> tuple[Signed[Grant], ExpiredError | None]:
        """Return the grant in a record. For signer and second result see `approval`."""
        return await self._verified(record, Grant, self._person_key, MAX_REQUEST_BYTES)

    async def withdrawal(self, record: Received) -> tuple[Signed[GrantWithdraw], ExpiredError | None]:
        """Return the withdrawal of a grant in a record. For signer and second result see `approval`."""
        return await self._verified(record, GrantWithdraw, self._person_key, MAX_REQUEST_BYTES)

    async def request_withdrawal(
        self, record: Received
    ) -> tuple[Signed[RequestWithdraw], ExpiredError | None]:
        """Return the withdrawal of a request in a record, signed by an agent, and the error if it came too late."""
        return await self._verified(record, RequestWithdraw, key_of_agent, MAX_REQUEST_BYTES)

    async def _verified(
        self,
        record: Received,
        model: type[C],
        find_key: FindKey,
        max_bytes: int,
    ) -> tuple[Signed[C], ExpiredError | None]:
        settings = self._runtime.settings
        verifier = SignedMessageVerifier(
            self._directory,
            settings.trust_domain,
            lambda: self._runtime.tables_caught_up(settings.grace_s),
            self._report_reuse,
        )
        return await verifier.verify(
            record.value, model, find_key, at_ms=record.appended_at_ms, max_bytes=max_bytes
        )

    def _person_key(self, iss: str, kid: str, at_s: float, of_agents: KeyFinder) -> VerificationKey | None:
        user_id = subject_of(self._runtime.settings.trust_domain, iss, "user")
        if user_id is None:
            return key_of_agent(iss, kid, at_s, of_agents)
        try:
            entry = self._directory.user(user_id)
        except ChainError:
            return None
        return self._directory.key_of(entry.state, kid, at_s) if entry else None


_WINDOW_MS = 60_000
TOLD_NO = 600
"""The minimum number of refusals per minute that an agent over its rate limit is sent. A higher rate limit replaces
it.
"""
SHARE = 60
"""Requests of each agent that are answered per minute while policy is behind."""
LOOKED_AT = 600
"""Requests per minute and partition that are still answered when probably nobody waits for them any more."""
PENDING_RETRY_S = 60
"""When to ask again after too many requests wait for people."""


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Limits of policy. 0 means no limit."""

    agent_per_minute: int
    sponsor_per_minute: int
    """Over all agents of one sponsor that this replica serves."""
    wait_s: int
    """The greatest age of a request when its turn comes."""


@dataclass(frozen=True, slots=True)
class PendingLimits:
    """The most requests that may wait for people at once. 0 means no limit."""

    agent: int
    sponsor: int
    """Over all agents of one sponsor."""


class AdmissionControl:
    """Rate limits by minute of the broker's append time, so that a backlog counts as it was sent."""

    def __init__(self, directory: Directory, limits: AdmissionLimits) -> None:
        self._directory = directory
        self._limits = limits
        self._window = 0
        self._counts: Counter[str] = Counter()
        self._refusals: Counter[str] = Counter()
        """By agent. Only requests with a verified signature count, so that nobody uses up another agent's refusals."""
        self._looked_at: Counter[int] = Counter()
        """By partition."""
        self._backlog = BacklogMonitor(limits.wait_s)

    def should_shed(self, record: Received, now_ms: int) -> bool:
        """Return whether to shed a request: no answer, not even parsing. Call it for each request in order."""
        self._begin(record.appended_at_ms)
        stage = self._backlog.observe(record.partition, record.appended_at_ms, now_ms)
        agent_id = record.key or ""
        match stage:
            case Stage.SERVED:
                most = self._limits.agent_per_minute
                return bool(most and self._refusals[agent_id] >= max(most, TOLD_NO))
            case Stage.SHARED:
                return self._refusals[agent_id] + self._counts[f"agent {agent_id}"] >= SHARE
            case Stage.UNANSWERED:
                self._looked_at[record.partition] += 1
                return self._looked_at[record.partition] > LOOKED_AT

    def admit(self, case: Case, now_ms: int) -> Allowed | RequestRefused:
        """Count a new request, and check that it is evaluated: it has not waited for too long, and neither its agent
        nor the sponsor's agents together ask too often.
        """
        admission = self._check_wait(case, now_ms)
        if isinstance(admission, Allowed):
            admission = self._check_rates(case)
        if isinstance(admission, RequestRefused):
            self._refusals[case.agent_id] += 1
        return admission

    def count_refusal(self, agent_id: str) -> None:
        """Count a refusal of another signed message of an agent, so that a flood of those is shed as well."""
        self._refusals[agent_id] += 1

    def behind(self, now_ms: int) -> str | None:
        """Return a warning that requests are refused because policy is behind, or None."""
        return self._backlog.warning(now_ms)

    def _check_wait(self, case: Case, now_ms: int) -> Allowed | RequestRefused:
        waited_ms, wait_s = now_ms - case.source.appended_at_ms, self._limits.wait_s
        if not wait_s or waited_ms <= wait_s * 1000:
            return ALLOWED
        message = f"policy is behind: the request waited for {waited_ms / 1000:.0f} s; ask again later"
        return refuse(Code.OVERLOADED, message, retry_after_s=wait_s)

    def _check_rates(self, case: Case) -> Allowed | RequestRefused:
        at_ms = case.source.appended_at_ms
        self._begin(at_ms)
        agent, sponsor = f"agent {case.agent_id}", _sponsor_of(self._directory, case.agent_id)
        rate = self._check_rate(agent, self._limits.agent_per_minute, at_ms)
        if isinstance(rate, Allowed) and sponsor:
            rate = self._check_rate(f"sponsor {sponsor}", self._limits.sponsor_per_minute, at_ms)
        if isinstance(rate, Allowed):
            self._counts[agent] += 1
            if sponsor:
                self._counts[f"sponsor {sponsor}"] += 1
        return rate

    def _begin(self, at_ms: int) -> None:
        # Partitions are not read in step: slightly older requests count in this window as well.
        if (window := at_ms // _WINDOW_MS) > self._window:
            self._window = window
            self._counts.clear()
            self._refusals.clear()
            self._looked_at.clear()

    def _check_rate(self, who: str, limit: int, at_ms: int) -> Allowed | RequestRefused:
        if not limit or self._counts[who] < limit:
            return ALLOWED
        left_s = ceil(((self._window + 1) * _WINDOW_MS - at_ms) / 1000)
        message = f"{who} may ask {limit} times a minute, and has; ask again in {left_s} s"
        return refuse(Code.RATE_LIMITED, message, retry_after_s=left_s)


@dataclass(slots=True, eq=False)
class PendingApprovalLimit:
    """Limits pending approvals: at the limit, a request that would have to wait for a person is denied.

    So nobody's agent can fill the day of another person's sponsor, and people are less likely to approve without
    reading.
    """

    directory: Directory
    decisions: DecisionLog
    limits: PendingLimits
    _asking: dict[str, str] = field(default_factory=dict, init=False)
    """Requests that are about to wait, by id, with their agents."""

    def admit(self, case: Case, sponsor: str) -> Allowed | RequestRefused:
        """Check that people can be asked about a request. If so, it counts as waiting from now on."""
        asking = self._about_to_wait(but_for=case.request_id)
        waiting = self.decisions.waiting()
        count = waiting.get(case.agent_id, 0) + asking[case.agent_id]
        admission = self._check_count(f"agent {case.agent_id}", count, self.limits.agent)
        if isinstance(admission, Allowed) and self.limits.sponsor:
            theirs = [agent for agent in {*waiting, *asking} if _sponsor_of(self.directory, agent) == sponsor]
            count = sum(waiting.get(agent, 0) + asking[agent] for agent in theirs)
            admission = self._check_count(f"the agents of {sponsor}", count, self.limits.sponsor)
        if isinstance(admission, Allowed):
            self._asking[case.request_id] = case.agent_id
        return admission

    def _about_to_wait(self, *, but_for: str) -> Counter[str]:
        """Return, by agent, how many requests were admitted and are not among the waiting ones yet."""
        for id in list(self._asking):
            state = self.decisions.get(id)
            if state is None or state.outcome is not None:
                del self._asking[id]
        return Counter(agent for id, agent in self._asking.items() if id != but_for)

    def _check_count(self, who: str, count: int, limit: int) -> Allowed | RequestRefused:
        if not limit or count < limit:
            return ALLOWED
        message = (
            f"{count} requests of {who} wait for people already, and no more may; wait for answers, or have them "
            "approved ahead (ringfence approvals grant)"
        )
        return refuse(Code.APPROVALS_PENDING_LIMIT, message, retry_after_s=PENDING_RETRY_S)


def _sponsor_of(directory: Directory, agent_id: str) -> str | None:
    try:
        agent = directory.agent(agent_id)
    except ChainError:
        return None  # the evaluation reports the problem
    return agent.state.sponsor if agent else None
