"""The encryption keys of a service: the current one, the next one, and former ones that are still needed.

Credentials are encrypted to these keys. While two keys are valid, senders encrypt to both, so that rotation needs no
coordination: a process decrypts with whichever it has.
"""

from __future__ import annotations

from pathlib import Path

from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.jwe import EncryptionKey, recipients_of
from ringfence.kernel.crypto.keys import KeyFileError
from ringfence.kernel.crypto.service_keys import files_before, next_file
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.messages.base import ServiceRole
from ringfence.messages.keys import KeyRecord


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
            raise InvalidMessageError("the envelope is not sealed to these keys", code="not_a_recipient")
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
