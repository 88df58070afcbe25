"""Events of sign-ins: a service says once when it begins to answer a console for somebody.

A console has no right to say anything of itself. So each service that takes session statements records them, and
whoever took over a console reads nowhere unnoticed. Only the browser knows of a sign-out.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.crypto.jws import Signed
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.registry import SessionStatement

log = logging.getLogger(__name__)

_MOST: Final = 20_000
"""Sessions that a process remembers to have reported. A repeated report is the same event."""


class SessionEvents:
    """Publishes a `service.event` for each session statement that this process sees for the first time."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._told: BoundedDict[str, None] = BoundedDict(_MOST)
        self._tasks: set[asyncio.Task[None]] = set()

    def __call__(self, statement: Signed[SessionStatement]) -> None:
        """Note a verified statement, by which somebody reads here now."""
        if statement.digest in self._told:
            return
        self._told[statement.digest] = None
        task = asyncio.get_running_loop().create_task(self._tell(statement))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self, statement: Signed[SessionStatement]) -> None:
        said = statement.claims
        try:
            await self._runtime.event(
                "accepted",
                SessionStatement.typ,
                about=(statement.digest,),
                actor=said.iss,
                ref=said.jti,
                at_ms=said.iat * 1000,  # of the sign-in: then a repeat says the same
            )
        except RingfenceError as error:
            self._told.pop(statement.digest, None)  # the next call tells it
            log.warning("a sign-in could not be told yet: %s", error, extra=rate_limited("session"))
