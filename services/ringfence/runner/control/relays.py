"""Relays to a run's targets without HTTP: the mapping from hosts to loopback addresses of the sandbox."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from ringfence.kernel.base.errors import RingfenceError
from ringfence.runner.control.messages import Relay
from ringfence.runner.sandbox.backend import is_host_address

_FIRST: Final = int(ipaddress.IPv4Address("127.0.1.1"))
_MOST: Final = 4096
_LOCALHOST: Final = "127.0.0.1"
_IPV6: Final = Path("/proc/net/if_inet6")
_HOST: Final = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_][a-z0-9_-]{0,62})*")


class RelayError(RingfenceError):
    """Raised if a target can have no relay."""

    code = "relay_invalid"


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
    if _is_address(host):
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
        if relay.host != "localhost" and not _is_address(relay.host)
    }


def addresses_of(relays: Iterable[Relay]) -> tuple[str, ...]:
    """The addresses of the sandbox's loopback interface, as `SandboxSpec.addresses` has them."""
    return tuple(dict.fromkeys(relay.host for relay in relays if is_host_address(relay.host)))


def needs_low_ports(relays: Iterable[Relay]) -> bool:
    """Whether a relay listens below port 1024, as `SandboxSpec.low_ports` has it."""
    return any(relay.port < 1024 for relay in relays)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
