"""Reconciles users with the delegation, and confirms entitlements before they expire.

If an operator changed the delegation, every user gets what it grants now. Entitlements expire with age. A directory
reports changes only, so while it calls, its silence about a user means that nothing changed, and the entitlements are
confirmed. If it no longer calls, nothing is confirmed, and they expire.
"""

from __future__ import annotations

import logging

from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import RingfenceError, UnavailableError
from ringfence.kernel.base.retry import run_periodically
from ringfence.messages.registry import Delegation, UserRecord
from ringfence.scim.directory_view import DirectoryView
from ringfence.scim.provisioning import ProvisioningWriter, differs_from_delegation
from ringfence.scim.settings import ScimSettings

log = logging.getLogger(__name__)


class EntitlementRefresh:
    """Checks all users periodically."""

    def __init__(
        self, view: DirectoryView, writer: ProvisioningWriter, settings: ScimSettings, clock: Clock
    ) -> None:
        self._view = view
        self._writer = writer
        self._settings = settings
        self._clock = clock
        self._last_request_s = 0

    def note_request(self) -> None:
        """Record an authenticated call of the directory."""
        self._last_request_s = self._clock.now_ms() // 1000

    async def run(self) -> None:
        """Refresh every `check_s` seconds, for ever."""
        await run_periodically(
            self._settings.check_s, self.refresh, "users could not be confirmed this time", log,
            expected=(RingfenceError, OSError), at_once=True,
        )  # fmt: skip

    async def refresh(self) -> int:
        """Reprovision the users that need it. Returns how many."""
        try:
            delegation = self._view.delegation()
        except UnavailableError:
            return 0
        now_s, refreshed = self._clock.now_ms() // 1000, 0
        for record in list(self._view.all()):
            as_of = self._as_of(record, delegation, now_s)
            if as_of is None:
                continue
            try:
                await self._writer.reprovision(record, as_of)
                refreshed += 1
            except RingfenceError as error:  # a user whose command fails does not stop the others
                log.warning("user %s could not be confirmed: %s", record.state.user_id, error)
        return refreshed

    def _as_of(self, record: UserRecord, delegation: Delegation, now_s: int) -> int | None:
        """The `as_of` to reprovision a user with; None where nothing is due, or an operator disabled them."""
        if record.state.provisioned is not None and record.state.provisioned.blocked:
            return None
        if differs_from_delegation(record, delegation):
            # The delegation is another, and that is all that is known: what was of then stays of then.
            return record.state.entitlements.as_of
        return self._last_request_s if self._is_due(record, now_s) else None

    def _is_due(self, record: UserRecord, now_s: int) -> bool:
        if record.state.status != "active" or now_s - self._last_request_s > self._settings.heard_s:
            return False
        return self._last_request_s - record.state.entitlements.as_of > self._settings.confirm_s
