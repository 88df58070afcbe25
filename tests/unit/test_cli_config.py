"""`ringfence config`: where each setting comes from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ringfence.cli.main import main

SECRETS = ("hunter2", "s3cr3t-in-url", "hook-secret", "not-a-place")
CONTENT = """
kafka = "broker:9092"
trust_root = "root"
redis_url = "redis://user:s3cr3t-in-url@redis:6379/0"
kafka_sasl_password = "hunter2"
identity = { path = "me.json" }

[policy]
webhooks = { sam = "https://chat.example/hook-secret", olga = "env:OLGAS_HOOK" }

[backends.access]
platform = "not-a-place"
"""


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in list(os.environ):
        if name.startswith("RINGFENCE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


def printed(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> Any:
    assert main([*words, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def by_name(document: Any) -> dict[str, Any]:
    return {one["name"]: (one["value"], one["source"]) for one in document["settings"]}


def test_show_says_where_each_setting_comes_from(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "ringfence.toml").write_text(CONTENT)
    monkeypatch.setenv("RINGFENCE_TRUST_ROOT", "e" * 43)
    without = printed(capsys, "config", "show")
    assert without["file"] is None
    assert by_name(without)["RINGFENCE_KAFKA"] == ("127.0.0.1:9092", "default")

    personal = folder.parent / "config/ringfence/ringfence.toml"
    personal.parent.mkdir(parents=True)
    personal.write_text(CONTENT)
    personal.chmod(0o600)
    shown = printed(capsys, "config", "show")
    assert shown["file"] == {"path": str(personal), "source": "personal file"}
    settings = by_name(shown)
    assert settings["RINGFENCE_KAFKA"] == ("broker:9092", "personal file")
    assert settings["RINGFENCE_TRUST_ROOT"] == ("e" * 43, "environment")
    assert settings["RINGFENCE_TOPIC_PREFIX"] == ("ringfence", "default")
    assert settings["RINGFENCE_KAFKA_SASL_PASSWORD"] == ("[redacted]", "personal file")
    assert settings["RINGFENCE_POLICY_WEBHOOKS"] == (
        {"sam": "[redacted]", "olga": "env:OLGAS_HOOK"}, "personal file",
    )  # fmt: skip
    assert settings["RINGFENCE_BACKENDS_ACCESS"] == ({"platform": "[redacted]"}, "personal file")

    monkeypatch.setenv("RINGFENCE_CONFIG", "ringfence.toml")
    assert by_name(printed(capsys, "config", "show"))["RINGFENCE_KAFKA"] == (
        "broker:9092",
        "RINGFENCE_CONFIG",
    )

    for words in (["config", "show"], ["config", "show", "--json"]):
        assert main(words) == 0
        said = capsys.readouterr()
        assert not [secret for secret in SECRETS if secret in said.out + said.err]


def test_show_shows_no_secret_of_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RINGFENCE_KAFKA_SASL_PASSWORD", "hunter2")
    monkeypatch.setenv("RINGFENCE_REDIS_URL", "redis://:s3cr3t-in-url@redis:6379/0")
    monkeypatch.setenv("RINGFENCE_POLICY_WEBHOOKS", '{"sam": "hook-secret"}')
    monkeypatch.setenv("RINGFENCE_BACKENDS_ACCESS", '{"p": "not-a-place"')
    said = json.dumps(printed(capsys, "config", "show"))
    assert not [secret for secret in SECRETS if secret in said]


@pytest.mark.parametrize("password", ["with/slash", "with@sign", "with space", "a:b?c#d"])
def test_show_shows_no_password_that_nobody_encoded(
    password: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RINGFENCE_REDIS_URL", f"redis://:{password}@redis:6379/0")
    shown = by_name(printed(capsys, "config", "show"))["RINGFENCE_REDIS_URL"]
    assert shown == ("redis://[redacted]@redis:6379/0", "environment")


def test_value_that_is_not_utf8_is_shown_with_its_source(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strange = folder / "strange\udcff"
    strange.mkdir()
    monkeypatch.chdir(strange)
    Path("ringfence.toml").write_text('kafka = "broker:9092"\n')
    monkeypatch.setenv("RINGFENCE_REDIS_URL", "redis://a\udcff")
    monkeypatch.setenv("RINGFENCE_CONFIG", str(strange / "ringfence.toml"))
    shown = printed(capsys, "config", "show")
    assert by_name(shown)["RINGFENCE_KAFKA"] == ("broker:9092", "RINGFENCE_CONFIG")
    assert by_name(shown)["RINGFENCE_REDIS_URL"] == ("redis://a\udcff", "environment")
