"""Clients of HTTP: by the proxies that the environment names, and past them to what is on this machine."""

from __future__ import annotations

import ssl
from functools import lru_cache

import httpx

from ringfence.kernel.base.errors import SettingsError

_HERE = ("all://127.0.0.1", "all://localhost", "all://[::1]")


def web_client(*, timeout_s: float) -> httpx.AsyncClient:
    """A client that goes by HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY, but never to a loopback address: what a
    proxy finds there is not what we mean.

    Raises SettingsError where the environment names a proxy that cannot be used.
    """
    try:
        return httpx.AsyncClient(verify=_authorities(), timeout=timeout_s, mounts=dict.fromkeys(_HERE))
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        why = (
            "SOCKS needs another package: pip install 'httpx[socks]'"
            if isinstance(error, ImportError)
            else error
        )
        raise SettingsError(
            f"the proxy in HTTP_PROXY, HTTPS_PROXY or ALL_PROXY cannot be used ({why}); correct it or unset it"
        ) from None


@lru_cache(maxsize=1)
def _authorities() -> ssl.SSLContext:
    """As httpx has it by default, read once: to read the machine's authorities takes 16 ms of processor time."""
    return httpx.create_ssl_context()
