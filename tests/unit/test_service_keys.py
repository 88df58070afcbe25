"""Which of its keys a service signs by, while one follows another; and what the ceremony makes of the bundle."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ringfence.client.admin.key_rotation import OVERLAP_S, renew, rotate_root, rotate_services
from ringfence.client.admin.trust_setup import CeremonyError, TrustFolder, make_trust
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.crypto.keys import KeyFileError, SigningKey
from ringfence.kernel.crypto.service_keys import SETTLE_S, ServiceKeys, next_file
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.messages.trust import TrustBundle
from tests.support.in_memory_registry import TD, FixedClock

ISSUER = f"spiffe://{TD}/service/issuer"


class Service:
    """An issuer that runs, with the files that the ceremony made."""

    def __init__(self, folder: TrustFolder) -> None:
        self.folder = folder
        self.clock = FixedClock(int(time.time()) * 1000)
        self.trust = TrustStore(TD, folder.fingerprint())
        self.keys = ServiceKeys(folder.service_key("issuer"), self.trust, self.clock)
        self.hear()

    def hear(self) -> None:
        """The bundle in the folder, just appended."""
        assert self.trust.load(self.folder.bundle.read_text().strip(), self.clock.ms / 1000)
        self.keys.on_bundle(self.clock.ms)

    @property
    def kid(self) -> str:
        """The key that it signs by."""
        return self.keys.current.kid

    def after(self, s: int) -> str:
        """The key that it signs by so much later."""
        self.clock.ms += s * 1000
        return self.kid

    def believed(self, kid: str) -> bool:
        return self.trust.service_key(ISSUER, kid, ("issuer",), self.clock.ms / 1000) is not None


@pytest.fixture
def folder(tmp_path: Path) -> TrustFolder:
    folder = TrustFolder(tmp_path)
    make_trust(folder, TD, "olga")
    return folder


def test_the_new_key_signs_once_everybody_has_heard_of_it(folder: TrustFolder) -> None:
    service = Service(folder)
    old = service.kid
    rotate_services(folder, ["issuer"])
    assert service.after(60) == old, "the file is there, and the bundle is not"
    service.hear()
    assert service.kid == old
    assert service.after(SETTLE_S - 1) == old
    new = service.after(1)
    assert new == SigningKey.load(next_file(folder.service_key("issuer"))).kid
    assert service.believed(old)
    assert service.believed(new)
    service.after(OVERLAP_S)
    assert not service.believed(old)
    assert service.kid == new


def test_service_started_during_a_rotation_signs_with_the_old_key(folder: TrustFolder) -> None:
    old = SigningKey.load(folder.service_key("issuer")).kid
    rotate_services(folder, ["issuer"])
    service = Service(folder)
    assert service.kid == old
    assert service.after(SETTLE_S) != old


def test_keys_follow_again_and_again_and_all_of_them_stay_known(folder: TrustFolder) -> None:
    service = Service(folder)
    used = [service.kid]
    for _ in range(3):
        rotate_services(folder, ["issuer"])
        service.hear()
        assert service.kid == used[-1]
        used.append(service.after(SETTLE_S))
    assert len(set(used)) == 4
    began_s = service.trust.require().iat
    for kid in used:
        assert service.trust.service_key(ISSUER, kid, ("issuer",), began_s) is not None


def test_a_stolen_key_ends_at_once_and_the_new_one_signs_at_once(folder: TrustFolder) -> None:
    service = Service(folder)
    old = service.kid
    rotate_services(folder, ["issuer"], compromised=True)
    service.after(1)
    service.hear()
    assert service.kid != old
    assert service.believed(service.kid)
    assert not service.believed(old)


def test_a_key_that_does_not_count_is_told_of_until_one_does(folder: TrustFolder) -> None:
    service = Service(folder)
    assert service.keys.uncounted("issuer") is None
    assert "has no audit" in (service.keys.uncounted("audit") or "")
    rotate_services(folder, ["issuer"], compromised=True)
    following = next_file(folder.service_key("issuer"))
    away = following.rename(following.with_suffix(".away"))
    service.after(1)
    service.hear()
    assert "--rotate-service issuer" in (service.keys.uncounted("issuer") or "")
    away.rename(following)
    service.keys.reload()
    assert service.keys.uncounted("issuer") is None


def test_a_key_does_not_count_for_what_would_be_appended_after_its_end(folder: TrustFolder) -> None:
    service = Service(folder)
    rotate_services(folder, ["issuer"])
    next_file(folder.service_key("issuer")).unlink()
    service.hear()
    ends_s = next(one.not_after for one in service.keys._records() if one.kid == service.kid)
    service.clock.ms = (ends_s - 6) * 1000
    assert service.keys.uncounted("issuer") is None
    service.clock.ms = (ends_s - 5) * 1000
    assert "has ended" in (service.keys.uncounted("issuer") or "")


def test_expired_bundle_is_not_reported_as_an_ended_key(folder: TrustFolder) -> None:
    service = Service(folder)
    service.clock.ms = service.trust.require().exp * 1000
    assert service.keys.uncounted("issuer") is None
    with pytest.raises(UnavailableError, match="expired"):
        service.trust.require(service.clock.ms / 1000)


def test_a_key_that_comes_after_its_bundle_is_read_when_told(folder: TrustFolder) -> None:
    """SIGHUP: the secret was mounted late."""
    service = Service(folder)
    old = service.kid
    rotate_services(folder, ["issuer"])
    late = next_file(folder.service_key("issuer"))
    hidden = late.rename(late.with_suffix(".hidden"))
    service.hear()
    assert service.after(SETTLE_S * 2) == old
    hidden.rename(late)
    service.keys.reload()
    assert service.kid == SigningKey.load(late).kid


def test_the_key_of_another_service_is_none_to_follow(folder: TrustFolder) -> None:
    service = Service(folder)
    old = service.kid
    SigningKey.load(folder.service_key("policy")).save(next_file(folder.service_key("issuer")))
    with pytest.raises(KeyFileError, match="service/policy"):
        service.keys.reload()
    assert service.kid == old


def test_the_others_keep_their_keys_and_the_bundle_lasts_longer(folder: TrustFolder) -> None:
    before = bundle_of(folder)
    after = rotate_services(folder, ["gateway"])
    assert after.version == before.version + 1
    assert after.exp >= before.exp
    same = {service.id: service for service in before.services}
    assert [s.id for s in after.services if s != same[s.id]] == [f"spiffe://{TD}/service/gateway"]


def test_a_service_that_nobody_knows(folder: TrustFolder) -> None:
    with pytest.raises(CeremonyError, match="there are: audit, console, gateway, issuer"):
        rotate_services(folder, ["isuer"])
    assert bundle_of(folder).version == 1


def test_expired_bundle_is_renewed(folder: TrustFolder) -> None:
    service = Service(folder)
    kid = service.kid
    service.clock.ms = (service.trust.require().exp + 1) * 1000
    assert not service.believed(kid)
    renew(folder, valid_s=2 * 365 * 86_400)
    service.hear()
    assert service.believed(kid)
    assert service.trust.expired(service.clock.ms / 1000) is None


def test_keys_that_ended_before_are_not_renewed(folder: TrustFolder) -> None:
    old = SigningKey.load(folder.service_key("issuer")).kid
    rotate_services(folder, ["issuer"], overlap_s=0)
    renewed = renew(folder)
    (issuer,) = (service for service in renewed.services if service.id == ISSUER)
    ends = {key.kid: key.not_after for key in issuer.keys}
    assert ends.pop(old) <= time.time()
    assert set(ends.values()) == {renewed.exp}


@pytest.mark.parametrize("pin", ["first", "last"])
def test_roots_follow_one_another_in_the_folder(folder: TrustFolder, pin: str) -> None:
    first = folder.fingerprint()
    fingerprints = [rotate_root(folder).fingerprint for _ in range(2)]
    assert folder.fingerprint() == fingerprints[-1]
    rotate_services(folder, ["issuer"])
    store = TrustStore(TD, first if pin == "first" else fingerprints[-1])
    assert store.load(folder.bundle.read_text().strip(), time.time())
    assert store.version == 4
    root_id = f"spiffe://{TD}/root"
    for kid in (first, *fingerprints):
        assert store.root_key(root_id, kid) is not None
    assert store.root_key(root_id, first, time.time() + 1) is None


def bundle_of(folder: TrustFolder) -> TrustBundle:
    store = TrustStore(TD, folder.fingerprint())
    store.load(folder.bundle.read_text().strip(), time.time())
    return store.require()
