"""What has to be said again of users though their directory said nothing new.

An operator changed the delegation: everybody gets what it gives now. Entitlements grow old: a directory tells what
changes, so while it calls, its silence about a user means that nothing did, and they are confirmed. Where it calls no
more, nothing is confirmed, and they run out.
"""

from __future__ import annotations

import asyncio
import logging

from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import RingfenceError, UnavailableError
from ringfence.messages.registry import Delegation, UserRecord
from ringfence.scim.directory_view import DirectoryView
from ringfence.scim.provisioning import ProvisioningWriter, differs_from_delegation
from ringfence.scim.settings import ScimSettings

log = logging.getLogger(__name__)


class EntitlementRefresh:
    """Looks at all users now and then."""

    def __init__(
        self, view: DirectoryView, writer: ProvisioningWriter, settings: ScimSettings, clock: Clock
    ) -> None:
        self._view = view
        self._writer = writer
        self._settings = settings
        self._clock = clock
        self._last_request_s = 0

    def note_request(self) -> None:
        """The directory called, with a token that is let in."""
        self._last_request_s = self._clock.now_ms() // 1000

    async def run(self) -> None:
        """Every `check_s`. Does not end."""
        while True:
            try:
                await self.refresh()
            except (RingfenceError, OSError) as error:
                log.warning("users could not be confirmed this time: %s", error)
            await asyncio.sleep(self._settings.check_s)

    async def refresh(self) -> int:
        """Say again what has to be; of how many users."""
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
            except RingfenceError as error:  # one who cannot be said again keeps nobody else from it
                log.warning("user %s could not be confirmed: %s", record.state.user_id, error)
        return refreshed

    def _as_of(self, record: UserRecord, delegation: Delegation, now_s: int) -> int | None:
        """As of when a user is to be said again; None where all is well, or an operator disabled them."""
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
