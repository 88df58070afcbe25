"""What `ringfence doctor` says of keys and trust: files, the bundle on Kafka, the keys in it, who goes by which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from ringfence.cli.doctor.finding import Finding
from ringfence.client.admin.trust_setup import SEAL, lacking
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.multi_recipient_jwe import EncryptionKey
from ringfence.kernel.crypto.service_keys import NEXT
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.messages.trust import ServiceIdentity

SOON_S = 14 * 86_400
"""So long before its end a person should know."""


def key_files(settings: ServiceSettings) -> list[Finding]:
    """The key files of services that are on this machine."""
    files = [settings.key_file] if settings.key_file else sorted(settings.key_dir.glob("*.json"))
    if not files:
        says = f"no key files in {settings.key_dir}: no service can be started from here"
        return [Finding("keys", "unknown", says)]
    return [_key_file(Path(file)) for file in files]


def _key_file(file: Path) -> Finding:
    try:
        if file.stem.removesuffix(NEXT).endswith(SEAL):
            id, kind = EncryptionKey.load(file).id, "X25519"
        else:
            key = SigningKey.load(file)
            id, kind = key.id, key.alg
    except RingfenceError as error:
        return Finding(f"key {file.stem}", "bad", str(error))
    return Finding(f"key {file.stem}", "good", f"{id}, {kind}, mode 0600")


def bundle_findings(trust: TrustStore, refused: Sequence[str], now_s: float) -> Iterator[Finding]:
    """The bundle that counts on Kafka, and the keys of services that end soon."""
    if trust.version is None:
        why = refused[-1] if refused else "there is none; run: ringfence init --publish"
        yield Finding("trust bundle", "bad", f"no bundle on Kafka counts: {why}")
        return
    if expired := trust.expired(now_s):
        yield Finding("trust bundle", "bad", expired)
        return
    bundle = trust.require()
    days = (bundle.exp - now_s) / 86_400
    says = f"version {bundle.version}, {len(bundle.services)} services, for {days:.0f} days"
    if bundle.exp - now_s < SOON_S:
        remedy = "sign a new one before it ends: ringfence init --renew --publish"
        yield Finding("trust bundle", "bad", f"{says}; {remedy}")
    else:
        yield Finding("trust bundle", "good", says)
    for role in lacking(bundle):
        says = (
            f"no keys in the trust bundle; where it is wanted: ringfence init --add-service {role} --publish"
        )
        yield Finding(f"keys of {role}", "unknown", says)
    for service in bundle.services:
        if (ending := _ending(service, now_s)) is not None and ending < bundle.exp:
            yield _keys_end(service, ending, now_s)


def _ending(service: ServiceIdentity, now_s: float) -> int | None:
    """When the last key of a service ends, to sign by or to seal to, where that is soon, or was."""
    last = max((key.not_after for key in service.keys), default=0)
    if service.encryption_keys:
        last = min(last, max(key.not_after for key in service.encryption_keys))
    return last if last - now_s < SOON_S else None


def _keys_end(service: ServiceIdentity, ending_s: int, now_s: float) -> Finding:
    name = service.id.rpartition("/")[2]
    day = datetime.fromtimestamp(ending_s, UTC).date()
    said = f"its last key ended on {day}" if ending_s <= now_s else f"its last key ends on {day}"
    return Finding(f"keys of {name}", "bad", f"{said}; run: ringfence init --rotate-service {name} --publish")


def versions(on_kafka: int | None, in_force: Mapping[str, int | None]) -> Finding | None:
    """Whether the services that answered have the bundle that is on Kafka; None where nothing can be compared."""
    if not in_force or on_kafka is None:
        return None
    if others := {role: said for role, said in in_force.items() if said != on_kafka}:
        named = ", ".join(f"{role} has {said or 'none'}" for role, said in sorted(others.items()))
        says = f"on Kafka is version {on_kafka}, and {named}: restart it where that stays so"
        return Finding("trust bundle in force", "bad", says)
    return Finding(
        "trust bundle in force", "good", f"version {on_kafka}, at all {len(in_force)} that answered"
    )
