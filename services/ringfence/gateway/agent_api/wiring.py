"""Wiring of the HTTP API for agents."""

from __future__ import annotations

import time
from typing import Final

from ringfence.gateway.agent_api.api import AgentRequestsApi
from ringfence.gateway.agent_api.posted_messages import PostedMessageVerifier
from ringfence.gateway.agent_api.publications import PublicationJournal
from ringfence.gateway.agent_api.publications import Publications
from ringfence.gateway.agent_api.replies import SealedReplies, WaitingRequests
from ringfence.gateway.dataplane.limits import Allowance, SenderLimits
from ringfence.gateway.decision.sender import AgentKeys
from ringfence.gateway.settings import GatewaySettings
from ringfence.gateway.wiring import Core, spool_folder
from ringfence.kernel.service.runtime import Runtime

POSTS: Final = Allowance(per_second_each=20.0, burst_each=100)
"""Posts of one agent. Twice the rate that policy decides by default: policy refuses first, and says why."""
WAITING_PER_AGENT: Final = 32
_CONNECTIONS_SHARE: Final = 2
"""One of this many connections of an address or socket may wait for a reply, so that others behind it find one."""
_JOURNAL: Final = "publications.jsonl"
"""In the folder of the spool, which one process uses at a time."""
_WAITING_SHARE: Final = 4
"""One of this many connections may wait for a reply."""


def build_agent_api(runtime: Runtime, core: Core, own: GatewaySettings) -> AgentRequestsApi:
    """Build the API. The history of `credential.reply` feeds it."""
    clock, directory, settings = runtime.clock, core.view.directory, runtime.settings
    replies = SealedReplies()
    core.reply_readers.append(replies.on_records)
    verifier = PostedMessageVerifier(
        directory,
        audience=settings.trust_domain,
        now_ms=runtime.broker_now_ms,
        catch_up=lambda: runtime.tables_caught_up(settings.grace_s),
    )
    journal = PublicationJournal(
        spool_folder(runtime, settings, own) / _JOURNAL, now_s=lambda: clock.now_ms() // 1000
    )
    publications = Publications(runtime.publisher, is_answered=replies.has, journal=journal)
    runtime.on_stop(publications.close)
    return AgentRequestsApi(
        directory,
        core.view.table,
        runtime.trust,
        verifier,
        publications,
        replies,
        AgentKeys(directory),
        core.proofs,
        SenderLimits(POSTS, time.monotonic),
        WaitingRequests(
            per_agent=WAITING_PER_AGENT,
            per_sender=Allowance().connections_each // _CONNECTIONS_SHARE,
            in_total=max(1, own.connections // _WAITING_SHARE),
        ),
        clock,
    )
