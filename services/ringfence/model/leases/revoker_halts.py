"""Whether a revoker has halted, by what revokers sign once a second: then orders to end leases may go unanswered.

Replicas of the revoker sign with one key, so a heartbeat that names nothing takes nothing back: it may be another
replica's. What was named counts until nobody has named it for the grace. One that died is heard no more and counts no
longer; what it left undone is then done by the others, or nobody confirms what stands on Kafka (`streams.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from ringfence.kernel.base.clock import RemoteClock
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import digest
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.messages.credential import Reason
from ringfence.messages.operations import Heartbeat

if TYPE_CHECKING:  # rules use what stands here, and import nothing that does I/O
    from ringfence.kernel.kafka.record import Received

HALTED: Final = "revoker_halted"
"""The code of a denial for it."""
RETRY_AFTER_S = 30
"""When to ask again: a person has to look first."""
_CLOCKS_DIFFER_MS = 60_000
"""How far a revoker's clock may be from the broker's before its heartbeats count as old ones, sent again."""


class RevokerHalts:
    """The consumer groups that revokers name as halted."""

    def __init__(self, trust: TrustStore, *, grace_ms: int, broker: RemoteClock | None = None) -> None:
        """`broker`: the broker's time; by it alone the grace runs, whatever this machine's clock says."""
        self._trust = trust
        self._grace_ms = grace_ms
        self._broker = broker or RemoteClock()
        self._named: dict[str, int] = {}
        """By group: when the broker had the last heartbeat that names it."""
        self._seen: dict[str, int] = {}
        """When the broker first had each of these heartbeats: one that is sent again must not keep a halt alive."""

    def on_heartbeats(self, records: Iterable[Received]) -> None:
        """Take in what came on `heartbeat`; those that name nothing, and those of others, are passed over."""
        for record in records:
            self._broker.observe(record.appended_at_ms)
            for group in self._groups(record):
                self._named[group] = max(record.appended_at_ms, self._named.get(group, 0))

    def denial(self) -> Reason | None:
        """Why nothing may be issued or forwarded, or None."""
        if not self._named:
            return None
        since_ms = self._broker.now_ms() - self._grace_ms
        self._named = {group: at_ms for group, at_ms in self._named.items() if at_ms >= since_ms}
        if not self._named:
            return None
        groups = ", ".join(sorted(self._named)[:5])
        message = (
            f"a revoker has halted (consumer group {groups}), so what is ordered to end may live on: nothing is issued "
            "or forwarded; look at /readyz of each revoker and at its dead letters, mend what wrote them, restart it"
        )
        return Reason(code=HALTED, message=message)

    def _groups(self, record: Received) -> tuple[str, ...]:
        try:
            jws = parse(record.value)
            # Unverified claims can only pass over what names nothing.
            if not jws.unverified_claims(Heartbeat).halted:
                return ()
            find = self._trust.finder("revoker", at_s=record.appended_at_ms / 1000)
            beat = verify(jws, Heartbeat, find, audience=self._trust.trust_domain).claims
        except InvalidMessageError:
            return ()
        if abs(beat.at_ms - record.appended_at_ms) > _CLOCKS_DIFFER_MS or self._is_repeated(record):
            return ()
        return beat.halted

    def _is_repeated(self, record: Received) -> bool:
        since_ms = record.appended_at_ms - 2 * _CLOCKS_DIFFER_MS
        self._seen = {mark: at_ms for mark, at_ms in self._seen.items() if at_ms >= since_ms}
        mark = digest(record.value)
        return self._seen.setdefault(mark, record.appended_at_ms) != record.appended_at_ms
