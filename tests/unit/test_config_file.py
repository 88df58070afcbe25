"""Which settings file counts: what was named, and what was found and is trusted with exactly this content."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ringfence.cli.main import main
from ringfence.client.settings import ClientSettings
from ringfence.kernel.base import config_file
from ringfence.kernel.base.errors import SettingsError
from ringfence.kernel.base.settings import ServiceSettings, load
from ringfence.kernel.base.trusted_files import TrustedFiles

PLANTED = 'kafka = "planted:1"\n[policy]\nbundle = "planted"\n'
USUAL = "127.0.0.1:9092"


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A working directory, and a list of trusted files that is empty."""
    for name in list(os.environ):
        if name.startswith("RINGFENCE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


def plant(text: str = PLANTED, path: str = "ringfence.toml") -> Path:
    file = Path(path)
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    return file


def allow(file: Path) -> None:
    config_file.allow(str(file), file.read_bytes())


def test_a_file_that_was_merely_found_decides_nothing(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    for path in config_file.CANDIDATES:
        file = plant(path=path)
        assert load(ClientSettings).kafka == load(ServiceSettings).kafka == USUAL
        told = capsys.readouterr().err
        assert told.count("\n") == 1, "once, though it is read for each kind of settings"
        assert f"ignored the settings file {folder / path}: you have not allowed it" in told
        assert told.endswith(f"ringfence config trust {path}\n")
        file.unlink()


def test_a_file_counts_once_its_user_allowed_it(capsys: pytest.CaptureFixture[str]) -> None:
    allow(plant())
    assert load(ClientSettings).kafka == load(ServiceSettings).kafka == "planted:1"
    assert capsys.readouterr().err == ""


def test_a_file_that_changed_is_ignored_again(capsys: pytest.CaptureFixture[str]) -> None:
    file = plant()
    allow(file)
    plant(PLANTED.replace("planted:1", "planted:2"))
    assert load(ClientSettings).kafka == USUAL
    assert "it has changed since you allowed it" in capsys.readouterr().err
    plant(PLANTED)
    assert load(ClientSettings).kafka == "planted:1"
    allow(plant(PLANTED + "#"))
    plant(PLANTED)
    assert load(ClientSettings).kafka == USUAL, "what was allowed before counts no more"


def test_a_copy_elsewhere_is_another_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    allow(plant())
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy("ringfence.toml", other)
    monkeypatch.chdir(other)
    assert load(ClientSettings).kafka == USUAL


@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_link_to_a_trusted_file_is_not_followed(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    folder: Path,
    whole_folder: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Relative paths in it would name a stranger's files."""
    allow(plant('kafka = "trusted:1"\nkafka_ssl_ca_file = "ca.pem"\n', config_file.FOUND_BY_ITSELF))
    assert load(ClientSettings).kafka == "trusted:1"
    other = tmp_path / "other"
    other.mkdir()
    if whole_folder:
        (other / ".ringfence").symlink_to(folder / ".ringfence")
    else:
        (other / "ringfence.toml").symlink_to(folder / config_file.FOUND_BY_ITSELF)
    monkeypatch.chdir(other)
    assert load(ClientSettings).kafka == USUAL
    assert "it is reached by a symbolic link" in capsys.readouterr().err
    assert main(["config", "trust"]) == 1
    assert "symbolic link" in capsys.readouterr().err


def test_a_link_on_the_way_to_the_working_directory_is_no_matter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path
) -> None:
    allow(plant())
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path / "link")
    assert load(ClientSettings).kafka == "planted:1"


def test_the_first_file_decides_even_where_it_is_ignored(capsys: pytest.CaptureFixture[str]) -> None:
    """Its user would get other settings than the wanted ones."""
    allow(plant('kafka = "dev:1"\n', config_file.FOUND_BY_ITSELF))
    plant()
    assert load(ClientSettings).kafka == USUAL
    assert "ringfence config trust ringfence.toml" in capsys.readouterr().err


def test_an_ignored_file_is_not_even_parsed(capsys: pytest.CaptureFixture[str]) -> None:
    plant("kafka = \n")
    assert load(ClientSettings).kafka == USUAL
    assert "you have not allowed it" in capsys.readouterr().err


def test_what_is_no_regular_file_is_not_waited_for() -> None:
    os.mkfifo("ringfence.toml")
    assert load(ClientSettings).kafka == USUAL
    allow(plant('kafka = "dev:1"\n', config_file.FOUND_BY_ITSELF))
    assert load(ClientSettings).kafka == "dev:1"


def test_a_file_that_is_too_large_is_ignored(capsys: pytest.CaptureFixture[str]) -> None:
    file = plant(PLANTED + "#" * config_file.MAX_FOUND_BYTES)
    allow(file)
    assert load(ClientSettings).kafka == USUAL
    assert f"larger than {config_file.MAX_FOUND_BYTES} bytes" in capsys.readouterr().err


def test_without_a_home_directory_nothing_found_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    allow(plant())
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    assert load(ClientSettings).kafka == USUAL
    assert "there is no home directory" in capsys.readouterr().err
    assert main(["config", "trust"]) == 1
    assert "set HOME, or XDG_STATE_HOME" in capsys.readouterr().err


LIKE_WINDOWS = """
import os, sys

sys.modules["fcntl"] = None
for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_DIRECTORY", "geteuid", "fchmod"):
    delattr(os, name)
from ringfence import Agent
from ringfence.client.settings import ClientSettings

print(ClientSettings().kafka)
"""


def test_where_files_have_no_owners_agents_run_and_nothing_found_counts() -> None:
    allow(plant())
    done = subprocess.run(
        [sys.executable, "-c", LIKE_WINDOWS], check=False, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, f"{USUAL}\n"), done.stderr
    assert "name your settings file by RINGFENCE_CONFIG" in done.stderr


def test_where_the_list_cannot_be_believed_nothing_found_counts(capsys: pytest.CaptureFixture[str]) -> None:
    allow(plant())
    TrustedFiles.of_user().path.write_text("{")
    assert load(ClientSettings).kafka == USUAL
    assert "counts for nothing" in capsys.readouterr().err


def test_environment_and_a_named_file_need_nobody_s_leave(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant()
    (tmp_path / "link.toml").symlink_to(plant('kafka = "named:1"\n', "mine.toml").resolve())
    for named in ("mine.toml", str(tmp_path / "link.toml")):
        monkeypatch.setenv("RINGFENCE_CONFIG", named)
        assert load(ClientSettings).kafka == "named:1"
    monkeypatch.setenv("RINGFENCE_KAFKA", "environment:1")
    assert load(ClientSettings).kafka == "environment:1"
    monkeypatch.setenv("RINGFENCE_CONFIG", os.devnull)
    monkeypatch.delenv("RINGFENCE_KAFKA")
    assert load(ClientSettings).kafka == USUAL
    assert capsys.readouterr().err == "", "what was not looked for is not ignored"
    monkeypatch.setenv("RINGFENCE_CONFIG", "gone.toml")
    with pytest.raises(SettingsError, match="there is no such file"):
        load(ClientSettings)


def test_the_path_of_an_ignored_file_moves_no_cursor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = tmp_path / "a\x1b[2J\n\u202e\u0430"
    hostile.mkdir()
    monkeypatch.chdir(hostile)
    plant()
    assert load(ClientSettings).kafka == USUAL
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.isascii() or not ({"\x1b", "\u202e"} & set(told))
    assert "a‹U+001B›[2J‹U+000A›‹U+202E›а‹U+0430›" in told
    assert main(["config", "trust"]) == 0
    shown = capsys.readouterr()
    assert not ({"\x1b", "\u202e"} & set(shown.out + shown.err))
