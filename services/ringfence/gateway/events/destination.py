"""The destination of a refused request, for its event: bounded, printable, without query and user information.

The sender chose it, so no decision depends on it. Secrets do not belong in a path. Those of a known form, and the
handle that the request shows, are redacted.
"""

from __future__ import annotations

import re
from typing import Final, Literal
from urllib.parse import unquote

from ringfence.gateway.contract import Attempt
from ringfence.gateway.hosts import PORTS
from ringfence.kernel.base.secret_scrubber import REDACTED, without_secrets, without_tokens
from ringfence.messages.operations import MAX_PATH_CHARS, Destination

MAX_METHOD_CHARS: Final = 32
_MAX_HOST_CHARS: Final = 253
_MAX_PORT: Final = 65535
_MAX_READ_CHARS: Final = 4096
"""The most characters of a stranger's text that are read."""
_ODD_IN_HOST: Final = re.compile(r"[^a-z0-9._:-]")
_ODD: Final = re.compile(r"[^!-~]")
_URL_IN_METHOD: Final = re.compile(r"[/\\?#@:=].*", re.DOTALL)
_ABSOLUTE: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,15})://(.*)", re.DOTALL)
_AFTER_HOST: Final = re.compile(r"[/\\?#]")
_HOST_AND_PORT: Final = re.compile(r"(?:\[[^\]]*\]|[^:]*)(?::[0-9]*)?")
_USER_IN_PATH: Final = re.compile(r"([/\\]{2})[^/\\]*@")
"""User information of a URL inside a path, or of a path that some parsers read as a URL."""

Scheme = Literal["http", "https"]


def destination_of(attempt: Attempt, url: str | None, handle: str | None = None) -> Destination:
    """The destination of an attempt.

    Args:
        attempt: as it was received.
        url: scheme and authority of its target, if known.
        handle: the handle that the request shows; it is not recorded.
    """
    path = attempt.target if attempt.target.startswith("/") else None
    if attempt.authority is not None:
        return _destination(attempt.scheme, attempt.authority, path, handle)
    if url is not None:
        scheme, _, authority = url.partition("://")
        return _destination(scheme, authority, path, handle)
    return _destination(attempt.scheme, None, f"/{attempt.target_id}{path or ''}", handle)


def destination_of_line(method: str, target: str, host: str | None, scheme: Scheme) -> Destination:
    """The destination of a request line and the `Host` of its message, even if they cannot be parsed for certain."""
    target = target[:_MAX_READ_CHARS]
    if (absolute := _ABSOLUTE.fullmatch(target)) is not None:
        authority, path = _cut(absolute[2])
        return _destination(absolute[1].lower(), authority, path or "/")
    if method.upper() == "CONNECT":
        return _destination("https", _cut(target)[0], None)
    if not target.startswith("/"):
        target = target.rpartition("@")[2]  # no path: an authority, or a URL without a slash
    return _destination(scheme, host, target)


def unparsed_line(head: bytes) -> tuple[str, str, str | None]:
    """Method, target and `Host` of an invalid head, as far as they can be told apart."""
    first, *lines = re.split(rb"\r\n|\r|\n", head[:_MAX_READ_CHARS])
    method, *rest = re.split(rb"[ \t]+", first, maxsplit=2)
    hosts = [line.partition(b":")[2] for line in lines if line[:5].lower() == b"host:"]
    host = hosts[0].strip(b" \t").decode("latin-1") if hosts else None
    return method.decode("latin-1"), rest[0].decode("latin-1") if rest else "", host


def printable_method(method: str) -> str | None:
    """A method in printable form; None if it is empty.

    It ends at the first character that belongs to a URL and not to a method, so that no query or user information of a
    URL is recorded.
    """
    return _ODD.sub("?", _URL_IN_METHOD.sub("?", method[:MAX_METHOD_CHARS])) or None


def _cut(rest: str) -> tuple[str, str]:
    """Split an authority from what follows it. In an invalid authority, its end may be part of a password."""
    at = _end_of_authority(rest)
    if "@" in rest[at:] and not _HOST_AND_PORT.fullmatch(rest[:at]):
        rest = rest.rpartition("@")[2]
        at = _end_of_authority(rest)
    return rest[:at], rest[at:]


def _end_of_authority(rest: str) -> int:
    match = _AFTER_HOST.search(rest)
    return match.start() if match is not None else len(rest)


def _destination(
    scheme: str, authority: str | None, path: str | None, handle: str | None = None
) -> Destination:
    known_scheme: Scheme | None = "https" if scheme == "https" else "http" if scheme == "http" else None
    host, port = _host_and_port(authority, scheme) if authority else (None, None)
    return Destination(
        scheme=known_scheme, host=host, port=port, path=_recorded_path(path, handle) if path is not None else None
    )  # fmt: skip


def _host_and_port(authority: str, scheme: str) -> tuple[str | None, int | None]:
    rest = authority[:_MAX_READ_CHARS].rpartition("@")[2]
    rest = rest[: _end_of_authority(rest)]
    if rest.startswith("["):
        host, _, after = rest[1:].partition("]")
        port_text = after.removeprefix(":")
    elif rest.count(":") > 1:
        host, port_text = rest, "?"  # IPv6 without brackets: a port cannot be told from it
    else:
        host, _, port_text = rest.partition(":")
    host = _ODD_IN_HOST.sub("?", host.lower()[:_MAX_HOST_CHARS])
    if not port_text:
        return host or None, PORTS.get(scheme)
    port = int(port_text) if re.fullmatch(r"[0-9]{1,5}", port_text) else 0
    return host or None, port if 0 < port <= _MAX_PORT else None


def _recorded_path(target: str, handle: str | None) -> str:
    cut = len(target) > _MAX_READ_CHARS
    path = re.split(r"[?#]", target[:_MAX_READ_CHARS], maxsplit=1)[0]
    decoded = unquote(path)
    if _scrubbed(decoded, handle) != decoded and _scrubbed(path, handle) == path:
        return REDACTED  # the secret is percent-encoded, so its end is unknown
    path = _scrubbed(path, handle)
    path = _ODD.sub("?", path)
    return path if len(path) <= MAX_PATH_CHARS and not cut else f"{path[: MAX_PATH_CHARS - 3]}..."


def _scrubbed(text: str, handle: str | None) -> str:
    if handle:
        text = re.sub(re.escape(handle), REDACTED, text, flags=re.IGNORECASE)
    return _USER_IN_PATH.sub(rf"\g<1>{REDACTED}@", without_secrets(without_tokens(text)))
