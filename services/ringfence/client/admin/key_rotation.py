"""Rotates the keys of services, and the root itself, each by the next version of the trust bundle.

Services keep running, and what was signed before stays valid: see docs/trust.md.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from ringfence.client.admin.origins import NO_CHANGE, OriginChange, changed_origins
from ringfence.client.admin.trust_setup import (
    YEAR_S,
    CeremonyError,
    TrustFolder,
    load_root_and_bundle,
    sign_next_bundle,
)
from ringfence.kernel.crypto.jwe import EncryptionKey
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.service_keys import file_before, files_before, next_file
from ringfence.messages.base import KeyRecord
from ringfence.messages.trust import RootHandover, ServiceIdentity, TrustBundle

OVERLAP_S = 48 * 3600
"""Twice the longest life of a lease, in seconds: whatever the old key signed has ended before the key ends."""
_LONGEST_LEASE_S = OVERLAP_S // 2


@dataclass(frozen=True, slots=True)
class RotatedRoot:
    """The result of a root rotation."""

    bundle: TrustBundle
    fingerprint: str
    former: Path
    """The file that now holds the old root's private key."""


def renew(folder: TrustFolder, *, valid_s: int = YEAR_S, origins: OriginChange = NO_CHANGE) -> TrustBundle:
    """Sign the next version of the bundle with the same keys and a new end, even if the bundle has expired.

    Returns the bundle. Needs the root's key. Raises CeremonyError if there is no trust root, or if `origins` are
    invalid.
    """
    root, bundle = load_root_and_bundle(folder)
    now_s = int(time.time())
    services = tuple(_with_extended_keys(service, bundle.exp, now_s + valid_s) for service in bundle.services)
    rp_id, following = changed_origins(origins, now_s, bundle.rp_id, bundle.origins)
    return sign_next_bundle(
        folder, bundle, root, now_s,
        exp=now_s + valid_s, services=services, rp_id=rp_id, origins=following,
    )  # fmt: skip


def rotate_services(
    folder: TrustFolder,
    names: Sequence[str],
    *,
    overlap_s: int = OVERLAP_S,
    compromised: bool = False,
    valid_s: int = YEAR_S,
) -> TrustBundle:
    """Make each of these services (or gateways) a new key, and sign the next bundle, in which old and new keys overlap.

    The new key is written beside the old one (`<name>-next.json`). A key left there by the previous rotation first
    replaces the old one. Encryption keys rotate likewise. An old one that leases may still need is kept
    (`<name>-seal-before-<kid>.json`). `compromised`: the old keys end now.

    Returns the bundle. Needs the root's key. Raises CeremonyError if a name is not in the bundle, or there is no
    trust root.
    """
    root, bundle = load_root_and_bundle(folder)
    now_s = int(time.time())
    by_name = {service.id.rpartition("/")[2]: service for service in bundle.services}
    if unknown := [name for name in names if name not in by_name]:
        raise CeremonyError(
            f"{unknown[0]} is not in the trust bundle; there are: {', '.join(sorted(by_name))}"
        )
    end_s = max(bundle.exp, now_s + valid_s)
    old_ends_s = now_s if compromised else now_s + overlap_s
    rotated = {
        by_name[name].id: _with_new_keys(folder, name, by_name[name], now_s, old_ends_s, end_s)
        for name in dict.fromkeys(names)
    }
    services = tuple(rotated.get(service.id, service) for service in bundle.services)
    return sign_next_bundle(folder, bundle, root, now_s, exp=end_s, services=services)


def rotate_root(
    folder: TrustFolder, *, compromised_since_s: int | None = None, valid_s: int = YEAR_S
) -> RotatedRoot:
    """Make a new root. The old root signs a handover to it, and the new one signs the next version of the bundle.

    A process that pins the old root follows its handover. A process that pins the new one accepts what the old one
    signed while it was the root: up to now, or up to `compromised_since_s`.

    Raises CeremonyError if there is no trust root.
    """
    old, bundle = load_root_and_bundle(folder)
    now_s = int(time.time())
    new = SigningKey.generate(old.id)
    handover = RootHandover(
        iss=old.id, aud=bundle.aud, iat=now_s, jti=str(uuid.uuid4()), next_root=new.public
    )
    began_s = max((former.not_after for former in bundle.former_roots), default=0)
    ended_s = now_s if compromised_since_s is None else min(now_s, compromised_since_s)
    former = folder.root_key.with_name(f"root-{old.kid[:8]}.json")
    new_file = folder.root_key.with_suffix(".new")
    new_file.unlink(missing_ok=True)
    new.save(new_file)
    following = sign_next_bundle(
        folder, bundle, new, now_s,
        exp=max(bundle.exp, now_s + valid_s),
        former_roots=(*bundle.former_roots, old.record(ended_s, began_s)),
        handovers=(*bundle.handovers, sign(handover, old, header_jwk=True)),
    )  # fmt: skip
    folder.root_key.replace(former)
    new_file.replace(folder.root_key)
    return RotatedRoot(following, new.kid, former)


def _with_extended_keys(service: ServiceIdentity, old_end_s: int, end_s: int) -> ServiceIdentity:
    """The service, with those keys extended that were to last as long as the old bundle."""

    def longer(keys: tuple[KeyRecord, ...]) -> tuple[KeyRecord, ...]:
        return tuple(
            key.model_copy(update={"not_after": end_s}) if key.not_after >= old_end_s else key for key in keys
        )

    return service.model_copy(
        update={"keys": longer(service.keys), "encryption_keys": longer(service.encryption_keys)}
    )


def _with_new_keys(
    folder: TrustFolder, name: str, service: ServiceIdentity, now_s: int, old_ends_s: int, end_s: int
) -> ServiceIdentity:
    """The service with new keys, and an end for the old ones."""
    key = SigningKey.generate(service.id)
    key.save(_promote_next_key(folder.service_key(name)))
    keys = (*_with_end(service.keys, old_ends_s), key.record(end_s, now_s - 60))
    if not service.encryption_keys:
        return service.model_copy(update={"keys": keys})
    # Nobody encrypts to an ended key, but what was encrypted to it must be readable for as long as a lease lives.
    ending = _with_end(service.encryption_keys, old_ends_s)
    before = tuple(one for one in ending if one.not_after + _LONGEST_LEASE_S > now_s)
    _keep_former_key(folder.encryption_key(name), {one.kid for one in before})
    seal = EncryptionKey.generate(service.id)
    seal.save(_promote_next_key(folder.encryption_key(name)))
    sealed_to = (*before, seal.record(end_s, now_s - 60))
    return service.model_copy(update={"keys": keys, "encryption_keys": sealed_to})


def _keep_former_key(file: Path, needed: Collection[str]) -> None:
    """Save the key in `file` before the next one replaces it, if it is needed; delete saved ones that are not."""
    for aside in files_before(file):
        if EncryptionKey.load(aside).kid not in needed:
            aside.unlink()
    if next_file(file).exists() and file.exists() and (kid := EncryptionKey.load(file).kid) in needed:
        file.replace(file_before(file, kid))


def _promote_next_key(file: Path) -> Path:
    """Move the next key into `file` where there is one. Returns the path for the new next key."""
    following = next_file(file)
    if following.exists():
        following.replace(file)
    return following


def _with_end(keys: Sequence[KeyRecord], end_s: int) -> tuple[KeyRecord, ...]:
    return tuple(key.model_copy(update={"not_after": min(key.not_after, end_s)}) for key in keys)
