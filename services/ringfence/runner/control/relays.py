"""The relays of a run's targets that are no HTTP: which loopback address stands for which host."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from typing import Final

from ringfence.kernel.base.errors import RingfenceError
from ringfence.runner.control.messages import Relay

_FIRST: Final = int(ipaddress.IPv4Address("127.0.1.1"))
_MOST: Final = 4096
_HOST: Final = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_][a-z0-9_-]{0,62})*")


class RelayError(RingfenceError):
    """Raised for a target that no relay can stand for."""

    code = "relay_invalid"


def relays_of(targets: Iterable[tuple[str, int]]) -> tuple[Relay, ...]:
    """One relay for each host and port, in the order given. Hosts are compared without case.

    Each host has a loopback address of its own, because /etc/hosts knows no ports. Raises RelayError.
    """
    addresses: dict[str, str] = {}
    relays: dict[tuple[str, int], Relay] = {}
    for name, port in targets:
        host = name.lower()
        if host == "localhost" or not _HOST.fullmatch(host) or _is_address(host):
            raise RelayError(f"{name!r} is no host name, so nothing inside can be led to it").with_remedy(
                "give the target a host name instead of an address"
            )
        if not 1 <= port <= 65535:
            raise RelayError(f"{name} has the port {port}, and ports go from 1 to 65535")
        if host not in addresses and len(addresses) >= _MOST:
            raise RelayError(f"a run has relays to {_MOST} hosts at most")
        address = addresses.setdefault(host, str(ipaddress.IPv4Address(_FIRST + len(addresses))))
        relays.setdefault((host, port), Relay(host, port, address))
    return tuple(relays.values())


def hosts_of(relays: Iterable[Relay]) -> Mapping[str, str]:
    """Loopback addresses by host name, as `SandboxSpec.hosts` has them."""
    return {relay.host: relay.address for relay in relays}


def needs_low_ports(relays: Iterable[Relay]) -> bool:
    """What `SandboxSpec.low_ports` has to be."""
    return any(relay.port < 1024 for relay in relays)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
