"""Halted revokers: heartbeats name consumer groups that have halted. Then revocations may go unanswered.

Replicas of the revoker sign with one key. So a heartbeat without halts takes nothing back: it may be another replica's.
A named group counts until no heartbeat has named it for the grace. A revoker that died sends no heartbeats, and its
halt ends after the grace: other revokers do its work, or nobody confirms what is on Kafka (`stream_digests`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ringfence.kernel.base.clock import RemoteClock
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.jws import message_digest, parse, verify
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.messages.codes import Code
from ringfence.messages.operations import Heartbeat
from ringfence.model.verdict import ALLOWED, Verdict, refused

if TYPE_CHECKING:  # rules use this module, and import nothing that does I/O
    from ringfence.kernel.kafka.record import Received

RETRY_AFTER_S = 30
"""When a denied agent may ask again: a person has to act first."""
_CLOCKS_DIFFER_MS = 60_000
"""How far a revoker's clock may be from the broker's before its heartbeats count as replays of old ones."""


class RevokerHalts:
    """The consumer groups that revokers' heartbeats name as halted."""

    def __init__(self, trust: TrustStore, *, grace_ms: int, broker: RemoteClock | None = None) -> None:
        """`broker`: the broker's time. The grace is measured by it, not by this machine's clock."""
        self._trust = trust
        self._grace_ms = grace_ms
        self._broker = broker or RemoteClock()
        self._named: dict[str, int] = {}
        """By group: append time of the last heartbeat that names it, in ms."""
        self._seen: dict[str, int] = {}
        """By `message_digest` of a heartbeat: its first append time (ms). A replayed one must not keep a halt alive."""

    def on_heartbeats(self, records: Iterable[Received]) -> None:
        """Process records of `heartbeat`. Those that name no halt, and those of other services, are ignored."""
        for record in records:
            self._broker.observe(record.appended_at_ms)
            for group in self._groups(record):
                self._named[group] = max(record.appended_at_ms, self._named.get(group, 0))

    def check(self) -> Verdict:
        """Check that no revoker has halted. Otherwise nothing may be issued or forwarded."""
        if not self._named:
            return ALLOWED
        since_ms = self._broker.now_ms() - self._grace_ms
        self._named = {group: at_ms for group, at_ms in self._named.items() if at_ms >= since_ms}
        if not self._named:
            return ALLOWED
        groups = ", ".join(sorted(self._named)[:5])
        message = (
            f"a revoker has halted (consumer group {groups}), so what is ordered to end may live on: nothing is issued "
            "or forwarded. Look at /readyz of each revoker and at its dead letters, mend what wrote them, restart it"
        )
        return refused(Code.REVOKER_HALTED, message)

    def _groups(self, record: Received) -> tuple[str, ...]:
        try:
            jws = parse(record.value)
            # Unverified claims only decide that a heartbeat without halts is ignored.
            if not jws.unverified_claims(Heartbeat).halted:
                return ()
            find = self._trust.finder("revoker", at_s=record.appended_at_ms / 1000)
            heartbeat = verify(jws, Heartbeat, find, audience=self._trust.trust_domain).claims
        except InvalidMessageError:
            return ()
        if abs(heartbeat.at_ms - record.appended_at_ms) > _CLOCKS_DIFFER_MS or self._is_repeated(record):
            return ()
        return heartbeat.halted

    def _is_repeated(self, record: Received) -> bool:
        since_ms = record.appended_at_ms - 2 * _CLOCKS_DIFFER_MS
        self._seen = {key: at_ms for key, at_ms in self._seen.items() if at_ms >= since_ms}
        key = message_digest(record.value)
        return self._seen.setdefault(key, record.appended_at_ms) != record.appended_at_ms
