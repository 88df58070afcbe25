"""TLS of our servers: a certificate and the authorities of clients, which are read again when a file changes."""

from __future__ import annotations

import logging
import ssl
import time
from pathlib import Path
from typing import Final

from ringfence.kernel.base.errors import SettingsError
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.base.settings import ServiceSettings

log = logging.getLogger(__name__)

_LOOK_EVERY_S: Final = 1.0


class ServerTls:
    """The TLS contexts of one listener.

    Each handshake takes the newest files. While they do not fit together, as in the middle of a renewal, it takes the
    former ones.
    """

    def __init__(
        self,
        settings: str,
        cert_file: Path,
        key_file: Path | None = None,
        client_ca_file: Path | None = None,
        *,
        client_required: bool = True,
    ) -> None:
        """`settings` is the beginning of the settings' names, `RINGFENCE_HTTP_TLS`, for errors.

        `key_file` may be left out if `cert_file` holds the key, too. `client_ca_file` has the authorities of clients'
        certificates, without which a handshake fails if `client_required`. Raises SettingsError if a file cannot be
        used.
        """
        self._settings = settings
        self._cert_file = cert_file
        self._key_file = key_file
        self._client_ca_file = client_ca_file
        self._verify_mode = ssl.CERT_NONE
        if client_ca_file is not None:
            self._verify_mode = ssl.CERT_REQUIRED if client_required else ssl.CERT_OPTIONAL
        self._seen = self._marks()
        self._looked_s = time.monotonic()
        self._current = self._load()
        self.context = self._load()
        """The context to start a listener with. It passes each handshake on to the newest context."""
        self.context.sni_callback = self._choose  # called without a server name, too

    def _choose(self, handshake: ssl.SSLObject, _: str | None, __: ssl.SSLContext) -> None:
        now_s = time.monotonic()
        if now_s - self._looked_s >= _LOOK_EVERY_S:
            self._looked_s = now_s
            self._renew()
        handshake.context = self._current

    def _renew(self) -> None:
        marks = self._marks()
        if marks == self._seen:
            return
        try:
            self._current = self._load()
        except SettingsError as error:
            log.warning("the former certificate stays in use: %s", error, extra=rate_limited("server tls"))
            return
        self._seen = marks
        log.info("certificate of %s read again", self._cert_file)

    def _marks(self) -> tuple[object, ...]:
        return tuple(_mark(file) for file in (self._cert_file, self._key_file, self._client_ca_file) if file)

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        context.verify_mode = self._verify_mode
        try:
            context.load_cert_chain(self._cert_file, self._key_file, password="")
        except (OSError, ssl.SSLError) as error:
            raise SettingsError(f"{self._settings}_CERT_FILE: {pem_error(error)}") from None
        if self._client_ca_file is not None:
            trust(context, self._client_ca_file, f"{self._settings}_CLIENT_CA_FILE")
        return context


def http_tls(settings: ServiceSettings) -> ServerTls | None:
    """Return the TLS of a service's HTTP; None if its settings name no certificate. Raises SettingsError."""
    if settings.http_tls_cert_file is None:
        return None
    return ServerTls(
        "RINGFENCE_HTTP_TLS",
        settings.http_tls_cert_file,
        settings.http_tls_key_file,
        settings.http_tls_client_ca_file,
    )


def trust(context: ssl.SSLContext, path: Path, setting: str) -> None:
    """Add the authorities (PEM) in a file. Raises SettingsError, which names the setting."""
    try:
        context.load_verify_locations(path)
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"{setting}: {pem_error(error)}") from None


def pem_error(error: OSError) -> str:
    """Return what is wrong with a PEM file, without any of its contents."""
    if isinstance(error, ssl.SSLError):
        return f"no usable PEM ({error.reason or 'unreadable'})"
    return f"cannot be read: {error.strerror}"


def _mark(file: Path) -> object:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
