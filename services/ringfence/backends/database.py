"""Shared by the backends of databases: Ringfence's login, address and URL for agents, a scope as privileges.

Enters: the secret of a target (`DatabaseLogin.parse`), a scope (`requests_of`), settings of a target.
Leaves: a login, the URL of an agent's login, privilege requests; AccessError, InexactError, ValueError.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from ringfence.backends.secret_sources import AccessError
from ringfence.backends.target_settings import InexactError
from ringfence.messages.base import Permission
from ringfence.model.scope.globs import Glob, ScopeError, parse_glob
from ringfence.model.target_settings import DatabaseSettings, SslMode

_MODES: Final[tuple[SslMode, ...]] = ("disable", "prefer", "require", "verify-ca", "verify-full")
_PARAMETERS: Final = frozenset({"sslmode", "sslrootcert", "host"})


@dataclass(frozen=True, slots=True)
class DatabaseLogin:
    """Ringfence's own login: `SCHEME://user:password@host:port/database?sslmode=...`."""

    host: str
    port: int
    user: str
    password: str = field(repr=False)
    database: str
    sslmode: SslMode
    root_certificate: str | None

    @classmethod
    def parse(cls, url: str, schemes: tuple[str, ...], port: int) -> DatabaseLogin:
        """Parse a URL. `port` is the usual one of such servers. Raises ValueError, which quotes no value."""
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
        host = query.get("host") or parts.hostname
        if parts.scheme not in schemes or not host or not parts.username:
            raise ValueError(f"it is no {schemes[0]}://user:password@host:port/database")
        if unknown := set(query) - _PARAMETERS:
            raise ValueError(f"it has {', '.join(sorted(map(ascii, unknown)))}, which is not known here")
        # An attacker in between could downgrade a connection from TLS, and then obtain the password.
        ssl_mode = query.get("sslmode") or ("prefer" if _is_local(host) else "verify-full")
        sslmode = next((mode for mode in _MODES if mode == ssl_mode), None)
        if sslmode is None:
            raise ValueError(f"its sslmode is none of {', '.join(_MODES)}")
        return cls(
            host,
            parts.port or port,
            unquote(parts.username),
            unquote(parts.password or ""),
            unquote(parts.path.removeprefix("/")),
            sslmode,
            query.get("sslrootcert"),
        )

    @classmethod
    def of_target(cls, target_id: str, url: str, schemes: tuple[str, ...], port: int) -> DatabaseLogin:
        """Parse the secret of a target, and read its root certificate. Raises AccessError, which quotes no value."""
        try:
            login = cls.parse(url, schemes, port)
            login.tls()
        except (ValueError, OSError) as error:
            reason = str(error) if type(error) is ValueError else "its root certificate cannot be read"
            raise AccessError(f"the rights at target {target_id} are wrong: {reason}") from None
        return login

    def tls(self) -> ssl.SSLContext | Literal["prefer"] | None:
        """Return how connections are encrypted; None for not at all. Raises OSError for a missing certificate file."""
        if self.sslmode == "disable" or self.host.startswith("/"):
            return None
        if self.sslmode == "prefer":
            return "prefer"
        context = ssl.create_default_context(cafile=self.root_certificate)
        context.check_hostname = self.sslmode == "verify-full"
        if self.sslmode == "require":
            context.verify_mode = ssl.CERT_NONE
        return context


def _is_local(host: str) -> bool:
    """Return whether the host is a socket or the loopback: connections that do not leave the machine."""
    return host.startswith("/") or host in ("localhost", "127.0.0.1", "::1")


# --- what agents are told ---------------------------------------------------------------------------------------------


def agent_address(target_id: str, login: DatabaseLogin, settings: DatabaseSettings) -> str:
    """Return the `host:port` for agents. Raises AccessError if Ringfence itself connects to a socket."""
    if settings.address is not None:
        return settings.address
    if login.host.startswith("/"):
        raise AccessError(f"Ringfence reaches target {target_id} by a socket; give its backend an address")
    return f"[{login.host}]:{login.port}" if ":" in login.host else f"{login.host}:{login.port}"


def agent_sslmode(login: DatabaseLogin, settings: DatabaseSettings, *, encrypted: bool) -> SslMode | None:
    """Return the sslmode for agents; None if they need not know one. `encrypted`: whether Ringfence's connection is."""
    if settings.sslmode is not None:
        return settings.sslmode
    if login.sslmode in ("verify-ca", "verify-full"):
        return login.sslmode
    return "require" if encrypted else None


def agent_url(
    scheme: str, user: str, password: str, address: str, database: str, sslmode: SslMode | None
) -> str:
    """Return the URL that an agent logs in with."""
    query = f"?sslmode={sslmode}" if sslmode else ""
    return f"{scheme}://{user}:{password}@{address}/{quote(database, safe='')}{query}"


# --- a scope as requested privileges ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Privileges:
    """What a kind of database can grant."""

    rights: Mapping[str, Mapping[Any, tuple[str, ...]]]
    """By verb and level of object: its privileges."""
    depth: Mapping[Any, int]
    """By level: how many segments name such an object. The levels include `table` and `column`."""
    longest_name: int
    size: Callable[[str], int]
    """The length of a name as the server counts it."""
    unit: str
    """Of lengths: `bytes`."""
    path: str
    """What a resource looks like: `database/table`."""


@dataclass(frozen=True, slots=True)
class PrivilegeRequest:
    """One verb on one resource pattern."""

    verb: str
    glob: Glob
    known: Privileges = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.verb} {self.glob.text!a}"

    def rights(self, level: str) -> tuple[str, ...]:
        """Return the privileges that the verb means on a kind of object."""
        return self.known.rights[self.verb].get(level, ())

    def covers(self, *names: str) -> bool:
        """Return whether the pattern matches the object at this path."""
        return self.glob.matches("/".join(names)) and not any("/" in name for name in names)

    @property
    def wants_columns(self) -> bool:
        """Return whether the pattern can match a column of a table that it does not match as a whole."""
        segments, depth = self.glob.segments, self.known.depth["column"]
        if not self.rights("column") or not self.glob.reaches(depth):
            return False
        return not (segments[-1] == "**" and len(segments) <= depth and "**" not in segments[:-1])


def requests_of(scope: Iterable[Permission], known: Privileges) -> tuple[PrivilegeRequest, ...]:
    """Parse a scope without access to a server. Raises InexactError."""
    requests = [
        PrivilegeRequest(_checked_verb(verb, known), _resource_glob(resource, known), known)
        for permission in scope
        for resource in permission.resources
        for verb in permission.verbs
    ]
    if not requests:
        raise InexactError("the scope is empty")
    for request in requests:
        levels = known.rights[request.verb]
        if not any(request.glob.reaches(known.depth[level]) for level in levels):
            named = " or ".join(sorted(set(levels)))
            raise InexactError(f"{request}: {request.verb} is a right on a {named}, which this cannot name")
    return tuple(dict.fromkeys(requests))


def _checked_verb(verb: str, known: Privileges) -> str:
    if verb not in known.rights:
        raise InexactError(f"the verb {verb!a} is none: write one of {', '.join(known.rights)}")
    return verb


def _resource_glob(text: str, known: Privileges) -> Glob:
    try:
        glob = parse_glob(text)
    except ScopeError as error:
        raise InexactError(str(error)) from None
    if "*" in glob.segments[0]:
        raise InexactError(f"{text!a} names no database: write {known.path}")
    for segment in glob.segments:
        if known.size(segment) > known.longest_name:
            raise InexactError(
                f"{text!a} has a name of more than {known.longest_name} {known.unit}: the server has none such"
            )
    return glob
