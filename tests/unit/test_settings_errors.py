"""What is said about wrong settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from ringfence.cli.main import main
from ringfence.client.settings import ClientSettings
from ringfence.kernel.base.errors import SettingsError
from ringfence.kernel.base.settings import BusSettings, ServiceSettings, load, problems
from ringfence.kernel.crypto.keys import SigningKey


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


@pytest.mark.parametrize(
    "value", ["abc", "x" * 42, "x" * 44, "=" * 43, "x" * 42 + "\n", "sha256:" + "x" * 36]
)
@pytest.mark.parametrize("cls", [BusSettings, ServiceSettings, ClientSettings])
def test_trust_root_that_is_no_fingerprint_is_refused(
    monkeypatch: pytest.MonkeyPatch, cls: type[BusSettings], value: str
) -> None:
    monkeypatch.setenv("RINGFENCE_TRUST_ROOT", value)
    with pytest.raises(SettingsError, match=r"RINGFENCE_TRUST_ROOT: .* is no fingerprint"):
        load(cls)


def test_fingerprint_of_root_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprint = SigningKey.generate("spiffe://ringfence.local/root").kid
    monkeypatch.setenv("RINGFENCE_TRUST_ROOT", fingerprint)
    assert load(BusSettings).trust_root == fingerprint


class Listed(BusSettings):
    names: tuple[str, ...] = ()
    words: tuple[str, ...] = ()


def test_all_mistakes_are_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "NAMES": "no JSON: hunter2", "WORDS": "[", "TRUST_ROOT": "abc", "RUN_GRACE_S": "0",
        "KAFKA_SSL_KEY_FILE": "/key.pem", "KAFKA_SASL_PASSWORD": "hunter2", "KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"RINGFENCE_{name}", value)
    lines = problems(Listed)
    assert {line.partition(":")[0] for line in lines} == {
        "RINGFENCE_NAMES", "RINGFENCE_WORDS", "RINGFENCE_TRUST_ROOT", "RINGFENCE_RUN_GRACE_S",
        "RINGFENCE_KAFKA_SASL_PASSWORD",
    }  # fmt: skip
    monkeypatch.delenv("RINGFENCE_KAFKA_SASL_PASSWORD")
    monkeypatch.setenv("RINGFENCE_KAFKA_SECURITY_PROTOCOL", "SSL")
    lines = problems(Listed)
    assert any(
        line.startswith("RINGFENCE_KAFKA_SSL_KEY_FILE: a key without its certificate") for line in lines
    )
    assert sum("not JSON, which it has to be" in line for line in lines) == 2
    assert "hunter2" not in "".join(lines)


def test_wrong_and_unknown_settings_of_file_are_reported_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ringfence.toml"
    file.write_text('trust_root = "abc"\ntrust_domian = "x"\nrun_grace_s = 0\n[policy]\nbundel = "b"\n')
    monkeypatch.setenv("RINGFENCE_CONFIG", str(file))
    monkeypatch.setenv("RINGFENCE_KAKFA", "h:1")
    for words in (["agent", "list"], ["serve", "registry"]):
        assert main(words) == 1
        told = capsys.readouterr().err
        for name in (
            "RINGFENCE_TRUST_ROOT: ", "RINGFENCE_RUN_GRACE_S: ", "trust_domian is no setting",
            "policy.bundel is no setting", "RINGFENCE_KAKFA is no setting",
        ):  # fmt: skip
            assert name in told, (words, name)
        assert all(line.startswith(("error: ", "  ")) for line in told.splitlines())


def test_missing_setting_is_reported_with_its_misspelt_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RINGFENCE_TRUST_ROOT", raising=False)
    monkeypatch.setenv("RINGFENCE_TRUST_ROTO", "x" * 43)
    assert main(["agent", "rotate-key", "bot", "--new-key", "new.json", "--identity", "absent.json"]) == 1
    told = capsys.readouterr().err
    assert "RINGFENCE_TRUST_ROOT is not set" in told
    assert (
        "RINGFENCE_TRUST_ROTO is no setting, and counts for nothing; did you mean RINGFENCE_TRUST_ROOT?"
        in told
    )


def test_password_in_the_address_of_redis_is_not_shown() -> None:
    """A service object shows its settings where a log or a traceback has it."""
    assert "canary" not in repr(ServiceSettings(redis_url="redis://user:canary@127.0.0.1:6379/0"))
