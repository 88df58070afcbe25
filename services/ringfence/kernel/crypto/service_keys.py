"""The signing keys and the encryption keys of a service, and their rotation without a restart.

Signing: an operator puts the next key beside the current one before the trust bundle names it. The service signs with
it `SETTLE_S` after the bundle: by then all readers have the bundle, and know the key of each signature.

Encryption: a service has the current key, the next one, and former ones that are still needed. While two keys are
valid, senders encrypt to both, so that rotation needs no coordination: a process decrypts with the one that it has.
"""

from __future__ import annotations

import glob
import logging
from pathlib import Path

from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.jwe import EncryptionKey, recipients_of
from ringfence.kernel.crypto.keys import KeyFileError, SigningKey, valid_key
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.messages.base import KeyRecord, ServiceRole
from ringfence.messages.codes import Code

log = logging.getLogger(__name__)

NEXT = "-next"
"""Suffix of the file name of the next key: `issuer-next.json` beside `issuer.json`."""
BEFORE = "-before-"
"""Infix of the file name of a former key, which still decrypts what was encrypted to it."""
SETTLE_S = 10
"""A key that is new in the bundle signs nothing for so many seconds. It is twice the grace after which a process that
is behind denies by itself.
"""
_UNDER_WAY_S = 5
"""A message may be appended so many seconds after it was signed, by the clock of the broker, which may be ahead. The
append time is what counts.
"""


def next_file(file: Path) -> Path:
    return file.with_name(f"{file.stem}{NEXT}{file.suffix}")


def file_before(file: Path, kid: str) -> Path:
    """The file of the former key `kid` of `file`, for example `issuer-seal-before-1aB2cD3e.json`."""
    return file.with_name(f"{file.stem}{BEFORE}{kid[:8]}{file.suffix}")


def files_before(file: Path) -> list[Path]:
    """The files of former keys of `file` that exist."""
    return sorted(file.parent.glob(f"{glob.escape(file.stem + BEFORE)}*{glob.escape(file.suffix)}"))


class ServiceKeys:
    """Chooses the signing key: the newest one on this machine that has been valid for `SETTLE_S`."""

    def __init__(self, file: Path, trust: TrustStore, clock: Clock) -> None:
        """Raises KeyFileError if `file` holds no usable key, or if the next key's file belongs to another service."""
        self._file = file
        self._trust = trust
        self._clock = clock
        self._held: tuple[SigningKey, ...] = ()
        self._current = SigningKey.load(file)
        self._settled_s: dict[str, int] = {}
        """By `kid`: from when on the bundles seen so far let a key sign, in seconds."""
        self._choose_at_s = float("inf")
        self.reload()

    def reload(self) -> None:
        """Read the key files again, because the next key may have been added. On KeyFileError the former keys stay
        loaded.
        """
        loaded = [SigningKey.load(self._file)]
        following = next_file(self._file)
        if following.exists():
            loaded.append(SigningKey.load(following))
        if any(key.id != self._current.id for key in loaded):
            raise KeyFileError(f"{following} holds the key of {loaded[-1].id}, not of {self._current.id}")
        self._held = tuple(loaded)
        self._choose()

    def on_bundle(self, appended_at_ms: int) -> None:
        """A trust bundle came into force (append time in ms): note its keys, and read the key files again."""
        for record in self._records():
            begins = max(record.not_before, appended_at_ms // 1000) + SETTLE_S
            self._settled_s.setdefault(record.kid, begins)
        try:
            self.reload()
        except KeyFileError as error:
            log.error("going on with the keys of before: %s", error)
            self._choose()

    @property
    def current(self) -> SigningKey:
        if self._clock.now_ms() >= self._choose_at_s * 1000:
            self._choose()
        return self._current

    def unknown(self, role: ServiceRole) -> str | None:
        """The reason if the bundle in force names none of the loaded keys for this service and `role`, else None.

        Whether the keys are valid now is not checked here; see `uncounted`.
        """
        services = self._trust.require().services if self._trust.version is not None else ()
        loaded = {key.kid for key in self._held}
        if any(
            service.id == self._current.id
            and role in service.roles
            and not loaded.isdisjoint(key.kid for key in service.keys)
            for service in services
        ):
            return None
        return (
            f"the trust bundle in force has no {role} {self._current.id} with the key in {self._file}, so nobody would "
            f"believe what it signs; put the {role}'s own key there (RINGFENCE_KEY_FILE), or publish the bundle that "
            "names this one: ringfence init --publish"
        )

    def uncounted(self, role: ServiceRole) -> str | None:
        """The reason if nobody would accept a signature made now: no loaded key is valid by the bundle in force.

        Also checks a few seconds ahead, when the message may be appended. None if a key is valid, and if there is no
        bundle in force, which `TrustStore` reports.
        """
        now_s = self._clock.now_ms() / 1000
        if self._trust.version is None or self._trust.expired(now_s):
            return None
        if (reason := self.unknown(role)) is not None:
            return reason
        key, records = self.current, self._records()
        if all(valid_key(records, key.kid, at_s) for at_s in (now_s, now_s + _UNDER_WAY_S)):
            return None
        return (
            f"key {key.kid} of {key.id} in {self._file} has ended, or has not begun, by the trust bundle in force, so "
            "nobody believes what it signs; the root signs a bundle with another one: ringfence init --rotate-service "
            f"{role}, or, where it ended with the bundle before: ringfence init --renew; then --publish"
        )

    def _records(self) -> tuple[KeyRecord, ...]:
        services = self._trust.require().services if self._trust.version is not None else ()
        return tuple(key for service in services if service.id == self._current.id for key in service.keys)

    def _choose(self) -> None:
        now_s = self._clock.now_ms() / 1000
        records = self._records()
        counting = [key for key in self._held if valid_key(records, key.kid, now_s) is not None]
        settled = [key for key in counting if self._settled_s.get(key.kid, 0) <= now_s]
        # A key that has just begun is better than none, for example after the old one was stolen and ended at once.
        chosen = settled[-1] if settled else counting[0] if counting else self._current
        if chosen.kid != self._current.kid:
            log.info("%s signs by its key %s now", chosen.id, chosen.kid)
        self._current = chosen
        self._choose_at_s = self._next_change(records, now_s)

    def _next_change(self, records: tuple[KeyRecord, ...], now_s: float) -> float:
        """When the choice of the key may change: a key settles, begins or ends."""
        loaded = {key.kid for key in self._held}
        moments = [self._settled_s.get(kid, 0) for kid in loaded]
        for record in records:
            if record.kid in loaded:
                moments += [record.not_before, record.not_after]
        return min((moment for moment in moments if moment > now_s), default=float("inf"))


class EncryptionKeys:
    """Decrypts envelopes with any of the private keys on this machine."""

    def __init__(self, file: Path) -> None:
        """Raises KeyFileError if `file` holds no usable key, or if the next key's file belongs to another service."""
        self._file = file
        self._held: dict[str, EncryptionKey] = {}
        self.reload()

    def reload(self) -> None:
        """Read the key files again, because the next key may have been added. On KeyFileError the former keys stay
        loaded.
        """
        own, following = EncryptionKey.load(self._file), next_file(self._file)
        keys = {}
        for file in (*files_before(self._file), self._file, *([following] if following.exists() else ())):
            key = keys[file] = EncryptionKey.load(file)
            if key.id != own.id:
                raise KeyFileError(f"{file} holds the key of {key.id}, not of {own.id}")
        self._held = {key.kid: key for key in keys.values()}

    @property
    def kids(self) -> frozenset[str]:
        """The `kid`s of the loaded keys."""
        return frozenset(self._held)

    def open(self, envelope: str | bytes) -> bytes:
        """Decrypt an envelope that has one of these keys among its recipients, and return the plaintext.

        Raises InvalidMessageError if it is not an envelope, or not one for these keys.
        """
        key = next((self._held[kid] for kid in recipients_of(envelope) if kid in self._held), None)
        if key is None:
            raise InvalidMessageError("the envelope is not sealed to these keys", code=Code.NOT_A_RECIPIENT)
        return key.open(envelope)

    def records(self, trust: TrustStore, role: ServiceRole, at_s: float, end_s: int) -> tuple[KeyRecord, ...]:
        """The public keys to encrypt to for this service itself at `at_s`.

        These are the service's keys in the trust bundle, also those whose file only another replica has. If the bundle
        has none, it is the newest loaded key, valid until `end_s`.
        """
        *_, youngest = self._held.values()
        return trust.encryption_keys(role, at_s, of=youngest.id) or (youngest.record(end_s),)

    def missing_key(self, trust: TrustStore, role: ServiceRole, clock: Clock) -> str | None:
        """The reason if the trust bundle names an encryption key that is not loaded here, else None."""
        *_, youngest = self._held.values()
        named = trust.encryption_keys(role, clock.now_ms() / 1000, of=youngest.id)
        missing = [record.kid for record in named if record.kid not in self._held]
        if not missing:
            return None
        return (
            f"credentials are sealed to key {missing[-1]} of {youngest.id}, which is not here; put it to "
            f"{next_file(self._file)} and send SIGHUP: without it none can be opened once the keys before have ended"
        )
