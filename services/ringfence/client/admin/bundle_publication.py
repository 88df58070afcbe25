"""Publication of a trust bundle that the root has signed, on a machine without the root."""

from __future__ import annotations

import contextlib
import time

from ringfence.client.admin.trust_setup import CeremonyError
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.settings import BusSettings
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Outbound
from ringfence.messages.topics import TRUST
from ringfence.messages.trust import TrustBundle


async def publish_signed_bundle(compact: str, settings: BusSettings) -> tuple[int, bool]:
    """Put a signed trust bundle (a compact JWS) on Kafka, unless Kafka has it or a newer one.

    Returns the version in force afterwards, and whether this call published it. Raises SignatureError or
    InvalidMessageError where the pinned root has not signed it; CeremonyError where it has expired, or where Kafka has
    another bundle of the same version; UnavailableError where Kafka does not answer.
    """
    from ringfence.kernel.kafka.producer import Publisher
    from ringfence.kernel.kafka.range_reader import Stretches

    store, found = (TrustStore(settings.trust_domain, settings.trust_root) for _ in range(2))
    store.load(compact, time.time())
    bundle = store.require()
    if reason := store.expired(time.time()):
        raise CeremonyError(reason)
    async with Publisher(settings, store.root_id) as publisher:
        await publisher.require(TRUST)
        async with Stretches(settings) as kafka:
            async for record in kafka.whole(TRUST):
                with contextlib.suppress(InvalidMessageError):
                    found.load(record.value, time.time())
        if found.version is not None and found.version >= bundle.version:
            if found.version == bundle.version and found.compact.decode() != compact:
                raise CeremonyError(
                    f"Kafka has another trust bundle {bundle.version}: the root signed two of one version; sign the "
                    "next one from the one on Kafka"
                )
            return found.version, False
        outbound = Outbound(str(bundle.version), compact, id=f"trust-{bundle.jti}")
        await (await publisher.send(TRUST, TrustBundle.typ, outbound))
    return bundle.version, True
