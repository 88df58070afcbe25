"""The trust bundle in force, read from Kafka the first time that somebody needs it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from ringfence.client.connection import READY_TIMEOUT_S
from ringfence.client.settings import ClientSettings, load_settings
from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.kernel.service.trust_updates import apply_bundle
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
