"""Who we are to Kafka, as settings say it: what does not fit together is refused at start, each with its remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringfence.kernel.errors import SettingsError
from ringfence.kernel.kafka_connection import connection, no_answer
from ringfence.kernel.settings import BusSettings, load


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
        ({"SECURITY_PROTOCOL": "ssl"}, "RINGFENCE_KAFKA_SECURITY_PROTOCOL"),
        ({"SASL_PASSWORD": "hunter2"}, "RINGFENCE_KAFKA_SASL_PASSWORD"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_named(
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


def test_who_is_not_let_in_is_told_which_settings_say_who_they_are():
    told = str(no_answer(BusSettings(kafka_security_protocol="SSL"), OSError()))
    assert "RINGFENCE_KAFKA_SSL_*" in told
    told = str(no_answer(BusSettings(), OSError()))
    assert "RINGFENCE_KAFKA_SSL" not in told
    assert "RINGFENCE_KAFKA_SECURITY_PROTOCOL" in told, "it may take nobody in clear"
