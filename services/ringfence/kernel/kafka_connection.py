"""How Kafka is reached, and as whom: the one place where every client of it learns that."""

from __future__ import annotations

import ssl
from typing import Any

from ringfence.kernel.errors import SettingsError, UnavailableError
from ringfence.kernel.places import PlaceError, read_place
from ringfence.kernel.settings import BusSettings


def connection(settings: BusSettings) -> dict[str, Any]:
    """The options of an aiokafka client that say where the brokers are, how they are believed, and who connects.

    Raises SettingsError where a certificate or a password is not where the settings say.
    """
    options: dict[str, Any] = {
        "bootstrap_servers": settings.kafka,
        "security_protocol": settings.kafka_security_protocol,
    }
    if settings.kafka_security_protocol.endswith("SSL"):
        options["ssl_context"] = _tls(settings)
    if settings.kafka_security_protocol.startswith("SASL"):
        options |= {
            "sasl_mechanism": settings.kafka_sasl_mechanism,
            "sasl_plain_username": settings.kafka_sasl_username,
            "sasl_plain_password": _password(settings),
        }
    return options


def no_answer(settings: BusSettings, error: Exception) -> UnavailableError:
    """What is said where no connection comes about: a broker does not tell strangers why."""
    security = settings.kafka_security_protocol
    remedy = "set RINGFENCE_KAFKA, or RINGFENCE_KAFKA_SECURITY_PROTOCOL where it takes another"
    if security != "PLAINTEXT":
        remedy += f", and see who we are to it: RINGFENCE_KAFKA_{security.partition('_')[0]}_*, and its ACLs"
    why = type(error).__name__
    return UnavailableError(f"Kafka at {settings.kafka} does not answer by {security} ({why}); {remedy}")


def _tls(settings: BusSettings) -> ssl.SSLContext:
    """The brokers' certificates and names are always verified."""
    try:
        context = ssl.create_default_context(cafile=settings.kafka_ssl_ca_file)
    except (OSError, ssl.SSLError):
        raise SettingsError(
            f"RINGFENCE_KAFKA_SSL_CA_FILE: {settings.kafka_ssl_ca_file} holds no certificate (PEM) of an authority"
        ) from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if settings.kafka_ssl_cert_file is not None:
        try:
            context.load_cert_chain(settings.kafka_ssl_cert_file, settings.kafka_ssl_key_file, password="")
        except (OSError, ssl.SSLError):
            raise SettingsError(
                f"RINGFENCE_KAFKA_SSL_CERT_FILE, RINGFENCE_KAFKA_SSL_KEY_FILE: {settings.kafka_ssl_cert_file} and "
                f"{settings.kafka_ssl_key_file} are no certificate and its key (PEM, the key without a password)"
            ) from None
    return context


def _password(settings: BusSettings) -> str:
    assert settings.kafka_sasl_password is not None  # the settings see to it
    try:
        return read_place(settings.kafka_sasl_password, "the password for Kafka")
    except PlaceError as error:
        raise SettingsError(f"RINGFENCE_KAFKA_SASL_PASSWORD: {error}") from None
