"""The approver's side of the SDK: see pending requests exactly as the agent signed them, and answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from ringfence.client.approvals.action_approvals import OpenActions, PendingAction, is_action
from ringfence.client.approvals.history_comparison import (
    DAYS,
    ApprovalHistory,
    PendingApproval,
    RequestGroup,
    group_equivalent,
    group_key,
)
from ringfence.client.arguments import Lifetime, describe_approvers, find_by_prefix
from ringfence.client.connection import Connection, subject
from ringfence.client.errors import NotYoursError, RefusedError, StaleApprovalError
from ringfence.client.passkeys.questions import PasskeyUser
from ringfence.client.settings import ClientSettings
from ringfence.client.signed_messages import APPROVED_TERMS
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.claims import MAX_LIFE_S
from ringfence.kernel.crypto.jws import Signed, parse, verify
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import Received
from ringfence.messages.approval import ActionApproval, ActionRequest, Approval, ApprovalRequest
from ringfence.messages.base import typ_header
from ringfence.messages.credential import (
    CredentialDecision,
    CredentialRequest,
)
from ringfence.messages.topics import APPROVAL_REQUEST, APPROVAL_RESPONSE, CREDENTIAL_DECISION
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.records.instances import keys_of_agents
from ringfence.model.requests.approvals import may_approve
from ringfence.model.requests.approver_keys import check_approver_key
from ringfence.model.requests.facts import DeniedError, RequestContext, load_context
from ringfence.model.verdict import ALLOWED, Allowed, Refused, Verdict

log = logging.getLogger(__name__)

APPROVAL_LIFE_S = 600
"""Seconds until an answer expires. Where several approvals are required, an answer lives as long as the question.
"""
LOOK_BACK_S = 24 * 3600
"""How far back open approvals are searched, in seconds."""


@dataclass(frozen=True, slots=True)
class _OpenQuestion:
    """One question. Several people may be asked it, each by a message of their own."""

    message: ApprovalRequest
    compact: str
    """The message as policy signed it."""
    appended_at_ms: int
    people: frozenset[str]
    traceparent: str | None = None


class Sponsor(Lifetime):
    """A person who approves, connected.

    ```python
    async with Sponsor.connect(key="maria.json") as maria:
        async for pending in maria.watch():
            print(pending.agent, pending.purpose, pending.scope)
            await maria.approve(pending)
    ```

    Common parameters:
        pending, group: what `pending`, `watch`, `groups` or `actions` gave.
        request_id: an id, or four of its first characters or more.
        comment: text for the agent and the audit trail.
        everyone: also what waits for others and this person may see.
    """

    def __init__(self, connection: Connection) -> None:
        """Use `connect`. Raises IdentityError if the connection's key is no user's."""
        self.id = subject(connection.key, "user", connection.settings)
        self.connection = connection
        self._directory: Directory | None = None
        self._actions: OpenActions | None = None
        self._questions: dict[str, _OpenQuestion] = {}
        self._answered: set[str] = set()
        self._problems: dict[str, str] = {}
        self._changed = asyncio.Event()
        self._histories: dict[str | None, ApprovalHistory] = {}
        self._histories_lock = asyncio.Lock()

    @classmethod
    def connect(
        cls,
        key: SigningKey | Path | str | PasskeyUser | None = None,
        settings: ClientSettings | None = None,
        *,
        clock: Clock | None = None,
    ) -> Self:
        """Return a sponsor, to be used as an async context manager. See `Agent.connect`."""
        return cls(Connection(key, settings, clock))

    async def start(self) -> None:
        """Connect and read the open requests. `async with` does it."""
        await self.connection.start()
        try:
            directory = self._directory = await self.connection.directory()
            self._actions = OpenActions(self.connection, directory, self.id)
            directory.on_change(lambda *_: self._notify())
            since_ms = max(self.connection.clock.now_ms() - LOOK_BACK_S * 1000, 1)
            await self.connection.follow([APPROVAL_REQUEST], self._on_requests, since_ms=since_ms)
            # Answers come after the question: answers before the oldest open question need not be read.
            open_since = [question.appended_at_ms for question in self._open()]
            open_since += [one.asked_at * 1000 for one in self._actions.pending(everyone=True)]
            await self.connection.follow(
                [CREDENTIAL_DECISION, APPROVAL_RESPONSE],
                self._on_answers,
                since_ms=min(open_since, default=self.connection.clock.now_ms() - 60_000),
            )
        except BaseException:
            await self.connection.close()
            raise

    async def close(self) -> None:
        """Disconnect. `async with` does it."""
        await self.connection.close()

    # --- asking ---

    def pending(self, *, everyone: bool = False) -> list[PendingApproval]:
        """The requests that wait for this person now, oldest first.

        `everyone`: also those that this person has no part in, for an overview.
        """
        shown = []
        for question in sorted(self._open(), key=lambda question: question.appended_at_ms):
            pending = self._show(question)
            if pending and (everyone or pending.mine or self.id in question.people):
                shown.append(pending)
        return shown

    async def watch(self, *, everyone: bool = False) -> AsyncIterator[PendingApproval]:
        """Yield each request that waits for this person, once, the ones open now first. Never ends."""
        seen: set[tuple[str, str]] = set()
        while True:
            changed = self._changed
            for pending in self.pending(everyone=everyone):
                # A question that was repeated on other revisions is a new one for the person.
                key = (pending.request_id, pending.revisions.model_dump_json())
                if key not in seen:
                    seen.add(key)
                    yield pending
            await changed.wait()

    def groups(self, *, everyone: bool = False) -> list[RequestGroup]:
        """`pending`, with equivalent requests grouped."""
        return group_equivalent(self.pending(everyone=everyone))

    def alike(self, pending: PendingApproval) -> tuple[PendingApproval, ...]:
        """All pending requests equivalent to this one, itself included, oldest first."""
        return tuple(
            one
            for one in self.pending(everyone=True)
            if one.request_id == pending.request_id or group_key(one) == group_key(pending)
        ) or (pending,)

    async def usual(self, agent: str | None = None) -> ApprovalHistory:
        """Return people's answers of the last 30 days, for comparison.

        They are read on first use, then kept up to date.

        With `agent` only the partition with the answers about that agent is read.
        """
        async with self._histories_lock:
            if agent not in self._histories:
                history = ApprovalHistory(self._require_directory(), self.connection.settings.trust_domain)
                since_ms = max(self.connection.clock.now_ms() - DAYS * 86_400_000, 1)
                await self.connection.follow(
                    [APPROVAL_RESPONSE], history.on_records, since_ms=since_ms, key=agent
                )
                self._histories[agent] = history
        return self._histories[agent]

    def find(self, request_id: str) -> PendingApproval | None:
        """The open request with this id or unique id prefix (four characters or more); None if there is none."""
        return find_by_prefix(request_id, self.pending(everyone=True), lambda one: one.request_id)

    @property
    def unshowable(self) -> dict[str, str]:
        """By request id, why a question is not shown: it does not match what an agent signed."""
        return {**self._problems, **self._require_actions().problems}

    # --- single actions, through a gateway ---

    def actions(self, *, everyone: bool = False) -> list[PendingAction]:
        """The actions that wait for this person now, oldest first; with `everyone` also those of others."""
        return self._require_actions().pending(everyone=everyone)

    async def watch_actions(self, *, everyone: bool = False) -> AsyncIterator[PendingAction]:
        """Yield each action that waits for this person, once, the ones open now first. Never ends."""
        seen: set[str] = set()
        while True:
            changed = self._changed
            for pending in self.actions(everyone=everyone):
                if pending.digest not in seen:
                    seen.add(pending.digest)
                    yield pending
            await changed.wait()

    def find_action(self, request_id: str) -> PendingAction | None:
        """The open action with this id or unique id prefix (four characters or more); None if there is none."""
        return find_by_prefix(request_id, self.actions(everyone=True), lambda one: one.request_id)

    async def approve_action(self, pending: PendingAction, comment: str | None = None) -> str:
        """Sign an approval of exactly this action, once. Returns the approval's id once Kafka holds it.

        Raises StaleApprovalError if the action is no longer open or changed since it was shown, and NotYoursError.
        """
        return await self._answer_action(pending, "approved", comment)

    async def deny_action(self, pending: PendingAction, comment: str | None = None) -> str:
        """Sign a denial. See `approve_action`."""
        return await self._answer_action(pending, "denied", comment)

    async def _answer_action(
        self, pending: PendingAction, verdict: Literal["approved", "denied"], comment: str | None
    ) -> str:
        now = self._require_actions().get(pending.digest)
        if now != pending:
            reason = self._require_actions().problems.get(
                pending.request_id, "it was answered or its time is over"
            )
            raise StaleApprovalError(
                f"action {pending.request_id} is no longer open as it was shown: {reason}"
            )
        if not pending.mine:
            raise NotYoursError(
                f"action {pending.request_id} needs {describe_approvers((pending.required,))}, not {self.id}"
            )
        answer = self.connection.compose(
            ActionApproval,
            life_s=APPROVAL_LIFE_S,
            until=pending.expires_at,
            verdict=verdict,
            agent_id=pending.agent,
            request=pending.request,
            request_digest=pending.digest,
            comment=comment,
        )
        signed = await self.connection.sign(answer)
        by_key = self._require_actions().check_key(signed, self.connection.clock.now_ms())
        if isinstance(by_key, Refused):
            raise RefusedError(ActionApproval.typ, (by_key.reason,), "client")
        await self.connection.publish(APPROVAL_RESPONSE, pending.agent, signed.claims, compact=signed.compact)
        self._require_actions().answered(pending.digest)
        self._notify()
        return message_id(signed.claims.iss, signed.claims.jti)

    def _require_actions(self) -> OpenActions:
        if self._actions is None:
            raise RuntimeError("not connected: use Sponsor as an async context manager")
        return self._actions

    # --- answering ---

    async def approve(self, pending: PendingApproval, comment: str | None = None) -> str:
        """Sign an approval of exactly this request, on these terms. Returns the approval's id once Kafka holds it.

        Raises StaleApprovalError if records changed since `pending` was shown, or it is no longer open. Raises
        NotYoursError if this person may give none of the approvals that it needs. Raises RefusedError if the key does
        not count: somebody else added it recently, or the target demands another kind. Nothing is sent then.
        """
        return await self._answer(pending, "approved", comment)

    async def deny(self, pending: PendingApproval, comment: str | None = None) -> str:
        """Sign a denial. See `approve`."""
        return await self._answer(pending, "denied", comment)

    async def approve_all(self, group: RequestGroup, comment: str | None = None) -> list[str]:
        """Sign an approval of each request of a group, as it was shown, and of no other. Returns the approvals' ids.

        Raises StaleApprovalError or NotYoursError, before anything is sent, if a request changed since it was shown.
        """
        return await self._answer_all(group, "approved", comment)

    async def deny_all(self, group: RequestGroup, comment: str | None = None) -> list[str]:
        """Sign a denial of each request. See `approve_all`."""
        return await self._answer_all(group, "denied", comment)

    async def _answer_all(
        self, group: RequestGroup, verdict: Literal["approved", "denied"], comment: str | None
    ) -> list[str]:
        for pending in group.requests:
            self._check(pending)
        return [await self._answer(pending, verdict, comment) for pending in group.requests]

    async def _answer(
        self, pending: PendingApproval, verdict: Literal["approved", "denied"], comment: str | None
    ) -> str:
        self._check(pending)
        approval = self.connection.compose(
            Approval,
            life_s=APPROVAL_LIFE_S if len(pending.required) == 1 else MAX_LIFE_S,
            until=pending.expires_at,
            verdict=verdict,
            request_digest=pending.digest,
            comment=comment,
            **{name: getattr(pending, name) for name in APPROVED_TERMS},
        )
        question = self._questions.get(pending.request_id)
        signed = await self.connection.sign(approval, {"question": question.compact} if question else {})
        by_key = self._check_key(signed, self.connection.clock.now_ms())
        if isinstance(by_key, Refused):
            raise RefusedError(Approval.typ, (by_key.reason,), "client")
        await self.connection.publish(
            APPROVAL_RESPONSE,
            pending.agent,
            signed.claims,
            compact=signed.compact,
            traceparent=question.traceparent if question else None,
        )
        self._answered.add(pending.request_id)
        self._notify()
        return message_id(signed.claims.iss, signed.claims.jti)

    def _check(self, pending: PendingApproval) -> None:
        """Raise StaleApprovalError if a request is no longer open, or changed since it was shown; and NotYoursError."""
        question = self._questions.get(pending.request_id)
        over = question is None or question.message.expires_at <= self.connection.clock.now_ms() // 1000
        if question is None or over or pending.request_id in self._answered:
            raise StaleApprovalError(
                f"request {pending.request_id} is no longer open: it was answered or withdrawn, or its time is over"
            )
        now = self._show(question)
        if now is None:
            raise StaleApprovalError(
                f"request {pending.request_id}: {self._problems.get(pending.request_id)}; look at it again"
            )
        if (now.revisions, now.ttl_s, now.delivery) != (pending.revisions, pending.ttl_s, pending.delivery):
            raise StaleApprovalError(
                "agent, user, task, target, policy or terms changed since this was shown; look at it again"
            )
        if not now.mine:
            raise NotYoursError(
                f"request {pending.request_id} needs {describe_approvers(now.required)}, "
                f"and {self.id} can give nothing of that"
            )

    # --- open questions ---

    def _open(self) -> list[_OpenQuestion]:
        now_s = self.connection.clock.now_ms() / 1000
        return [
            question
            for id, question in self._questions.items()
            if id not in self._answered and question.message.expires_at > now_s
        ]

    def _show(self, item: _OpenQuestion) -> PendingApproval | None:
        question = item.message
        try:
            facts = self._facts(question, item.appended_at_ms)
            mine = tuple(
                c for c in question.required if may_approve(self._require_directory(), self.id, c, facts)
            )
        except (InvalidMessageError, DeniedError, ChainError) as error:
            if self._problems.get(question.request_id) != str(error):
                self._problems[question.request_id] = str(error)
                log.warning("the approval asked for request %s is not shown: %s", question.request_id, error)
            return None
        self._problems.pop(question.request_id, None)
        request = facts.request.claims
        return PendingApproval(
            request_id=facts.request_id,
            digest=facts.request.digest,
            agent=facts.agent.state.agent_id,
            agent_description=facts.agent.state.description,
            sponsor=facts.agent.state.sponsor,
            task_id=facts.task.state.task_id,
            purpose=facts.task.state.purpose,
            on_behalf_of=facts.task.state.on_behalf_of,
            target=facts.target.state.target_id,
            target_description=facts.target.state.description,
            scope=request.scope,
            reason=request.reason,
            requested_ttl_s=request.ttl_s,
            requested_at=request.iat,
            ttl_s=question.ttl_s,
            delivery=facts.delivery,
            required=question.required,
            mine=mine,
            expires_at=question.expires_at,
            revisions=facts.revisions(question.revisions.policy),
            why_asked=question.reasons,
            request=question.request,
            break_glass=facts.break_glass,
            delegators=facts.act[1:],
        )

    def _facts(self, question: ApprovalRequest, at_ms: int) -> RequestContext:
        """Load the context of a question: the request as the agent signed it, and the verified records.

        Raises InvalidMessageError if the question contradicts them.
        """
        directory = self._require_directory()
        jws = parse(question.request)
        request = verify(
            jws,
            CredentialRequest,
            keys_of_agents(directory, jws, CredentialRequest, at_ms / 1000),
            audience=self.connection.settings.trust_domain,
        )
        jws.check_one_reading()
        claims = request.claims
        if message_id(claims.iss, claims.jti) != question.request_id:
            raise InvalidMessageError("it names another request than the one that it embeds")
        facts = load_context(directory, request)
        if facts.revisions(question.revisions.policy) != question.revisions:
            raise InvalidMessageError(
                "agent, user, task or target changed since it was asked, or the change has not arrived here yet"
            )
        if question.ttl_s > claims.ttl_s or question.delivery != facts.delivery:
            raise InvalidMessageError("its terms go beyond what the agent asked for")
        return facts

    def _require_directory(self) -> Directory:
        if self._directory is None:
            raise RuntimeError("not connected: use Sponsor as an async context manager")
        return self._directory

    # --- incoming records ---

    def _on_requests(self, records: Sequence[Received]) -> None:
        for record in records:
            if is_action(record, ActionRequest):
                self._on_action(record)
                continue
            find = self.connection.trust.finder("policy", at_s=record.appended_at_ms / 1000)
            audience = self.connection.settings.trust_domain
            try:
                signed = verify(parse(record.value), ApprovalRequest, find, audience=audience)
            except InvalidMessageError as error:
                log.warning("ignored an approval request at %d: %s", record.offset, error)
                continue
            question = signed.claims
            before = self._questions.get(question.request_id)
            if before is not None and question.iat < before.message.iat:
                continue  # an earlier version of the question, sent again by somebody
            people = (before.people if before else frozenset()) | {question.approver}
            self._questions[question.request_id] = _OpenQuestion(
                question, signed.compact, record.appended_at_ms, people, record.traceparent
            )
        self._forget_expired()
        self._notify()

    def _on_action(self, record: Received) -> None:
        try:
            self._require_actions().on_request(record)
        except InvalidMessageError as error:
            log.warning("ignored a question about an action at %d: %s", record.offset, error)

    def _on_answers(self, records: Sequence[Received]) -> None:
        for record in records:
            try:
                if record.topic is CREDENTIAL_DECISION:
                    self._on_decision(record)
                elif is_action(record, ActionApproval):
                    self._require_actions().on_answer(record)
                else:
                    self._on_response(record)
            except (InvalidMessageError, ChainError) as error:
                log.warning("ignored %s at %d: %s", record.topic_name, record.offset, error)
        self._notify()

    def _on_decision(self, record: Received) -> None:
        jws = parse(record.value)
        unverified = jws.unverified_claims(CredentialDecision)
        if unverified.outcome == "approval_required" or unverified.request_id not in self._questions:
            return  # skipped before its signature costs anything; skipping trusts nothing
        find = self.connection.trust.finder("policy", at_s=record.appended_at_ms / 1000)
        decision = verify(
            jws, CredentialDecision, find, audience=self.connection.settings.trust_domain
        ).claims
        self._answered.add(decision.request_id)

    def _on_response(self, record: Received) -> None:
        jws = parse(record.value)
        if jws.header.typ != typ_header(Approval):
            return  # grants and reviews: policy reports their effects
        if jws.unverified_claims(Approval).iss != self.connection.key.id:
            return  # skipped before its signature costs anything; skipping trusts nothing
        directory = self._require_directory()
        approval = verify(
            jws,
            Approval,
            lambda iss, kid: directory.user_key(iss, kid, record.appended_at_ms / 1000),
            audience=self.connection.settings.trust_domain,
        )
        # A yes by a key that does not count is none: the question must not vanish from the list of who can answer it.
        if isinstance(self._check_key(approval, record.appended_at_ms), Allowed):
            self._answered.add(approval.claims.request_id)

    def _check_key(self, approval: Signed[Approval], at_ms: int) -> Verdict:
        """Check that the key of a yes counts for an open question at `at_ms`. A no counts by any key."""
        open_question = self._questions.get(approval.claims.request_id)
        if approval.claims.verdict == "denied" or open_question is None:
            return ALLOWED
        directory, compact = self._require_directory(), open_question.message.request
        request = Signed(
            parse(compact).unverified_claims(CredentialRequest), compact
        )  # shown only once verified
        try:
            facts = load_context(directory, request)
        except DeniedError:
            return ALLOWED
        return check_approver_key(approval, directory, facts, facts.verbs, at_ms=at_ms)

    def _notify(self) -> None:
        """Wake every watcher; each takes the next event before it looks, so none misses a change."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _forget_expired(self) -> None:
        now_s = self.connection.clock.now_ms() / 1000
        for id in [id for id, question in self._questions.items() if question.message.expires_at <= now_s]:
            del self._questions[id]
            self._answered.discard(id)
            self._problems.pop(id, None)
