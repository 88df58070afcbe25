"""The messages of the control channel between runner and init, and the relays to a run's targets without HTTP.

Messages are frozen dataclasses, with a strict codec of one JSON object a line. Relays map hosts to loopback addresses
of the sandbox. Init imports this module while the command waits, so it needs no pydantic.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, TypeVar

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.strict_json import json_object
from ringfence.messages.codes import Code
from ringfence.runner.sandbox.backend import is_address, is_host_address

MAX_FROM_INIT_BYTES: Final = 64 * 1024
"""The longest line that a runner reads. The longest message has a token of at most 16 KiB."""
MAX_FROM_RUNNER_BYTES: Final = 8 * 1024 * 1024
"""The longest line that init reads. Linux takes arguments and environment of 6 MiB at most (execve(2))."""

_NUMBER: Final = (0, 1 << 62)


class ControlMessageError(RingfenceError):
    """Raised if a line is no message of the control channel, or not the expected one."""

    code = Code.CONTROL_MESSAGE_INVALID


@dataclass(frozen=True, slots=True)
class Relay:
    """A relay to a target without HTTP: from `address` and `port` inside to `host` and `port`, through the gateway."""

    host: str
    port: int
    address: str
    """The loopback address that stands for the host in /etc/hosts; of a host that is an address, that address."""


@dataclass(frozen=True, slots=True)
class PublicKeyMessage:
    """init → runner: the public key of the instance, as a JWK (RFC 7517)."""

    type: ClassVar[str] = "public_key"

    jwk: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class EnrolMessage:
    """runner → init: the enrolment token that the runner signed for that key."""

    type: ClassVar[str] = "enrol"

    token: str = field(repr=False)
    trust_domain: str
    agent_id: str


@dataclass(frozen=True, slots=True)
class EnrolmentMessage:
    """init → runner: the `instance.enrol` that the key signed (compact JWS)."""

    type: ClassVar[str] = "enrolment"

    jws: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class StartCommand:
    """runner → init: the command of the run. Texts may hold any bytes but NUL, as `os.fsdecode` represents them."""

    type: ClassVar[str] = "start"

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)
    """What the run was given. It wins over what init sets."""
    working_directory: str
    enrolment: str = field(repr=False)
    """The registry's signed `instance.enrolment`."""
    trust_root: str
    trust_domain: str
    agent_id: str
    task_id: str
    relays: tuple[Relay, ...] = ()
    ca_pem: str | None = None
    """The gateway's CA certificates (PEM); None leaves the trust of programs as it is."""


@dataclass(frozen=True, slots=True)
class StartedMessage:
    """init → runner: the command runs."""

    type: ClassVar[str] = "started"


@dataclass(frozen=True, slots=True)
class StartFailedMessage:
    """init → runner: the command cannot be run. `code` is a shell's exit code: 126 or 127."""

    type: ClassVar[str] = "start_failed"

    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class InitReport:
    """init → runner: the command has ended. The numbers come from inside, so they are information only."""

    type: ClassVar[str] = "ended"

    exit_code: int
    """128 and the signal's number after a signal."""
    proxy_connections: int = 0
    relay_connections: int = 0
    sent_bytes: int = 0
    """What proxy and relays passed to the gateway."""
    received_bytes: int = 0


Message = (
    PublicKeyMessage
    | EnrolMessage
    | EnrolmentMessage
    | StartCommand
    | StartedMessage
    | StartFailedMessage
    | InitReport
)
M = TypeVar("M", bound=Message)


def encode(message: Message) -> bytes:
    """Encode a message as one line. Raises ControlMessageError for a text that no command can have."""
    fields = {name: _encoded(getattr(message, name)) for name in _fields(type(message))}
    return json.dumps({"type": message.type, **fields}, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes, *expected: type[M]) -> M:
    """Decode a line. Raises ControlMessageError if it is no message of one of these kinds."""
    if not line.endswith(b"\n"):
        raise ControlMessageError("a message of the control channel is cut off or too long")
    try:
        members = json_object(line)
    except ValueError:
        raise ControlMessageError("a message of the control channel is no JSON object") from None
    name = members.pop("type", None)
    for kind in expected:
        if kind.type == name:
            break
    else:
        awaited = " or ".join(kind.type for kind in expected)
        raise ControlMessageError(
            f"the control channel has {str(name)[:40]!r} where it has to have {awaited}"
        )
    fields = _fields(kind)
    if members.keys() != fields.keys():
        raise ControlMessageError(f"the message {kind.type} has other members than it has to have")
    try:
        return kind(**{member: _decoded(value, fields[member]) for member, value in members.items()})
    except ValueError:
        raise ControlMessageError(f"the message {kind.type} has a member of another type") from None


def _fields(kind: type[Any]) -> dict[str, str]:
    """The names of a message's fields, with their annotations."""
    return {one.name: str(one.type) for one in dataclasses.fields(kind)}


def _encoded(value: Any) -> Any:
    # A text of the operating system is bytes, of which not all are UTF-8: each byte becomes one character.
    if isinstance(value, str):
        if "\0" in value:
            raise ControlMessageError("a text for the command holds a NUL character")
        return os.fsencode(value).decode("latin-1")
    if isinstance(value, Mapping):
        return {_encoded(name): _encoded(one) for name, one in value.items()}
    if isinstance(value, tuple):
        return [_encoded(one) for one in value]
    if isinstance(value, Relay):
        return {"host": value.host, "port": value.port, "address": value.address}
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError
    return os.fsdecode(value.encode("latin-1"))


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not _NUMBER[0] <= value <= _NUMBER[1]:
        raise ValueError
    return value


def _optional_text(value: Any) -> str | None:
    return None if value is None else _text(value)


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError
    return tuple(_text(one) for one in value)


def _text_by_text(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError
    return {_text(name): _text(one) for name, one in value.items()}


def _relays(value: Any) -> tuple[Relay, ...]:
    if not isinstance(value, list):
        raise ValueError
    return tuple(_relay(one) for one in value)


def _relay(value: Any) -> Relay:
    if not isinstance(value, dict) or value.keys() != {"host", "port", "address"}:
        raise ValueError
    port = _number(value["port"])
    if not 1 <= port <= 65535:
        raise ValueError
    return Relay(_text(value["host"]), port, _text(value["address"]))


_DECODERS: Final[dict[str, Callable[[Any], Any]]] = {
    "str": _text,
    "int": _number,
    "str | None": _optional_text,
    "tuple[str, ...]": _texts,
    "tuple[Relay, ...]": _relays,
    "Mapping[str, str]": _text_by_text,
}


def _decoded(value: Any, annotation: str) -> Any:
    """Raises ValueError."""
    return _DECODERS[annotation](value)


_FIRST: Final = int(ipaddress.IPv4Address("127.0.1.1"))
_MOST: Final = 4096
_LOCALHOST: Final = "127.0.0.1"
_IPV6: Final = Path("/proc/net/if_inet6")
_HOST: Final = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_][a-z0-9_-]{0,62})*")


class RelayError(RingfenceError):
    """Raised if a target can have no relay."""

    code = Code.RELAY_INVALID


def relays_of(targets: Iterable[tuple[str, int]]) -> tuple[Relay, ...]:
    """One relay for each host and port, in the order given. Hosts are compared without case.

    Each name has a loopback address of its own, because /etc/hosts knows no ports. An IP address is the sandbox's own:
    its loopback interface has it. So is `localhost`. Raises RelayError.
    """
    addresses: dict[str, str] = {}
    relays: dict[tuple[str, int], Relay] = {}
    places: dict[tuple[str, int], str] = {}
    for name, port in targets:
        host = name.lower()
        if not 1 <= port <= 65535:
            raise RelayError(f"{name} has the port {port}, and ports go from 1 to 65535")
        if host not in addresses and len(addresses) >= _MOST:
            raise RelayError(f"a run has relays to {_MOST} hosts at most")
        if host not in addresses:
            addresses[host] = _address_of(host) or str(ipaddress.IPv4Address(_FIRST + len(addresses)))
        relay = relays.setdefault((host, port), Relay(host, port, addresses[host]))
        other = places.setdefault((relay.address, port), host)
        if other != host:
            raise RelayError(f"{host} and {other} are one place inside, and their relays go to two")
    return tuple(relays.values())


def _address_of(host: str) -> str | None:
    """The address inside that is the host itself; None for a name. Raises RelayError."""
    if host == "localhost":
        return _LOCALHOST
    if is_address(host):
        if ":" in host and not _IPV6.exists():
            raise RelayError(f"{host} is an IPv6 address, and this machine has no IPv6").with_remedy(
                "give the target a host name, or switch IPv6 on"
            )
        if not is_host_address(host) and host != "::1" and not _is_own(host):
            raise RelayError(
                f"{host} is no address of a machine, so nothing inside can be led to it"
            ).with_remedy("give the target another address, or a host name")
        return host
    if (
        not _HOST.fullmatch(host) or host.rpartition(".")[2].isdigit()
    ):  # programs read 010.0.0.1 in several ways
        raise RelayError(f"{host!r} is no host name and no address, so nothing inside can be led to it")
    return None


def _is_own(host: str) -> bool:
    """Whether an address is in 127.0.0.0/8, and not assigned to a name."""
    address = ipaddress.ip_address(host)
    if not (address.version == 4 and address.is_loopback):
        return False
    return not _FIRST <= int(address) < _FIRST + _MOST


def hosts_of(relays: Iterable[Relay]) -> Mapping[str, str]:
    """Loopback addresses by host name, as `SandboxSpec.hosts` has them."""
    return {
        relay.host: relay.address
        for relay in relays
        if relay.host != "localhost" and not is_address(relay.host)
    }


def addresses_of(relays: Iterable[Relay]) -> tuple[str, ...]:
    """The addresses of the sandbox's loopback interface, as `SandboxSpec.addresses` has them."""
    return tuple(dict.fromkeys(relay.host for relay in relays if is_host_address(relay.host)))


def needs_low_ports(relays: Iterable[Relay]) -> bool:
    """Whether a relay listens below port 1024, as `SandboxSpec.low_ports` has it."""
    return any(relay.port < 1024 for relay in relays)
