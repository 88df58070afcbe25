"""Rate limits and concurrency limits per sender, so that no sender takes the gateway from the others.

Requests are limited by a token bucket per sender: `per_second_each` tokens a second, at most `burst_each`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass

from ringfence.kernel.http1.head import RequestRefusedError
from ringfence.messages.codes import Code
from ringfence.model.verdict import ALLOWED, Allowed, Refused, refused

HANDSHAKE_COST = 10
"""The cost of a TLS handshake in requests: it takes as long as some of them."""
_MAX_SENDERS = 10_000
_RESERVED_SHARE = 4
"""One of this many connections is reserved for senders with a task's socket or a certificate, so that a client with
many addresses cannot keep them out.
"""
_HANDSHAKE_SHARE = 4
"""One of this many connections may be in its TLS handshake, so that clients that never finish it block no others."""


ADDRESS = "address:"
"""The prefix of senders that are known only by their address."""


def sender_at(address: str) -> str:
    """The sender behind an address. An IPv6 /64 counts as one sender: each site gets at least that (RFC 6177)."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return f"{ADDRESS}{address}"
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return f"{ADDRESS}{ip.ipv4_mapped}"
        ip = ipaddress.IPv6Address(int(ip) >> 64 << 64)
    return f"{ADDRESS}{ip}"


@dataclass(frozen=True, slots=True)
class Allowance:
    """The limits. A sender is a task, a client certificate, an agent, or an address."""

    connections: int = 4096
    """Of all senders together."""
    connections_each: int = 256
    """Of one address or one task's socket."""
    handshakes_each: int = 64
    """Connections of one address that are in their TLS handshake."""
    concurrent_each: int = 64
    """Requests of one sender at a time."""
    per_second_each: float = 1000.0
    burst_each: int = 2000


class SenderLimits:
    """The current usage of all senders."""

    def __init__(self, allowance: Allowance, seconds: Callable[[], float]) -> None:
        """`seconds`: a monotonic clock."""
        self._allowed = allowance
        self._seconds = seconds
        self.connections = 0
        self.of_addresses = 0
        """The connections of senders that are known only by their address."""
        self.handshakes = 0
        self._connections: dict[str, int] = {}
        self._handshakes: dict[str, int] = {}
        self._usages: dict[str, SenderUsage] = {}
        self._forget_after_s = 0.0

    def open_connection(self, sender: str) -> bool:
        """Count a new connection of this sender. False if it may not have one more:

        1. All senders together have fewer connections than allowed.
        2. So has this sender.
        3. Senders that are known only by their address leave the reserved share to others.
        """
        having = self._connections.get(sender, 0)
        if self.connections >= self._allowed.connections or having >= self._allowed.connections_each:
            return False
        if sender.startswith(ADDRESS):
            most = self._allowed.connections
            if self.of_addresses >= most - most // _RESERVED_SHARE:
                return False
            self.of_addresses += 1
        self.connections += 1
        self._connections[sender] = having + 1
        return True

    def close_connection(self, sender: str) -> None:
        self.connections -= 1
        self.of_addresses -= sender.startswith(ADDRESS)
        _decrement(self._connections, sender)

    def connections_of(self, sender: str) -> int:
        return self._connections.get(sender, 0)

    def begin_handshake(self, address: str) -> bool:
        """Count a new connection of this address that begins a TLS handshake. False if it may not have one more:

        1. All addresses together are in fewer handshakes than allowed.
        2. So is this address.
        3. It may have one more connection (`open_connection`).
        4. Its bucket has the tokens that a handshake costs.
        """
        having = self._handshakes.get(address, 0)
        most = max(1, self._allowed.connections // _HANDSHAKE_SHARE)
        if (
            self.handshakes >= most
            or having >= self._allowed.handshakes_each
            or not self.open_connection(address)
        ):
            return False
        try:
            self.charge(address, HANDSHAKE_COST)
        except RequestRefusedError:
            self.close_connection(address)
            return False
        self.handshakes += 1
        self._handshakes[address] = having + 1
        return True

    def end_handshake(self, address: str) -> None:
        """Count the end of a handshake. Once it succeeds, the connection is counted anew for its sender."""
        self.handshakes -= 1
        _decrement(self._handshakes, address)
        self.close_connection(address)

    def charge(self, sender: str, cost: float = 1) -> None:
        """Take tokens from the sender's bucket. Raises RequestRefusedError (429), and takes none then.

        `cost`: the number of tokens, for more work than most requests; at most what the bucket holds.
        """
        now = self._seconds()
        self._charge(self._usage(sender, now), now, cost)

    def begin(self, sender: str) -> SenderUsage:
        """Count a request in progress, until `SenderUsage.end`. Raises RequestRefusedError (429)."""
        return self._begin(self._usage(sender, self._seconds()))

    def charge_and_begin(self, sender: str) -> SenderUsage:
        """Take one token, and count a request in progress. Raises RequestRefusedError (429)."""
        now = self._seconds()
        usage = self._usages.get(sender)
        if usage is None:
            usage = self._usage(sender, now)
        self._charge(usage, now, 1)
        return self._begin(usage)

    def _usage(self, sender: str, now: float) -> SenderUsage:
        usage = self._usages.get(sender)
        if usage is None:
            if len(self._usages) > _MAX_SENDERS and now >= self._forget_after_s:
                self._forget_idle_senders(now)
            usage = self._usages[sender] = SenderUsage(float(self._allowed.burst_each), now)
        return usage

    def _charge(self, usage: SenderUsage, now: float, cost: float) -> None:
        burst = self._allowed.burst_each
        if cost > burst:
            cost = burst
        tokens = usage.tokens + (now - usage.updated_s) * self._allowed.per_second_each
        if tokens > burst:
            tokens = burst
        if tokens < cost:
            raise _too_many("requests a second", (cost - tokens) / self._allowed.per_second_each)
        usage.tokens, usage.updated_s = tokens - cost, now

    def _begin(self, usage: SenderUsage) -> SenderUsage:
        if usage.running >= self._allowed.concurrent_each:
            raise _too_many("requests at a time", 1.0)
        usage.running += 1
        return usage

    def slot(self, sender: str) -> RequestSlot:
        """The slot that counts the requests of one connection."""
        return RequestSlot(self, sender)

    def _forget_idle_senders(self, now: float) -> None:
        full_s = self._allowed.burst_each / self._allowed.per_second_each
        self._forget_after_s = (
            now + full_s
        )  # no sender can be idle before: so a full table is not searched each time
        for sender, usage in list(self._usages.items()):
            if not usage.running and now - usage.updated_s > full_s:
                del self._usages[sender]


class SenderUsage:
    """The token bucket of one sender, and its requests in progress."""

    __slots__ = ("running", "tokens", "updated_s")

    def __init__(self, tokens: float, updated_s: float) -> None:
        self.tokens = tokens
        """The tokens that were left at `updated_s`."""
        self.updated_s = updated_s
        self.running = 0
        """The requests in progress."""

    def end(self) -> None:
        self.running -= 1


class RequestSlot:
    """Counts the request in progress of one connection: for its sender, and for its agent once that is known."""

    __slots__ = ("_agent", "_agent_usage", "_charged", "_limits", "_sender", "_sender_usage")

    def __init__(self, limits: SenderLimits, sender: str) -> None:
        self._limits = limits
        self._sender = sender
        self._agent = ("", "")
        """The last agent id, and the sender name under which it is counted."""
        self._sender_usage: SenderUsage | None = None
        self._agent_usage: SenderUsage | None = None
        """Set while a request of a known agent is in progress."""
        self._charged = False
        """Whether the next request has paid its token already."""

    def begin(self) -> None:
        """Begin a request. Raises RequestRefusedError (429)."""
        take = self._limits.begin if self._charged else self._limits.charge_and_begin
        self._charged = False
        self._sender_usage = take(self._sender)

    def check_agent(self, agent_id: str) -> Allowed | Refused:
        """The `RateCheck` of the data plane: the limits of an agent over all its connections."""
        if self._agent[0] != agent_id:
            self._agent = agent_id, f"agent:{agent_id}"
        try:
            self._agent_usage = self._limits.charge_and_begin(self._agent[1])
        except RequestRefusedError as error:
            return refused(error.code, error.message)
        return ALLOWED

    def end(self) -> None:
        if self._sender_usage is not None:
            self._sender_usage.end()
            self._sender_usage = None
        if self._agent_usage is not None:
            self._agent_usage.end()
            self._agent_usage = None

    def defer(self) -> None:
        """End the request for now. It begins again, and is charged once."""
        self.end()
        self._charged = True


def _decrement(counts: dict[str, int], sender: str) -> None:
    counts[sender] -= 1
    if not counts[sender]:
        del counts[sender]


def _too_many(exceeded: str, wait_s: float) -> RequestRefusedError:
    return RequestRefusedError(
        Code.TOO_MANY_REQUESTS,
        f"too many {exceeded} from this sender; wait and try again",
        headers={"Retry-After": str(max(1, round(wait_s)))},
    )
