"""Takes three waits out of the start and the stop of services in this process, in which flows spent half their time.

The embedded broker answers a JoinGroup after 300 ms, or after the member's rebalance timeout if that is shorter. Here
the only member of a group in this process joins with a short one. The broker then leaves the protocol out of its
answer, and the member's own is put in. Further members join as usual: their rebalances are the broker's.

uvicorn looks every 100 ms whether it should stop, and then waits another 100 ms.

Policy starts a process for each entry point of its bundle, compiles the bundle there and tests it. Here the next
service with the same bundle takes over the processes of one that has stopped.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import uvicorn.server
from aiokafka.client import AIOKafkaClient

from ringfence.rego import embedded
from ringfence.rego.bundle import Bundle

_JOIN, _LEAVE = 11, 13
"""API keys of the Kafka protocol."""
_REBALANCE_TIMEOUT_MS = 10
_UVICORN_HURRY = 10
"""How much more often uvicorn looks."""

_members: defaultdict[str, set[str]] = defaultdict(set)
"""By group: the members of this process that join or have joined, and did not leave."""


@asynccontextmanager
async def installed(*, embedded_broker: bool) -> AsyncIterator[None]:
    """Within it, services of this process start and stop so; groups of another broker are left as they are."""
    send, workers = AIOKafkaClient.send, _KeptWorkers()

    async def quick_send(client: Any, node_id: int, request: Any, **options: Any) -> Any:
        joins = request.API_KEY == _JOIN
        alone = embedded_broker and joins and request._member_id and _is_alone(request)
        if alone:
            request._rebalance_timeout = _REBALANCE_TIMEOUT_MS
        response = await send(client, node_id, request, **options)
        if joins and not response.error_code:
            _members[request._group].add(response.member_id)
            if alone:
                _complete(response, request)
        elif joins or request.API_KEY == _LEAVE:
            _members[request._group].discard(request._member_id)
        return response

    async def hurried_sleep(delay_s: float) -> None:
        await asyncio.sleep(delay_s / _UVICORN_HURRY)

    hurried = SimpleNamespace(**{**vars(asyncio), "sleep": hurried_sleep})
    try:
        with (
            patch.object(AIOKafkaClient, "send", quick_send),
            patch.object(uvicorn.server, "asyncio", hurried),
            patch.object(embedded, "start_worker", workers.start),
        ):
            yield
    finally:
        await workers.end()


class _KeptWorkers:
    """Processes that evaluate a bundle and that no engine uses now, by what they were started with."""

    def __init__(self) -> None:
        self._start = embedded.start_worker
        self._idle: defaultdict[tuple[object, ...], list[embedded.Worker]] = defaultdict(list)

    async def start(self, bundle: Bundle, entry_point: str, timeout_s: float) -> embedded.Worker:
        """In place of `embedded.start_worker`."""
        made_with = (bundle, entry_point, timeout_s)
        while idle := self._idle[made_with]:
            if (kept := idle.pop()).alive:
                return kept
        worker = await self._start(bundle, entry_point, timeout_s)
        end = worker.end

        async def put_back() -> None:
            if worker.alive and not worker._waiting:
                idle.append(worker)
            else:
                await end()

        worker.end = put_back  # type: ignore[method-assign]
        return worker

    async def end(self) -> None:
        for idle in self._idle.values():
            for worker in idle:
                await embedded.Worker.end(worker)


def _is_alone(request: Any) -> bool:
    """Whether no other member is there; from now on this one is."""
    members = _members[request._group]
    members.add(request._member_id)
    return len(members) == 1


def _complete(response: Any, request: Any) -> None:
    """Put in what the broker leaves out when the rebalance timeout ends a join."""
    if not response.group_protocol and len(response.members) == 1:
        name, metadata = request._group_protocols[0]
        response.group_protocol = name
        response.members = [(*response.members[0][:-1], metadata)]
