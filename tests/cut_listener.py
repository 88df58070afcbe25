"""Stands for a gateway: hears revocations and leases, refuses what they cover, and gives its signed word for it.

    python -m tests.cut_listener          # settings and key as for a service: RINGFENCE_*, RINGFENCE_KEY_FILE

It signs a heartbeat a second. An order is followed only where its signer may give it, as the revoker judges it.
`GET /v1/forwards/LEASE` says whether a request under a lease would go on to its target now.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from ringfence.kernel.clock import Clock
from ringfence.kernel.errors import InvalidMessageError
from ringfence.kernel.ids import derived_id
from ringfence.kernel.kafka import Follower, Received
from ringfence.kernel.process import run
from ringfence.kernel.runtime import Runtime
from ringfence.kernel.settings import ServiceSettings, load
from ringfence.messages.lease import Lease, RevocationAck
from ringfence.messages.operations import Heartbeat
from ringfence.messages.topics import HEARTBEAT, LEASE, REVOCATION_ACK, REVOCATION_REQUEST
from ringfence.model.directory import TABLES, Directory
from ringfence.model.lease_epochs import Epochs
from ringfence.model.leases import is_covered, mark_of, marks_of
from ringfence.model.streams import Partition, StreamCheck, Streams
from ringfence.revoker.domain import Order, objection
from ringfence.revoker.opening import open_lease, open_order

BEAT_EVERY_S = 1.0
_COMPARE_EVERY_S = 0.2
_PATIENCE_S = 5.0


class CutListener:
    """What a gateway knows of leases: those that there are, and what was revoked."""

    def __init__(self, runtime: Runtime, directory: Directory, *, gives_its_word: bool = True) -> None:
        """Without `gives_its_word` it says that it is alive, and never that it refuses anything."""
        self._runtime = runtime
        self._directory = directory
        self._streams = Streams()
        grace_ms = int(runtime.settings.grace_s * 1000)
        self._check = StreamCheck(self._streams, runtime.trust, runtime.clock, grace_ms=grace_ms)
        self._gives_its_word = gives_its_word
        self._epochs = Epochs(runtime.trust)
        self._leases: dict[str, Lease] = {}
        self._fences: dict[str, int] = {}
        self._revoked: set[str] = set()
        self._is_old = True
        """Whether the orders that come were given before this process began: then nobody waits for its word."""
        self._tasks: set[asyncio.Task[None]] = set()

    def forwards(self, lease_id: str) -> bool:
        """Whether a request under this lease would go on to its target now."""
        if self._tasks or self._check.stale():
            return False  # while it is not known what an order covers, or whether there are others
        lease = self._leases.get(lease_id)
        if lease is None or lease.status != "active" or lease_id in self._revoked:
            return False
        if lease.deadline * 1000 <= self._runtime.clock.now_ms():
            return False
        return not any(is_covered(lease, self._fences.get(mark, -1)) for mark in (*marks_of(lease), "all"))

    async def compare(self, followers: Sequence[Follower]) -> None:
        """Hold what has been read against what revokers sign, for ever."""
        began = False
        while True:
            positions: dict[Partition, int] = {}
            for follower in followers:
                positions |= await follower.positions()
            if not began:
                began = True
                self._check.begin(positions)
            self._check.compare(positions)
            await asyncio.sleep(_COMPARE_EVERY_S)

    def on_heartbeats(self, records: Sequence[Received]) -> None:
        self._directory.on_records(records)
        self._check.on_heartbeats(records)

    def on_leases(self, records: Sequence[Received]) -> None:
        self._streams.on_records(records)
        for record in records:
            if self._epochs.took(record):
                continue
            try:
                lease = open_lease(record.value, self._runtime.trust, self._runtime.clock)
            except InvalidMessageError:
                continue
            if self._epochs.is_void(record, lease.epoch):
                continue
            known = self._leases.get(lease.lease_id)
            if known is None or lease.seq > known.seq:
                self._leases[lease.lease_id] = lease

    def routes(self) -> list[BaseRoute]:
        return [Route("/v1/forwards/{lease}", self._told)]

    async def _told(self, request: Request) -> Response:
        if self._runtime.unready():
            return Response(status_code=503)
        return JSONResponse({"forwards": self.forwards(request.path_params["lease"])})

    def on_orders(self, records: Sequence[Received]) -> None:
        self._streams.on_records(records)
        for record in records:
            task = asyncio.create_task(self._follow(record, is_old=self._is_old), name="order")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _follow(self, record: Received, *, is_old: bool) -> None:
        order = self._believed(record)
        if order is None and await self._runtime.tables_caught_up(_PATIENCE_S):
            order = self._believed(record)
        if order is None:
            return
        claims = order.claims
        if claims.selector is not None:
            mark = mark_of(claims.selector)
            self._fences[mark] = max(self._fences.get(mark, 0), order.at.appended_at_ms)
        else:
            self._revoked.add(claims.lease_id or "")
        if self._gives_its_word and not is_old:
            await self._give_word(order)

    def _believed(self, record: Received) -> Order | None:
        try:
            order = open_order(record, self._directory, self._runtime.trust)
        except InvalidMessageError:
            return None
        lease = self._leases.get(order.claims.lease_id or "")
        return order if objection(order, lease, self._directory) is None else None

    async def _give_word(self, order: Order) -> None:
        key, now_ms = self._runtime.key, self._runtime.clock.now_ms()
        ack = RevocationAck(
            iss=key.id,
            aud=self._runtime.settings.trust_domain,
            iat=now_ms // 1000,
            jti=derived_id("revocation.ack", key.id, order.id),
            revocation_id=order.id,
            cut_at_ms=now_ms,
        )
        await self._runtime.publisher.publish_signed(REVOCATION_ACK, key.id, ack, key)

    async def beat(self) -> None:
        """Say that it is alive, for ever. All orders that were given before have been read."""
        self._is_old = False
        while True:
            key, now_ms = self._runtime.key, self._runtime.clock.now_ms()
            heartbeat = Heartbeat(
                iss=key.id,
                aud=self._runtime.settings.trust_domain,
                iat=now_ms // 1000,
                jti=derived_id("heartbeat", key.id, now_ms),
                at_ms=now_ms,
            )
            await self._runtime.publisher.publish_signed(HEARTBEAT, key.id, heartbeat, key)
            await asyncio.sleep(BEAT_EVERY_S)


def build(
    settings: ServiceSettings, clock: Clock | None = None, *, gives_its_word: bool = True
) -> tuple[Runtime, CutListener]:
    """The process, and what it knows."""
    runtime = Runtime("gateway", settings, clock)
    directory = Directory(runtime.trust, runtime.clock, grace_ms=None)
    listener = CutListener(runtime, directory, gives_its_word=gives_its_word)
    runtime.table(TABLES, directory.on_records)
    runtime.table([HEARTBEAT], listener.on_heartbeats)
    leases = runtime.history([LEASE], listener.on_leases, since_ms=0)
    orders = runtime.history([REVOCATION_REQUEST], listener.on_orders, since_ms=0)
    runtime.background("comparing", partial(listener.compare, (leases, orders)))
    runtime.routes += listener.routes()
    runtime.background("heartbeat", listener.beat)
    return runtime, listener


def main() -> int:
    settings = load(ServiceSettings)
    return run([build(settings)[0]], settings)


if __name__ == "__main__":
    raise SystemExit(main())
