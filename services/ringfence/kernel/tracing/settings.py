"""Settings of tracing: whether a service records spans, and where it exports them.

Ringfence's own setting comes first, then OpenTelemetry's for all programs. This module imports nothing of the extra
`otel`, so that services start without it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from ringfence.kernel.base.errors import SettingsError
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.tracing.api import NOT_TRACING, Tracing

log = logging.getLogger(__name__)

_PROTOCOL = "http/protobuf"


def of_service(role: str, instance: str, settings: ServiceSettings) -> Tracing:
    """Return the tracing of a service. `instance` is a name that no other process has.

    Raises SettingsError if the settings ask for something that is not possible.
    """
    url = where_to(settings.otlp_endpoint, os.environ)
    if url is None:
        return NOT_TRACING
    try:
        from ringfence.kernel.tracing.export import Exporting
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("opentelemetry"):
            raise
        missing = "that needs the extra `otel` (ringfence[otel]): pip install '.[otel]'"
        if settings.otlp_endpoint:
            raise SettingsError(f"RINGFENCE_OTLP_ENDPOINT is set, and {missing}, or unset it") from None
        # It may be set for everything on this machine, which is no reason to fail.
        log.warning("OTEL_EXPORTER_OTLP_ENDPOINT is set, and %s", missing)
        return NOT_TRACING
    return Exporting.to(url, role, settings.instance or instance)


def where_to(endpoint: str, environment: Mapping[str, str]) -> str | None:
    """Return the URL to export spans to, or None for no export.

    Args:
        endpoint: the setting, a base URL. If empty, the variables of OpenTelemetry for all signals
            (`OTEL_EXPORTER_OTLP_ENDPOINT`) and for traces count.

    Raises SettingsError if another protocol is requested than is supported.
    """  # fmt: skip
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    if environment.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        return None
    base = endpoint or environment.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
    whole = "" if endpoint else environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "")
    if not base and not whole:
        return None
    names = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    name = next((name for name in names if environment.get(name)), None)
    if name is not None and environment[name] != _PROTOCOL:
        raise SettingsError(
            f"{name} is {environment[name]!r}, and spans are sent as {_PROTOCOL} alone: "
            "set it so, with the port that takes that (4318, usually)"
        )
    return whole or f"{base.rstrip('/')}/v1/traces"
