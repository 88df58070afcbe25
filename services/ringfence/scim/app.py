"""Wiring of the SCIM 2.0 service provider."""

from __future__ import annotations

from ringfence.client.admin.provisioner import Provisioner
from ringfence.client.settings import ClientSettings
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.base.settings import BusSettings, ServiceSettings, load
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.service.bearer_tokens import Tokens
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.credential import Reason
from ringfence.messages.operations import EventSubject
from ringfence.messages.topics import HEARTBEAT, USER
from ringfence.model.records.alarms import report_alarms
from ringfence.model.records.directory import Directory
from ringfence.scim.http import ScimApi
from ringfence.scim.provisioning import (
    DirectoryView,
    EntitlementRefresh,
    ProvisioningWriter,
)
from ringfence.scim.settings import ScimSettings

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
