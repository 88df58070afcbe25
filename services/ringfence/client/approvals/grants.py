"""Grants (approvals in advance) and reviews of break glass: signs a grant, lists uses of break glass, signs a review.

A grant is for a number of credentials of one agent, in one task, at one target, until a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringfence.client.admin.command_client import TIMEOUT_S, Accepted, CommandClient
from ringfence.client.admin.preview import unknown_names
from ringfence.client.arguments import find_by_prefix, permissions
from ringfence.client.connection import Connection, subject
from ringfence.client.errors import InvalidCallError, NotAnsweredError, RefusedError, StaleApprovalError
from ringfence.client.kafka_lookups import find_break_glass_use, request_of
from ringfence.client.passkeys.questions import PasskeyUser
from ringfence.client.reports.read_api import ReadApi
from ringfence.client.settings import ClientSettings
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.approval import MAX_GRANT_LIFE_S, BreakGlassReview, Grant, GrantWithdraw
from ringfence.messages.base import Permission, Scope
from ringfence.messages.codes import Code
from ringfence.messages.credential import Delivery, Reason
from ringfence.messages.registry import ApprovalClass
from ringfence.messages.topics import APPROVAL_RESPONSE
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.requests.approvals import may_approve
from ringfence.model.requests.facts import DeniedError, load_records
from ringfence.model.scope.rule import Limit, are_in_force, effective, limits_of
from ringfence.model.scope.scope import validate_scope

_LOOK_EVERY_S = 0.1


async def uses_of_break_glass(
    key: SigningKey | Path | str | None = None,
    settings: ClientSettings | None = None,
    *,
    unreviewed: bool = False,
) -> list[Any]:
    """The uses of break glass that this person may see, oldest first, each with its `review` or None.

    Raises ApiError if audit does not answer.
    """
    async with ReadApi(key, settings) as api:
        return await api.break_glass(unreviewed=unreviewed)


async def review_break_glass(
    request_id: str,
    note: str,
    key: SigningKey | Path | str | PasskeyUser | None = None,
    settings: ClientSettings | None = None,
    *,
    timeout_s: float = 15.0,
) -> Any:
    """Sign a review of one use, and wait until audit shows it. Returns the use with its review.

    A passkey cannot authenticate the read from audit. Then the returned use has no review, and the review counts once
    audit has it.

    Args:
        request_id: the id, or an id prefix of four characters or more, of the request that break glass allowed.
        note: the reviewer's findings.
        timeout_s: how long to wait for audit, in seconds.

    Raises:
        RefusedError: the reviewer took part in the use, or is neither operator nor auditor.
        InvalidCallError: there is no single such use, or it is reviewed already.
        NotAnsweredError: audit does not show the review in time. It is on Kafka and will count.
        ApiError, UnavailableError: audit or Kafka do not answer.
    """
    if isinstance(key, PasskeyUser):
        return await _review_with_passkey(request_id, note, key, settings)
    async with Connection(key, settings) as connection, ReadApi(connection.key, connection.settings) as api:
        subject(connection.key, "user", connection.settings)
        use = find_by_prefix(request_id, await api.break_glass(), lambda one: str(one["request_id"]))
        if use is None:
            raise InvalidCallError(
                f"no single use of break glass {request_id} that you may see; see: ringfence break-glass list"
            )
        if (before := use["review"]) is not None:
            raise InvalidCallError(f"request {use['request_id']} was reviewed already, by {before['by']}")
        review = connection.compose(
            BreakGlassReview,
            request_id=use["request_id"],
            decision_digest=use["decision_digest"],
            agent_id=use["agent"],
            note=note,
        )
        await connection.publish(APPROVAL_RESPONSE, review.agent_id, review)
        try:
            async with asyncio.timeout(timeout_s):
                return await _review_view(api, review)
        except TimeoutError:
            raise NotAnsweredError(
                f"audit has not shown the review within {timeout_s:g} s; see: ringfence break-glass list"
            ) from None


async def _review_with_passkey(
    request_id: str, note: str, key: PasskeyUser, settings: ClientSettings | None
) -> Any:
    async with Connection(key, settings) as connection:
        use = await find_break_glass_use(connection, request_id)
        agent_id = subject_of(connection.settings.trust_domain, request_of(use.claims).iss, "agent")
        review = connection.compose(
            BreakGlassReview,
            request_id=use.claims.request_id,
            decision_digest=use.digest,
            agent_id=agent_id or "",
            note=note,
        )
        signed = await connection.sign(review, {"decision": use.compact})
        await connection.publish(APPROVAL_RESPONSE, review.agent_id, signed.claims, compact=signed.compact)
        return {"request_id": review.request_id, "agent": review.agent_id, "review": None}


async def _review_view(api: ReadApi, review: BreakGlassReview) -> Any:
    while True:
        use = next(use for use in await api.break_glass() if use["request_id"] == review.request_id)
        if use["review"] is not None and use["review"]["id"] == review.jti:
            return use
        for refused in use["refused_reviews"]:
            if refused["id"] == review.jti:
                reason = Reason(code=Code.REVIEW_REFUSED, message=refused["why"])
                raise RefusedError(review.typ, (reason,), "audit")
        await asyncio.sleep(_LOOK_EVERY_S)


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
        delivery: Delivery | None = None,
        comment: str | None = None,
    ) -> Proposal:
        """Build the grant that `give` would sign, to be looked at. Nothing is sent.

        Args:
            scope: what each credential may allow, all at one target.
            delivery: to whom each credential goes: `agent` or `gateway`; None takes the target's delivery.
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
            delivery=delivery or ground.target.state.delivery,
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
