"""Handler of `credential.decision`: turns allowed decisions into leases and sealed replies, or into refusals.

A batch goes through four phases together, so that each phase costs one round trip: check, activate in Redis, publish
lease records, reply. Credentials that leave something at their target take a longer way (`minting.py`).

Invariants: no agent gets a credential before Kafka has its lease record. A decision that is delivered several times
issues one lease.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import orjson

from ringfence.backends import Backend
from ringfence.issuer.domain import (
    FULL,
    FULL_RETRY_S,
    LATE,
    OVER,
    Decision,
    Issue,
    Refusal,
    StaleView,
    Terms,
    cannot,
    fenced,
    weigh,
)
from ringfence.issuer.limits import GrantKeeper, LeaseLimits
from ringfence.issuer.minting import (
    ENVELOPE_TYPE,
    REPLAYED,
    GatewayDelivery,
    Minted,
    Minter,
    Replayed,
    signed_delivery,
)
from ringfence.kernel.base import metrics
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import derived_id, digest, lease_id
from ringfence.kernel.crypto.jwe import seal
from ringfence.kernel.crypto.jws import Signed, parse, sign, verify
from ringfence.kernel.kafka.batch_handlers import gather_all
from ringfence.kernel.kafka.record import Outbound, Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.kernel.tracing.api import Span, Work
from ringfence.messages.codes import Code
from ringfence.messages.credential import (
    Credential,
    CredentialDecision,
    CredentialDelivery,
    CredentialRequest,
    DecidedTerms,
    IssuerRefusal,
    Reason,
    ReplyContent,
)
from ringfence.messages.lease import Lease
from ringfence.messages.operations import EventKind
from ringfence.messages.topics import CREDENTIAL_REPLY, LEASE
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.lease_store import Activation, LeaseStore, SignedLease, StoredLease
from ringfence.model.leases.lifecycle import has_origin, origin_of
from ringfence.model.leases.tracing import ids_of, step_of, work_on
from ringfence.model.leases.unverified_records import verify_lease
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.verdict import Verdict

log = logging.getLogger(__name__)

_RECHECK_EVERY_S = 0.02
_PROMPT_S = 0.1
"""When Kafka takes longer than this to store a lease, the issuer asks Redis whether its data was lost meanwhile."""


@dataclass(frozen=True, slots=True)
class _Live:
    """A lease of a stateless token that is active in Redis and belongs to the decision."""

    issue: Issue
    jws: str
    fresh: bool = False
    """True if this issuer has just signed the record, false if the record was found in Redis."""


@dataclass(frozen=True, slots=True)
class _Reply:
    """The encrypted reply to the agent."""

    agent_id: str
    id: str
    jwe: str
    traceparent: str | None
    envelope: str | None = None
    """The credential as a JWE for the gateways. None if the credential goes to the agent."""

    def outbound(self) -> Outbound:
        return Outbound(self.agent_id, self.jwe, self.id, self.traceparent)


_Outcome = _Live | Minted | Refusal | Replayed


@dataclass(frozen=True, slots=True)
class DecisionChecks:
    """By what a decision is checked before anything is issued."""

    directory: Directory
    terms: Terms
    patience_s: float
    """How long a decision waits for records that policy has seen and this issuer has not."""
    halts: Callable[[], Verdict]
    """Checks that the issuer may issue anything now."""


@dataclass(frozen=True, slots=True)
class IssuanceSteps:
    """The parts that admit an issue, mint its credential and deliver it."""

    limits: LeaseLimits
    grants: GrantKeeper
    minter: Minter
    delivery: GatewayDelivery


@dataclass(slots=True, eq=False)
class DecisionHandler:
    """The batch handler of `credential.decision`."""

    runtime: Runtime
    store: LeaseStore
    backends: Mapping[str, Backend]
    checks: DecisionChecks
    steps: IssuanceSteps

    async def __call__(self, batch: Sequence[Received]) -> None:
        """Handle a batch of decisions until every effect is durable.

        Raises LostError if Redis was rebuilt before Kafka had a lease. The rebuilt Redis does not know that lease. What
        was made at a target may be void there, or a revoker may have aborted it. The same decisions are delivered
        again.
        """
        decisions = await self._verified(batch)
        by_target: dict[str, list[tuple[Decision, Issue]]] = {}
        others: list[tuple[Decision, Issue | Refusal]] = []
        admitted = await self._admitted(decisions)
        for decision, one in zip(decisions, admitted, strict=True):
            if isinstance(one, Issue) and not self.backends[one.lease.backend].stateless:
                by_target.setdefault(one.lease.target_id, []).append((decision, one))
            else:
                others.append((decision, one))
        # No target delays another's credentials, nor tokens, which need no target.
        await gather_all([self._issue(others), *map(self._mint, by_target.values())])
        metrics.RECORDS.labels("credential.decision", "done").inc(len(decisions))

    async def _admitted(self, decisions: Sequence[Decision]) -> list[Issue | Refusal]:
        work = (Work(one.traceparent, {"request_id": one.claims.request_id}) for one in decisions)
        with self.runtime.tracing.steps("check", work) as spans:
            weighed = [self._checked(one) for one in await self._weigh(decisions)]
            admitted = await self.steps.limits.admit(decisions, self.steps.delivery.admit(weighed))
            admitted = await self.steps.grants.admit(admitted)
            for span, one in zip(spans, admitted, strict=False):
                note_outcome(span, one)
        return admitted

    async def _issue(self, weighed: Sequence[tuple[Decision, Issue | Refusal]]) -> None:
        decisions = [decision for decision, _ in weighed]
        work = (work_on(one.lease) for _, one in weighed if isinstance(one, Issue))
        with self.runtime.tracing.steps("activate", work):
            outcomes = await self._activate(decisions, [one for _, one in weighed])
        await self._answer(decisions, outcomes)

    def _checked(self, one: Issue | Refusal) -> Issue | Refusal:
        """Refuse what the backend cannot mint.

        A stateless token is made after its lease is active, so the check comes before.
        """
        if isinstance(one, Refusal) or not self.backends[one.lease.backend].stateless:
            return one
        problem = self.backends[one.lease.backend].problem(one.lease, one.target)
        return one if problem is None else cannot(problem, one.request)

    async def _mint(self, issues: Sequence[tuple[Decision, Issue]]) -> None:
        await self._answer(
            [decision for decision, _ in issues],
            await self.steps.minter.mint([issue for _, issue in issues]),
        )

    async def _answer(self, decisions: Sequence[Decision], outcomes: Sequence[_Outcome]) -> None:
        done = list(zip(decisions, outcomes, strict=True))
        live = [(decision, one) for decision, one in done if isinstance(one, _Live | Minted)]
        epochs = {epoch for _, one in live if (epoch := one.issue.lease.epoch) is not None}
        written_in, loop = self.store.epoch if live else None, asyncio.get_running_loop()
        until = loop.time() + _PROMPT_S
        leases = await self._publish([one for _, one in live])
        replies: list[_Reply] = []
        try:
            for decision, one in live:
                await asyncio.sleep(0)  # meanwhile the leases are sent to Kafka, and written there
                replies.append(await self._credential(decision, one))
        finally:
            await gather_all(leases)
        self.store.published((one.issue.lease.lease_id, one.issue.lease.seq) for _, one in live)
        if written_in is not None and loop.time() > until:
            epochs.add(written_in)
        for epoch in epochs:
            await self.store.confirm(epoch)
        # An agent may use the handle of a lease at once: gateways must have the credential before.
        await gather_all([await self._send_envelope(reply) for reply in replies if reply.envelope])
        sent = await self.runtime.publisher.send_many(
            CREDENTIAL_REPLY, CREDENTIAL_REPLY.what, [reply.outbound() for reply in replies]
        )
        no = [(decision, one) for decision, one in done if isinstance(one, Refusal | Replayed)]
        await gather_all([*sent, *(self._reject(decision, one) for decision, one in no)])

    # --- 1: verify and check decisions ---

    async def _verified(self, batch: Sequence[Received]) -> list[Decision]:
        """Return the allowed decisions that policy signed.

        A record without a valid signature goes to the dead letters.
        """
        verified, failed = list[Decision](), list[tuple[Received, InvalidMessageError]]()
        for record in batch:
            try:
                signed: Signed[CredentialDecision] = verify(
                    parse(record.value),
                    DecidedTerms,
                    self.runtime.trust.finder(*DecidedTerms.signed_by, at_s=record.appended_at_ms / 1000),
                    audience=self.checks.terms.trust_domain,
                    appended_at_ms=record.appended_at_ms,
                )
            except InvalidMessageError as error:
                failed.append((record, error))
                continue
            if signed.claims.outcome == "allowed":
                verified.append(Decision(signed, record.coordinates, record.traceparent))
        await gather_all(self.runtime.dead_letters.send(record, problem) for record, problem in failed)
        return verified

    async def _weigh(self, decisions: Sequence[Decision]) -> list[Issue | Refusal]:
        """Check the decisions.

        A record that policy has seen and that has not arrived here *yet* is waited for, not refused.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + self.checks.patience_s
        weighed = [self._weigh_one(decision) for decision in decisions]
        if not all(isinstance(one, Issue) for one in weighed):
            await self.runtime.tables_caught_up(self.checks.patience_s)
            self._weigh_again(decisions, weighed, (Refusal, StaleView))
        while any(isinstance(one, StaleView) for one in weighed) and loop.time() < until:
            await asyncio.sleep(_RECHECK_EVERY_S)
            self._weigh_again(decisions, weighed, (StaleView,))
        return [one.refusal() if isinstance(one, StaleView) else one for one in weighed]

    def _weigh_one(self, decision: Decision) -> Issue | Refusal | StaleView:
        return weigh(decision, self.checks.directory, self.checks.terms, self.checks.halts())

    def _weigh_again(
        self,
        decisions: Sequence[Decision],
        weighed: list[Issue | Refusal | StaleView],
        those: tuple[type[Refusal | StaleView], ...],
    ) -> None:
        for i, one in enumerate(weighed):
            if isinstance(one, those):
                weighed[i] = self._weigh_one(decisions[i])

    # --- 2: one lease for each request ---

    async def _activate(
        self, decisions: Sequence[Decision], weighed: Sequence[Issue | Refusal]
    ) -> list[_Outcome]:
        issues = [one for one in weighed if isinstance(one, Issue)]
        signed = [SignedLease(one.lease, sign(one.lease, self.runtime.key)) for one in issues]
        activations = iter(zip(issues, signed, await self.store.activate(signed), strict=True))
        outcomes: list[_Outcome] = []
        for decision, one in zip(decisions, weighed, strict=True):
            if isinstance(one, Issue):
                outcomes.append(self._outcome(*next(activations)))
            else:
                outcomes.append(await self._issued_before(decision, one) or one)
        return outcomes

    def _outcome(self, issue: Issue, signed: SignedLease, activation: Activation) -> _Outcome:
        match activation.outcome:
            case "activated":
                metrics.LEASES_ISSUED.labels(issue.lease.backend).inc()
                return _Live(issue, signed.jws, fresh=True)
            case "fenced":
                return Refusal(fenced(activation.selector_key or ""), issue.request)
            case "late":
                return Refusal(LATE, issue.request)
            case "full":
                return Refusal(FULL, issue.request, retry_after_s=FULL_RETRY_S)
            case "known" | "lost":  # only prepared leases can be lost
                assert activation.stored is not None
                return self._existing(issue, activation.stored)

    def _existing(self, issue: Issue, stored: StoredLease) -> _Outcome:
        try:
            # Verified: a writer to Redis must not make this issuer publish a record of their own.
            lease = verify_lease(stored.jws, self.runtime.trust, self.runtime.clock)
        except InvalidMessageError as error:
            # The same batch would fail again, and block all others behind it.
            log.error("the record of lease %s in Redis does not hold: %s", issue.lease.lease_id, error)
            return REPLAYED
        if not has_origin(lease, issue.origin):
            return REPLAYED
        if stored.status == "active" and lease.backend == issue.lease.backend:
            return _Live(issue, stored.jws.decode("ascii"))
        return Refusal(OVER, issue.request)

    async def _issued_before(self, decision: Decision, refusal: Refusal) -> _Outcome | None:
        """Return the lease of a decision that this issuer would refuse now, but issued before the process died.

        The revoker acts on whatever changed since then.
        """
        if refusal.request is None:
            return None
        id = lease_id(decision.claims.request_id)
        stored = (await self.store.get([id])).get(id)
        if stored is None or stored.status != "active":
            return None
        live = self._recovered(decision, refusal.request, stored)
        if live is None or self.backends[live.issue.lease.backend].stateless:
            return live
        return await self.steps.minter.remint(live.issue, live.jws)

    def _recovered(self, decision: Decision, request: CredentialRequest, stored: StoredLease) -> _Live | None:
        try:
            lease = verify_lease(stored.jws, self.runtime.trust, self.runtime.clock)
            target = self.checks.directory.target(lease.target_id)
        except (InvalidMessageError, ChainError):
            return None
        origin = origin_of(lease.lease_id, decision.at)
        if target is None or not has_origin(lease, origin) or lease.backend not in self.backends:
            return None
        issue = Issue(lease, origin, request, target.state)
        if isinstance(self._checked(issue), Refusal):
            return None
        return _Live(issue, stored.jws.decode("ascii"))

    # --- 3: publish leases ---

    async def _publish(self, live: Sequence[_Live | Minted]) -> list[asyncio.Task[None]]:
        records = [
            Outbound(lease.lease_id, one.jws.encode(), lease.jti, lease.traceparent)
            for one in live
            for lease in (one.issue.lease,)
        ]
        return [
            asyncio.ensure_future(sending)
            for sending in await self.runtime.publisher.send_many(LEASE, Lease.typ, records)
        ]

    # --- 4: reply to agents, report refusals to audit ---

    async def _credential(self, decision: Decision, live: _Live | Minted) -> _Reply:
        issue = live.issue
        credential, to_gateway = await self._credential_of(live), issue.lease.delivery == "gateway"
        for_agent = None if to_gateway else credential
        # Built from verified values without validation, which would cost as much as serialising.
        content = ReplyContent.model_construct(
            request_id=issue.lease.request_id,
            decision=decision.signed.compact,
            lease=live.jws,
            credential=for_agent,
            delivery=self._signed(live, for_agent) if for_agent else None,
        )
        reply = self._sealed(decision, content, issue.request)
        if credential is None or not to_gateway:
            return reply
        return replace(reply, envelope=self.steps.delivery.sealed(issue, credential, id=_envelope_id(reply)))

    def _signed(self, live: _Live | Minted, credential: Credential) -> str:
        lease = live.issue.lease
        id = derived_id(CredentialDelivery.typ, lease.lease_id, "agent")
        fresh = isinstance(live, _Live) and live.fresh
        return signed_delivery(
            lease, credential, self.runtime.key, id=id, lease_digest=digest(live.jws) if fresh else None
        )

    async def _credential_of(self, live: _Live | Minted) -> Credential | None:
        """Return the credential, or None if the gateway reads the secret from a source of its own."""
        if isinstance(live, Minted):
            return live.credential
        issue, backend = live.issue, self.backends[live.issue.lease.backend]
        if backend.enforced_by == "gateway":
            return None
        with step_of(issue.lease, "mint", self.runtime.tracing):
            return await backend.mint(issue.lease, issue.target)

    async def _reject(self, decision: Decision, outcome: Refusal | Replayed) -> None:
        if isinstance(outcome, Refusal):
            await self._refuse(decision, outcome)
        else:
            reason = Reason(
                code=Code.REPLAYED, message="the lease of this request was issued on another record"
            )
            await self._event("replayed", decision, (reason,))

    async def _refuse(self, decision: Decision, refusal: Refusal) -> None:
        metrics.ISSUE_REFUSED.labels(refusal.reasons[0].code).inc()
        log.info("refused request %s: %s", decision.claims.request_id, refusal.reasons[0].message)
        work: list[Awaitable[object]] = [self._event("refused", decision, refusal.reasons, refusal.request)]
        if refusal.finding:
            work.append(self._event("finding", decision, refusal.reasons, refusal.request))
        if refusal.request is not None:
            work.append(self._send_refusal(decision, refusal, refusal.request))
        await gather_all(work)

    async def _send_refusal(self, decision: Decision, refusal: Refusal, request: CredentialRequest) -> None:
        """Encrypt the signed refusal to the agent and publish it."""
        claims = IssuerRefusal(
            iss=self.checks.terms.id,
            aud=self.checks.terms.trust_domain,
            iat=decision.at.appended_at_ms // 1000,
            jti=derived_id("issuer.refusal", *_decision_order(decision)),
            request_id=decision.claims.request_id,
            reasons=refusal.reasons,
            retry_after_s=refusal.retry_after_s,
        )
        content = ReplyContent(
            request_id=decision.claims.request_id,
            decision=decision.signed.compact,
            refusal=sign(claims, self.runtime.key),
        )
        try:
            await (await self._send(self._sealed(decision, content, request)))
        except InvalidMessageError as error:
            log.warning("a refusal cannot be delivered: %s", error)  # the event reports it anyway

    def _sealed(self, decision: Decision, content: ReplyContent, request: CredentialRequest) -> _Reply:
        """Encrypt a reply to the key `reply_key` of the request.

        Raises InvalidMessageError if `reply_key` is no valid key. Requests that lead to a credential were checked for
        that.
        """
        # orjson escapes in a third of the time, and nearly all of the content is a few long texts.
        text = orjson.dumps(content.model_dump(exclude_none=True))
        sealed = seal(text, request.reply_key, kid=content.request_id)
        return _Reply(
            agent_id=subject_of(self.checks.terms.trust_domain, request.iss, "agent") or "",
            id=derived_id("credential.reply", self.checks.terms.id, *_decision_order(decision)),
            jwe=sealed,
            traceparent=decision.traceparent,
        )

    async def _send(self, reply: _Reply) -> Awaitable[object]:
        return await self.runtime.publisher.send(
            CREDENTIAL_REPLY,
            CREDENTIAL_REPLY.what,
            reply.outbound(),
        )

    async def _send_envelope(self, reply: _Reply) -> Awaitable[object]:
        return await self.runtime.publisher.send(
            CREDENTIAL_REPLY,
            CredentialDelivery.typ,
            Outbound(reply.agent_id, reply.envelope or "", _envelope_id(reply), reply.traceparent),
            content_type=ENVELOPE_TYPE,
        )

    async def _event(
        self,
        kind: EventKind,
        decision: Decision,
        reasons: Sequence[Reason],
        request: CredentialRequest | None = None,
    ) -> None:
        agent_id = subject_of(self.checks.terms.trust_domain, request.iss, "agent") if request else None
        await self.runtime.event(
            kind,
            CredentialDecision.typ,
            about=_decision_order(decision),
            reasons=reasons,
            source=decision.at,
            traceparent=decision.traceparent,
            actor=decision.claims.iss,
            ref=decision.claims.jti,
            agent_id=agent_id,
            request_id=decision.claims.request_id,
            task_id=request.task_id if request else None,
        )


def _envelope_id(reply: _Reply) -> str:
    return derived_id(CredentialDelivery.typ, reply.id)


def _decision_order(decision: Decision) -> tuple[str, int, int]:
    return decision.at.topic, decision.at.partition, decision.at.offset


# The issuer's outcome in the trace of a request.


def note_outcome(span: Span, outcome: Issue | Refusal) -> None:
    """Add to a tracing span whether the decision holds, and the reason if it does not."""
    if isinstance(outcome, Issue):
        span.note(**ids_of(outcome.lease))
    else:
        span.refused(*(reason.code for reason in outcome.reasons))
