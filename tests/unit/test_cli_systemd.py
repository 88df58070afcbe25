"""`ringfence init --install`: the files of one machine, and nothing that does not belong there."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from ringfence.cli.main import main
from ringfence.kernel.crypto.keys import SigningKey


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RINGFENCE_CONFIG", "/dev/null")
    monkeypatch.chdir(tmp_path)
    assert main(["init", "--gateway", "gateway", "--gateway", "edge"]) == 0


def files(folder: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def test_machine_gets_the_keys_of_its_services_and_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["--json", "init", "--install", "machine", "--service", "issuer", "--service", "edge"]) == 0
    assert json.loads(capsys.readouterr().out)["services"] == ["issuer", "gateway"]
    keys = "etc/ringfence/keys"
    assert files("machine") == {
        "etc/systemd/system/ringfence@.service",
        "etc/sysusers.d/ringfence.conf",
        "etc/tmpfiles.d/ringfence.conf",
        "etc/ringfence/ringfence.toml",
        f"{keys}/issuer/issuer.json",
        f"{keys}/issuer/issuer-token.json",
        f"{keys}/issuer/issuer-seal.json",
        f"{keys}/gateway/gateway.json",
        f"{keys}/gateway/edge-seal.json",
    }
    own = json.loads(Path(f"machine/{keys}/gateway/gateway.json").read_text())
    assert own == json.loads(Path(".ringfence/keys/edge.json").read_text())
    assert all(path.stat().st_mode & 0o077 == 0 for path in Path("machine", keys).rglob("*.json"))


def test_key_that_a_rotation_made_comes_along() -> None:
    assert main(["init", "--rotate-service", "policy"]) == 0
    assert main(["init", "--install", "machine", "--service", "policy"]) == 0
    names = {path.name for path in Path("machine/etc/ringfence/keys/policy").iterdir()}
    assert names == {"policy.json", "policy-next.json"}


def test_settings_file_pins_the_root_and_holds_no_password(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RINGFENCE_REDIS_URL", "redis://:geheim@valkey:6379/0")
    monkeypatch.setenv("RINGFENCE_KAFKA", "k1:9092")
    monkeypatch.setenv("RINGFENCE_INSTANCE", "one")
    root = SigningKey.load(Path(".ringfence/root.json"))
    Path(".ringfence/root.json").unlink()  # it is kept elsewhere
    assert main(["init", "--install", "machine", "--service", "policy"]) == 0
    told = tomllib.loads(Path("machine/etc/ringfence/ringfence.toml").read_text())
    assert told["kafka"] == "k1:9092"
    assert told["trust_root"] == root.kid
    assert not told.keys() & {"redis_url", "instance", "key_dir"}
    assert "RINGFENCE_REDIS_URL" in capsys.readouterr().out
    assert not any("geheim" in Path("machine", name).read_text() for name in files("machine"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--install", "machine"], "a machine runs one gateway"),
        (["--install", "machine", "--service", "polcy"], "polcy is no service of the trust bundle"),
        (["--install", ".ringfence", "--service", "policy"], ".ringfence exists"),
        (["--install", "new", "--folder", "none", "--service", "policy"], "does not exist; make it first"),
    ],
)
def test_wrong_layout_is_refused(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", *words]) == 1
    assert says in " ".join(capsys.readouterr().err.split())
    assert not Path("machine").exists()


def test_service_without_a_machine_is_refused() -> None:
    assert main(["init", "--service", "policy"]) == 2


def test_missing_key_leaves_no_half_of_a_machine(capsys: pytest.CaptureFixture[str]) -> None:
    Path(".ringfence/keys/policy.json").unlink()
    assert main(["init", "--install", "machine", "--service", "issuer", "--service", "policy"]) == 1
    assert "the keys of policy are elsewhere" in " ".join(capsys.readouterr().err.split())
    assert not Path("machine").exists()
