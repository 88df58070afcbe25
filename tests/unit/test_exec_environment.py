"""The environment of a command that an agent runs: no identity but the agent's own."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from ringfence.cli.shared.settings_check import DECLARED_IN, known_settings
from ringfence.client.agent.credentials import own_environment
from ringfence.client.settings import ClientSettings

SAM = "/home/sam/sam.json"
OTHERS = {
    "RINGFENCE_IDENTITY": SAM, "ringfence_identity": SAM, "RINGFENCE_RUN_INSTANCE": SAM, "RINGFENCE_AGENT": SAM,
    "RINGFENCE_ATTEST": f"file:{SAM}", "RINGFENCE_ATTEST_KEY_FILE": SAM, "RINGFENCE_RUNNER_KEY_FILE": SAM,
    "RINGFENCE_KEY_FILE": SAM, "RINGFENCE_KEY_DIR": SAM, "RINGFENCE_ISSUER_SEAL_KEY_FILE": SAM,
    "RINGFENCE_ISSUER_PUBLISHED_TOKEN_KEY_FILES": SAM, "RINGFENCE_SCIM_TOKENS": SAM,
    "RINGFENCE_BACKENDS_VAULT_TOKEN_FILE": SAM,
}  # fmt: skip
KEPT = {"PATH": "/bin", "RINGFENCE_KAFKA": "broker:9092", "RINGFENCE_KAFKA_SSL_KEY_FILE": "/etc/client.pem"}


@pytest.mark.parametrize(
    ("settings", "arguments", "own"),
    [
        ({}, (Path("/bot.json"), None, None), {"RINGFENCE_IDENTITY": "/bot.json"}),
        ({"identity": "/bot.json"}, (None, None, None), {"RINGFENCE_IDENTITY": "/bot.json"}),
        (
            {"identity": SAM},
            (None, "github", "bot"),
            {"RINGFENCE_ATTEST": "github", "RINGFENCE_AGENT": "bot"},
        ),
        (
            {"run_instance": "/run/key", "agent": "bot", "identity": SAM},
            (None, None, None),
            {"RINGFENCE_RUN_INSTANCE": "/run/key", "RINGFENCE_AGENT": "bot"},
        ),
        (
            {"run_instance": SAM, "attest": "gcp"},
            (Path("/bot.json"), None, None),
            {"RINGFENCE_IDENTITY": "/bot.json"},
        ),
    ],
    ids=["key named", "key of settings", "attested", "run", "key named in a run"],
)
def test_command_of_agent_inherits_no_identity_but_its_own(
    settings: dict[str, Any], arguments: tuple[Path | None, str | None, str | None], own: dict[str, str]
) -> None:
    found = own_environment(OTHERS | KEPT, ClientSettings(**settings), *arguments)
    assert found == KEPT | own


def test_relative_key_file_is_passed_on_as_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = own_environment({}, ClientSettings(), Path("bot.json"), None, None)
    assert found == {"RINGFENCE_IDENTITY": str(tmp_path / "bot.json")}


def test_every_setting_of_a_key_or_token_is_left_out() -> None:
    for module in DECLARED_IN:
        importlib.import_module(module)
    secrets = {
        name for name in known_settings()
        if {"KEY", "KEYS", "TOKEN", "TOKENS", "IDENTITY", "SECRET", "PASSWORD"} & set(name.split("_"))
        and "KAFKA" not in name and not name.endswith(("_S", "_CHECK", "_URL"))
    }  # fmt: skip
    passed = own_environment(dict.fromkeys(secrets, SAM), ClientSettings(), Path("/bot.json"), None, None)
    assert passed == {"RINGFENCE_IDENTITY": "/bot.json"}
