"""An installation whose services take TLS alone, from clients with a certificate: commands, doctor, a gateway."""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.gateway.certificates import Certificates
from tests.support.installation import STARTED, STOPPED, THIS_CLONE, WITHIN_S, Installation, lease, organise


class TlsInstallation(Installation):
    """All services by TLS: with `localhost` in one certificate, and one authority for services and clients."""

    tls: ssl.SSLContext

    def secure(self, certificates: Certificates) -> None:
        server, client = (
            certificates.server_file("localhost"),
            certificates.client("spiffe://acme.example/client"),
        )
        self.change(
            http_tls_cert_file=str(server),
            http_tls_client_ca_file=str(certificates.file),
            http_ca_file=str(certificates.file),
            http_client_cert_file=str(client),
            **{
                f"{name}_url": self.url(name).replace("http://127.0.0.1", "https://localhost")
                for name in STOPPED
            },
        )
        self.tls = certificates.trusting()
        self.tls.load_cert_chain(client)

    def unready(self, name: str) -> str | None:
        try:
            with (
                socket.create_connection(("127.0.0.1", self._ports[name]), timeout=5) as plain,
                self.tls.wrap_socket(plain, server_hostname="localhost") as connection,
            ):
                connection.sendall(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                answer = b""
                while part := connection.recv(65536):
                    answer += part
        except OSError as error:
            return str(error)
        return None if answer.startswith(b"HTTP/1.1 200") else answer.decode(errors="replace")


@pytest.fixture
def here(kafka: Kafka, redis_server: RedisServer, tmp_path: Path) -> Iterator[TlsInstallation]:
    made = TlsInstallation(
        THIS_CLONE, tmp_path, kafka=kafka.bootstrap, embedded_broker=kafka.embedded, redis_url=redis_server.url
    )  # fmt: skip
    try:
        made.make()
        made.secure(Certificates(tmp_path))
        made.start(*STARTED)
        yield made
    finally:
        made.end()


def test_commands_doctor_and_agents_work_by_tls_alone(here: TlsInstallation) -> None:
    task = organise(here)
    issued = lease(here, task, "10m")
    assert issued in here.leases()
    told = here.run("doctor", who="olga").stdout
    assert "policy" in told
    assert "does not answer" not in told
    deadline = time.monotonic() + WITHIN_S
    while issued not in (trail := json.dumps(here.say("audit", "trace", task, who="olga"))):
        assert time.monotonic() < deadline, trail


def test_refused_client_and_unknown_authority_are_told_which_setting_to_see(
    here: TlsInstallation, tmp_path: Path
) -> None:
    (tmp_path / "strangers").mkdir()
    strangers = Certificates(tmp_path / "strangers")
    for setting, file in (
        ("http_client_cert_file", strangers.client("spiffe://acme.example/client")),
        ("http_ca_file", strangers.file),
    ):
        here.change(**{setting: str(file)})
        done = here.run("inventory", who="olga")
        assert done.returncode == 1
        assert f"see RINGFENCE_{setting.upper()}" in done.stdout + done.stderr
