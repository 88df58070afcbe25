"""Keys that credentials are sealed to, while one follows another: who opens what, and what is told where one lacks."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ringfence.client.admin.key_rotation import OVERLAP_S, rotate_services
from ringfence.client.admin.trust_setup import TrustFolder, make_trust
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.jwe import EncryptionKey, enclose, recipients_of
from ringfence.kernel.crypto.keys import KeyFileError
from ringfence.kernel.crypto.service_keys import EncryptionKeys, files_before, next_file
from ringfence.kernel.crypto.trust_store import TrustStore
from tests.support.in_memory_registry import TD, FixedClock

GATEWAY = f"spiffe://{TD}/service/gateway"


class Place:
    """A gateway that runs, and an issuer that seals to it, with the files that the ceremony made."""

    def __init__(self, folder: TrustFolder) -> None:
        self.folder = folder
        self.clock = FixedClock(int(time.time()) * 1000)
        self.trust = TrustStore(TD, folder.fingerprint())
        self.keys = EncryptionKeys(folder.encryption_key("gateway"))
        self.hear()

    def hear(self) -> None:
        """The bundle in the folder is in force from now on; files are not read again yet."""
        assert self.trust.load(self.folder.bundle.read_text().strip(), self.clock.ms / 1000)

    def sealed(self) -> str:
        to = self.trust.encryption_keys("gateway", self.clock.ms / 1000, of=GATEWAY)
        return enclose(b"secret", to, about="x")

    def missing_key(self) -> str | None:
        return self.keys.missing_key(self.trust, "gateway", self.clock)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    folder = TrustFolder(tmp_path)
    make_trust(folder, TD, "olga")
    return Place(folder)


def test_key_rotation_needs_no_waiting(place: Place) -> None:
    before, (old,) = place.sealed(), place.keys.kids
    rotate_services(place.folder, ["gateway"])
    place.hear()
    between = place.sealed()
    assert place.keys.open(between) == b"secret", "its file has not come yet"
    assert str(next_file(place.folder.encryption_key("gateway"))) in (place.missing_key() or "")
    place.keys.reload()
    assert place.missing_key() is None
    assert set(recipients_of(between)) == place.keys.kids > {old}
    for envelope in (before, between):
        assert place.keys.open(envelope) == b"secret"
    place.clock.ms += OVERLAP_S * 1000
    after = place.sealed()
    assert set(recipients_of(after)) == place.keys.kids - {old}
    assert place.keys.open(after) == b"secret"
    assert place.keys.open(before) == b"secret", "what was sealed before stays as long as its file"


def test_to_a_stolen_key_nothing_is_sealed_any_more(place: Place) -> None:
    (old,) = place.keys.kids
    rotate_services(place.folder, ["gateway"], compromised=True)
    place.clock.ms += 1000
    place.hear()
    envelope = place.sealed()
    assert old not in recipients_of(envelope)
    with pytest.raises(InvalidMessageError, match="not sealed to these keys"):
        place.keys.open(envelope)
    place.keys.reload()
    assert place.keys.open(envelope) == b"secret"


def test_seal_keys_rotate_repeatedly(place: Place) -> None:
    used = [*place.keys.kids]
    for _ in range(3):
        rotate_services(place.folder, ["gateway"])
        place.hear()
        place.keys.reload()
        (new,) = place.keys.kids - set(used)
        used.append(new)
        assert place.keys.open(place.sealed()) == b"secret"
        place.clock.ms += OVERLAP_S * 1000
    assert len(set(used)) == 4


@pytest.mark.parametrize("compromised", [False, True])
def test_envelope_sealed_to_any_recent_key_opens(place: Place, compromised: bool) -> None:
    envelopes = [place.sealed()]
    for _ in range(3):
        rotate_services(place.folder, ["gateway"], compromised=compromised)
        place.clock.ms += 1000
        place.hear()
        place.keys.reload()
        envelopes.append(place.sealed())
    assert [EncryptionKeys(place.folder.encryption_key("gateway")).open(one) for one in envelopes] == [
        b"secret"
    ] * 4


def test_a_key_that_no_lease_can_need_is_kept_no_longer(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, began_s = place.folder.encryption_key("gateway"), time.time()
    for days, kept in ((0, 0), (0.5, 1), (0.7, 2), (2.9, 3), (3.1, 3), (10, 0)):
        monkeypatch.setattr("time.time", lambda days=days: began_s + days * 86_400)
        rotate_services(place.folder, ["gateway"])
        assert len(files_before(file)) == kept, days
        assert len(EncryptionKeys(file).kids) == kept + 2


def test_an_issuer_keeps_what_it_sealed_for_all_its_replicas(place: Place) -> None:
    """One that has its file meets one that has not: each opens what the other sealed to them."""
    early = EncryptionKeys(place.folder.encryption_key("issuer"))
    rotate_services(place.folder, ["issuer"])
    place.hear()
    late, now_s = EncryptionKeys(place.folder.encryption_key("issuer")), place.clock.ms / 1000
    for by, other in ((early, late), (late, early)):
        to = by.records(place.trust, "issuer", now_s, 0)
        assert other.open(enclose(b"secret", to, about="x")) == b"secret"


def test_without_a_key_in_the_bundle_an_issuer_seals_to_its_own(place: Place) -> None:
    (record,) = place.keys.records(TrustStore(TD, "none"), "gateway", 10, 20)
    assert (record.kid, record.not_after) == (*place.keys.kids, 20)


def test_the_key_of_another_service_is_none_to_follow(place: Place) -> None:
    before = place.keys.kids
    following = next_file(place.folder.encryption_key("gateway"))
    EncryptionKey.load(place.folder.encryption_key("issuer")).save(following)
    with pytest.raises(KeyFileError, match="service/issuer"):
        place.keys.reload()
    assert place.keys.kids == before


def test_a_service_that_is_not_sealed_to_gets_no_such_key(place: Place) -> None:
    rotate_services(place.folder, ["policy"])
    assert not place.folder.encryption_key("policy").exists()
    assert not next_file(place.folder.encryption_key("policy")).exists()
