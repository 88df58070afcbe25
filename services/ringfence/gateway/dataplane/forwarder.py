"""Forwards requests to their targets: with the credential injected, or unchanged in observe mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ringfence.gateway.contract import Gate, Verdict
from ringfence.gateway.dataplane.exchange import (
    Exchange,
    ForwardedRequest,
    StaleConnectionError,
    Timeouts,
    do_nothing,
    is_observed,
    never_expired,
)
from ringfence.gateway.dataplane.stream import Stream
from ringfence.gateway.dataplane.upstream_pool import UpstreamPool
from ringfence.gateway.errors import RequestRefusedError
from ringfence.gateway.hosts import Origin, origin_of, stdio_origin
from ringfence.kernel.base.errors import UnavailableError
from ringfence.model.target_settings import STDIO_URL


def is_forwarded(verdict: Verdict) -> bool:
    """Whether a request is forwarded: allowed, or only observed."""
    return verdict.allowed or is_observed(verdict)


class Forwarder:
    """Runs exchanges on pooled connections."""

    def __init__(self, gate: Gate, upstreams: UpstreamPool, timeouts: Timeouts) -> None:
        self._gate = gate
        self._upstreams = upstreams
        self._timeouts = timeouts

    async def forward(self, client: Stream, request: ForwardedRequest) -> bool:
        """Forward a request, and send the response to the client. Returns whether the client's connection can be
        reused.

        Raises RequestRefusedError as long as nothing of a response was sent, and DisconnectedError or PeerTimeoutError
        if the client fails.
        """
        injected, origin = await self._credential_and_origin(request.verdict, request.server_socket)
        view_expired = never_expired if is_observed(request.verdict) else self._gate.view_expired
        exchange = Exchange(
            client, request, injected, origin, self._timeouts, view_expired, self._gate.view_problem
        )
        exchange.unsubscribe = self._on_lease_end(request.verdict, exchange.on_lease_end)
        try:
            # An approved request is sent once, so not on a pooled connection, which could turn out to be closed.
            fresh = request.verdict.headers is not None
            return await self._run(exchange, *await self._upstreams.acquire(origin, fresh=fresh))
        finally:
            exchange.finish()

    def take_over(
        self,
        client: Stream,
        request: ForwardedRequest,
        injected: Mapping[str, str],
        origin: Origin,
        upstream: Stream,
    ) -> Exchange:
        """The exchange of an allowed request that was sent to `upstream` already. Pass it to `resume`."""
        assert request.verdict.lease is not None, "it was allowed"
        gate = self._gate
        exchange = Exchange(
            client, request, injected, origin, self._timeouts, gate.view_expired, gate.view_problem
        )
        exchange.upstream = upstream
        client.on_disconnect = exchange.on_client_disconnect
        exchange.unsubscribe = self._gate.on_lease_end(request.verdict.lease.lease_id, exchange.on_lease_end)
        return exchange

    async def resume(self, exchange: Exchange) -> bool:
        """Wait for the response to a request that was taken over. Returns and raises as `forward`."""
        assert exchange.upstream is not None, "it was sent"
        try:
            return await self._run(exchange, exchange.upstream, reused=True, begun=True)
        finally:
            exchange.finish()

    async def _credential_and_origin(
        self, verdict: Verdict, server_socket: Path | None
    ) -> tuple[Mapping[str, str] | None, Origin]:
        """The headers to inject, None if the request is forwarded unchanged; and the origin of the target."""
        as_it_came = is_observed(verdict)
        if verdict.target is None or (verdict.lease is None and not as_it_came):
            raise RequestRefusedError(503, "undecided", "the decision names no lease; try again")
        try:
            injected = None if as_it_came else await self._gate.headers_to_inject(verdict)
            url = self._gate.upstream(verdict.target)
            if url == STDIO_URL and server_socket is not None:
                # The bridge is of the run, and no target: it gets no credential. The server gets the message alone.
                return {}, stdio_origin(verdict.target.target_id, server_socket)
            return injected, origin_of(url)
        except UnavailableError as error:
            raise RequestRefusedError(503, error.code, error.message, headers={"Retry-After": "1"}) from None

    def _on_lease_end(self, verdict: Verdict, ended: Callable[[], None]) -> Callable[[], None]:
        if verdict.lease is None or is_observed(verdict):
            return do_nothing  # it uses no lease
        return self._gate.on_lease_end(verdict.lease.lease_id, ended)

    async def _run(self, exchange: Exchange, upstream: Stream, reused: bool, *, begun: bool = False) -> bool:
        while True:
            try:
                if not begun:
                    exchange.send_request(upstream)
                response = await exchange.read_response_head(upstream)
            except StaleConnectionError:
                upstream.abort()
                if not reused or not exchange.can_repeat:
                    raise RequestRefusedError(
                        502, "target_gone", "the target closed the connection"
                    ) from None
                upstream, reused = await self._upstreams.acquire(exchange.origin, fresh=True)
                begun = False
                continue
            except BaseException:
                upstream.abort()
                raise
            try:
                keep_client, keep_upstream = await exchange.relay_response(upstream, response)
            except BaseException:
                upstream.abort()
                raise
            if keep_upstream:
                self._upstreams.release(exchange.origin, upstream)
            else:
                upstream.abort()
            return keep_client
