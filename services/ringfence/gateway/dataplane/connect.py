"""CONNECT: no tunnel, but a promise of TLS, which the gateway opens, so that each request inside is decided."""

from __future__ import annotations

from ringfence.gateway.dataplane.http1_head import RequestHead
from ringfence.gateway.dataplane.request_reader import ListenerContext
from ringfence.gateway.dataplane.stream import Stream
from ringfence.gateway.errors import RefusedError
from ringfence.gateway.hosts import canonical

AGREED = b"HTTP/1.1 200 Connection established\r\n\r\n"


def connect_authority(request: RequestHead, way: ListenerContext, client: Stream) -> str:
    """The canonical authority that a CONNECT is for. Raises RefusedError."""
    if way.inside is not None:
        raise RefusedError(400, "connect_refused", "there is no CONNECT inside another")
    if request.chunked or request.length or client.buffer:
        raise RefusedError(400, "connect_refused", "nothing may follow a CONNECT before it is answered")
    if ":" not in request.target.rpartition("]")[2]:
        raise RefusedError(400, "connect_refused", "CONNECT names a host and a port")
    authority = canonical(request.target, "https")
    host = request.known.get(b"host")
    if host is not None and canonical(host.decode("latin-1"), "https") != authority:
        raise RefusedError(400, "host_disagrees", "Host names another host than the CONNECT")
    return authority
