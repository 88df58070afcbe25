"""The private keys of a service: the one that it signs by now, and the one that follows it.

A new key is put beside the old one before the trust bundle names it, and signs a little after that: by then everybody
has read the bundle, and nobody meets a signature by a key that is not known yet. Nothing has to be restarted.
"""

from __future__ import annotations

import glob
import logging
from pathlib import Path

from ringfence.kernel.base.clock import Clock
from ringfence.kernel.crypto.keys import KeyFileError, SigningKey, valid_key
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.messages.base import ServiceRole
from ringfence.messages.keys import KeyRecord

log = logging.getLogger(__name__)

NEXT = "-next"
"""How the name of the file of the key that follows ends: `issuer-next.json` beside `issuer.json`."""
BEFORE = "-before-"
"""In the name of the file of a key that others have followed, and that still opens what was sealed to it."""
SETTLE_S = 10
"""For so long after a bundle a key that is new in it signs nothing: twice the grace after which a process that is
behind denies by itself."""
_UNDER_WAY_S = 5
"""What is signed now may be appended so much later, by a broker's clock that may be ahead: it is judged by that."""


def next_file(file: Path) -> Path:
    """Where the key lies that follows the one in `file`."""
    return file.with_name(f"{file.stem}{NEXT}{file.suffix}")


def file_before(file: Path, kid: str) -> Path:
    """Where the key `kid` lies that was in `file` and is still needed: `issuer-seal-before-1aB2cD3e.json`."""
    return file.with_name(f"{file.stem}{BEFORE}{kid[:8]}{file.suffix}")


def files_before(file: Path) -> list[Path]:
    """The files of the keys that were in `file` and are still here."""
    return sorted(file.parent.glob(f"{glob.escape(file.stem + BEFORE)}*{glob.escape(file.suffix)}"))


class ServiceKeys:
    """Chooses the key to sign by: the youngest that is here and has counted for a while."""

    def __init__(self, file: Path, trust: TrustStore, clock: Clock) -> None:
        """Raises KeyFileError where there is no usable key in `file`, or another service's in the file beside it."""
        self._file = file
        self._trust = trust
        self._clock = clock
        self._held: tuple[SigningKey, ...] = ()
        self._current = SigningKey.load(file)
        self._settled_s: dict[str, int] = {}
        """From when on the bundles that were seen let a key sign, by its name."""
        self._choose_at_s = float("inf")
        self.reload()

    def reload(self) -> None:
        """Read the files again: a key that follows may have come. Raises KeyFileError, and keeps those it had."""
        held = [SigningKey.load(self._file)]
        following = next_file(self._file)
        if following.exists():
            held.append(SigningKey.load(following))
        if any(key.id != self._current.id for key in held):
            raise KeyFileError(f"{following} holds the key of {held[-1].id}, not of {self._current.id}")
        self._held = tuple(held)
        self._choose()

    def on_bundle(self, appended_at_ms: int) -> None:
        """Take note of the bundle that has just come into force, and look for the keys that it names."""
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
        """The key to sign by now."""
        if self._clock.now_ms() >= self._choose_at_s * 1000:
            self._choose()
        return self._current

    def unknown(self, role: ServiceRole) -> str | None:
        """Why nobody would believe what this service signs: the bundle in force names none of its keys for its role.

        Not asked is whether they count by now: one that ended is another matter.
        """
        services = self._trust.require().services if self._trust.version is not None else ()
        held = {key.kid for key in self._held}
        if any(
            service.id == self._current.id
            and role in service.roles
            and not held.isdisjoint(key.kid for key in service.keys)
            for service in services
        ):
            return None
        return (
            f"the trust bundle in force has no {role} {self._current.id} with the key in {self._file}, so nobody would "
            f"believe what it signs; put the {role}'s own key there (RINGFENCE_KEY_FILE), or publish the bundle that "
            "names this one: ringfence init --publish"
        )

    def uncounted(self, role: ServiceRole) -> str | None:
        """Why nobody believes what this service signs now, or will when it is appended: the bundle in force names no
        key of it that counts. None where one does; and where there is no bundle in force, which is another matter.
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
        # One that has just begun is better than none: so it is where the old one was stolen, and ended at once.
        chosen = settled[-1] if settled else counting[0] if counting else self._current
        if chosen.kid != self._current.kid:
            log.info("%s signs by its key %s now", chosen.id, chosen.kid)
        self._current = chosen
        self._choose_at_s = self._next_change(records, now_s)

    def _next_change(self, records: tuple[KeyRecord, ...], now_s: float) -> float:
        """When the choice may be another: a key settles, begins, or ends."""
        held = {key.kid for key in self._held}
        moments = [self._settled_s.get(kid, 0) for kid in held]
        for record in records:
            if record.kid in held:
                moments += [record.not_before, record.not_after]
        return min((moment for moment in moments if moment > now_s), default=float("inf"))
