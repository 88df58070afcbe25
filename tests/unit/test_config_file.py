"""Which settings file applies: the named one, else the user's own; never one of the working directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ringfence.cli.main import main
from ringfence.client.reports.read_api import ReadApi
from ringfence.client.settings import ClientSettings, load_settings
from ringfence.kernel.base.errors import RingfenceError, SettingsError
from ringfence.kernel.base.settings import ServiceSettings, load
from ringfence.kernel.crypto.keys import SigningKey

DEV_FILE = ".ringfence/ringfence.toml"
HINT = "run 'source .ringfence/dev.sh', or set RINGFENCE_CONFIG"
USUAL = "127.0.0.1:9092"


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A working directory, and a home folder without settings."""
    for name in list(os.environ):
        if name.startswith(("RINGFENCE_", "XDG_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


def write(path: Path, kafka: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'kafka = "{kafka}"\n')
    path.chmod(0o644)
    return path


@pytest.fixture
def personal(tmp_path: Path) -> Path:
    return write(tmp_path / "home/.config/ringfence/ringfence.toml", "personal:1")


@pytest.mark.parametrize("path", ["ringfence.toml", DEV_FILE])
@pytest.mark.parametrize("content", ['kafka = "planted:1"\n', "kafka = \n"])
def test_file_in_working_directory_is_not_read(
    path: str, content: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write(Path(path), "").write_text(content)
    assert load(ClientSettings).kafka == load(ServiceSettings).kafka == USUAL
    write(tmp_path / "home/.config/ringfence/ringfence.toml", "personal:1")
    assert load(ClientSettings).kafka == load(ServiceSettings).kafka == "personal:1"


def test_personal_file_is_in_configuration_folder(
    personal: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert load(ClientSettings).kafka == "personal:1"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    write(Path("relative/ringfence/ringfence.toml"), "planted:1")
    assert load(ClientSettings).kafka == "personal:1"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert load(ClientSettings).kafka == USUAL
    file = write(tmp_path / "dotfiles/ringfence.toml", "dotfiles:1")
    (tmp_path / "config/ringfence").mkdir(parents=True)
    (tmp_path / "config/ringfence/ringfence.toml").symlink_to(file)
    assert load(ClientSettings).kafka == "dotfiles:1"


@pytest.mark.parametrize("home", [None, "", "relative"])
def test_without_home_folder_there_is_no_personal_file(
    home: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(Path("relative/.config/ringfence/ringfence.toml"), "planted:1")
    write(Path(".config/ringfence/ringfence.toml"), "planted:1")
    monkeypatch.delenv("HOME") if home is None else monkeypatch.setenv("HOME", home)
    assert load(ClientSettings).kafka == USUAL


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_personal_file_that_others_can_write_is_refused(personal: Path, mode: int) -> None:
    personal.chmod(mode)
    with pytest.raises(SettingsError, match=r"others can write it; .*chmod go-w"):
        load(ClientSettings)


def test_personal_file_in_folder_that_others_can_write_is_refused(personal: Path) -> None:
    personal.parent.chmod(0o775)
    with pytest.raises(SettingsError, match=r"others can write it; .*chmod go-w"):
        load(ClientSettings)


def test_personal_file_of_another_user_is_refused(personal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    if personal.stat().st_uid == 0:
        assert load(ClientSettings).kafka == "personal:1", "root may write every file"
        os.chown(personal, 4712, -1)
    with pytest.raises(SettingsError, match="belongs to another user"):
        load(ClientSettings)


def test_named_file_and_environment_win(
    personal: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link.toml").symlink_to(write(Path("mine.toml"), "named:1").resolve())
    for named in ("mine.toml", str(tmp_path / "link.toml")):
        monkeypatch.setenv("RINGFENCE_CONFIG", named)
        assert load(ClientSettings).kafka == "named:1"
    monkeypatch.setenv("RINGFENCE_KAFKA", "environment:1")
    assert load(ClientSettings).kafka == "environment:1"
    monkeypatch.setenv("RINGFENCE_CONFIG", os.devnull)
    monkeypatch.delenv("RINGFENCE_KAFKA")
    assert load(ClientSettings).kafka == USUAL
    monkeypatch.setenv("RINGFENCE_CONFIG", "gone.toml")
    with pytest.raises(SettingsError, match="there is no such file"):
        load(ClientSettings)
    assert capsys.readouterr().err == ""


def test_errors_about_settings_hint_at_those_of_dev_without_reading_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing_root() -> str:
        with pytest.raises(SettingsError) as refused:
            load_settings()
        return refused.value.message

    assert HINT not in missing_root()
    file = write(Path(DEV_FILE), "")
    file.write_text("kafka = \n")
    assert HINT in missing_root()
    assert main(["user", "list"]) == 1
    assert HINT in capsys.readouterr().err
    assert main(["doctor"]) == 1
    assert HINT in " ".join(capsys.readouterr().out.split())
    assert main([]) == 0
    assert "If you started ringfence dev here, first: source .ringfence/dev.sh" in capsys.readouterr().out
    monkeypatch.setenv("RINGFENCE_CONFIG", os.devnull)
    assert HINT not in missing_root()


async def test_service_that_does_not_answer_hints_at_settings_of_dev() -> None:
    write(Path(DEV_FILE), "")
    settings = ClientSettings(policy_url="http://127.0.0.1:1", trust_root="a" * 43)
    async with ReadApi(
        key=SigningKey.generate("spiffe://ringfence.local/user/sam"), settings=settings
    ) as api:
        with pytest.raises(RingfenceError, match=r"RINGFENCE_POLICY_URL.*source \.ringfence/dev\.sh"):
            await api.inventory()


LIKE_WINDOWS = """
import os, sys

sys.modules["fcntl"] = None
for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_DIRECTORY", "geteuid", "fchmod"):
    delattr(os, name)
from ringfence import Agent
from ringfence.client.settings import ClientSettings

print(ClientSettings().kafka)
"""


def test_personal_settings_file_applies_on_systems_without_file_owners(personal: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIKE_WINDOWS], check=False, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "personal:1\n"), done.stderr
