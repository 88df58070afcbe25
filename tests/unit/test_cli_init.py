"""`ringfence init` as a command: what it says is so, and nonsense is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ringfence.cli.main import main
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.service.bearer_tokens import Tokens


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RINGFENCE_CONFIG", "/dev/null")
    monkeypatch.chdir(tmp_path)


def test_the_files_that_it_names_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    folder = "x" * 100 + "/[bold]trust"
    assert main(["init", "--folder", folder, "--operator", "olga"]) == 0
    said = capsys.readouterr().out
    assert f"Root key:      {folder}/root.json   move it off this machine\n" in said
    assert f"Operator key:  {folder}/users/olga.json\n" in said


def test_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "init", "--folder", "trust"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["trust_root"] == SigningKey.load(Path(made["root_key"])).kid
    assert (made["trust_bundle"], made["published"]) == (1, False)
    assert main(["init", "--folder", "trust", "--rotate-root", "--json"]) == 0
    rotated = json.loads(capsys.readouterr().out)
    assert rotated["trust_root"] == SigningKey.load(Path(rotated["root_key"])).kid != made["trust_root"]
    assert rotated["trust_bundle"] == 2


def test_a_runner_is_added_with_its_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--folder", "trust"]) == 0
    assert main(["init", "--folder", "trust", "--add-runner", "runner-1"]) == 0
    said = capsys.readouterr().out
    assert "Trust bundle 2 has runner runner-1 now." in said
    assert "Its key:  trust/keys/runner-1.json" in said
    assert SigningKey.load(Path("trust/keys/runner-1.json")).id.endswith("/service/runner-1")


@pytest.mark.parametrize(
    ("args", "status", "says"),
    [
        (["--add-runner", "runner-1", "--renew"], 2, "one change at a time"),
        (["--add-runner", "policy"], 1, "name of a service"),
        (["--name", " "], 2, "what they are called"),
        (["--rotate-service", "policy", "--overlap-hours", "8761"], 2, "--overlap-hours"),
        (["--rotate-root", "--compromised-since", "2999-01-01"], 1, "still to come"),
        (["--renew", "--remove-oidc-issuer", "https://x"], 2, "one change at a time"),
    ],
)
def test_nonsense_is_refused(
    args: list[str], status: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "--folder", "trust"]) == 0
    before = Path("trust/trust-bundle.jws").read_text()
    capsys.readouterr()
    assert main(["init", "--folder", "trust", *args]) == status
    assert says in " ".join(capsys.readouterr().err.split())
    assert Path("trust/trust-bundle.jws").read_text() == before


def test_a_moment_with_a_time_zone_is_that_moment() -> None:
    from datetime import datetime

    from ringfence.cli.commands.init import _moment_s

    assert _moment_s(datetime.fromisoformat("2026-11-25T09:00:00")) == 1_795_597_200
    assert _moment_s(datetime.fromisoformat("2026-11-25T09:00:00+02:00")) == 1_795_590_000


def test_failed_init_leaves_nothing_that_blocks_the_next(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("trust/users").mkdir(parents=True)
    Path("trust/users/olga.json").write_text("somebody else's")
    assert main(["init", "--folder", "trust", "--operator", "olga"]) == 1
    assert "olga.json exists already" in capsys.readouterr().err
    assert [str(file) for file in Path("trust").rglob("*.j*")] == ["trust/users/olga.json"]
    assert main(["init", "--folder", "trust", "--operator", "sam"]) == 0


def test_a_bearer_token_gets_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    file = Path("tokens")
    file.write_text("# no line end after this")
    for name in ("", "two words", "two\nlines"):
        assert main(["provisioner", "new-token", str(file), "--name", name]) == 1
    capsys.readouterr()
    assert main(["provisioner", "new-token", str(file), "--name", "entra", "--json"]) == 0
    token = json.loads(capsys.readouterr().out)["token"]
    file.chmod(0o600)
    assert Tokens(file, "RINGFENCE_SCIM_TOKENS").name_of(f"Bearer {token}") == "entra"
