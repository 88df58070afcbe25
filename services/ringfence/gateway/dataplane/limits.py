"""How much of the gateway one sender may have, so that none takes it from the others."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass

from ringfence.gateway.errors import RefusedError
from ringfence.messages.credential import Reason

TOO_MANY_CONNECTIONS = "too_many_connections"
HANDSHAKE_COST = 10
"""To open TLS counts for so many requests: it takes the time of some of them."""
_MAX_SENDERS = 10_000
_RESERVED_SHARE = 4
"""One in so many connections is for senders that a socket or a certificate shows: whoever has many addresses does not
keep them out."""
_HANDSHAKE_SHARE = 4
"""One in so many connections may be one whose TLS is not open yet: who never opens it stops nobody who has."""


ADDRESS = "address:"
"""How a sender begins that is told by its address alone."""


def sender_at(address: str) -> str:
    """The sender that an address is told by. Of IPv6 whoever has one has a /64 (RFC 6177): that counts as one."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return f"{ADDRESS}{address}"
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return f"{ADDRESS}{found.ipv4_mapped}"
        found = ipaddress.IPv6Address(int(found) >> 64 << 64)
    return f"{ADDRESS}{found}"


@dataclass(frozen=True, slots=True)
class Allowance:
    """What everybody may have. A sender is a task, a client certificate, an agent, or an address."""

    connections: int = 4096
    """All of them together."""
    connections_each: int = 256
    """Of one address or one task's socket."""
    handshakes_each: int = 64
    """Connections of one address whose TLS is not open yet."""
    concurrent_each: int = 64
    """Requests at a time."""
    per_second_each: float = 1000.0
    burst_each: int = 2000


class SenderLimits:
    """What everybody has at the moment."""

    def __init__(self, allowance: Allowance, seconds: Callable[[], float]) -> None:
        """`seconds`: a clock that only goes forward."""
        self._allowed = allowance
        self._seconds = seconds
        self.connections = 0
        self.of_addresses = 0
        """So many of them are of senders told by their addresses."""
        self.handshakes = 0
        self._connections: dict[str, int] = {}
        self._handshakes: dict[str, int] = {}
        self._usages: dict[str, SenderUsage] = {}
        """By sender."""
        self._forget_after_s = 0.0

    def open_connection(self, sender: str) -> bool:
        """Whether this sender may have one more connection; then it has."""
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
        """The sender has one connection less."""
        self.connections -= 1
        self.of_addresses -= sender.startswith(ADDRESS)
        _decrement(self._connections, sender)

    def begin_handshake(self, address: str) -> bool:
        """Whether this address may open the TLS of one more connection; then that is one of its connections."""
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
        except RefusedError:
            self.close_connection(address)
            return False
        self.handshakes += 1
        self._handshakes[address] = having + 1
        return True

    def end_handshake(self, address: str) -> None:
        """It is open, or will never be; whose connection it is from now on is counted anew."""
        self.handshakes -= 1
        _decrement(self._handshakes, address)
        self.close_connection(address)

    def charge(self, sender: str, cost: float = 1) -> None:
        """Count a request against the sender's rate. Raises RefusedError (429), which counts for nothing.

        `cost`: for how many it counts, where it is more work than most; never more than there can be at once.
        """
        now = self._seconds()
        self._charge(self._usage(sender, now), now, cost)

    def begin(self, sender: str) -> SenderUsage:
        """The sender has one more request under way, until `SenderUsage.end`. Raises RefusedError (429)."""
        return self._begin(self._usage(sender, self._seconds()))

    def charge_and_begin(self, sender: str) -> SenderUsage:
        """Count a request against the sender's rate, and begin it. Raises RefusedError (429)."""
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
        left = usage.tokens + (now - usage.updated_s) * self._allowed.per_second_each
        if left > burst:
            left = burst
        if left < cost:
            raise _too_many("requests a second", (cost - left) / self._allowed.per_second_each)
        usage.tokens, usage.updated_s = left - cost, now

    def _begin(self, usage: SenderUsage) -> SenderUsage:
        if usage.running >= self._allowed.concurrent_each:
            raise _too_many("requests at a time", 1.0)
        usage.running += 1
        return usage

    def slot(self, sender: str) -> RequestSlot:
        """What counts the requests of one connection."""
        return RequestSlot(self, sender)

    def _forget_idle_senders(self, now: float) -> None:
        full_s = self._allowed.burst_each / self._allowed.per_second_each
        self._forget_after_s = now + full_s  # nobody is idle before: many who are not cost the others nothing
        for sender, usage in list(self._usages.items()):
            if not usage.running and now - usage.updated_s > full_s:
                del self._usages[sender]


class SenderUsage:
    """What one sender has at the moment."""

    __slots__ = ("running", "tokens", "updated_s")

    def __init__(self, tokens: float, updated_s: float) -> None:
        self.tokens = tokens
        """How many requests it had left"""
        self.updated_s = updated_s
        """at this time."""
        self.running = 0
        """How many are under way."""

    def end(self) -> None:
        """One less is under way."""
        self.running -= 1


class RequestSlot:
    """The request of a connection that is under way: one of its sender, and of its agent once that is known."""

    __slots__ = ("_agent", "_agent_usage", "_charged", "_limits", "_sender", "_sender_usage")

    def __init__(self, limits: SenderLimits, sender: str) -> None:
        self._limits = limits
        self._sender = sender
        self._agent = ("", "")
        """The agent that it was last, and by which sender that one is counted."""
        self._sender_usage: SenderUsage | None = None
        self._agent_usage: SenderUsage | None = None
        """Where it is under way, what it counts for."""
        self._charged = False
        """Whether the next one was counted already."""

    def begin(self) -> None:
        """One more. Raises RefusedError (429)."""
        take = self._limits.begin if self._charged else self._limits.charge_and_begin
        self._charged = False
        self._sender_usage = take(self._sender)

    def check_agent(self, agent_id: str) -> Reason | None:
        """See `Admits`: the limits of an agent, wherever it comes from."""
        if self._agent[0] != agent_id:
            self._agent = agent_id, f"agent:{agent_id}"
        try:
            self._agent_usage = self._limits.charge_and_begin(self._agent[1])
        except RefusedError as error:
            return Reason(code=error.code, message=error.message)
        return None

    def end(self) -> None:
        """It is over."""
        if self._sender_usage is not None:
            self._sender_usage.end()
            self._sender_usage = None
        if self._agent_usage is not None:
            self._agent_usage.end()
            self._agent_usage = None

    def defer(self) -> None:
        """It is over for now: the same one begins anew, and counts once."""
        self.end()
        self._charged = True


def _decrement(counts: dict[str, int], sender: str) -> None:
    counts[sender] -= 1
    if not counts[sender]:
        del counts[sender]


def _too_many(what: str, wait_s: float) -> RefusedError:
    return RefusedError(
        429,
        "too_many_requests",
        f"too many {what} from this sender; wait and try again",
        headers={"Retry-After": str(max(1, round(wait_s)))},
    )
