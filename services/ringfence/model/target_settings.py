"""The built-in kinds of credentials (`CREDENTIAL_KINDS`), and the settings of each in a target's record.

They are declared here and not beside the backends. So the command line, the SDK, the registry and the gateway know them
without packages that only the server installs. Add a new kind here first; `tests/unit/test_credential_kinds.py` then
names every place that lacks it.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ringfence.kernel.base.text import did_you_mean, visible_name
from ringfence.messages.registry import BackendSettings, Delivery

Address = Annotated[str, Field(pattern=r"^([A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):[0-9]{1,5}$")]
"""`host:port`, where agents reach the target."""

_HOST: Final = r"([A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?"
TargetUrl = Annotated[
    str, Field(pattern=rf"^(https://{_HOST}|http://(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{{1,5}})?)$")
]
"""Where the gateway sends requests: scheme, host and port. Plain HTTP is for this machine alone."""

STDIO_URL: Final = "stdio://run"
"""The `url` of a target that is an MCP server on standard input and output, inside of the run that asks it."""

RESERVED_NAME: Final = "ringfence"
"""The host and the target id by which agents reach the gateway itself. New targets must have neither."""

TokenAlgorithm = Literal["ES256", "RS256"]
"""Signature algorithms of tokens. ES256 is the default; RS256 is for targets that verify nothing else."""
SslMode = Literal["disable", "prefer", "require", "verify-ca", "verify-full"]
Owned = Literal["drop", "keep"]

_TOKEN: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}"  # noqa: S105 - the token of RFC 9110, 5.6.2
_FRAMING_HEADERS: Final = frozenset({
    "host", "connection", "content-length", "transfer-encoding", "te", "trailer", "upgrade", "keep-alive", "expect",
    "proxy-authorization", "proxy-connection",
})  # fmt: skip
"""Headers that say where a request ends or goes. None of them may carry a secret."""


class TargetSettings(BaseModel):
    """Base of the settings of one kind. Unknown fields are refused, not ignored: one may limit something."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    address: Address | None = None
    """Where agents reach the target. By default it is where Ringfence itself does."""


class JwtSettings(TargetSettings):
    """Settings for tokens in a target's record, besides their audience."""

    url: TargetUrl | Literal["stdio://run"] | None = None
    """The URL to which the gateway sends agents' requests; `STDIO_URL` for a server in the run."""
    dpop: Literal["off", "required"] = "off"
    """`required`: tokens are bound to the agent's key, and good only with a proof of it (RFC 9449)."""
    alg: TokenAlgorithm = "ES256"
    """What they are signed with: `RS256` for a target that verifies nothing else."""


class HttpSettings(TargetSettings):
    """Settings of how the target takes its secret."""

    url: TargetUrl
    auth: Literal["bearer", "basic", "header"] = "bearer"
    """`bearer`: `Authorization: Bearer SECRET`. `basic`: `username` and the secret as the password. `header`: the
    secret in a header of its own."""
    header: Annotated[str, Field(pattern=f"^{_TOKEN}$")] | None = None
    """The name of that header, e.g. `X-Api-Key`."""
    scheme: Annotated[str, Field(pattern=f"^{_TOKEN}$")] | None = None
    """What stands before the secret: `Bearer` with `bearer`, nothing with `header`, if not given."""
    username: (
        Annotated[str, Field(pattern=r"^[^:\x00-\x1f\x7f]{1,256}$", coerce_numbers_to_str=True)] | None
    ) = None

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        if (self.auth == "header") != (self.header is not None):
            raise ValueError("header goes with auth = header, which needs it")
        if (self.auth == "basic") != (self.username is not None):
            raise ValueError("username goes with auth = basic, which needs it")
        if self.auth == "basic" and self.scheme is not None:
            raise ValueError("basic has no scheme but its own")
        if self.header is not None and self.header.lower() in _FRAMING_HEADERS:
            raise ValueError("this header says where a request goes or ends; no secret belongs there")
        return self


class DatabaseSettings(TargetSettings):
    """Settings that all databases have."""

    sslmode: SslMode | None = None
    """What agents should require; by default what Ringfence itself requires."""
    connection_limit: Annotated[int, Field(ge=1, le=100)] = 4
    """How many sessions a credential may have at once."""
    public: Literal["refuse", "accept"] = "refuse"
    """What to do where PUBLIC may more than the lease: refuse, or accept that every role may that."""


class PostgresSettings(DatabaseSettings):
    """Settings of a PostgreSQL target."""

    statement_timeout_s: Annotated[int, Field(ge=1, le=86_400)] = 60
    """How long a statement may take, as long as the agent does not set it otherwise."""
    owned: Owned = "drop"
    """What becomes of what the lease's role made: it goes with the role, or Ringfence's own role keeps it."""


class MysqlSettings(DatabaseSettings):
    """Settings of a MariaDB or MySQL target."""

    host: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:%/-]{1,60}$")] = "%"
    """From which hosts a credential logs in, as the server writes it: `10.0.%`, `10.0.0.0/255.255.0.0`, `%`."""


def _networks(text: str) -> str:
    # The server may misread what it cannot parse: only valid networks, in the canonical form.
    try:
        return ",".join(str(ipaddress.ip_network(part.strip())) for part in text.split(","))
    except ValueError:
        raise ValueError(
            "write networks in CIDR notation, with commas between: 10.0.0.0/8,192.0.2.7/32"
        ) from None


class SshSettings(TargetSettings):
    """Settings of an SSH host."""

    source_address: Annotated[str, AfterValidator(_networks)] | None = None
    """The networks, in CIDR notation with commas, from which a certificate is good; from anywhere, if not given."""


@dataclass(frozen=True, slots=True)
class CredentialKind:
    """The properties of one built-in kind of credential that other packages need. The rest is its backend's."""

    settings: type[TargetSettings]
    takes_audience: bool = False
    """Whether its credentials are tokens, which have an audience."""
    tells_address: bool = False
    """Whether a credential contains the target's address, so that a target needs one."""
    handed_out: bool = True
    """Whether an agent can receive it. If not, the backend says `enforced_by = "gateway"`."""
    fits_header: bool = False
    """Whether the gateway can inject it into a request header."""


CREDENTIAL_KINDS: Final[Mapping[str, CredentialKind]] = MappingProxyType({
    "http": CredentialKind(HttpSettings, handed_out=False, fits_header=True),
    "jwt": CredentialKind(JwtSettings, takes_audience=True, fits_header=True),
    "mysql": CredentialKind(MysqlSettings, tells_address=True),
    "postgres": CredentialKind(PostgresSettings, tells_address=True),
    "redis": CredentialKind(TargetSettings, tells_address=True),
    "ssh": CredentialKind(SshSettings, tells_address=True),
})  # fmt: skip
"""By `backend.kind` of a target. Kinds of other packages are unknown here."""
RELAYED_KINDS: Final = frozenset(name for name, kind in CREDENTIAL_KINDS.items() if kind.tells_address)
"""The kinds of targets that agents reach at an address, by a protocol of their own: a run does by relays."""
ENTRY_POINTS: Final = "ringfence.backends"
"""The entry point group by which other packages add backends. Each is called with the `BackendContext`."""
_PLACE: Final = re.compile(r"([^:\[\]/@]+|\[[^\[\]]+\])(?::([0-9]{1,5}))?", re.ASCII)
_LABEL: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?", re.ASCII)
_WRITE: Final = MappingProxyType({
    "address": "write HOST:PORT, the port from 1 to 65535",
    "url": "write https://HOST or https://HOST:PORT, without a path; http only for 127.0.0.1, localhost or [::1]",
})  # fmt: skip


def problems(backend: BackendSettings) -> list[str]:
    """Return the mistakes in the settings of a built-in kind, a sentence each, without values.

    Empty for other kinds.
    """
    kind = CREDENTIAL_KINDS.get(backend.kind)
    if kind is None:
        return []
    declared = kind.settings
    settings: dict[str, Any] = backend.model_extra or {}
    names = sorted(declared.model_fields)
    sentences = [_unknown(backend.kind, name, names) for name in sorted(settings.keys() - set(names))]
    if backend.audience is not None and not kind.takes_audience:
        sentences.append(f"an audience is for tokens, and backend {backend.kind} makes none: leave it out")
    elif backend.audience is not None and not (backend.audience.strip() and backend.audience.isprintable()):
        sentences.append(
            "the audience is empty, or has characters that nobody sees: write it, or leave it out"
        )
    malformed = {name for name in _WRITE if name in settings and not _may_be_reached(settings[name])}
    try:
        declared.model_validate({name: value for name, value in settings.items() if name in names})
    except ValidationError as error:
        for one in error.errors(include_url=False, include_input=False):
            name = str(one["loc"][0]) if one["loc"] else ""
            if name in _WRITE and name in settings:
                malformed.add(name)
            elif one["type"] == "missing":
                sentences.append(
                    f"backend {backend.kind} needs the setting {name}: {_WRITE.get(name, 'give it')}"
                )
            else:
                sentences.append(f"{name or 'the settings'}: {one['msg'].removeprefix('Value error, ')}")
    return sentences + [f"{name} is malformed: {_WRITE[name]}" for name in sorted(malformed)]


def default_delivery(backend: BackendSettings, *, mapped: bool) -> Delivery:
    """Return the delivery of a target whose command names none. `mapped`: whether it has a request map."""
    if delivery_problem(backend, "gateway") is not None:
        return "agent"
    return "gateway" if mapped or not CREDENTIAL_KINDS[backend.kind].handed_out else "agent"


def delivery_problem(backend: BackendSettings, delivery: Delivery) -> str | None:
    """Return why a target with this backend cannot have a delivery, in a sentence; None if it can."""
    kind = CREDENTIAL_KINDS.get(backend.kind)
    if delivery == "agent":
        if kind is None or kind.handed_out:
            return None
        return f"a secret of kind {backend.kind} is never given to agents: its delivery is gateway"
    if kind is None or not kind.fits_header:
        return f"the gateway cannot inject a credential of kind {backend.kind}: its delivery is agent"
    if (backend.model_extra or {}).get("dpop") == "required":
        return "tokens with dpop=required are bound to the agent's key: their delivery is agent"
    return None


def reserved_name(target_id: str, backend: BackendSettings) -> str | None:
    """Why a new target must have another name or another host, or None. Targets that were set before stay valid."""
    if target_id == RESERVED_NAME:
        return (
            f"{RESERVED_NAME} is no name for a target: agents reach the gateway itself by it; choose another"
        )
    for setting in ("url", "address"):
        place = str((backend.model_extra or {}).get(setting, ""))
        match = _PLACE.match(place.rpartition("://")[2])
        if match is not None and match[1].lower().removesuffix(".") == RESERVED_NAME:
            return f"{setting}: agents reach the gateway itself at {RESERVED_NAME}; name the target's host otherwise"
    return None


def _unknown(kind: str, name: str, names: Sequence[str]) -> str:
    sentence = f"backend {kind} has no setting {visible_name(name[:64])}"
    return f"{sentence}{did_you_mean(name, names) or '; it has ' + ', '.join(names)}"


def _may_be_reached(place: Any) -> bool:
    """Return whether a `host:port` or URL has a plausible host and port. True for any other form."""
    match = _PLACE.fullmatch(str(place).rpartition("://")[2])
    if match is None:
        return True  # its pattern reports a malformed one
    host, port = match.groups()
    return _host_is_one(host) and (port is None or 1 <= int(port) <= 65_535)


def _host_is_one(host: str) -> bool:
    """Return whether it is an IP address, or a name whose labels DNS allows (RFC 1123 2.1)."""
    labels = host.removesuffix(".").split(".")
    if not host.startswith("[") and not labels[-1].isdecimal():
        return all(map(_LABEL.fullmatch, labels))
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True
