"""Handler of grants and withdrawals: verifies them, keeps them, and reports to those concerned."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

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
from ringfence.model.requests.approver_keys import approver_key_problem
from ringfence.model.requests.facts import DeniedError, load_records
from ringfence.model.requests.grants import (
    MOST_OF_ONE,
    GrantTable,
    id_of,
    kind_of,
    not_understood,
    signer_of,
)
from ringfence.model.scope.globs import ScopeError
from ringfence.model.scope.scope import validate_scope
from ringfence.policy.incoming.admission import MessageVerifier


class GrantHandler:
    """Processes grants and withdrawals. Each is answered by a `service.event`."""

    def __init__(
        self,
        runtime: Runtime,
        directory: Directory,
        verifier: MessageVerifier,
        table: GrantTable,
        policy_revision: Callable[[], str],
        records: Callable[[int], Awaitable[None]],
        reconsider: Callable[[Grant, int], Awaitable[None]],
    ) -> None:
        """Args:
            policy_revision: returns the revision of the bundle in force.
            records: returns when the records are known that were on Kafka at an append time.
            reconsider: evaluates waiting requests again after a grant was given (at an append time).
        """  # fmt: skip
        self._runtime = runtime
        self._directory = directory
        self._verifier = verifier
        self._table = table
        self._policy_revision = policy_revision
        self._records = records
        self._reconsider = reconsider

    async def handle(self, record: Received) -> None:
        """Process one record. Raises InvalidMessageError if it is neither, or if nobody known signed it."""
        if kind_of(record) == Grant.typ:
            await self._grant(record)
        else:
            await self._withdraw(record)

    async def _grant(self, record: Received) -> None:
        grant, late = await self._verifier.grant(record)
        # The person may have seen records that have not arrived here yet.
        await self._records(record.appended_at_ms)
        reason = self._objection(grant, late, record)
        if reason is None:
            entry = self._table.keep(grant, record.partition, record.offset, record.appended_at_ms)
            if entry is None:
                message = f"{grant.claims.iss} has given {MOST_OF_ONE} grants already; let some end"
                reason = Reason(code=Code.GRANTS_TOO_MANY, message=message)
            elif (entry.partition, entry.offset) != (record.partition, record.offset):
                reason = Reason(
                    code=Code.GRANT_REPLAYED,
                    message="this grant was given before; given again it counts for nothing more",
                )
        if reason is None:  # whoever reads the acceptance sees its effects on waiting requests
            await self._reconsider(grant.claims, record.appended_at_ms)
        await self._answer(grant.claims, reason, record)

    def _objection(self, signed: Signed[Grant], late: ExpiredError | None, record: Received) -> Reason | None:
        """Return the reason why a grant would have no effect now, or None. Its signer learns it at once."""
        grant = signed.claims
        user_id = signer_of(grant)
        if user_id is None:
            return Reason(code=Code.NOT_A_PERSON, message=f"{grant.iss} is no user; only people approve")
        if record.key != grant.agent_id:
            return Reason(
                code=Code.KEY_UNEXPECTED,
                message=f"the Kafka key of a grant is the agent's id, {grant.agent_id}",
            )
        if late is not None:
            return Reason(code=late.code, message=str(late))
        if (unread := not_understood(grant)) is not None:
            return unread
        if grant.exp - grant.iat > MAX_GRANT_LIFE_S:
            return Reason(
                code=Code.GRANT_TOO_LONG, message=f"a grant lives {MAX_GRANT_LIFE_S // 3600} h at most"
            )
        targets = {permission.target for permission in grant.scope}
        if len(targets) != 1:
            return Reason(code=Code.SEVERAL_TARGETS, message="a grant is for one target; give one for each")
        try:
            validate_scope(grant.scope)
            ground = load_records(self._directory, grant.agent_id, grant.task_id, targets.pop())
        except ScopeError as error:
            return Reason(code=Code.SCOPE_INVALID, message=str(error))
        except DeniedError as error:
            return error.reason
        if ground.task.state.agent_id != grant.agent_id:
            return Reason(
                code=Code.TASK_OTHER_AGENT, message=f"task {grant.task_id} was assigned to another agent"
            )
        if not any(
            may_approve(self._directory, user_id, one, ground)
            for one in ("sponsor", "second_person", "operator")
        ):
            return Reason(
                code=Code.NOT_APPROVER,
                message=f"{user_id} can approve nothing of agent {grant.agent_id} in this task",
            )
        verbs = {verb for permission in grant.scope for verb in permission.verbs}
        found = approver_key_problem(signed, self._directory, ground, verbs, at_ms=record.appended_at_ms)
        if found is not None:
            return found.reason
        if grant.revisions != ground.revisions(self._policy_revision()):
            return Reason(
                code=Code.GRANT_STALE,
                message="agent, user, task, target or policy changed before the grant came here; sign it anew",
            )
        return None

    async def _withdraw(self, record: Received) -> None:
        signed, late = await self._verifier.withdrawal(record)
        claims = signed.claims
        if late is None and self._withdrawal_objection(claims) is not None:
            # Nobody is refused for a record that has not arrived here yet.
            await self._records(record.appended_at_ms)
        reason = Reason(code=late.code, message=str(late)) if late else self._withdrawal_objection(claims)
        if reason is None:
            user_id = subject_of(claims.aud, claims.iss, "user") or ""
            self._table.take_back(claims.grant_id, user_id, record.appended_at_ms)
        await self._answer(claims, reason, record)

    def _withdrawal_objection(self, claims: GrantWithdraw) -> Reason | None:
        """Return the reason why a person cannot withdraw a grant, or None."""
        entry = self._table.get(claims.grant_id)
        user_id = subject_of(claims.aud, claims.iss, "user")
        if entry is None:
            return Reason(
                code=Code.GRANT_UNKNOWN,
                message="no grant with this id is remembered: it may have ended long ago",
            )
        grant = entry.signed.claims
        try:
            ground = load_records(self._directory, grant.agent_id, grant.task_id, grant.scope[0].target)
        except DeniedError as error:
            return error.reason
        concerned = {signer_of(grant), ground.agent.state.sponsor, ground.task.state.on_behalf_of}
        if user_id is None or user_id not in concerned:
            return Reason(
                code=Code.NOT_CONCERNED,
                message=f"{claims.iss} neither signed the grant, nor sponsors the agent, "
                "nor is whom the task is on behalf of; "
                "an operator may end the task or suspend the agent",
            )
        return None

    async def _answer(self, claims: Grant | GrantWithdraw, why: Reason | None, record: Received) -> None:
        grant_id = id_of(claims) if isinstance(claims, Grant) else claims.grant_id
        entry = self._table.get(grant_id)
        grant = claims if isinstance(claims, Grant) else entry.signed.claims if entry else None
        replayed = why is not None and why.code == Code.GRANT_REPLAYED
        await self._runtime.event(
            "accepted" if why is None else "replayed" if replayed else "refused",
            claims.typ,
            about=(record.topic_name, record.partition, record.offset),
            actor=claims.iss,
            ref=claims.jti,
            reasons=(why,) if why else (),
            result=grant_id,
            source=record.coordinates,
            traceparent=record.traceparent,
            agent_id=grant.agent_id if grant else None,
            task_id=grant.task_id if grant else None,
        )
