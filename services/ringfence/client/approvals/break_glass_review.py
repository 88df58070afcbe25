"""The reviewer's side of break glass: list its uses, and sign a review of one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from ringfence.client.connection import Connection, subject
from ringfence.client.errors import InvalidCallError, NotAnsweredError, RefusedError
from ringfence.client.arguments import find_by_prefix
from ringfence.client.kafka_lookups import find_break_glass_use, request_of
from ringfence.client.passkeys.questions import PasskeyUser
from ringfence.client.reports.read_api import ReadApi
from ringfence.client.settings import ClientSettings
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.approval import BreakGlassReview
from ringfence.messages.credential import Reason
from ringfence.messages.topics import APPROVAL_RESPONSE
from ringfence.model.identity.spiffe_ids import subject_of

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
                reason = Reason(code="review_refused", message=refused["why"])
                raise RefusedError(review.typ, (reason,), "audit")
        await asyncio.sleep(_LOOK_EVERY_S)
