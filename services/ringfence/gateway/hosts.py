"""Canonical form of host and port, in which authorities are compared. Ambiguous spellings are refused."""

from __future__ import annotations

import functools
import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

from ringfence.kernel.http1.head import RequestRefusedError
from ringfence.messages.codes import Code
from ringfence.model.target_settings import RESERVED_NAME

Scheme = Literal["http", "https"]
AGENT_API: Final = RESERVED_NAME
"""The host at which agents reach the gateway itself, and the first segment of the path at the gateway's own name."""
PORTS: Final[dict[str, int]] = {"http": 80, "https": 443}

_AUTHORITY: Final = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::([1-9][0-9]{0,4}))?")
_LABEL: Final = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER: Final = re.compile(r"[0-9]+|0[xX][0-9a-fA-F]*")


@dataclass(frozen=True, slots=True)
class Origin:
    """A destination of requests: scheme, host without brackets, port, and the authority for the `Host` field."""

    scheme: Scheme
    host: str
    port: int
    authority: str
    socket: str | None = None
    """The path of the unix socket that stands for host and port, if any."""


@functools.lru_cache(maxsize=4096)
def canonical(authority: str, scheme: Scheme) -> str:
    """`host[:port]` in lower case, without the scheme's default port, IPv6 in its short form.

    Raises RequestRefusedError for user information, an empty or invalid port, a trailing dot, an address that parsers
    read differently (`127.1`, `0x7f.1`, `010.0.0.1`), a zone id, and everything else that is no host.
    """
    host, port = split_host_and_port(authority, scheme)
    shown = f"[{host}]" if ":" in host else host
    return shown if port == PORTS[scheme] else f"{shown}:{port}"


def split_host_and_port(authority: str, scheme: Scheme) -> tuple[str, int]:
    """Host, without brackets, and port. Raises RequestRefusedError as `canonical` does."""
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        raise _invalid(authority)
    port = int(match[2]) if match[2] else PORTS[scheme]
    if port > 65535:
        raise _invalid(authority)
    return _host(match[1].lower(), authority), port


@functools.lru_cache(maxsize=1024)
def origin_of(url: str) -> Origin:
    """The origin of `https://host[:port]`. Raises RequestRefusedError (502) if it is not one."""
    parts = urlsplit(url)
    if parts.scheme not in PORTS or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise RequestRefusedError(Code.TARGET_MISCONFIGURED, "the target says no usable URL; ask an operator")
    scheme: Scheme = "https" if parts.scheme == "https" else "http"
    host, port = split_host_and_port(parts.netloc, scheme)
    return Origin(scheme, host, port, canonical(parts.netloc, scheme))


def stdio_origin(target_id: str, socket: Path) -> Origin:
    """The origin of an MCP server in a run, which the runner of that run bridges to a socket. `Host` is the target."""
    return Origin("http", target_id, PORTS["http"], target_id, str(socket))


def _host(host: str, authority: str) -> str:
    if host.startswith("["):
        try:
            return str(ipaddress.IPv6Address(host[1:-1]))
        except ValueError:
            raise _invalid(authority) from None
    labels = host.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError:
            raise _invalid(authority) from None
    if not all(_LABEL.fullmatch(label) for label in labels):
        raise _invalid(authority)
    return host


def _invalid(authority: str) -> RequestRefusedError:
    return RequestRefusedError(
        Code.HOST_INVALID, f"{authority[:80]!r} is no host[:port] that all would read alike"
    )
