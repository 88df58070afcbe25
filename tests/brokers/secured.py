"""Apache Kafka as it is run where not everybody is trusted: TLS, clients that say who they are, and ACLs.

One certificate authority signs the broker and each party. Beside the clear port, on which the tests are everybody's
superior, there is one where a client shows its certificate and one where it knows a password (SCRAM).
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from ringfence.dev.processes import LOOPBACK, free_port
from tests.brokers.apache import ApacheKafka
from tests.support.oidc_tokens import TokenIssuer

ADMIN = "kafka-admin"
"""Who administers the broker, by certificate, password or token: may do everything."""
AUDIENCE = "kafka.test"
"""The `aud` of the tokens that the broker takes."""


class Authority:
    """A certificate authority of the test's own."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder = folder
        self._name = _name(name)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self._signed(self._name, self._key, authority=True)
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(self.certificate)

    def issue(self, name: str, *hosts: str) -> Path:
        """A certificate for `CN=<name>` on the loopback address, and for hosts; its key, and what they are signed by,
        in one file."""
        key = ec.generate_private_key(ec.SECP256R1())
        file = self._folder / f"{name}.pem"
        text = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        file.touch(0o600)
        file.write_bytes(text + self._signed(_name(name), key, hosts) + self.certificate)
        return file

    def _signed(
        self,
        name: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        hosts: Iterable[str] = (),
        *,
        authority: bool = False,
    ) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName(
                    [
                        x509.IPAddress(ipaddress.ip_address(LOOPBACK)),
                        *map(x509.DNSName, hosts),
                    ]
                ),
                critical=False,
            )
        )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)


class SecuredKafka:
    """The broker, and how each party connects to it."""

    def __init__(
        self,
        folder: Path,
        parties: Iterable[str],
        passwords: Mapping[str, str],
        tokens: TokenIssuer | None = None,
    ) -> None:
        """`parties` get certificates, `CN=<party>`; the keys of `passwords` are users of SCRAM-SHA-512.

        `tokens` for `AUDIENCE` let their `sub` in by OAUTHBEARER, as Kafka's own validator decides.
        """
        self.authority = self._authority = Authority(folder)
        self._tokens, self._token_port, self._jwks = tokens, free_port(), folder / "jwks.json"
        self._files = {party: self._authority.issue(party) for party in parties}
        self._broker_file = self._authority.issue("broker")
        self._tls_port, self._scram_port = free_port(), free_port()
        users = [f"SCRAM-SHA-512=[name={name},password={value}]" for name, value in passwords.items()]
        self.server = ApacheKafka(
            folder,
            adapt=self._secure,
            format_options=[part for user in users for part in ("--add-scram", user)],
        )
        if tokens is not None:
            self._jwks.write_text(tokens.jwks())
            allowed = f"-Dorg.apache.kafka.sasl.oauthbearer.allowed.urls={self._jwks.as_uri()}"
            self.server.java_options = (allowed,)

    def by_certificate(self, party: str, **fields: Any) -> dict[str, Any]:
        """Settings of a client that shows the certificate of a party."""
        return {
            "kafka": f"{LOOPBACK}:{self._tls_port}",
            "kafka_security_protocol": "SSL",
            "kafka_ssl_ca_file": self._authority.file,
            "kafka_ssl_cert_file": self._files[party],
            **fields,
        }

    def by_password(self, user: str, place: str, **fields: Any) -> dict[str, Any]:
        """Settings of a client that knows a password, which it reads from a place."""
        return {
            "kafka": f"{LOOPBACK}:{self._scram_port}",
            "kafka_security_protocol": "SASL_SSL",
            "kafka_ssl_ca_file": self._authority.file,
            "kafka_sasl_username": user,
            "kafka_sasl_password": place,
            **fields,
        }

    def by_token(self, source: str, **fields: Any) -> dict[str, Any]:
        """Settings of a client with tokens of a source."""
        return {
            "kafka": f"{LOOPBACK}:{self._token_port}",
            "kafka_security_protocol": "SASL_SSL",
            "kafka_ssl_ca_file": self._authority.file,
            "kafka_sasl_mechanism": "OAUTHBEARER",
            "kafka_sasl_token_source": source,
            **fields,
        }

    def _secure(self, properties: dict[str, str]) -> None:
        tls, scram = f"{LOOPBACK}:{self._tls_port}", f"{LOOPBACK}:{self._scram_port}"
        for name in ("listeners", "advertised.listeners"):
            properties[name] += f",TLS://{tls},SCRAM://{scram}"
        properties["listener.security.protocol.map"] += ",TLS:SSL,SCRAM:SASL_SSL"
        properties |= {
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(self._broker_file),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(self._authority.file),
            "listener.name.tls.ssl.client.auth": "required",
            "sasl.enabled.mechanisms": "SCRAM-SHA-512",
            "listener.name.scram.scram-sha-512.sasl.jaas.config": (
                "org.apache.kafka.common.security.scram.ScramLoginModule required;"
            ),
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": f"User:ANONYMOUS;User:CN={ADMIN};User:{ADMIN}",
        }
        if self._tokens is not None:
            self._take_tokens(properties, self._tokens)

    def _take_tokens(self, properties: dict[str, str], tokens: TokenIssuer) -> None:
        for name in ("listeners", "advertised.listeners"):
            properties[name] += f",TOKEN://{LOOPBACK}:{self._token_port}"
        properties["listener.security.protocol.map"] += ",TOKEN:SASL_SSL"
        package, listener = "org.apache.kafka.common.security.oauthbearer", "listener.name.token"
        properties |= {
            f"{listener}.sasl.enabled.mechanisms": "OAUTHBEARER",
            f"{listener}.oauthbearer.sasl.jaas.config": f"{package}.OAuthBearerLoginModule required;",
            f"{listener}.oauthbearer.sasl.server.callback.handler.class": (
                f"{package}.OAuthBearerValidatorCallbackHandler"
            ),
            f"{listener}.oauthbearer.sasl.oauthbearer.jwks.endpoint.url": self._jwks.as_uri(),
            f"{listener}.oauthbearer.sasl.oauthbearer.expected.issuer": tokens.issuer,
            f"{listener}.oauthbearer.sasl.oauthbearer.expected.audience": AUDIENCE,
            f"{listener}.oauthbearer.sasl.oauthbearer.clock.skew.seconds": "0",
        }


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
