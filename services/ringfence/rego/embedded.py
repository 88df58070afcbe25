"""The embedded engine: regorus, compiled once, in a worker process of the service."""

from __future__ import annotations

import asyncio
import logging

from ringfence.rego.bundle import Bundle, BundleError
from ringfence.rego.engine import (
    ISSUANCE,
    Answer,
    PolicyFailedError,
    PolicyUnavailableError,
    read_result,
)
from ringfence.rego.worker_client import Worker, WorkerLostError, start_worker

log = logging.getLogger(__name__)

TIMEOUT_MS = 1000
_TRIES = 5
"""So many workers may be lost over the inputs of others before an input is given up."""


class EmbeddedEngine:
    """A `PolicyEngine` without a server. A new worker replaces one that was killed."""

    def __init__(self, bundle: Bundle, *, timeout_ms: int = TIMEOUT_MS, entry_point: str = ISSUANCE) -> None:
        """Nothing is evaluated before `start`. `timeout_ms` is what one evaluation may take."""
        self._bundle = bundle
        self._timeout_s = timeout_ms / 1000
        self._entry_point = entry_point
        self._worker: Worker | None = None
        self._replacing = asyncio.Lock()

    @property
    def revision(self) -> str:
        return self._bundle.revision

    async def start(self) -> None:
        await self.use(self._bundle)

    async def use(self, bundle: Bundle) -> None:
        worker = await start_worker(bundle, self._entry_point, self._timeout_s)
        async with self._replacing:
            before, self._worker, self._bundle = self._worker, worker, bundle
        if before is not None:
            await before.retire()

    async def evaluate(self, input_json: bytes) -> Answer:
        for _ in range(_TRIES):
            worker = self._worker
            if worker is None or not worker.alive:
                worker = await self._replaced()
            try:
                answer = await worker.ask(input_json)
            except WorkerLostError:
                continue
            if answer[:1] != b"+":
                raise PolicyFailedError(
                    f"the policy bundle could not be evaluated: {answer[1:].decode(errors='replace')}"
                )
            return Answer(read_result(answer[1:]), worker.revision)
        raise PolicyUnavailableError("the policy engine was lost again and again over other requests")

    async def close(self) -> None:
        if self._worker is not None:
            await self._worker.end()

    async def _replaced(self) -> Worker:
        """The worker that takes the place of a lost one: the first who notices starts it."""
        async with self._replacing:
            if self._worker is None or not self._worker.alive:
                log.error("the policy worker was lost; a new one is started")
                if self._worker is not None:
                    await self._worker.end()
                try:
                    self._worker = await start_worker(self._bundle, self._entry_point, self._timeout_s)
                except BundleError as error:  # it was fit before: the machine is out of something
                    raise PolicyUnavailableError(str(error)) from None
            return self._worker
