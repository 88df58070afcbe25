"""`ringfence config`: what is trusted, and where each setting comes from."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from ringfence.cli.commands.dev import write_config
from ringfence.cli.main import main
from ringfence.client.settings import ClientSettings
from ringfence.kernel.base.settings import load
from ringfence.kernel.base.trusted_files import TrustedFiles

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
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


def printed(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> Any:
    assert main([*words, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def by_name(document: Any) -> dict[str, Any]:
    return {one["name"]: (one["value"], one["source"]) for one in document["settings"]}


@pytest.mark.parametrize("words", [[], ["ringfence.toml"]])
def test_trust_allows_exactly_what_it_shows(
    capsys: pytest.CaptureFixture[str], folder: Path, words: list[str]
) -> None:
    file = folder / "ringfence.toml"
    file.write_text(CONTENT)
    told = printed(capsys, "config", "trust", *words)
    assert told["path"] == str(file)
    assert told["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert told["sets"]["kafka"] == "broker:9092"
    trusted = TrustedFiles.of_user().path
    assert told["list"] == str(trusted)
    assert stat.S_IMODE(trusted.stat().st_mode) == 0o600
    assert json.loads(trusted.read_text())["files"] == {str(file): told["sha256"]}


def test_trust_says_what_the_file_sets_and_no_secret(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    (folder / "ringfence.toml").write_text('"\\u001b[2J" = "\\u202eevil"\n' + CONTENT)
    assert main(["config", "trust"]) == 0
    said = capsys.readouterr()
    for part in (
        "broker:9092",
        "root",
        "redis://[redacted]@redis:6379/0",
        "env:OLGAS_HOOK",
        "‹U+202E›evil",
        "‹U+001B›[2J",
    ):
        assert part in said.out
    assert "identity.path" in said.err, "a relative path means another file in each folder"
    for hidden in (*SECRETS, "\x1b", "\u202e"):
        assert hidden not in said.out + said.err


def test_what_cannot_be_read_as_settings_is_not_trusted(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    assert main(["config", "trust"]) == 1
    assert "name a file" in capsys.readouterr().err
    assert main(["config", "trust", "gone.toml"]) == 1
    assert "cannot trust gone.toml" in capsys.readouterr().err
    (folder / "ringfence.toml").write_text("kafka = \n")
    assert main(["config", "trust"]) == 1
    assert "cannot read ringfence.toml" in capsys.readouterr().err
    (folder / "real.toml").write_text(CONTENT)
    (folder / "link.toml").symlink_to("real.toml")
    assert main(["config", "trust", "link.toml"]) == 1
    assert "symbolic link" in capsys.readouterr().err
    assert not TrustedFiles.of_user().path.exists()


def test_show_says_where_each_setting_comes_from(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "ringfence.toml"
    file.write_text(CONTENT)
    monkeypatch.setenv("RINGFENCE_TRUST_ROOT", "e" * 43)
    ignored = printed(capsys, "config", "show")
    assert ignored["file"]["path"] == str(file)
    assert not ignored["file"]["counts"]
    assert ignored["file"]["ignored_because"] == "you have not allowed it"
    assert by_name(ignored)["RINGFENCE_KAFKA"] == ("127.0.0.1:9092", "default")

    printed(capsys, "config", "trust")
    trusted = printed(capsys, "config", "show")
    assert trusted["file"]["counts"]
    settings = by_name(trusted)
    assert settings["RINGFENCE_KAFKA"] == ("broker:9092", "trusted file")
    assert settings["RINGFENCE_TRUST_ROOT"] == ("e" * 43, "environment")
    assert settings["RINGFENCE_TOPIC_PREFIX"] == ("ringfence", "default")
    assert settings["RINGFENCE_KAFKA_SASL_PASSWORD"] == ("[redacted]", "trusted file")
    assert settings["RINGFENCE_POLICY_WEBHOOKS"] == (
        {"sam": "[redacted]", "olga": "env:OLGAS_HOOK"}, "trusted file",
    )  # fmt: skip
    assert settings["RINGFENCE_BACKENDS_ACCESS"] == ({"platform": "[redacted]"}, "trusted file")

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


def test_what_is_no_utf8_is_shown_and_trusted(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strange = folder / "strange\udcff"
    strange.mkdir()
    monkeypatch.chdir(strange)
    Path("ringfence.toml").write_text('kafka = "broker:9092"\n')
    monkeypatch.setenv("RINGFENCE_REDIS_URL", "redis://a\udcff")
    assert printed(capsys, "config", "trust")["path"] == str(strange / "ringfence.toml")
    shown = printed(capsys, "config", "show")
    assert by_name(shown)["RINGFENCE_KAFKA"] == ("broker:9092", "trusted file")
    assert by_name(shown)["RINGFENCE_REDIS_URL"] == ("redis://a\udcff", "environment")


def test_dev_trusts_what_it_writes_each_time_it_changes_it(folder: Path) -> None:
    (folder / ".ringfence").mkdir()
    file = folder / ".ringfence/ringfence.toml"
    for kafka in ("127.0.0.1:1001", "127.0.0.1:1002"):
        write_config({"RINGFENCE_KAFKA": kafka, "RINGFENCE_EMBEDDED_BROKER": "True"}, file)
        assert load(ClientSettings).kafka == kafka
    file.write_text('kafka = "planted:1"\n')
    assert load(ClientSettings).kafka == "127.0.0.1:9092"


def test_dev_writes_its_settings_where_nothing_can_be_trusted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    written = folder / "ringfence.toml"
    write_config({"RINGFENCE_KAFKA": "127.0.0.1:1001"}, written)
    monkeypatch.setenv("RINGFENCE_CONFIG", str(written))
    assert load(ClientSettings).kafka == "127.0.0.1:1001"
