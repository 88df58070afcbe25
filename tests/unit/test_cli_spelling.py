"""Mistyped settings are found; settings that there are, are not."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import ringfence
from ringfence.cli.main import main
from ringfence.cli.shared.settings_check import known_settings, mistyped
from ringfence.kernel.base.settings import RingfenceSettings
from ringfence.kernel.crypto.keys import SigningKey


def test_every_setting_is_known() -> None:
    known = known_settings()
    for module in pkgutil.walk_packages(ringfence.__path__, "ringfence."):
        for _, cls in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if issubclass(cls, RingfenceSettings):
                prefix = str(cls.model_config.get("env_prefix") or "")
                assert {f"{prefix}{field}".upper() for field in cls.model_fields} <= known


def test_mistyped_settings_are_reported_with_a_suggestion() -> None:
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


def test_kubernetes_service_variables_are_no_mistyped_settings() -> None:
    names = [
        "SERVICE_HOST",
        "SERVICE_PORT",
        "SERVICE_PORT_HTTP",
        "PORT",
        "PORT_8703_TCP",
        "PORT_8703_TCP_ADDR",
    ]
    assert mistyped([f"RINGFENCE_ISSUER_{name}" for name in names], {}) == []


def test_a_service_that_starts_tells_of_what_is_mistyped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "ringfence.toml"
    file.write_text('trust_root = "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"\npartitons = 3\n')
    SigningKey.generate("spiffe://ringfence.local/service/registry").save(tmp_path / "registry.json")
    monkeypatch.setenv("RINGFENCE_CONFIG", str(file))
    monkeypatch.setenv("RINGFENCE_KEY_DIR", str(tmp_path))
    monkeypatch.setenv("RINGFENCE_KAKFA", "h:1")
    monkeypatch.setattr("ringfence.kernel.service.process.run", lambda runtimes, settings: 0)
    assert main(["serve", "registry"]) == 0
    told = capsys.readouterr().err
    assert "warning: RINGFENCE_KAKFA is no setting" in told
    assert "did you mean RINGFENCE_PARTITIONS?" in told
