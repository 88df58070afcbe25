"""The delivery of a target: its default by kind, and which deliveries a kind can have."""

from __future__ import annotations

import pytest

from ringfence.messages.registry import BackendSettings, RequestRule, TargetState
from ringfence.model.lifecycle.context import CommandRefusedError
from tests.support.in_memory_registry import InMemoryRegistry

MAP = (RequestRule(method="GET", path="/{path*}", verb="read", resource="path/{path*}"),)
HTTP = {"url": "https://api.example"}


def made(kind: str, **fields: object) -> TargetState:
    settings = fields.pop("settings", {})
    registry = InMemoryRegistry()
    registry.organisation()
    backend = BackendSettings.model_validate({"kind": kind, **settings})  # type: ignore[dict-item]
    change = registry.give(registry.target_set("olga", "hub", backend=backend, **fields))
    assert change is not None
    assert isinstance(change.state, TargetState)
    return change.state


@pytest.mark.parametrize(
    ("kind", "settings", "requests", "delivery"),
    [
        ("jwt", {}, MAP, "gateway"),
        ("jwt", {}, (), "agent"),
        ("jwt", {"dpop": "required"}, MAP, "agent"),
        ("http", HTTP, MAP, "gateway"),
        ("http", HTTP, (), "gateway"),
        ("postgres", {"address": "db:5432"}, (), "agent"),
        ("redis", {"address": "db:6379"}, MAP, "agent"),
        ("ssh", {"address": "host:22"}, (), "agent"),
        ("of-a-package", {}, MAP, "agent"),
    ],
)
def test_target_without_delivery_gets_default_of_its_kind(
    kind: str, settings: dict[str, str], requests: tuple[RequestRule, ...], delivery: str
) -> None:
    assert made(kind, settings=settings, requests=requests).delivery == delivery


@pytest.mark.parametrize("delivery", ["agent", "gateway"])
def test_target_of_tokens_takes_either_delivery(delivery: str) -> None:
    assert made("jwt", requests=MAP, delivery=delivery).delivery == delivery
    assert made("jwt", delivery=delivery).delivery == delivery


@pytest.mark.parametrize(
    ("kind", "settings", "delivery", "code"),
    [
        ("http", HTTP, "agent", "delivery_gateway_only"),
        ("postgres", {"address": "db:5432"}, "gateway", "not_injectable"),
        ("mysql", {"address": "db:3306"}, "gateway", "not_injectable"),
        ("ssh", {"address": "host:22"}, "gateway", "not_injectable"),
        ("jwt", {"dpop": "required"}, "gateway", "not_injectable"),
        ("of-a-package", {}, "gateway", "not_injectable"),
    ],
)
def test_target_with_delivery_that_its_kind_cannot_have_is_refused(
    kind: str, settings: dict[str, str], delivery: str, code: str
) -> None:
    with pytest.raises(CommandRefusedError) as refused:
        made(kind, settings=settings, delivery=delivery)
    assert refused.value.code == code
