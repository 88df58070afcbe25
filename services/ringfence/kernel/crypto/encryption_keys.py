"""The private keys of a service that credentials are sealed to: the one in its file, the one that follows it, and those
before that are still needed.

While two of them count, whoever seals seals to both, so nobody has to wait for anybody: a process opens by either.
"""

from __future__ import annotations

from pathlib import Path

from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.keys import KeyFileError
from ringfence.kernel.crypto.multi_recipient_jwe import EncryptionKey, recipients_of
from ringfence.kernel.crypto.service_keys import files_before, next_file
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.messages.base import ServiceRole
from ringfence.messages.keys import KeyRecord


class EncryptionKeys:
    """Opens what was sealed to any of the keys that are here."""

    def __init__(self, file: Path) -> None:
        """Raises KeyFileError where there is no usable key in `file`, or another service's in the file beside it."""
        self._file = file
        self._held: dict[str, EncryptionKey] = {}
        self.reload()

    def reload(self) -> None:
        """Read the files again: a key that follows may have come. Raises KeyFileError, and keeps those it had."""
        own, following = EncryptionKey.load(self._file), next_file(self._file)
        held = {}
        for file in (*files_before(self._file), self._file, *([following] if following.exists() else ())):
            key = held[file] = EncryptionKey.load(file)
            if key.id != own.id:
                raise KeyFileError(f"{file} holds the key of {key.id}, not of {own.id}")
        self._held = {key.kid: key for key in held.values()}

    @property
    def kids(self) -> frozenset[str]:
        """The names of the keys that are here."""
        return frozenset(self._held)

    def open(self, envelope: str | bytes) -> bytes:
        """The plaintext of an envelope that has one of these keys among its recipients.

        Raises InvalidMessageError where it is no envelope, or none for these keys.
        """
        key = next((self._held[kid] for kid in recipients_of(envelope) if kid in self._held), None)
        if key is None:
            raise InvalidMessageError("the envelope is not sealed to these keys", code="not_a_recipient")
        return key.open(envelope)

    def records(self, trust: TrustStore, role: ServiceRole, at_s: float, end_s: int) -> tuple[KeyRecord, ...]:
        """What to seal to for this service itself: its keys in the trust bundle, also one whose file is with another
        replica only; the youngest that is here, up to `end_s`, where the bundle has none.
        """
        *_, youngest = self._held.values()
        return trust.encryption_keys(role, at_s, of=youngest.id) or (youngest.record(end_s),)

    def missing_key(self, trust: TrustStore, role: ServiceRole, clock: Clock) -> str | None:
        """Which key is sealed to and not here, or None."""
        *_, youngest = self._held.values()
        named = trust.encryption_keys(role, clock.now_ms() / 1000, of=youngest.id)
        missing = [record.kid for record in named if record.kid not in self._held]
        if not missing:
            return None
        return (
            f"credentials are sealed to key {missing[-1]} of {youngest.id}, which is not here; put it to "
            f"{next_file(self._file)} and send SIGHUP: without it none can be opened once the keys before have ended"
        )
