"""The audit service, whose writer of the chain stops between what it has sent of a batch and its commit.

python -m tests.support.slow_writer SENT GO: it makes the file SENT when it has sent, and goes on when GO exists.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

from ringfence.audit.app import build
from ringfence.audit.trail.chain_writer import ChainWriter
from ringfence.kernel.base.settings import ServiceSettings, load
from ringfence.kernel.kafka.producer import TransactionalPublisher
from ringfence.kernel.service.process import run


def main(sent: Path, go: Path) -> int:
    settings = load(ServiceSettings)
    chain = ChainWriter._chain

    async def slow(self: ChainWriter, publisher: TransactionalPublisher, events: Any) -> None:
        await chain(self, publisher, events)
        sent.touch()
        while not go.exists():
            await asyncio.sleep(0.02)

    ChainWriter._chain = slow  # type: ignore[method-assign]
    return run([build(settings)], settings)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
