"""Wiring of the SCIM 2.0 service provider, and the periodic refresh of users' entitlements from the delegation.

If an operator changed the delegation, every user gets what it grants now. Entitlements expire with age. A directory
reports changes only, so while it calls, its silence about a user means that nothing changed, and the entitlements are
confirmed. If it no longer calls, nothing is confirmed, and they expire.
"""

from __future__ import annotations

import logging

from ringfence.client.admin.provisioner import Provisioner
from ringfence.client.settings import ClientSettings
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import RingfenceError, UnavailableError
from ringfence.kernel.base.retry import run_periodically
from ringfence.kernel.base.settings import BusSettings, ServiceSettings, load
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.service.bearer_tokens import Tokens
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.credential import Reason
from ringfence.messages.operations import EventSubject
from ringfence.messages.registry import Delegation, UserRecord
from ringfence.messages.topics import HEARTBEAT, USER
from ringfence.model.records.alarms import report_alarms
from ringfence.model.records.directory import Directory
from ringfence.scim.http import ScimApi
from ringfence.scim.provisioning import DirectoryView, ProvisioningWriter, differs_from_delegation
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


_CAUGHT_UP_S = 10.0


def build(settings: ServiceSettings, own: ScimSettings | None = None, clock: Clock | None = None) -> Runtime:
    """A SCIM endpoint, ready to run. Raises SettingsError, KeyFileError, IdentityError."""
    own = own or load(ScimSettings)
    runtime = Runtime("scim", settings, clock)
    tokens = Tokens(own.tokens, "RINGFENCE_SCIM_TOKENS")
    provisioner = Provisioner.connect(
        SigningKey.load(own.provisioner), _as_client(settings), clock=runtime.clock
    )
    directory = Directory(runtime.trust, runtime.clock, grace_ms=None, on_alarm=report_alarms(runtime))
    runtime.table((USER, HEARTBEAT), directory.on_records)
    view = DirectoryView(directory, provisioner.id)

    async def caught_up() -> None:
        if not await runtime.tables_caught_up(_CAUGHT_UP_S):
            raise UnavailableError("the table of users is behind; ask again")

    async def report_refusal(event_id: tuple[object, ...], reason: Reason) -> None:
        await runtime.event("refused", EventSubject.SCIM, about=event_id, reasons=(reason,))

    writer = ProvisioningWriter(view, provisioner, caught_up, own.mail_domain)
    refresh = EntitlementRefresh(view, writer, own, runtime.clock)
    runtime.on_start(provisioner.start)
    runtime.on_stop(provisioner.close)
    runtime.background("confirming", refresh.run)
    runtime.denies_when(lambda: _undelegated(view))
    runtime.routes += ScimApi(
        view,
        writer,
        tokens,
        runtime.clock,
        url=own.url,
        on_request=refresh.note_request,
        report_refusal=report_refusal,
    ).routes()
    return runtime


def _as_client(settings: ServiceSettings) -> ClientSettings:
    """Client settings with the Kafka connection of the service."""
    return ClientSettings(**{name: getattr(settings, name) for name in BusSettings.model_fields})


def _undelegated(view: DirectoryView) -> str | None:
    try:
        view.provisioner()
    except UnavailableError as error:
        return str(error)
    return None
