"""What each record on `trust` was, judged in order: a bundle that came into force, the same again, or an older one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from ringfence.audit.memory import Recent
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.messages.trust import TrustBundle

_REMEMBERED = 10_000


class BundleSeen(NamedTuple):
    """A bundle that a root signed whom the pinned one led to."""

    fate: Literal["in force", "again", "fell"]
    """`again`: the very bundle in force; `fell`: a version that is not higher than that of the bundle in force."""
    bundle: TrustBundle
    kid: str
    """The root that signed it."""
    before: TrustBundle | None
    """What was in force until then."""


class Bundles:
    """Judges every record once, in the order of its offset: `trust` has one partition.

    It is read from the beginning at each start, so that a bundle of before is known as one after a restart as well.
    """

    def __init__(self, trust: TrustStore) -> None:
        """`trust`: an empty store, which nobody else feeds."""
        self._trust = trust
        self._in_force: TrustBundle | None = None
        self._next = 0
        self._seen: Recent[int, BundleSeen | InvalidMessageError] = Recent(_REMEMBERED)

    def on_records(self, records: Sequence[Received]) -> None:
        """Take in what stands there."""
        for record in records:
            self._take(record)

    def seen(self, record: Received) -> BundleSeen:
        """What a record was. Raises InvalidMessageError where it is no bundle that counts for anything."""
        self._take(record)
        seen = self._seen.get(record.offset)
        if seen is None:
            raise InvalidMessageError("too many bundles came after it", code="bundle_forgotten")
        if isinstance(seen, InvalidMessageError):
            raise seen
        return seen

    def _take(self, record: Received) -> None:
        if record.offset < self._next:
            return
        self._next = record.offset + 1
        try:
            self._seen.put(record.offset, self._judged(record))
        except InvalidMessageError as error:
            self._seen.put(record.offset, error)

    def _judged(self, record: Received) -> BundleSeen:
        if not record.value:
            raise InvalidMessageError("a bundle is never deleted", code="tombstone")
        known, before = self._trust.compact, self._in_force
        newer = self._trust.load(record.value, record.appended_at_ms / 1000)
        jws = parse(record.value)
        bundle = jws.unverified_claims(TrustBundle)  # the store verified it
        if newer:
            self._in_force = bundle
        fate: Literal["in force", "again", "fell"] = (
            "in force" if newer else "again" if record.value == known else "fell"
        )
        return BundleSeen(fate, bundle, jws.header.kid, before)
