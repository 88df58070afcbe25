"""Follows a run while it goes on: tells the prober what has just ended, and knows when nothing is open any more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import orjson

from ringfence.client.settings import ClientSettings
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.jwe import unverified_kid
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.messages.base import typ_header
from ringfence.messages.credential import CredentialRequest
from ringfence.messages.lease import TERMINAL, Lease, LeaseEpoch
from ringfence.messages.operations import DeadLetter
from ringfence.messages.topics import AUDIT, CREDENTIAL_REPLY, CREDENTIAL_REQUEST, DEAD_LETTER, LEASE
from ringfence.model.leases.epochs import Epochs
from tests.chaos.reading import TOLD


class Watch:
    """Nothing is verified here, and nothing is judged by it."""

    def __init__(self, settings: ClientSettings, nudge: Callable[[str], None]) -> None:
        self._follower = Follower(settings, (*TOLD, CREDENTIAL_REPLY, AUDIT), self._take, since_ms=None)
        self._nudge = nudge
        self._epochs = Epochs(TrustStore(settings.trust_domain, settings.trust_root))
        self._open: set[str] = set()
        self._over: set[str] = set()
        self._untold: set[tuple[str, int, int]] = set()
        self._told: set[tuple[str, int, int]] = set()
        self._asked: set[str] = set()
        """Requests, as to whom a reply must be sealed."""
        self._answered: set[str] = set()
        self._dead: set[tuple[str, int, int]] = set()
        self._asked_at: dict[tuple[str, int, int], str] = {}
        """Requests by where they are: one that does not verify becomes a dead letter, and gets no reply."""

    async def __aenter__(self) -> Watch:
        await self._follower.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._follower.stop()

    async def settled(self, within_s: float) -> str | None:
        """Return when every request is answered, every lease is over, and audit has told everything.

        What is missing where nothing more of that came about for `within_s`.
        """
        try:
            async with asyncio.timeout(within_s) as patience:
                while not await self._follower.caught_up(within_s):
                    await asyncio.sleep(0.1)
                least = self._missing
                while self._missing:
                    await asyncio.sleep(0.1)
                    if self._missing < least:
                        least = self._missing
                        patience.reschedule(asyncio.get_running_loop().time() + within_s)
        except TimeoutError:
            return (
                f"{len(self._open)} leases have not ended, {len(self._untold)} records have no audit event, "
                f"{len(self._unanswered)} requests are not answered {sorted(self._unanswered)[:5]}"
            )
        return None

    @property
    def _missing(self) -> int:
        return len(self._open) + len(self._untold) + len(self._unanswered)

    @property
    def _unanswered(self) -> set[str]:
        return self._asked - self._answered - {id for at, id in self._asked_at.items() if at in self._dead}

    def _take(self, records: Sequence[Received]) -> None:
        for record in records:
            if record.topic is AUDIT:
                source = orjson.loads(record.value)["unmapped"]["source"]
                self._tell((source["topic"], source["partition"], source["offset"]))
                continue
            if record.topic is CREDENTIAL_REPLY:
                self._answered.add(unverified_kid(record.value) or "")
                continue
            at = (record.topic_name, record.partition, record.offset)
            if at not in self._told:
                self._untold.add(at)
            if record.topic is LEASE:
                self._lease(record)
            elif record.topic is CREDENTIAL_REQUEST:
                self._request(record)
            elif record.topic is DEAD_LETTER:
                source = DeadLetter.model_validate_json(record.value).source
                self._dead.add((source.topic, source.partition, source.offset))

    def _tell(self, at: tuple[str, int, int]) -> None:
        self._told.add(at)
        self._untold.discard(at)

    def _request(self, record: Received) -> None:
        try:
            request = parse(record.value).unverified_claims(CredentialRequest)
        except InvalidMessageError:
            return
        id = message_id(request.iss, request.jti)
        self._asked.add(id)
        self._asked_at[record.topic_name, record.partition, record.offset] = id

    def _lease(self, record: Received) -> None:
        try:
            unverified = parse(record.value)
            if unverified.header.typ == typ_header(LeaseEpoch):
                self._epochs.begin(record, unverified.unverified_claims(LeaseEpoch).epoch)
                return
            lease = unverified.unverified_claims(Lease)
        except InvalidMessageError:
            return
        if self._epochs.is_void(record, lease.epoch):
            return
        if lease.status in TERMINAL:
            self._over.add(lease.lease_id)
            self._open.discard(lease.lease_id)
        elif lease.lease_id not in self._over:
            self._open.add(lease.lease_id)
        if lease.status != "active":
            self._nudge(lease.lease_id)
