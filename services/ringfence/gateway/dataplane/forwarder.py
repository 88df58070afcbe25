"""One request that goes on, with the credential or as it came, and the response to it: streamed both ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ringfence.gateway.contract import Gate, Verdict
from ringfence.gateway.dataplane.exchange import (
    Asked,
    Exchange,
    StaleConnectionError,
    Timeouts,
    do_nothing,
    is_unchanged,
    never,
)
from ringfence.gateway.dataplane.stream import Stream
from ringfence.gateway.dataplane.upstream_pool import Upstreams
from ringfence.gateway.errors import RefusedError
from ringfence.gateway.hosts import Origin, origin_of
from ringfence.kernel.base.errors import UnavailableError


def goes_on(verdict: Verdict) -> bool:
    """Whether a request is forwarded at all: allowed, or only observed."""
    return verdict.allowed or is_unchanged(verdict)


class Forwarder:
    """Takes requests that go on to their targets."""

    def __init__(self, gate: Gate, upstreams: Upstreams, patiences: Timeouts) -> None:
        self._gate = gate
        self._upstreams = upstreams
        self._patiences = patiences

    async def forward(self, client: Stream, asked: Asked) -> bool:
        """Send the request, and the response to the client. Whether the client's connection can be used again.

        Raises RefusedError where nothing of a response was sent to the client yet, GoneError and ExpiredError where the
        client does not do its part.
        """
        injected, origin = await self._prepared(asked.verdict)
        lapsed = never if is_unchanged(asked.verdict) else self._gate.view_expired
        exchange = Exchange(client, asked, injected, origin, self._patiences, lapsed, self._gate.view_problem)
        exchange.unsubscribe = self._on_end(asked.verdict, exchange.lease_ended)
        try:
            # What a person approved is sent once: never on a connection that may be closed, so never again on another.
            fresh = asked.verdict.headers is not None
            return await self._exchange(exchange, *await self._upstreams.take(origin, fresh=fresh))
        finally:
            exchange.finish()

    def take_over(
        self, client: Stream, asked: Asked, injected: Mapping[str, str], origin: Origin, upstream: Stream
    ) -> Exchange:
        """The exchange of an allowed request that was sent to `upstream` already. Hand it to `go_on`."""
        assert asked.verdict.lease is not None, "it was allowed"
        gate = self._gate
        exchange = Exchange(
            client, asked, injected, origin, self._patiences, gate.view_expired, gate.view_problem
        )
        exchange.upstream = upstream
        client.on_disconnect = exchange.client_left
        exchange.unsubscribe = self._gate.on_lease_end(asked.verdict.lease.lease_id, exchange.lease_ended)
        return exchange

    async def go_on(self, exchange: Exchange) -> bool:
        """Wait for the answer to a request that was taken over. See `forward`."""
        assert exchange.upstream is not None, "it was sent"
        try:
            return await self._exchange(exchange, exchange.upstream, reused=True, begun=True)
        finally:
            exchange.finish()

    async def _prepared(self, verdict: Verdict) -> tuple[Mapping[str, str] | None, Origin]:
        """What to inject, None where the request goes on as it came; and where to."""
        as_it_came = is_unchanged(verdict)
        if verdict.target is None or (verdict.lease is None and not as_it_came):
            raise RefusedError(503, "undecided", "the decision names no lease; try again")
        try:
            injected = None if as_it_came else await self._gate.headers_to_inject(verdict)
            return injected, origin_of(self._gate.upstream(verdict.target))
        except UnavailableError as error:
            raise RefusedError(503, error.code, error.message, headers={"Retry-After": "1"}) from None

    def _on_end(self, verdict: Verdict, ended: Callable[[], None]) -> Callable[[], None]:
        if verdict.lease is None or is_unchanged(verdict):
            return do_nothing  # it goes by no lease
        return self._gate.on_lease_end(verdict.lease.lease_id, ended)

    async def _exchange(
        self, exchange: Exchange, upstream: Stream, reused: bool, *, begun: bool = False
    ) -> bool:
        while True:
            try:
                if not begun:
                    exchange.begin(upstream)
                response = await exchange.final(upstream)
            except StaleConnectionError:
                upstream.abort()
                if not reused or not exchange.can_repeat:
                    raise RefusedError(502, "target_gone", "the target closed the connection") from None
                upstream, reused = await self._upstreams.take(exchange.origin, fresh=True)
                begun = False
                continue
            except BaseException:
                upstream.abort()
                raise
            try:
                keep_client, keep_upstream = await exchange.answer(upstream, response)
            except BaseException:
                upstream.abort()
                raise
            if keep_upstream:
                self._upstreams.give_back(exchange.origin, upstream)
            else:
                upstream.abort()
            return keep_client
