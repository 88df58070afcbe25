"""What is said about wrong settings."""

from __future__ import annotations

from typing import Annotated

import pytest
from pydantic import Field

from ringfence.client.settings import ClientSettings
from ringfence.kernel.base.settings import BusSettings, problems


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
    class Bare(BusSettings):
        bare: Annotated[int, Field(ge=1)] = 1

    monkeypatch.setenv("RINGFENCE_BARE", "0")
    (line,) = problems(Bare)
    assert line.startswith("RINGFENCE_BARE: ")
    assert "It is:" not in line
