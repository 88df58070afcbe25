"""Heartbeat of the revoker: signs once a second the digests of `lease` and `revocation.request`.

Readers of those topics compare the digests with what they have read (`stream_digests`). A heartbeat also names consumer
groups that have halted. It continues after a halt, so that issuers and gateways learn of it (`revoker_halts`).
"""

from __future__ import annotations

import logging

from aiokafka.errors import KafkaError

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.base.retry import run_periodically
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.operations import Heartbeat
from ringfence.messages.topics import HEARTBEAT
from ringfence.model.leases.stream_digests import CONFIRMED, StreamDigests

log = logging.getLogger(__name__)

_EVERY_S = 1.0


class HeartbeatSender:
    """Sends heartbeats over what `follower` has read into `streams`."""

    def __init__(self, runtime: Runtime, streams: StreamDigests, follower: Follower) -> None:
        self._runtime = runtime
        self._streams = streams
        self._follower = follower

    async def run(self) -> None:
        """Send heartbeats, for ever."""
        await run_periodically(
            _EVERY_S, self.send, "a heartbeat is left out", log,
            expected=(RingfenceError, KafkaError, OSError), at_once=True,
        )  # fmt: skip

    async def send(self) -> None:
        """Sign the digests of what was read so far, and the halted consumer groups."""
        positions = await self._follower.positions(CONFIRMED)
        key, now_ms, halted = self._runtime.key, self._runtime.clock.now_ms(), self._runtime.halted()
        heartbeat = Heartbeat(
            iss=key.id,
            aud=self._runtime.settings.trust_domain,
            iat=now_ms // 1000,
            jti=derived_id("heartbeat", key.id, now_ms),
            # A halt must count even if our clock is wrong. By the broker's clock it is not taken for an old heartbeat.
            at_ms=self._runtime.broker_now_ms() if halted else now_ms,
            streams=self._streams.digests(positions),
            halted=halted,
        )
        await self._runtime.publisher.publish_signed(HEARTBEAT, self._runtime.role, heartbeat, key)
