"""Whether a service makes spans, and where they go: by its own setting, or by OpenTelemetry's for everybody.

It imports nothing of the extra `otel`, so that services start without it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from ringfence.kernel.base.errors import SettingsError
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.tracing.api import NOT_TRACING, Tracing, is_installed

log = logging.getLogger(__name__)


_PROTOCOL = "http/protobuf"


def of_service(role: str, instance: str, settings: ServiceSettings) -> Tracing:
    """What makes the spans of a service. `instance` is a name that no other process has.

    Raises SettingsError where it is asked for what cannot be done.
    """
    url = where_to(settings.otlp_endpoint, os.environ)
    if url is None:
        return NOT_TRACING
    if not is_installed("opentelemetry.exporter.otlp.proto.http"):
        missing = "that needs the extra `otel` (ringfence[otel]): pip install '.[otel]'"
        if settings.otlp_endpoint:
            raise SettingsError(f"RINGFENCE_OTLP_ENDPOINT is set, and {missing}, or unset it")
        # Set for everything that runs there, perhaps: no reason not to work.
        log.warning("OTEL_EXPORTER_OTLP_ENDPOINT is set, and %s", missing)
        return NOT_TRACING
    from ringfence.kernel.tracing.export import Exporting  # it needs the extra

    return Exporting.to(url, role, settings.instance or instance)


def where_to(endpoint: str, environment: Mapping[str, str]) -> str | None:
    """The URL that spans are sent to, or None for nowhere.

    Args:
        endpoint: the setting, a base URL; `OTEL_EXPORTER_OTLP_ENDPOINT`, or what is for traces alone, where empty.

    Raises SettingsError where another protocol is asked for than there is.
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
