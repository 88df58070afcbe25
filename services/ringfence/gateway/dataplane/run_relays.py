"""Byte relays from the sockets of runs to targets whose protocol is not HTTP (`CONNECT host:port`).

The address that is connected to is that of the target's record. What is relayed is not interpreted. A relay is cut in
both directions at the moment when its permit ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field
from typing import Final

from ringfence.gateway.contract import PresentedIdentity, RateCheck, RelayGate, RelayPermit, Verdict
from ringfence.gateway.dataplane.exchange import Timeouts
from ringfence.gateway.dataplane.forwarder import UpstreamPool
from ringfence.gateway.dataplane.secret_redaction import Redactor
from ringfence.gateway.dataplane.stream import DisconnectedError, Stream
from ringfence.gateway.dataplane.websockets import RelayedBytes, tunnel
from ringfence.gateway.hosts import Origin, split_host_and_port
from ringfence.kernel.http1.head import RequestRefusedError
from ringfence.messages.codes import Code, ReceivedCode
from ringfence.messages.credential import Reason
from ringfence.model.verdict import Refused

PER_RUN: Final = 32
"""The most relays of one run at a time."""


@dataclass(slots=True, eq=False)
class RunRelays:
    """Opens relays, within limits."""

    gate: RelayGate
    upstreams: UpstreamPool
    timeouts: Timeouts
    _: KW_ONLY
    per_run: int = PER_RUN
    _open: Counter[str] = field(default_factory=Counter, init=False)

    def may_be_at(self, authority: str) -> bool:
        """Whether a target that relays go to may be at a canonical `host[:port]`."""
        return self.gate.may_be_at(*split_host_and_port(authority, "https"))

    @contextlib.contextmanager
    def place(self, sender: str) -> Iterator[None]:
        """Take a place for one relay of a run's socket. Raises RequestRefusedError (429)."""
        if self._open[sender] >= self.per_run:
            raise RequestRefusedError(
                Code.RELAYS_LIMIT, f"a run has {self.per_run} relays at a time; close one first",
                headers={"Retry-After": "1"},
            )  # fmt: skip
        self._open[sender] += 1
        try:
            yield
        finally:
            self._open[sender] -= 1
            if not self._open[sender]:
                del self._open[sender]

    async def decide(
        self, presented: PresentedIdentity, authority: str, rate_check: RateCheck
    ) -> tuple[Verdict, RelayPermit | None]:
        """See `RelayGate.decide`."""
        host, port = split_host_and_port(authority, "https")
        return await self.gate.decide(presented, authority, host, port, rate_check)

    async def run(self, client: Stream, permit: RelayPermit, authority: str, established: bytes) -> None:
        """Connect to the address, send `established` to the client, and relay until one side or the permit ends.

        Its end is recorded with what passed. Raises RequestRefusedError as long as nothing was sent to the client.
        """
        relay, reason = _Relay(client, permit), None
        try:
            await self._run(relay, client, permit, authority, established)
        except RequestRefusedError as error:
            reason = Reason(code=error.code, message=error.message)
            raise
        finally:
            permit.ended(relay.bytes.sent, relay.bytes.received, relay.cut_by or reason)

    async def _run(
        self, relay: _Relay, client: Stream, permit: RelayPermit, authority: str, established: bytes
    ) -> None:
        host, port = split_host_and_port(authority, "https")
        unsubscribe = permit.watch(relay.cut)
        try:
            relay.check()
            # Never a pooled connection, and never kept: it is in an unknown state after one byte.
            upstream, _ = await self.upstreams.acquire(Origin("http", host, port, authority), fresh=True)
            relay.upstream = upstream
            try:
                relay.check()
                if not client.alive:
                    raise DisconnectedError("the client left")
                relay.established = True
                client.write(established)
                idle_s = self.timeouts.stream_s
                client.deadline = upstream.deadline = time.monotonic() + idle_s
                await tunnel(client, upstream, Redactor(()), relay.check, idle_s=idle_s, relayed=relay.bytes)
            finally:
                upstream.abort()
        finally:
            unsubscribe()
        # What the target sent last may still be on its way. A client that does not take it is not waited for.
        client.close()
        asyncio.get_running_loop().call_later(self.timeouts.piece_s, client.abort)


class _Relay:
    """The state of one relay: whether it was cut."""

    def __init__(self, client: Stream, permit: RelayPermit) -> None:
        self.upstream: Stream | None = None
        self.established = False
        self.bytes = RelayedBytes()
        self.cut_by: Reason | None = None
        """Why the gateway cut it; None if it did not."""
        self._client = client
        self._permit = permit
        self._refused: RequestRefusedError | None = None

    def cut(self) -> None:
        """End the relay in both directions, and drop what is still to be sent."""
        permitted = self._permit.check()
        reason = (
            permitted.reason
            if isinstance(permitted, Refused)
            else Reason(code=Code.LEASE_ENDED, message="the lease has ended")
        )
        self.cut_by = self.cut_by or reason
        self._refused = RequestRefusedError(ReceivedCode(reason.code), reason.message, status=403)
        if self.upstream is not None:
            self.upstream.fail(self._refused)
        if self.established:
            self._client.fail(DisconnectedError(reason.message))

    def check(self) -> None:
        """Raise RequestRefusedError if the relay was cut, or if nothing more may be relayed."""
        if self._refused is None and isinstance(self._permit.check(), Refused):
            self.cut()
        if self._refused is not None:
            raise self._refused
