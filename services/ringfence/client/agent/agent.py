"""The agent's side of the SDK: request a credential, use it, release it."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ringfence.client.admin.command_client import Accepted, CommandOutcomes
from ringfence.client.agent.credentials import IssuedCredential
from ringfence.client.agent.http_connection import HttpConnection, process_id
from ringfence.client.agent.key_renewal import KeyRenewal
from ringfence.client.agent.replies import (
    AllowedByPolicy,
    Answer,
    Denied,
    PendingRequest,
    SentRequest,
    read_reply,
)
from ringfence.client.arguments import Lifetime, describe_approvers, permissions, texts
from ringfence.client.connection import Connection, Coordinate, subject
from ringfence.client.errors import (
    IdentityError,
    InvalidCallError,
    RequestDeniedError,
    RequestTimeoutError,
    checked,
)
from ringfence.client.instance_enrolment import (
    Attested,
    EnrolledInstanceKey,
    RunInstance,
    TokenSource,
    source_of,
)
from ringfence.client.settings import ClientSettings, load_settings
from ringfence.client.signed_messages import task_terms
from ringfence.client.task_view import TaskView
from ringfence.kernel.base.clock import Clock, SystemClock
from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError
from ringfence.kernel.crypto.jwe import ReplyKey, unverified_kid
from ringfence.kernel.crypto.jws import Signed, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.tracing.api import Work, new_traceparent
from ringfence.messages.base import Permission
from ringfence.messages.credential import MAX_REQUEST_BYTES, CredentialRequest, Delivery, RequestWithdraw
from ringfence.messages.lease import RevocationRequest
from ringfence.messages.registry import AgentRenewKey, ModelLimits, TaskDelegate, TaskEnd
from ringfence.messages.topics import (
    CREDENTIAL_REQUEST,
    REVOCATION_REQUEST,
)
from ringfence.model.scope.scope import validate_scope

log = logging.getLogger(__name__)


COMMAND_TIMEOUT_S = 15.0
_MAX_ABANDONED = 1000
_WITHDRAW_TIMEOUT_S = 5.0
"""How long to try to withdraw a request that was given up; `Agent.close` waits no longer for it."""

OnPending = Callable[[PendingRequest], Awaitable[None] | None]
"""Called once when approvals are waited for. May be a coroutine function."""


@dataclass(slots=True)
class _OpenRequest:
    sent: SentRequest
    answers: asyncio.Queue[Answer] = field(default_factory=asyncio.Queue)
    at: Coordinate | None = None
    ignored: str | None = None
    """Why the last reply that did not verify was ignored."""
    abandoned: bool = False
    """The caller gave up waiting: a credential that still arrives is released."""


def _connection(
    key: SigningKey | Path | str | None,
    settings: ClientSettings,
    clock: Clock,
    attested: EnrolledInstanceKey | None = None,
) -> Connection:
    """By a gateway's HTTP API if `RINGFENCE_DOOR` says where, else by Kafka."""
    if settings.door is not None:
        return HttpConnection(settings.door, key, settings, clock, attested=attested)
    return Connection(key, settings, clock, attested=attested)


class Agent(Lifetime):
    """An agent's identity, connected. One reply listener serves any number of concurrent requests.

    Where the key came from a file, the agent renews it there when it is older than a day. If another key of the same
    agent replaces the file, that key signs from then on; see also `use_key`. A credential that was requested with the
    old key is still presented with the old key.

    ```python
    async with Agent.connect(key="deploy-bot.json") as agent:
        async with agent.credential(
            task=task_id, target="staging", verbs=["deploy"], resources=["env/staging/web"], reason="release 41"
        ) as credential:
            await http.post(url, auth=credential.apply())
    ```
    """

    def __init__(self, connection: Connection) -> None:
        """Use `connect`. Raises IdentityError if the connection's key is no agent's."""
        self.id = subject(connection.key, "agent", connection.settings)
        self.connection = connection
        self._outcomes = CommandOutcomes(connection)
        self._open_requests: dict[str, _OpenRequest] = {}
        self._renewal: KeyRenewal | None = None
        self._farewells: set[asyncio.Task[None]] = set()
        """Releases and withdrawals under way, of what nobody waits for any more."""

    @classmethod
    def connect(
        cls,
        key: SigningKey | Path | str | None = None,
        settings: ClientSettings | None = None,
        *,
        attest: TokenSource | str | None = None,
        agent_id: str | None = None,
        clock: Clock | None = None,
    ) -> Self:
        """Return an agent, to be entered: `async with Agent.connect(...) as agent`.

        Args:
            key: the agent's key, or the path of its file; None takes `RINGFENCE_RUN_INSTANCE`, which is set in a run of
                `ringfence run`, or else `RINGFENCE_IDENTITY`.
            settings: where to connect to; None reads `RINGFENCE_*` and the settings file. With `RINGFENCE_DOOR` the
                agent uses a gateway's HTTP API and needs no Kafka; `delegate`, `end_delegated`, and `release` with a
                timeout raise InvalidCallError then.
            attest: where the platform's identity token comes from, instead of a key: a `TokenSource`, or `file:PATH`,
                `github` or `gcp`. None takes `RINGFENCE_ATTEST` where no key is given.
            agent_id: with `attest`, the agent that this process is an instance of; None takes `RINGFENCE_AGENT`.
            clock: the time; None takes the clock of this machine.

        Raises:
            SettingsError, IdentityError, KeyFileError, InvalidCallError; on entering, UnavailableError, and with
            `attest` TokenSourceError and EnrolmentRefusedError.
        """
        settings, clock = load_settings(settings), clock or SystemClock()
        run_folder = settings.run_instance if key is None and attest is None else None
        attest = attest or (settings.attest if key is None else None)
        if attest is None and run_folder is None:
            return cls(_connection(key, settings, clock))
        if key is not None:
            raise InvalidCallError("an instance enrols a key of its own: give a key or attest, and not both")
        if not (agent_id := agent_id or settings.agent):
            raise IdentityError("say which agent this is an instance of: agent_id, or RINGFENCE_AGENT")
        if run_folder is not None:
            if attest is not None:
                raise InvalidCallError(
                    "RINGFENCE_RUN_INSTANCE and RINGFENCE_ATTEST each say where the key is from: unset one of them"
                )
            run = RunInstance(agent_id, run_folder, settings, clock)
            return cls(_connection(None, settings, clock, run))
        assert attest is not None
        source = source_of(attest) if isinstance(attest, str) else attest
        attested = Attested(agent_id, source, settings, clock, key_file=settings.attest_key_file)
        return cls(_connection(None, settings, clock, attested))

    async def start(self) -> None:
        """Connect and start to listen for replies. `async with` does it."""
        await self.connection.start()
        try:
            await self.connection.listen_for_replies(self.id, self._on_replies)
            await self._renew_key()
        except BaseException:
            await self.connection.close()
            raise

    async def close(self) -> None:
        """Withdraw requests that were given up, release credentials that came too late, then disconnect.

        `async with` does it.
        """
        await asyncio.gather(*self._farewells, return_exceptions=True)
        await self.connection.close()

    async def _renew_key(self) -> None:
        """Sign with the present key of the file or the instance from now on. Renew either where it is due."""
        path = self.connection.key_path
        if path is not None:
            if self._renewal is None or self._renewal.path != path:
                self._renewal = KeyRenewal(path, self.connection.clock)
            await self._renewal.run(self._send_renewal)
        self.connection.renew_key()
        await self.connection.renew()

    async def _send_renewal(self, old: SigningKey, new: SigningKey) -> int:
        claims = self.connection.compose(AgentRenewKey, agent_id=self.id, key=new.public)
        signed = Signed(claims, sign(claims, old))
        if isinstance(self.connection, HttpConnection):
            return await self.connection.renew_agent_key(signed, old)
        accepted = await self._outcomes.send(signed, timeout_s=COMMAND_TIMEOUT_S)
        return int(accepted.result or 0)

    def use_key(self, key: SigningKey | Path | str) -> None:
        """Sign with another key of this agent from now on, one registered by `ringfence agent rotate-key`.

        Credentials already held stay bound to the key they were requested with. Raises IdentityError, KeyFileError.
        """
        self.connection.use_key(key)

    async def request(
        self,
        *,
        task: str,
        target: str,
        verbs: Sequence[str],
        resources: Sequence[str],
        reason: str,
        ttl_s: int = 300,
        timeout_s: float | None = 60.0,
        on_pending: OnPending | None = None,
        break_glass: bool = False,
        delivery: Delivery | None = None,
    ) -> IssuedCredential:
        """Request one credential and wait for it.

        Args:
            task: the id of the task that it is for.
            target: the target's id; `verbs` and `resources` (globs) are what is needed there.
            reason: why, in a sentence that an approver will read.
            ttl_s: how long it is needed, in seconds.
            timeout_s: how long to wait for the final answer, approvals included; None waits without limit.
            on_pending: called once when a person has to approve.
            break_glass: policy denies the request, and two operators are asked to allow it once, for 15 minutes at
                most.
            delivery: with `gateway` the gateway injects the credential: the agent gets a `GatewayCredential`, a handle
                and no secret. None takes the target's delivery. Where that is `gateway`, `agent` is denied
                (`delivery_gateway_only`).

        Raises:
            RequestDeniedError: with every reason of policy or issuer.
            RefusedError: over HTTP alone, a gateway refused the message. Over Kafka it counts for nothing, and the call
                times out.
            RequestTimeoutError: saying what was missing. The request is withdrawn: people are asked about it no more. A
                credential that arrives later is released. Both hold for a cancelled call as well.
            InvalidCallError, ScopeError: the arguments make no request; nothing was sent.
            UnavailableError: Kafka, or the gateway, did not take the request.
        """
        verbs, resources = texts("verbs", verbs), texts("resources", resources)
        with checked("the permission"):
            permission = Permission(target=target, verbs=verbs, resources=resources)
        return await self.request_scope(
            task=task,
            scope=[permission],
            reason=reason,
            ttl_s=ttl_s,
            timeout_s=timeout_s,
            on_pending=on_pending,
            break_glass=break_glass,
            delivery=delivery,
        )

    async def request_scope(
        self,
        *,
        task: str,
        scope: Sequence[Permission],
        reason: str,
        ttl_s: int = 300,
        timeout_s: float | None = 60.0,
        on_pending: OnPending | None = None,
        break_glass: bool = False,
        delivery: Delivery | None = None,
    ) -> IssuedCredential:
        """Like `request`, with several permissions at one target: different verbs on different resources.

        `scope`: the permissions, in place of target, verbs and resources.
        """
        scope = permissions("scope", scope)
        await self._renew_key()
        facts = {"agent_id": self.id, "task_id": task}
        with self.connection.tracing.step("request credential", Work(None, facts)) as span:
            open_request = self._prepare(
                span.traceparent or new_traceparent(),
                task_id=task,
                scope=scope,
                ttl_s=ttl_s,
                delivery=delivery,
                reason=reason,
                break_glass=True if break_glass else None,
            )
            span.note(request_id=open_request.sent.request_id)
            return await self._answer_to(open_request, timeout_s, on_pending)

    async def _answer_to(
        self, open_request: _OpenRequest, timeout_s: float | None, on_pending: OnPending | None
    ) -> IssuedCredential:
        sent = open_request.sent
        self._open_requests[sent.request_id] = open_request
        self.connection.expect_replies(sent.request_id, sent.key or self.connection.key)
        answered = notified = False
        withdrawable = True
        phase = "policy's decision"
        limit = asyncio.timeout(timeout_s)
        try:
            async with limit:
                try:
                    open_request.at = await self.connection.publish(
                        CREDENTIAL_REQUEST,
                        self.id,
                        sent.claims,
                        compact=sent.compact,
                        traceparent=sent.traceparent,
                    )
                except RingfenceError:
                    withdrawable = False  # nothing was sent, or Kafka is away
                    raise
                while True:
                    match await open_request.answers.get():
                        case IssuedCredential() as credential:
                            answered = True
                            return credential
                        case Denied() as denied:
                            answered = True
                            raise RequestDeniedError(
                                denied.request_id,
                                denied.reasons,
                                denied.by,
                                retry_after_s=denied.retry_after_s,
                            )
                        case PendingRequest() as pending:
                            phase = f"the approval of {describe_approvers(pending.required)}"
                            if on_pending and not notified:
                                notified = True
                                result = on_pending(pending)
                                if inspect.isawaitable(result):
                                    await result
                        case AllowedByPolicy():
                            withdrawable = False
                            phase = "the issuer, after policy allowed it"
        except TimeoutError:
            if not limit.expired():
                raise  # the caller's own, out of `on_pending`
            raise RequestTimeoutError(
                sent.request_id, phase, timeout_s or 0.0, self._hint(open_request)
            ) from None
        finally:
            if answered:
                self._forget(sent.request_id)
            else:
                self._abandon(open_request)
                if withdrawable:
                    self._in_background(self._withdraw_quietly(sent))

    @asynccontextmanager
    async def credential(
        self,
        *,
        task: str,
        target: str,
        verbs: Sequence[str],
        resources: Sequence[str],
        reason: str,
        ttl_s: int = 300,
        timeout_s: float | None = 60.0,
        on_pending: OnPending | None = None,
        break_glass: bool = False,
        delivery: Delivery | None = None,
    ) -> AsyncIterator[IssuedCredential]:
        """Like `request`, as a context manager.

        The credential is wiped and released at the end of the block, also after an error.
        """
        credential = await self.request(
            task=task, target=target, verbs=verbs, resources=resources, reason=reason, ttl_s=ttl_s,
            timeout_s=timeout_s, on_pending=on_pending, break_glass=break_glass, delivery=delivery,
        )  # fmt: skip
        try:
            yield credential
        finally:
            credential.wipe()
            await self._release_quietly(credential)

    async def release(
        self,
        credential: IssuedCredential | str,
        *,
        reason: str = "no longer needed",
        timeout_s: float | None = None,
    ) -> None:
        """Release a credential before its deadline.

        Args:
            credential: what `request` returned, or its lease id.
            reason: why, in a sentence. It stands in the audit trail.
            timeout_s: how many seconds to wait for the revoker's signed answer. None returns once Kafka holds the
                release, which is durable then.

        Raises:
            RefusedError, NotAnsweredError: from the revoker, where its answer is waited for.
            UnavailableError: Kafka did not take the release.
        """
        lease_id = credential if isinstance(credential, str) else credential.lease_id
        await self._renew_key()
        claims = self.connection.compose(
            RevocationRequest,
            kind="release",
            lease_id=lease_id,
            reason=reason,
            enrolment=self.connection.enrolment,
        )
        traceparent = None if isinstance(credential, str) else credential.traceparent
        if timeout_s is None:
            await self.connection.publish(REVOCATION_REQUEST, self.id, claims, traceparent=traceparent)
        else:
            await self._outcomes.send(claims, key=self.id, timeout_s=timeout_s, traceparent=traceparent)

    async def task(self, task: str) -> TaskView:
        """Look at one of this agent's own tasks (by its id): what it allows, until when, and its leases at the gateway.

        With `RINGFENCE_DOOR` the gateway answers. Otherwise the record is read from Kafka and verified; the agent's
        Kafka user needs Read on the topics of records then.

        Raises:
            RefusedError: there is no such task of this agent.
            UnavailableError: the gateway, or Kafka, does not answer.
        """
        return await self.connection.task(self.id, task)

    async def delegate(
        self,
        *,
        task: str,
        to: str,
        purpose: str,
        scope: Sequence[Permission],
        ends_in_s: int | None = None,
        until: int | None = None,
        limits: ModelLimits | None = None,
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> str:
        """Hand part of a task to another agent. Returns the id of its task, which ends with this one at the latest.

        Args:
            task: the id of this agent's own task.
            to: the other agent's id. What it may do is within this agent's ceiling, and within its own.
            purpose: what for, in a sentence that approvers will read.
            scope: no wider than that of `task`.
            ends_in_s, until: when it ends, in seconds from now, or since 1970; one of them.
            limits: of what it uses of models. What it uses is used of `task`, too.

        Raises:
            RefusedError: by the registry, with the reason. NotAnsweredError: it gave no word within `timeout_s`.
            InvalidCallError, ScopeError: nothing was sent. UnavailableError: Kafka did not take it.
        """
        if (ends_in_s is None) == (until is None):
            raise InvalidCallError("say when the task ends: ends_in_s or until")
        now_s = self.connection.clock.now_ms() // 1000
        terms = task_terms(to, purpose, scope, now_s, ends_in_s=ends_in_s, not_after=until, limits=limits)
        await self._renew_key()
        claims = self.connection.compose(TaskDelegate, parent=task, terms=terms)
        return (await self._outcomes.send(claims, timeout_s=timeout_s)).command_id

    async def end_delegated(
        self, task: str, *, reason: str, timeout_s: float = COMMAND_TIMEOUT_S
    ) -> Accepted:
        """End a task that this agent delegated, or one delegated further from it. The leases held under it end.

        Args:
            task: the id of the delegated task.
            reason: why, in a sentence. It stands in the audit trail.
            timeout_s: how many seconds to wait for the registry's signed answer.

        Raises as `delegate` does.
        """
        await self._renew_key()
        claims = self.connection.compose(TaskEnd, task_id=task, reason=reason)
        return await self._outcomes.send(claims, timeout_s=timeout_s)

    def _prepare(self, traceparent: str, *, scope: tuple[Permission, ...], **fields: Any) -> _OpenRequest:
        """`fields`: further fields of the `CredentialRequest`."""
        validate_scope(scope)
        self.connection.renew_key()
        reply_key = ReplyKey()
        claims = self.connection.compose(
            CredentialRequest,
            **fields,
            scope=scope,
            reply_key=reply_key.public,
            process=process_id(),
            enrolment=self.connection.enrolment,
        )
        key = self.connection.key
        compact = sign(claims, key)
        if len(compact) > MAX_REQUEST_BYTES:
            raise InvalidCallError(
                f"the request has {len(compact)} bytes, and policy weighs no more than {MAX_REQUEST_BYTES}: name fewer "
                "resources, or what they have in common"
            )
        return _OpenRequest(SentRequest(claims, compact, reply_key, traceparent, key, self.connection.clock))

    def _abandon(self, open_request: _OpenRequest) -> None:
        open_request.abandoned = True
        abandoned = [id for id, one in self._open_requests.items() if one.abandoned]
        for id in abandoned[:-_MAX_ABANDONED]:
            self._forget(id)

    def _forget(self, request_id: str) -> None:
        self._open_requests.pop(request_id, None)
        self.connection.forget_replies(request_id)

    def _hint(self, open_request: _OpenRequest) -> str:
        if letter := self.connection.dead_letters.reason(open_request.at):
            return letter
        if open_request.ignored:
            return f"a reply was ignored: {open_request.ignored}"
        return ""

    def _on_replies(self, records: Sequence[Received]) -> None:
        for record in records:
            # Unverified: it only selects the request whose key to try; decryption proves the rest.
            open_request = self._open_requests.get(unverified_kid(record.value) or "")
            if open_request is None:
                continue
            try:
                answer = read_reply(
                    record.value, open_request.sent, self.connection.trust, record.appended_at_ms
                )
            except InvalidMessageError as error:
                open_request.ignored = str(error)
                log.warning("ignored a reply at %s@%d: %s", record.topic_name, record.offset, error)
                continue
            if open_request.abandoned:
                self._on_late_answer(open_request, answer)
            else:
                open_request.answers.put_nowait(answer)

    def _on_late_answer(self, open_request: _OpenRequest, answer: Answer) -> None:
        if isinstance(answer, IssuedCredential):
            log.info("lease %s came after its request had timed out; it is given back", answer.lease_id)
            self._in_background(self._release_quietly(answer))
        if isinstance(answer, IssuedCredential | Denied):
            self._forget(open_request.sent.request_id)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._farewells.add(task)
        task.add_done_callback(self._farewells.discard)

    async def _withdraw_quietly(self, sent: SentRequest) -> None:
        """Withdraw a request that was given up, so that nobody is asked about it any more; only log a failure.

        The idempotent producer keeps the order: the withdrawal stands after its request, even an unacknowledged one.
        """
        try:
            async with asyncio.timeout(_WITHDRAW_TIMEOUT_S):
                self.connection.renew_key()
                await self.connection.renew()
                claims = self.connection.compose(
                    RequestWithdraw, request_id=sent.request_id, enrolment=self.connection.enrolment
                )
                await self.connection.publish(
                    CREDENTIAL_REQUEST, self.id, claims, traceparent=sent.traceparent
                )
        except (RingfenceError, TimeoutError) as error:
            log.warning(
                "request %s was given up and not withdrawn: %s", sent.request_id, str(error) or "timeout"
            )

    async def _release_quietly(self, credential: IssuedCredential) -> None:
        """Release, and only log a failure.

        The lease ends at its deadline anyway, and an exception here would hide the caller's own.
        """
        try:
            await self.release(credential)
        except RingfenceError as error:
            log.warning("lease %s was not released and ends at its deadline: %s", credential.lease_id, error)
