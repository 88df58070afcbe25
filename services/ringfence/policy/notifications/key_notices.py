"""Webhook notices of added keys: a person who is given a key by somebody else can end it before it counts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.model.lifecycle import WAIT_S
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.policy.notifications.notices import Notice, Notices
from ringfence.policy.notifications.webhook import body_of_key


def key_notice_sender(
    runtime: Runtime, directory: Directory, notices: Notices
) -> Callable[[Received], Awaitable[None]]:
    """Return a handler of `user` records, which sends a notice of each key that was added in the last 24 hours, first
    keys too.
    """

    async def tell(record: Received) -> None:
        user_id = record.key or ""
        await runtime.tables_caught_up(runtime.settings.grace_s)
        try:
            history = directory.key_history(user_id)
        except ChainError:
            return  # a record that counts for nothing adds no key
        now_ms = runtime.clock.now_ms()
        for origin in history.origins.values():
            id = derived_id("key.added", user_id, origin.kid, origin.added_ms)
            ends_ms = origin.added_ms + WAIT_S * 1000
            if ends_ms <= now_ms or not notices.wants(user_id, id):
                continue
            notices.deliver(
                Notice(
                    id,
                    user_id,
                    f"key {origin.kid}",
                    ends_ms // 1000,
                    lambda: True,
                    partial(body_of_key, user_id, origin),
                )
            )

    return tell
