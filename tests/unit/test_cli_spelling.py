"""Mistyped settings are found; settings that there are, are not."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import ringfence
from ringfence.cli.spelling import known_settings, mistyped
from ringfence.kernel.settings import RingfenceSettings


def test_every_setting_is_known() -> None:
    known = known_settings()
    for module in pkgutil.walk_packages(ringfence.__path__, "ringfence."):
        for _, cls in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if issubclass(cls, RingfenceSettings):
                prefix = str(cls.model_config.get("env_prefix") or "")
                assert {f"{prefix}{field}".upper() for field in cls.model_fields} <= known


def test_what_is_mistyped_is_told_with_what_was_meant() -> None:
    told = mistyped(
        ["RINGFENCE_KAKFA", "RINGFENCE_KAFKA", "RINGFENCE_CONFIG", "RINGFENCE_TEST_KAFKA", "PATH"],
        {"trust_rot": "x", "kafka": "y", "identity": {"path": "z"}, "policy": {"bundel": "a", "bundle": "b"}},
    )
    assert told == [
        "RINGFENCE_KAKFA is no setting, and counts for nothing; did you mean RINGFENCE_KAFKA?",
        "trust_rot is no setting, and counts for nothing; did you mean RINGFENCE_TRUST_ROOT?",
        "policy.bundel is no setting, and counts for nothing; did you mean RINGFENCE_POLICY_BUNDLE?",
    ]
    assert mistyped(["RINGFENCE_SOMETHING_OF_MY_OWN"], {}) == [
        "RINGFENCE_SOMETHING_OF_MY_OWN is no setting, and counts for nothing"
    ]
