"""What is wrong with the settings of services is said at start, all at once, each with what to do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ringfence.cli.commands.serve import check
from ringfence.kernel.base.errors import SettingsError
from ringfence.kernel.crypto.keys import SigningKey
from tests.support.in_memory_registry import TD


@pytest.fixture(autouse=True)
def sound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Settings by which everything starts."""
    for name in [name for name in os.environ if name.startswith("RINGFENCE_")]:
        monkeypatch.delenv(name)
    for role in ("policy", "issuer"):
        SigningKey.generate(f"spiffe://{TD}/service/{role}").save(tmp_path / f"{role}.json")
    monkeypatch.setenv("RINGFENCE_CONFIG", os.devnull)
    monkeypatch.setenv("RINGFENCE_TRUST_ROOT", "x" * 43)
    monkeypatch.setenv("RINGFENCE_KEY_DIR", str(tmp_path))
    return tmp_path


def said(*services: str) -> str:
    with pytest.raises(SettingsError) as caught:
        check(services)
    return caught.value.message


def test_valid_settings_pass() -> None:
    check(["policy", "issuer"])


def test_every_wrong_setting_is_reported_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """In what all share, in what each service has of its own, and in what it reads besides."""
    wrong = {
        "RINGFENCE_GRACE_S": "-1",
        "RINGFENCE_REDIS_SHARDS": "many",
        "RINGFENCE_LOG_FORMAT": "xml",
        "RINGFENCE_POLICY_APPROVAL_TIMEOUT_S": "0",
        "RINGFENCE_ISSUER_AGENT_LEASES": "x",
        "RINGFENCE_OPA_URL": "localhost",
        "RINGFENCE_BACKENDS_ACCESS": "{",
    }
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    message = said("policy", "issuer")
    lines = message.splitlines()[1:]
    for name in wrong:
        (line,) = [line for line in lines if line.strip().startswith(f"{name}:")]
        assert line
    assert "how old a view" in message.lower(), "what is meant"


def test_a_service_is_not_held_up_by_the_settings_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFENCE_REVOKER_UNDO_CONCURRENCY", "none")
    check(["policy", "issuer"])


def test_keys_and_the_root_are_looked_at_too(monkeypatch: pytest.MonkeyPatch, sound: Path) -> None:
    (sound / "policy.json").chmod(0o644)
    (sound / "issuer.json").unlink()
    monkeypatch.delenv("RINGFENCE_TRUST_ROOT")
    message = said("policy", "issuer")
    assert "chmod 600" in message
    assert "issuer.json" in message
    assert "RINGFENCE_TRUST_ROOT: not set" in message


def test_a_service_that_is_younger_than_the_trust_is_told_how_it_gets_a_key() -> None:
    assert "ringfence init --add-service signals --publish" in said("signals")
    assert "--add-service" not in said("revoker")
