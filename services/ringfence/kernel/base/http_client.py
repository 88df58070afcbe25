"""HTTP client that uses the environment's proxies, except for loopback addresses."""

from __future__ import annotations

import ssl
from functools import lru_cache

import httpx

from ringfence.kernel.base.errors import SettingsError

_HERE = ("all://127.0.0.1", "all://localhost", "all://[::1]")


def web_client(*, timeout_s: float) -> httpx.AsyncClient:
    """Return a client that honours HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY, but never uses a proxy for a
    loopback address.

    A proxy would reach its own loopback, not this machine's. Raises SettingsError if the environment names an unusable
    proxy.
    """
    try:
        return httpx.AsyncClient(verify=_authorities(), timeout=timeout_s, mounts=dict.fromkeys(_HERE))
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        reason = (
            "SOCKS needs another package: pip install 'httpx[socks]'"
            if isinstance(error, ImportError)
            else error
        )
        raise SettingsError(
            f"the proxy in HTTP_PROXY, HTTPS_PROXY or ALL_PROXY cannot be used ({reason}); correct it or unset it"
        ) from None


@lru_cache(maxsize=1)
def _authorities() -> ssl.SSLContext:
    """As httpx has it by default, read once: to read the machine's authorities takes 16 ms of processor time."""
    return httpx.create_ssl_context()
