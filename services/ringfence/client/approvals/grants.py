"""Grants: approvals in advance, for a number of credentials of one agent, in one task, at one target, until a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ringfence.client.admin.command_client import TIMEOUT_S, Accepted, CommandClient
from ringfence.client.admin.preview import unknown_names
from ringfence.client.arguments import permissions
from ringfence.client.connection import Connection
from ringfence.client.errors import InvalidCallError, StaleApprovalError
from ringfence.client.reports.read_api import ReadApi
from ringfence.kernel.base.ids import message_id
from ringfence.messages.approval import MAX_GRANT_LIFE_S, Grant, GrantWithdraw
from ringfence.messages.credential import Delivery
from ringfence.messages.permission import Permission, Scope
from ringfence.messages.registry import ApprovalClass
from ringfence.model.requests.approvals import may_approve
from ringfence.model.requests.facts import DeniedError, load_records
from ringfence.model.scope.rule import Limit, are_in_force, effective, limits_of
from ringfence.model.scope.scope import validate_scope

_CLASSES: tuple[ApprovalClass, ...] = ("sponsor", "second_person", "operator")


@dataclass(frozen=True, slots=True)
class Proposal:
    """A grant as it would be signed, with its effect according to verified records."""

    grant: Grant
    agent_description: str
    purpose: str
    """The purpose of the task."""
    on_behalf_of: str
    target_description: str
    effective: Scope
    """The part of its scope that task, ceiling and entitlements allow now. Nothing beyond is ever issued."""
    mine: tuple[ApprovalClass, ...]
    """The approval classes that its signer can give. Empty: the grant would have no effect."""


class Grantor(CommandClient):
    """A person who approves in advance, connected.

    ```python
    async with Grantor.connect(key="sam.json") as sam:
        proposal = await sam.propose(task_id, scope, count=5, lasts_s=7200)
        accepted = await sam.give(proposal)
        await sam.withdraw(accepted.result, reason="the release is off")
    ```

    Common parameters:
        task_id, grant_id: an id.
        comment, reason: text for people and the audit trail.
        timeout_s: how long to wait for each answer, in seconds.
    """

    def __init__(self, connection: Connection, *, timeout_s: float = TIMEOUT_S) -> None:
        """Use `connect`."""
        super().__init__(connection, timeout_s=timeout_s)
        self._api = ReadApi(connection.key, connection.settings, clock=connection.clock)

    async def close(self) -> None:
        """Disconnect. `async with` does it."""
        await self._api.close()
        await super().close()

    async def propose(
        self,
        task_id: str,
        scope: Sequence[Permission],
        *,
        count: int,
        lasts_s: int,
        ttl_s: int | None = None,
        delivery: Delivery = "agent",
        comment: str | None = None,
    ) -> Proposal:
        """Build the grant that `give` would sign, to be looked at. Nothing is sent.

        Args:
            scope: what each credential may allow, all at one target.
            delivery: to whom each credential goes: `agent` or `gateway`.
            count: the number of credentials.
            lasts_s: for how many seconds from now, but never past the end of the task.
            ttl_s: how long each credential may live, in seconds; None takes the target's maximum.

        Raises InvalidCallError, ScopeError; ApiError if policy does not say which bundle is in force.
        """
        scope = permissions("scope", scope)
        validate_scope(scope)
        targets = {permission.target for permission in scope}
        if len(targets) != 1:
            raise InvalidCallError("a grant is for one target; give one for each")
        if lasts_s > MAX_GRANT_LIFE_S:
            raise InvalidCallError(
                f"a grant lasts {MAX_GRANT_LIFE_S // 3600} h at most; give another one then"
            )
        directory = await self.connection.directory()
        task = directory.task(task_id)
        if task is None:
            raise InvalidCallError(f"there is no task {task_id}; see: ringfence task list")
        try:
            ground = load_records(directory, task.state.agent_id, task_id, targets.pop())
        except DeniedError as error:
            raise InvalidCallError(str(error)) from None
        if unknown := unknown_names(directory, scope):
            raise InvalidCallError("; ".join(unknown))
        revision = await self._policy_revision()
        grant = self.connection.compose(
            Grant,
            life_s=lasts_s,
            until=task.state.not_after,
            agent_id=task.state.agent_id,
            task_id=task_id,
            scope=scope,
            count=count,
            ttl_s=ttl_s or ground.target.state.max_ttl_s,
            delivery=delivery,
            revisions=ground.revisions(revision),
            comment=comment,
        )
        if grant.exp <= grant.iat:
            raise InvalidCallError(f"task {task_id} has ended; nothing is issued in it any more")
        entitlements = ground.user.state.entitlements
        fresh = are_in_force(entitlements, grant.iat, self.connection.settings.entitlements_max_age_s)
        ceiling = (grant.agent_id, ground.agent.state.ceiling)
        entitled = entitlements.scope if fresh else ()
        sides = limits_of(task.state.scope, [ceiling], task.state.on_behalf_of, entitled)
        return Proposal(
            grant=grant,
            agent_description=ground.agent.state.description,
            purpose=task.state.purpose,
            on_behalf_of=task.state.on_behalf_of,
            target_description=ground.target.state.description,
            effective=effective((Limit("grant", grant.scope), *sides)),
            mine=tuple(one for one in _CLASSES if may_approve(directory, self.id, one, ground)),
        )

    async def give(self, proposal: Proposal) -> Accepted:
        """Sign and send `proposal`, which `propose` returned. The `result` of the returned answer is the grant's id.

        Raises RefusedError with policy's reasons, NotAnsweredError; StaleApprovalError if records changed since.
        """
        grant = proposal.grant
        directory = await self.connection.directory()
        try:
            ground = load_records(directory, grant.agent_id, grant.task_id, grant.scope[0].target)
        except DeniedError as error:
            raise StaleApprovalError(str(error)) from None
        if ground.revisions(grant.revisions.policy) != grant.revisions:
            raise StaleApprovalError(
                "agent, user, task or target changed since this was shown; look at it again"
            )
        return await self._send(grant, grant.agent_id)

    async def withdraw(self, grant_id: str, *, reason: str) -> Accepted:
        """Withdraw a grant: nothing more is issued on it. Credentials already issued stay valid until `revoke` ends
        them.

        Raises RefusedError, NotAnsweredError; ApiError if policy knows no such grant that this person may see.
        """
        grant_id, agent_id = await self._grant(grant_id)
        return await self._send(
            self.connection.compose(GrantWithdraw, grant_id=grant_id, reason=reason), agent_id
        )

    async def grants(self) -> list[dict[str, Any]]:
        """All grants that this person may see, as policy knows them, by their end."""
        return await self._api.grants()

    async def _policy_revision(self) -> str:
        if self.connection.passkey_user is None:
            return str((await self._api.get("policy", "bundle"))["revision"])
        from ringfence.client.kafka_lookups import policy_revision

        return await policy_revision(self.connection)

    async def _grant(self, grant_id: str) -> tuple[str, str]:
        """The whole id of a grant, and the agent that it is for."""
        if self.connection.passkey_user is None:
            grant: dict[str, Any] = await self._api.get("policy", "grants", grant_id)
            return grant["grant_id"], grant["agent_id"]
        from ringfence.client.kafka_lookups import find_grant

        found = await find_grant(self.connection, grant_id)
        return message_id(found.iss, found.jti), found.agent_id
