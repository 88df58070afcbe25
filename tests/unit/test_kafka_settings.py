"""Who we are to Kafka, as settings say it: what does not fit together is refused at start, each with its remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ringfence.kernel.base.errors import SettingsError
from ringfence.kernel.base.settings import BusSettings, load
from ringfence.kernel.kafka.connection import connection, diagnosis
from ringfence.kernel.kafka.probe import Found, Listener, Silence, addresses


def test_without_any_setting_kafka_is_reached_in_clear():
    assert connection(BusSettings(kafka="h:1")) == {
        "bootstrap_servers": "h:1",
        "security_protocol": "PLAINTEXT",
    }


def test_brokers_are_always_verified():
    context = connection(BusSettings(kafka_security_protocol="SSL"))["ssl_context"]
    assert context.check_hostname
    assert context.verify_mode.name == "CERT_REQUIRED"


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"SECURITY_PROTOCOL": "SASL_SSL"}, "RINGFENCE_KAFKA_SASL_USERNAME"),
        ({"SECURITY_PROTOCOL": "SASL_SSL", "SASL_USERNAME": "me"}, "RINGFENCE_KAFKA_SASL_PASSWORD"),
        (
            {
                "SECURITY_PROTOCOL": "SASL_PLAINTEXT", "SASL_MECHANISM": "PLAIN", "SASL_USERNAME": "me",
                "SASL_PASSWORD": "env:X",
            },
            "use it with SASL_SSL",
        ),
        ({"SSL_KEY_FILE": "key.pem"}, "RINGFENCE_KAFKA_SSL_CERT_FILE"),
        ({"SECURITY_PROTOCOL": "SASL_SSL", "SASL_MECHANISM": "OAUTHBEARER"}, "RINGFENCE_KAFKA_SASL_TOKEN_SOURCE"),
        (
            {
                "SECURITY_PROTOCOL": "SASL_PLAINTEXT", "SASL_MECHANISM": "OAUTHBEARER",
                "SASL_TOKEN_SOURCE": "file:token",
            },
            "use it with SASL_SSL",
        ),
        (
            {
                "SECURITY_PROTOCOL": "SASL_SSL", "SASL_MECHANISM": "OAUTHBEARER",
                "SASL_TOKEN_SOURCE": "https://login.example/token",
            },
            "RINGFENCE_KAFKA_SASL_USERNAME",
        ),
        (
            {
                "SECURITY_PROTOCOL": "SASL_SSL", "SASL_MECHANISM": "OAUTHBEARER",
                "SASL_TOKEN_SOURCE": "exec:print-token 'hunter2",
            },
            "correct the quotes",
        ),
        ({"SASL_TOKEN_SOURCE": "hunter2"}, "RINGFENCE_KAFKA_SASL_TOKEN_SOURCE"),
        ({"SASL_TOKEN_SOURCE": "http://login.example/token"}, "RINGFENCE_KAFKA_SASL_TOKEN_SOURCE"),
        ({"SASL_TOKEN_SOURCE": "https://me:hunter2@login.example/"}, "RINGFENCE_KAFKA_SASL_TOKEN_SOURCE"),
        ({"SECURITY_PROTOCOL": "ssl"}, "RINGFENCE_KAFKA_SECURITY_PROTOCOL"),
        ({"SASL_PASSWORD": "hunter2"}, "RINGFENCE_KAFKA_SASL_PASSWORD"),
    ],
)  # fmt: skip
def test_inconsistent_kafka_settings_are_refused_by_name(
    environment: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
):
    for name, value in environment.items():
        monkeypatch.setenv(f"RINGFENCE_KAFKA_{name}", value)
    with pytest.raises(SettingsError, match=says) as refused:
        load(BusSettings)
    assert "hunter2" not in str(refused.value)


def test_a_password_that_others_can_read_is_not_used(tmp_path: Path):
    file = tmp_path / "password"
    file.write_text("hunter2")
    file.chmod(0o644)
    settings = BusSettings(
        kafka_security_protocol="SASL_SSL", kafka_sasl_username="me", kafka_sasl_password=f"file:{file}"
    )
    with pytest.raises(SettingsError, match="chmod 600") as refused:
        connection(settings)
    assert "hunter2" not in str(refused.value)
    file.chmod(0o600)
    options = connection(settings)
    assert (options["sasl_mechanism"], options["sasl_plain_username"]) == ("SCRAM-SHA-512", "me")


CLEAR = Listener(tls=False, sasl=False)
TLS = Listener(tls=True, sasl=False)
SCRAM = Listener(tls=True, sasl=True, mechanisms=("SCRAM-SHA-256",))
SCRAM_IN_CLEAR = Listener(tls=False, sasl=True, mechanisms=("SCRAM-SHA-512",))
ASKS_FOR_A_CERTIFICATE = Listener(tls=True, sasl=None)


@pytest.mark.parametrize(
    ("wanted", "found", "says"),
    [
        ("PLAINTEXT", Silence("nothing listens there"), "nothing listens there; .* RINGFENCE_KAFKA to"),
        ("PLAINTEXT", TLS, "takes TLS alone, and we came by PLAINTEXT; .*RINGFENCE_KAFKA_SECURITY_PROTOCOL to SSL"),
        ("PLAINTEXT", SCRAM, "RINGFENCE_KAFKA_SECURITY_PROTOCOL to SASL_SSL"),
        ("SASL_PLAINTEXT", ASKS_FOR_A_CERTIFICATE, "SSL or SASL_SSL"),
        ("PLAINTEXT", SCRAM_IN_CLEAR, "SCRAM-SHA-512.*RINGFENCE_KAFKA_SECURITY_PROTOCOL to SASL_PLAINTEXT"),
        ("PLAINTEXT", CLEAR, "OSError.*advertised.listeners"),
        ("SSL", CLEAR, "speaks no TLS.*RINGFENCE_KAFKA to a listener that does"),
        ("SSL", SCRAM, "we came by SSL; set RINGFENCE_KAFKA_SECURITY_PROTOCOL to SASL_SSL"),
        ("SSL", Listener(True, False, disbelieved="self-signed"), "self-signed.*RINGFENCE_KAFKA_SSL_CA_FILE"),
        ("SSL", ASKS_FOR_A_CERTIFICATE, "does not let us in by SSL.*RINGFENCE_KAFKA_SSL_\\*"),
        ("SASL_SSL", TLS, "knows no SASL"),
        ("SASL_SSL", SCRAM, "SCRAM-SHA-256, and we came by SCRAM-SHA-512; set RINGFENCE_KAFKA_SASL_MECHANISM"),
        ("SASL_PLAINTEXT", SCRAM_IN_CLEAR, "does not let us in.*RINGFENCE_KAFKA_SASL_\\*"),
    ],
)  # fmt: skip
def test_rejected_client_is_told_the_listener_and_the_setting(wanted: str, found: Found, says: str):
    who: dict[str, Any] = {"kafka_sasl_username": "me", "kafka_sasl_password": "env:X"}
    settings = BusSettings(kafka_security_protocol=wanted, **who if "SASL" in wanted else {})  # type: ignore[arg-type]
    told = diagnosis(settings, OSError(), {"h:1": found})
    assert re.search(says, told), told
    assert "h:1" in told or settings.kafka in told


def test_diagnosis_never_suggests_plain_text_instead_of_tls():
    told = diagnosis(BusSettings(kafka_security_protocol="SSL"), OSError(), {"h:1": CLEAR})
    assert "PLAINTEXT" not in told, "who is on the way could answer in clear in the place of Kafka"


def test_probed_addresses_are_those_of_the_client():
    settings = BusSettings(kafka="localhost,[::1]:1234,h:1")
    assert addresses(settings) == [("localhost", 9092), ("::1", 1234), ("h", 1)]


def test_of_several_each_is_told_and_one_that_answers_says_most():
    settings = BusSettings(kafka="a:1,b:2")
    gone = {"a:1": Silence("nothing listens there"), "b:2": Silence("there is no host b")}
    assert "a:1: nothing listens there; b:2: there is no host b" in diagnosis(settings, OSError(), gone)
    assert "Kafka at b:2 takes TLS" in diagnosis(settings, OSError(), {**gone, "b:2": TLS})


@pytest.mark.parametrize("host", ["a..b", f"{'x' * 64}.example", "ä" * 70])
def test_impossible_host_name_is_rejected_before_lookup(host: str):
    with pytest.raises(ValidationError, match="names no host"):
        BusSettings(kafka=f"kafka.example:9092,{host}:9092")
    assert BusSettings(kafka="broker-1.example.,bücher.example:9092,[::1]:1").kafka
