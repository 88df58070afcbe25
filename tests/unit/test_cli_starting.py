"""`ringfence serve` with something wrong: one message that names the setting, exit 1, and nothing is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringfence.cli.main import main
from ringfence.client.admin.trust_setup import TrustFolder, make_trust


@pytest.fixture
def trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrustFolder:
    folder = TrustFolder(tmp_path)
    monkeypatch.setenv("RINGFENCE_TRUST_ROOT", make_trust(folder, "ringfence.local", "olga"))
    monkeypatch.setenv("RINGFENCE_KEY_DIR", str(tmp_path / "keys"))
    monkeypatch.setattr("ringfence.kernel.service.process.run", lambda runtimes, settings: 0)
    return folder


def refusal(service: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["serve", service]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    return told.err


@pytest.mark.parametrize("service", ["registry", "policy", "issuer", "revoker", "audit", "gateway"])
def test_with_what_init_makes_it_starts(service: str, trust: TrustFolder) -> None:
    assert main(["serve", service]) == 0


@pytest.mark.parametrize(
    ("service", "setting", "value"),
    [
        ("issuer", "RINGFENCE_ISSUER_TOKEN_KEY_FILE", "{none}"),
        ("issuer", "RINGFENCE_ISSUER_TOKEN_KEY_FILE", "{keys}/issuer-seal.json"),
        ("issuer", "RINGFENCE_ISSUER_RS256_TOKEN_KEY_FILE", "{none}"),
        ("issuer", "RINGFENCE_ISSUER_PUBLISHED_TOKEN_KEY_FILES", '["{none}"]'),
        ("issuer", "RINGFENCE_ISSUER_SEAL_KEY_FILE", "{none}"),
        ("issuer", "RINGFENCE_ISSUER_SEAL_KEY_FILE", "{keys}/issuer.json"),
        ("issuer", "RINGFENCE_ISSUER_URL", "issuer.example"),
        ("gateway", "RINGFENCE_GATEWAY_SEAL_KEY_FILE", "{keys}/gateway.json"),
        ("gateway", "RINGFENCE_GATEWAY_BUNDLE", "{none}"),
        ("gateway", "RINGFENCE_GATEWAY_SPOOL", "{keys}/gateway.json"),
        ("gateway", "RINGFENCE_GATEWAY_LISTEN", "127.0.0.1:99999"),
        ("policy", "RINGFENCE_POLICY_BUNDLE", "{none}"),
        ("policy", "RINGFENCE_GRACE_S", "inf"),
        ("audit", "RINGFENCE_STATE_DIR", "{keys}/audit.json"),
        ("audit", "RINGFENCE_HTTP", "127.0.0.1:99999"),
        ("audit", "RINGFENCE_KAFKA", "kafka://broker:9092"),
    ],
)
def test_invalid_setting_is_named_in_the_refusal(
    service: str,
    setting: str,
    value: str,
    trust: TrustFolder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(setting, value.format(keys=trust.path / "keys", none=trust.path / "none"))
    assert setting in refusal(service, capsys)


def test_a_part_of_a_setting_is_told_as_that(
    trust: TrustFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RINGFENCE_BACKENDS_ACCESS", '{"platform": "hunter2"}')
    told = refusal("issuer", capsys)
    assert "RINGFENCE_BACKENDS_ACCESS (platform): " in told
    assert "hunter2" not in told


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"audit = 5", "audit is the table [audit], and no value"), (b"\xd0", "cannot read")],
)
def test_a_settings_file_that_is_none_is_told_once(
    content: bytes,
    says: str,
    trust: TrustFolder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = trust.path / "ringfence.toml"
    file.write_bytes(content)
    monkeypatch.setenv("RINGFENCE_CONFIG", str(file))
    assert refusal("audit", capsys).count(says) == 1
