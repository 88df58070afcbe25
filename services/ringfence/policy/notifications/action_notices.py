"""Sponsors are told of single actions that wait: from what a gateway signed and from verified records. Hints alone."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.jws import ExpiredError, parse, verify
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.approval import ActionRequest, ApprovalRequest
from ringfence.messages.base import typ_header
from ringfence.model.records.directory import Directory
from ringfence.model.requests.facts import DeniedError, find_ground
from ringfence.policy.notifications.notices import Notice, Notices
from ringfence.policy.notifications.webhook import body_of_action


def teller(runtime: Runtime, directory: Directory, notices: Notices) -> Callable[[Received], Awaitable[None]]:
    """A handler of `approval.request`: what policy itself asks is told where it is asked, and passed over here."""

    async def tell(record: Received) -> None:
        """Raises InvalidMessageError where no gateway signed it."""
        jws = parse(record.value)
        if jws.header.typ == typ_header(ApprovalRequest):
            return
        find = runtime.trust.finder(*ActionRequest.signed_by, at_s=record.appended_at_ms / 1000)
        audience = runtime.settings.trust_domain
        try:
            claims = verify(
                jws, ActionRequest, find,
                audience=audience, appended_at_ms=record.appended_at_ms,
            ).claims  # fmt: skip
            ground = find_ground(directory, claims.agent_id, claims.task_id, claims.target_id)
        except (ExpiredError, DeniedError):
            return  # nobody could answer it
        id, sponsor = message_id(claims.iss, claims.jti), ground.agent.state.sponsor
        over = claims.exp * 1000 <= runtime.clock.now_ms()
        if over or not notices.wants(sponsor, id):
            return
        notices.deliver(
            Notice(
                id,
                sponsor,
                f"action {id}",
                claims.exp,
                lambda: True,
                lambda: body_of_action(id, claims, ground),
            )
        )

    return tell
