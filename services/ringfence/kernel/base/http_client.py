"""Makes HTTP clients that use the environment's proxies, and shortens addresses of unix sockets in deep folders.

Loopback addresses are never reached through a proxy. The address of a unix socket has a limit of length that paths
have not.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import ssl
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from ringfence.kernel.base.errors import SettingsError

if TYPE_CHECKING:
    import httpx

    from ringfence.kernel.base.settings import BusSettings


LONGEST_ADDRESS: Final = 107
"""The most bytes of a unix socket's address (unix(7))."""


@contextlib.contextmanager
def socket_address(path: Path) -> Iterator[str]:
    """The path, or a short one that leads there inside the block: project folders can be deep. Raises OSError."""
    if len(os.fsencode(path)) <= LONGEST_ADDRESS:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


_HERE = ("all://127.0.0.1", "all://localhost", "all://[::1]")


_IDLE_AT_MOST_S = 2.0
"""Services close a connection that is idle for 5 s. A call on it at that moment would have no answer."""


def service_client(settings: BusSettings, *, timeout_s: float) -> httpx.AsyncClient:
    """Return a `web_client` for the HTTP of services. Raises SettingsError."""
    return web_client(timeout_s=timeout_s, verify=service_tls(settings))


def service_tls(settings: BusSettings) -> ssl.SSLContext:
    """Return the TLS of calls to services, with the authorities and the certificate of the settings.

    Raises SettingsError if a file has none.
    """
    ca_file, file = settings.http_ca_file, settings.http_client_cert_file
    if ca_file is None and file is None:
        return _LazyAuthorities()
    context = tls_by(ca_file) if ca_file else ssl.create_default_context()
    if file is None:
        return context
    try:
        context.load_cert_chain(file, password="")
    except (OSError, ssl.SSLError):
        raise SettingsError(f"{file} holds no certificate with its key (PEM); correct its setting") from None
    return context


def tls_by(ca_file: Path) -> ssl.SSLContext:
    """Return a client's TLS that trusts the authorities (PEM) in a file alone. Raises SettingsError if it has none."""
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError):
        raise SettingsError(
            f"{ca_file} holds no certificate (PEM) of an authority; correct its setting"
        ) from None


def web_client(*, timeout_s: float, verify: ssl.SSLContext | None = None) -> httpx.AsyncClient:
    """Return a client that honours HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY, but never uses a proxy for a
    loopback address.

    A proxy would reach its own loopback, not this machine's. `verify` replaces the machine's authorities. Raises
    SettingsError if the environment names an unusable proxy.
    """
    import httpx

    try:
        limits = httpx.Limits(
            max_connections=100, max_keepalive_connections=20, keepalive_expiry=_IDLE_AT_MOST_S
        )
        return httpx.AsyncClient(
            verify=verify or _LazyAuthorities(), timeout=timeout_s, limits=limits, mounts=dict.fromkeys(_HERE)
        )
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        reason = (
            "SOCKS needs another package: pip install 'httpx[socks]'"
            if isinstance(error, ImportError)
            else error
        )
        raise SettingsError(
            f"the proxy in HTTP_PROXY, HTTPS_PROXY or ALL_PROXY cannot be used ({reason}); correct it or unset it"
        ) from None


class _LazyAuthorities(ssl.SSLContext):
    """httpx's default, made by the first TLS connection: reading the authorities takes 16 ms of processor time.

    A call that is not overridden here meets a context that trusts no authority.
    """

    def __new__(cls) -> Self:
        return super().__new__(cls, ssl.PROTOCOL_TLS_CLIENT)

    def set_alpn_protocols(self, alpn_protocols: Iterable[str]) -> None:
        _authorities().set_alpn_protocols(alpn_protocols)

    def wrap_bio(self, *args: Any, **more: Any) -> ssl.SSLObject:
        return _authorities().wrap_bio(*args, **more)

    def wrap_socket(self, *args: Any, **more: Any) -> ssl.SSLSocket:
        return _authorities().wrap_socket(*args, **more)


@lru_cache(maxsize=1)
def _authorities() -> ssl.SSLContext:
    import httpx

    return httpx.create_ssl_context()


def is_loopback(host: str) -> bool:
    """Return whether a host, a name or an address, is the loopback of this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
