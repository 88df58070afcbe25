"""What is said about wrong settings."""

from __future__ import annotations

import pytest

from ringfence.client.settings import ClientSettings
from ringfence.kernel.base.settings import problems


def test_a_mistake_comes_with_what_the_setting_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFENCE_ENTITLEMENTS_MAX_AGE_S", "0")
    (line,) = problems(ClientSettings)
    assert line.startswith("RINGFENCE_ENTITLEMENTS_MAX_AGE_S: ")
    assert line.endswith(
        ". It is: As the services have it: past this age a user's entitlements count for nothing."
    )


def test_a_setting_of_a_base_class_is_explained_by_that_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFENCE_KAFKA_SECURITY_PROTOCOL", "TLS")
    (line,) = problems(ClientSettings)
    assert line.endswith(". It is: `security.protocol`, in Kafka's own words.")


def test_a_setting_without_a_description_is_named_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFENCE_TOPIC_PREFIX", "-")
    (line,) = problems(ClientSettings)
    assert line.startswith("RINGFENCE_TOPIC_PREFIX: ")
    assert "It is:" not in line
