"""How Kafka is reached, and as whom: the one place where every client of it learns that."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any

from aiokafka.errors import KafkaError, SaslAuthenticationFailed

from ringfence.kernel.base.errors import SettingsError, UnavailableError
from ringfence.kernel.base.secret_refs import PlaceError, read_secret
from ringfence.kernel.base.settings import BusSettings
from ringfence.kernel.kafka.oauth import TokenError, provider_of, sign_in
from ringfence.kernel.kafka.probe import Found, Listener, Silence, look


def connection(settings: BusSettings) -> dict[str, Any]:
    """The options of an aiokafka client for the brokers' addresses, their authentication, and the client's own.

    Raises SettingsError if a certificate or a password is not where the settings say.
    """
    options: dict[str, Any] = {
        "bootstrap_servers": settings.kafka,
        "security_protocol": settings.kafka_security_protocol,
    }
    if settings.kafka_security_protocol.endswith("SSL"):
        options["ssl_context"] = _tls(settings)
    if settings.signs_in_with_tokens:
        options |= {"sasl_mechanism": "OAUTHBEARER", "sasl_oauth_token_provider": provider_of(settings)}
    elif settings.kafka_security_protocol.startswith("SASL"):
        options |= {
            "sasl_mechanism": settings.kafka_sasl_mechanism,
            "sasl_plain_username": settings.kafka_sasl_username,
            "sasl_plain_password": _password(settings),
        }
    return options


async def no_answer(settings: BusSettings, error: Exception) -> UnavailableError:
    """The error for a failed connection. A broker does not tell strangers the reason, so this probes for it."""
    options = connection(settings)
    found = await look(settings, options.get("ssl_context"))
    if settings.signs_in_with_tokens:
        del options["bootstrap_servers"]
        error = await _refusal(options, found) or error
    return UnavailableError(diagnosis(settings, error, found))


async def _refusal(options: dict[str, Any], found: Mapping[str, Found]) -> Exception | None:
    """The error of a sign-in at the first listener. aiokafka only reports that there is no connection."""
    for at, one in found.items():
        if isinstance(one, Listener) and one.sasl and not one.disbelieved:
            host, _, port = at.rpartition(":")
            try:
                await sign_in(host, int(port), options)
            except (KafkaError, OSError, TimeoutError) as error:
                return error
            return None
    return None


def diagnosis(settings: BusSettings, error: Exception, found: Mapping[str, Found]) -> str:
    """What was wrong and what to do, from what was found at the addresses of the settings."""
    wanted = settings.kafka_security_protocol
    first = next(((at, one) for at, one in found.items() if isinstance(one, Listener)), None)
    if first is None:
        told = [one.why for one in found.values() if isinstance(one, Silence)]
        why = (
            told[0]
            if len(told) == 1
            else "; ".join(f"{at}: {one}" for at, one in zip(found, told, strict=True))
        )
        return (
            f"Kafka at {settings.kafka} does not answer: {why}; see that the broker runs, or set RINGFENCE_KAFKA to "
            "where it does"
        )
    at, listener = first
    if listener.tls and not wanted.endswith("SSL"):
        remedy = "set RINGFENCE_KAFKA_SECURITY_PROTOCOL to " + (
            "SASL_SSL" if listener.sasl else "SSL or SASL_SSL"
        )
        return f"Kafka at {at} takes TLS alone, and we came by {wanted}; {remedy}"
    if wanted.endswith("SSL") and not listener.tls:
        return (
            f"Kafka at {at} speaks no TLS, and we came by {wanted}; set RINGFENCE_KAFKA to a listener that does; "
            "without TLS whoever is on the way reads all, and may change it"
        )
    if listener.sasl and not wanted.startswith("SASL"):
        return (
            f"Kafka at {at} wants to know by SASL ({', '.join(listener.mechanisms)}) who we are, and we came by "
            f"{wanted}; set RINGFENCE_KAFKA_SECURITY_PROTOCOL to {listener.protocol}, and RINGFENCE_KAFKA_SASL_*"
        )
    if listener.sasl is False and wanted.startswith("SASL"):
        return (
            f"Kafka at {at} knows no SASL, and we came by {wanted}; set RINGFENCE_KAFKA to a listener that does, or "
            f"RINGFENCE_KAFKA_SECURITY_PROTOCOL to {listener.protocol}"
        )
    if listener.disbelieved:
        return (
            f"the certificate of Kafka at {at} is not believed ({listener.disbelieved}); set "
            "RINGFENCE_KAFKA_SSL_CA_FILE to its authority, or RINGFENCE_KAFKA to a name that it is for"
        )
    mechanism = settings.kafka_sasl_mechanism
    if listener.sasl and listener.mechanisms and mechanism not in listener.mechanisms:
        return (
            f"Kafka at {at} knows {', '.join(listener.mechanisms)}, and we came by {mechanism}; set "
            "RINGFENCE_KAFKA_SASL_MECHANISM"
        )
    if isinstance(error, TokenError):
        return f"there is no token to sign in to Kafka at {at}: {error.args[0]}"
    if isinstance(error, SaslAuthenticationFailed) and settings.signs_in_with_tokens:
        return (
            f"Kafka at {at} does not let us in: {error.args[0]}; see that the token has the issuer, the audience and "
            "the scope that it expects: RINGFENCE_KAFKA_SASL_TOKEN_SOURCE, RINGFENCE_KAFKA_SASL_SCOPE"
        )
    why = type(error).__name__
    if wanted == "PLAINTEXT":
        return (
            f"Kafka at {at} answers, but could not be used ({why}); see its own log, and that the addresses that it "
            "tells its clients (advertised.listeners) are reachable from here"
        )
    own = f"RINGFENCE_KAFKA_{wanted.partition('_')[0]}_*"
    return f"Kafka at {at} does not let us in by {wanted} ({why}); see who we are to it: {own}, and its ACLs"


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
        return read_secret(settings.kafka_sasl_password, "the password for Kafka")
    except PlaceError as error:
        raise SettingsError(f"RINGFENCE_KAFKA_SASL_PASSWORD: {error}") from None
