"""Decodes Kafka records of one topic into messages, verifies their signatures, and follows the trust bundle in force.

`TrustReader` reads the bundle from Kafka at the first call of `store`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ringfence.client.connection import READY_TIMEOUT_S
from ringfence.client.settings import ClientSettings, load_settings
from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.base.errors import InvalidMessageError, SignatureError, UnavailableError
from ringfence.kernel.base.validation_problems import explain
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.kernel.service.trust_updates import apply_bundle
from ringfence.messages.base import Claims, ExpiringClaims, Message, Topic, typ_header
from ringfence.messages.codes import Code
from ringfence.messages.topics import TRUST


class TrustReader:
    """Follows the topic `trust`, from the first call of `store` until `close`."""

    def __init__(self, settings: ClientSettings) -> None:
        """Raises SettingsError if the trust root is not pinned, once `store` is called."""
        self._settings = settings
        self._clock = SystemClock()
        self._lock = asyncio.Lock()
        self._store: TrustStore | None = None
        self._follower: Follower | None = None

    async def store(self) -> TrustStore:
        """The trust store, with a bundle in force.

        Raises:
            UnavailableError: Kafka does not answer, or has no trust bundle that the pinned root signed.
            SettingsError: the trust root is not pinned.
        """
        async with self._lock:
            if self._store is None:
                self._store, self._follower = await self._started()
            return self._store

    async def moved(self) -> bool:
        """Read the topic to its end. True if that put another bundle in force."""
        if self._store is None or self._follower is None:
            return False
        version = self._store.version
        await self._follower.caught_up(READY_TIMEOUT_S)
        return self._store.version != version

    async def close(self) -> None:
        """Disconnect. `store` connects again."""
        async with self._lock:
            follower, self._follower, self._store = self._follower, None, None
            if follower is not None:
                await follower.stop()

    async def _started(self) -> tuple[TrustStore, Follower]:
        settings = load_settings(self._settings)
        store = TrustStore(settings.trust_domain, settings.trust_root)
        follower = Follower(settings, [TRUST], self._reader(store))
        await follower.start()
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                await follower.complete.wait()
            if problem := store.unready():
                raise UnavailableError(problem)
        except TimeoutError:
            await follower.stop()
            raise UnavailableError(
                f"{TRUST.name(settings.topic_prefix)} was not read to its end within {READY_TIMEOUT_S:g} s"
            ) from None
        except BaseException:
            await follower.stop()
            raise
        return store, follower

    def _reader(self, store: TrustStore) -> Callable[[Sequence[Received]], None]:
        def on_records(records: Sequence[Received]) -> None:
            for record in records:
                apply_bundle(store, record, self._clock)

        return on_records


@dataclass(frozen=True, slots=True)
class UnknownMessage:
    """A record that this version does not know as a message, or whose signature does not verify: do not act on it.

    A newer Ringfence may have written it, or anybody else with Write on the topic.
    """

    topic: str
    partition: int
    offset: int
    appended_at_ms: int
    """When the broker appended the record, in milliseconds since 1970."""
    key: str | None
    value: bytes
    """The record's value as it stands on the topic; empty for a tombstone."""
    headers: Mapping[str, str]
    code: str
    """Why: `tombstone`, `typ_unexpected`, `claims_invalid`, `key_unknown`, `signature_invalid`, or another code of an
    invalid message."""
    reason: str
    """The same as a sentence, without values of the record."""


class RecordDecoder:
    """Turns records of one topic into messages. It never raises for what a record contains."""

    def __init__(self, topic: Topic[Any], trust: TrustReader) -> None:
        """`trust`: the keys of the services. It connects only if the topic's messages are signed."""
        self._topic = topic
        self._trust = trust
        self._signed = {typ_header(model): model for model in topic.models if issubclass(model, Claims)}

    async def decode(self, record: Received, value: bytes) -> Message | UnknownMessage:
        """The record's message.

        Args:
            record: the record, with its detached signature attached, if it has one.
            value: the value as it is on the topic.

        Raises UnavailableError if the trust bundle cannot be read: deliver the record again.
        """
        try:
            if not record.value:
                raise InvalidMessageError("the record deletes what its key names", code=Code.TOMBSTONE)
            return await self._verified(record) if self._signed else self._unsigned(record)
        except InvalidMessageError as error:
            return UnknownMessage(
                topic=record.topic_name,
                partition=record.partition,
                offset=record.offset,
                appended_at_ms=record.appended_at_ms,
                key=record.key,
                value=value,
                headers=record.headers,
                code=error.code,
                reason=str(error),
            )

    async def _verified(self, record: Received) -> Message:
        trust = await self._trust.store()
        try:
            return self._verify(record, trust)
        except SignatureError as error:
            # The bundle that has this key may have been published just before the record.
            if error.code != Code.KEY_UNKNOWN or not await self._trust.moved():
                raise
            return self._verify(record, trust)

    def _verify(self, record: Received, trust: TrustStore) -> Message:
        jws = parse(record.value)
        model = self._signed.get(jws.header.typ)
        if model is None:
            raise InvalidMessageError(
                f"the type {jws.header.typ[:80]!r} is not known here", code=Code.TYP_UNEXPECTED
            )
        return verify(
            jws,
            model,
            trust.finder(*model.signed_by, at_s=record.appended_at_ms / 1000),
            audience=trust.trust_domain,
            appended_at_ms=record.appended_at_ms if issubclass(model, ExpiringClaims) else None,
        ).claims

    def _unsigned(self, record: Received) -> Message:
        problem = ""
        for model in self._topic.models:
            try:
                message: Message = model.model_validate_json(record.value)
                return message
            except ValidationError as error:
                problem = problem or explain(error)
        raise InvalidMessageError(
            f"none of the messages of {self._topic.what}: {problem}", code=Code.CLAIMS_INVALID
        )
