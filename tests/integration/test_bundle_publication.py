"""A signed trust bundle is published without the root's key, and never in the place of a newer one."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from ringfence.client.admin.bundle_publication import publish_signed_bundle
from ringfence.client.admin.trust_setup import (
    CeremonyError,
    TrustFolder,
    add_gateways,
    make_trust,
    publish_bundle,
)
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.kafka.topics_admin import TopicsAdmin
from tests.conftest import Kafka

DOMAIN = "acme.example"


@pytest.fixture
def trust(tmp_path: Path) -> TrustFolder:
    folder = TrustFolder(tmp_path)
    make_trust(folder, DOMAIN, "olga")
    return folder


@pytest.fixture
async def settings(kafka: Kafka, trust: TrustFolder) -> ServiceSettings:
    """Topics of the test's own, and the root of its trust bundle."""
    own = ServiceSettings(
        kafka=kafka.bootstrap, embedded_broker=kafka.embedded, topic_prefix=f"bundles{uuid.uuid4().hex[:8]}",
        trust_domain=DOMAIN, trust_root=trust.fingerprint(), partitions=1,
    )  # fmt: skip
    async with TopicsAdmin(own) as admin:
        await admin.apply()
    return own


def bundle(trust: TrustFolder) -> str:
    return trust.bundle.read_text().strip()


async def test_bundle_is_published_once(trust: TrustFolder, settings: ServiceSettings) -> None:
    assert await publish_signed_bundle(bundle(trust), settings) == (1, True)
    assert await publish_signed_bundle(bundle(trust), settings) == (1, False)
    add_gateways(trust, ["edge"])
    assert await publish_signed_bundle(bundle(trust), settings) == (2, True)


async def test_older_bundle_is_left_out(trust: TrustFolder, settings: ServiceSettings) -> None:
    first = bundle(trust)
    add_gateways(trust, ["edge"])
    await publish_bundle(trust, settings)
    assert await publish_signed_bundle(first, settings) == (2, False)


async def test_other_bundle_of_the_same_version_is_rejected(
    trust: TrustFolder, settings: ServiceSettings
) -> None:
    first = bundle(trust)
    add_gateways(trust, ["edge"])
    await publish_signed_bundle(bundle(trust), settings)
    trust.bundle.write_text(first)
    add_gateways(trust, ["other"])
    with pytest.raises(CeremonyError, match="another trust bundle 2"):
        await publish_signed_bundle(bundle(trust), settings)


async def test_bundle_of_another_root_or_changed_on_its_way_is_rejected(
    trust: TrustFolder, settings: ServiceSettings, tmp_path: Path
) -> None:
    other = TrustFolder(tmp_path / "other")
    make_trust(other, DOMAIN, "eve")
    head, _, signature = bundle(trust).split(".")
    changed = f"{head}.{bundle(other).split('.')[1]}.{signature}"
    for compact in (bundle(other), changed, "no bundle"):
        with pytest.raises(InvalidMessageError):
            await publish_signed_bundle(compact, settings)


async def test_expired_bundle_is_rejected(settings: ServiceSettings, tmp_path: Path) -> None:
    expired = TrustFolder(tmp_path / "expired")
    root = make_trust(expired, DOMAIN, "olga", valid_s=-1)
    with pytest.raises(CeremonyError, match="expired"):
        await publish_signed_bundle(bundle(expired), settings.model_copy(update={"trust_root": root}))
