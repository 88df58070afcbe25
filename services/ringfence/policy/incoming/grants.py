"""Handler of grants and withdrawals: verifies them, keeps them, and reports to those concerned."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ringfence.kernel.crypto.claims import ExpiredError
from ringfence.kernel.crypto.jws import Signed
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.approval import MAX_GRANT_LIFE_S, Grant, GrantWithdraw
from ringfence.messages.codes import Code
from ringfence.messages.credential import Reason
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.records.directory import Directory
from ringfence.model.requests.approvals import may_approve
from ringfence.model.requests.approver_keys import check_approver_key
from ringfence.model.requests.facts import DeniedError, load_records
from ringfence.model.requests.grants import (
    MOST_OF_ONE,
    GrantTable,
    check_understood,
    id_of,
    kind_of,
    signer_of,
)
from ringfence.model.scope.globs import ScopeError
from ringfence.model.scope.scope import validate_scope
from ringfence.model.verdict import ALLOWED, Allowed, Refused, Verdict, refused
from ringfence.policy.incoming.admission import MessageVerifier


@dataclass(slots=True, eq=False)
class GrantHandler:
    """Processes grants and withdrawals. Each is answered by a `service.event`."""

    runtime: Runtime
    directory: Directory
    verifier: MessageVerifier
    table: GrantTable
    policy_revision: Callable[[], str]
    """Returns the revision of the bundle in force."""
    records: Callable[[int], Awaitable[None]]
    """Returns when the records are known that were on Kafka at an append time."""
    reconsider: Callable[[Grant, int], Awaitable[None]]
    """Evaluates waiting requests again after a grant was given (at an append time)."""

    async def handle(self, record: Received) -> None:
        """Process one record. Raises InvalidMessageError if it is neither, or if nobody known signed it."""
        if kind_of(record) == Grant.typ:
            await self._grant(record)
        else:
            await self._withdraw(record)

    async def _grant(self, record: Received) -> None:
        grant, late = await self.verifier.grant(record)
        # The person may have seen records that have not arrived here yet.
        await self.records(record.appended_at_ms)
        verdict = self._check_grant(grant, late, record)
        if isinstance(verdict, Allowed):
            verdict = self._keep(grant, record)
        if isinstance(verdict, Allowed):  # whoever reads the acceptance sees its effects on waiting requests
            await self.reconsider(grant.claims, record.appended_at_ms)
        await self._answer(grant.claims, verdict, record)

    def _keep(self, grant: Signed[Grant], record: Received) -> Verdict:
        """Keep a grant, unless its signer gave too many, or it was given before elsewhere."""
        entry = self.table.keep(grant, record.partition, record.offset, record.appended_at_ms)
        if entry is None:
            message = f"{grant.claims.iss} has given {MOST_OF_ONE} grants already; let some end"
            return refused(Code.GRANTS_TOO_MANY, message)
        if (entry.partition, entry.offset) != (record.partition, record.offset):
            return refused(
                Code.GRANT_REPLAYED, "this grant was given before; given again it counts for nothing more"
            )
        return ALLOWED

    def _check_grant(self, signed: Signed[Grant], late: ExpiredError | None, record: Received) -> Verdict:
        """Check that a grant would have an effect now. Its signer learns at once if it has none.

        1. A user signed it.
        2. Its Kafka key is the agent's id.
        3. It reached Kafka in time.
        4. It has no field that is unknown here, and lives no longer than a grant may.
        5. Its scope is valid and for one target, and the records of agent, task and target are there.
        6. The task is the agent's.
        7. The signer can approve something of the agent in this task, and with this key.
        8. No record that it was given on has changed since.
        """
        grant = signed.claims
        user_id = signer_of(grant)
        if user_id is None:
            return refused(Code.NOT_A_PERSON, f"{grant.iss} is no user; only people approve")
        if record.key != grant.agent_id:
            return refused(
                Code.KEY_UNEXPECTED, f"the Kafka key of a grant is the agent's id, {grant.agent_id}"
            )
        if late is not None:
            return refused(late.code, str(late))
        understood = check_understood(grant)
        if isinstance(understood, Refused):
            return understood
        if grant.exp - grant.iat > MAX_GRANT_LIFE_S:
            return refused(Code.GRANT_TOO_LONG, f"a grant lives {MAX_GRANT_LIFE_S // 3600} h at most")
        targets = {permission.target for permission in grant.scope}
        if len(targets) != 1:
            return refused(Code.SEVERAL_TARGETS, "a grant is for one target; give one for each")
        try:
            validate_scope(grant.scope)
            ground = load_records(self.directory, grant.agent_id, grant.task_id, targets.pop())
        except ScopeError as error:
            return Refused(Reason(code=Code.SCOPE_INVALID, message=str(error)))
        except DeniedError as error:
            return Refused(error.reason)
        if ground.task.state.agent_id != grant.agent_id:
            return refused(Code.TASK_OTHER_AGENT, f"task {grant.task_id} was assigned to another agent")
        if not any(
            may_approve(self.directory, user_id, one, ground)
            for one in ("sponsor", "second_person", "operator")
        ):
            return refused(
                Code.NOT_APPROVER, f"{user_id} can approve nothing of agent {grant.agent_id} in this task"
            )
        verbs = {verb for permission in grant.scope for verb in permission.verbs}
        by_key = check_approver_key(signed, self.directory, ground, verbs, at_ms=record.appended_at_ms)
        if isinstance(by_key, Refused):
            return by_key
        if grant.revisions != ground.revisions(self.policy_revision()):
            return refused(
                Code.GRANT_STALE,
                "agent, user, task, target or policy changed before the grant came here; sign it anew",
            )
        return ALLOWED

    async def _withdraw(self, record: Received) -> None:
        signed, late = await self.verifier.withdrawal(record)
        claims = signed.claims
        if late is None and isinstance(self._check_withdrawal(claims), Refused):
            # Nobody is refused for a record that has not arrived here yet.
            await self.records(record.appended_at_ms)
        verdict = refused(late.code, str(late)) if late else self._check_withdrawal(claims)
        if isinstance(verdict, Allowed):
            user_id = subject_of(claims.aud, claims.iss, "user") or ""
            self.table.take_back(claims.grant_id, user_id, record.appended_at_ms)
        await self._answer(claims, verdict, record)

    def _check_withdrawal(self, claims: GrantWithdraw) -> Verdict:
        """Check that a person may withdraw a grant.

        1. The grant is remembered here.
        2. The records that it is about are there.
        3. The person signed it, sponsors the agent, or is whom the task is on behalf of.
        """
        entry = self.table.get(claims.grant_id)
        user_id = subject_of(claims.aud, claims.iss, "user")
        if entry is None:
            return refused(
                Code.GRANT_UNKNOWN, "no grant with this id is remembered: it may have ended long ago"
            )
        grant = entry.signed.claims
        try:
            ground = load_records(self.directory, grant.agent_id, grant.task_id, grant.scope[0].target)
        except DeniedError as error:
            return Refused(error.reason)
        concerned = {signer_of(grant), ground.agent.state.sponsor, ground.task.state.on_behalf_of}
        if user_id is None or user_id not in concerned:
            return refused(
                Code.NOT_CONCERNED,
                f"{claims.iss} neither signed the grant, nor sponsors the agent, "
                "nor is whom the task is on behalf of; "
                "an operator may end the task or suspend the agent",
            )
        return ALLOWED

    async def _answer(self, claims: Grant | GrantWithdraw, verdict: Verdict, record: Received) -> None:
        grant_id = id_of(claims) if isinstance(claims, Grant) else claims.grant_id
        entry = self.table.get(grant_id)
        grant = claims if isinstance(claims, Grant) else entry.signed.claims if entry else None
        reasons = (verdict.reason,) if isinstance(verdict, Refused) else ()
        replayed = any(reason.code == Code.GRANT_REPLAYED for reason in reasons)
        await self.runtime.event(
            "replayed" if replayed else "refused" if reasons else "accepted",
            claims.typ,
            about=(record.topic_name, record.partition, record.offset),
            actor=claims.iss,
            ref=claims.jti,
            reasons=reasons,
            result=grant_id,
            source=record.coordinates,
            traceparent=record.traceparent,
            agent_id=grant.agent_id if grant else None,
            task_id=grant.task_id if grant else None,
        )
