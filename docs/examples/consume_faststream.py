"""Prints audit events, questions, leases and actions as lines of JSON, each at least once, by FastStream.

RINGFENCE_CONFIG=.ringfence/ringfence.toml python docs/examples/consume_faststream.py
"""

import asyncio
import json
import logging

from faststream import FastStream

from ringfence.faststream import (
    ActionDecided,
    ActionRequest,
    ApprovalRequest,
    AuditEvent,
    Lease,
    RingfenceRouter,
    UnknownMessage,
)

router = RingfenceRouter()
audit = router.audit_events(group="ringfence.siem.faststream")
questions = router.questions(group="pager")
leases = router.leases(group="platform-leases")
actions = router.actions(group="platform-actions")


def show(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


@audit("credential.*")
async def on_credential(event: AuditEvent) -> None:
    show(event=event.metadata["event_code"], lease=event.unmapped.get("lease"), message=event.message)


@questions(ApprovalRequest)
async def on_approval_request(question: ApprovalRequest) -> None:
    show(question="request", id=question.request_id, by=question.iss)


@questions(ActionRequest)
async def on_action_request(question: ActionRequest) -> None:
    show(question="action", id=question.jti, by=question.iss, method=question.method)


@leases(Lease)
async def on_lease(lease: Lease) -> None:
    show(lease=lease.lease_id, status=lease.status, agent=lease.agent_id)


@actions(ActionDecided)
async def on_action(action: ActionDecided) -> None:
    show(action=action.action_id, agent=action.agent_id, target=action.target_id)


@questions(UnknownMessage)
@leases(UnknownMessage)
async def on_unknown(message: UnknownMessage) -> None:
    show(unknown=message.code, topic=message.topic, offset=message.offset)


logging.basicConfig(level=logging.INFO)  # to stderr; FastStream's own logger writes to stdout
log = logging.getLogger("consumer")
app = FastStream(router.broker(logger=log), lifespan=router.lifespan, logger=log)

if __name__ == "__main__":
    asyncio.run(app.run())
