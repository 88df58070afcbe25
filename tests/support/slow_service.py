"""A service whose work on one record takes as long as the test wants: it says when it begins, and when it is done.

python -m tests.support.slow_service SECONDS
"""

from __future__ import annotations

import asyncio
import sys

from ringfence.kernel.base.settings import ServiceSettings, load
from ringfence.kernel.kafka.faststream_adapter import ConsumerGroup, GroupRouter
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.process import run
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.topics import CREDENTIAL_REQUEST

GROUP = "issuer-slow"


def main(work_s: float) -> int:
    settings = load(ServiceSettings)
    runtime = Runtime("issuer", settings)

    async def handle(record: Received) -> None:
        await runtime.event("finding", "began", about=(record.offset,))
        await asyncio.sleep(work_s)
        await runtime.event("finding", "done", about=(record.offset,))

    router = GroupRouter()
    group = ConsumerGroup(GROUP, runtime.dead_letters)
    router.subscriber(CREDENTIAL_REQUEST, group=group, order="sequential")(handle)
    runtime.consume(router)
    return run([runtime], settings)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))
