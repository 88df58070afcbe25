"""Wiring of the signals service, a Shared Signals Framework (SSF 1.0) transmitter."""

from __future__ import annotations

from faststream import FastStream

from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.settings import ServiceSettings, load
from ringfence.kernel.service.bearer_tokens import Tokens
from ringfence.kernel.service.runtime import Runtime
from ringfence.kernel.service.service_description import describe, placeholder
from ringfence.messages.topics import LEASE, SIGNAL_STREAM
from ringfence.signals.delivery import DeliverySupervisor
from ringfence.signals.http import SignalsApi
from ringfence.signals.requests import read_receivers
from ringfence.signals.settings import SignalsSettings
from ringfence.signals.streams import StreamTable
from ringfence.signals.subscribers import router


def build(
    settings: ServiceSettings, own: SignalsSettings | None = None, clock: Clock | None = None
) -> Runtime:
    """An SSF transmitter, ready to run. Raises SettingsError, KeyFileError."""
    own = own or load(SignalsSettings)
    runtime = Runtime("signals", settings, clock)
    receivers = read_receivers(own.receivers)
    tokens = Tokens(own.tokens, "RINGFENCE_SIGNALS_TOKENS")
    streams = StreamTable(runtime)
    deliveries = DeliverySupervisor(runtime, own, streams, receivers)
    runtime.table((SIGNAL_STREAM,), streams.on_records)
    # Only the markers are kept of that topic: which records count is known before the first is reported.
    runtime.history((LEASE,), runtime.redeliver_after_rotation(deliveries.on_leases), since_ms=0)
    runtime.background("streams", deliveries.run)
    runtime.ready_when(deliveries.unready)
    runtime.warns_when(deliveries.warning)
    runtime.routes += SignalsApi(runtime, own, streams, deliveries, receivers, tokens).routes()
    return runtime


def described() -> FastStream:
    """What the service consumes and publishes, for AsyncAPI. Needs no settings, keys or broker."""
    return describe(
        "signals",
        router(
            stream_id="ID",
            leases=placeholder,
        ),
    )
