"""The list of trusted settings files: who may write it, what is refused, and that nothing gets lost."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringfence.kernel.base.trusted_files import TrustedFiles, TrustedFilesError

DIGEST = "ab" * 32


@pytest.fixture
def trusted(tmp_path: Path) -> TrustedFiles:
    return TrustedFiles(tmp_path / "state" / "ringfence")


@pytest.fixture
def any_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_is_trusted_by_path_and_digest(trusted: TrustedFiles) -> None:
    assert trusted.digest_of("/a/ringfence.toml") is None
    trusted.allow("/a/ringfence.toml", DIGEST)
    trusted.allow("/b/ringfence.toml", "cd" * 32)
    assert trusted.digest_of("/a/ringfence.toml") == DIGEST
    assert trusted.digest_of("/b/ringfence.toml") == "cd" * 32
    trusted.allow("/a/ringfence.toml", "ef" * 32)
    assert trusted.digest_of("/a/ringfence.toml") == "ef" * 32, "what it had before counts no more"


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o277, 0o777])
def test_the_modes_are_the_same_under_any_umask(trusted: TrustedFiles, any_umask: None, umask: int) -> None:
    os.umask(umask)
    trusted.allow("/a/ringfence.toml", DIGEST)
    trusted.allow("/b/ringfence.toml", DIGEST)
    assert mode(trusted.path) == 0o600
    assert mode(trusted.folder) == mode(trusted.folder.parent) == 0o700
    assert {mode(file) for file in trusted.folder.iterdir()} == {0o600}
    assert trusted.digest_of("/a/ringfence.toml") == DIGEST


def test_a_list_of_mode_644_is_narrowed_when_it_is_written(trusted: TrustedFiles) -> None:
    trusted.allow("/a/ringfence.toml", DIGEST)
    trusted.path.chmod(0o644)
    assert trusted.digest_of("/a/ringfence.toml") == DIGEST
    trusted.allow("/b/ringfence.toml", DIGEST)
    assert mode(trusted.path) == 0o600


@pytest.mark.parametrize("wide", [0o620, 0o602, 0o666])
def test_a_list_that_others_can_write_counts_for_nothing(trusted: TrustedFiles, wide: int) -> None:
    trusted.allow("/a/ringfence.toml", DIGEST)
    trusted.path.chmod(wide)
    for refused in (
        lambda: trusted.digest_of("/a/ringfence.toml"),
        lambda: trusted.allow("/b/ringfence.toml", DIGEST),
    ):
        with pytest.raises(TrustedFilesError, match=r"others can write it; .* chmod 600"):
            refused()


def test_a_folder_that_others_can_write_counts_for_nothing(trusted: TrustedFiles) -> None:
    trusted.allow("/a/ringfence.toml", DIGEST)
    trusted.folder.chmod(0o770)
    with pytest.raises(TrustedFilesError, match="others can write its folder"):
        trusted.digest_of("/a/ringfence.toml")


def test_a_list_of_another_user_counts_for_nothing(
    trusted: TrustedFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    trusted.allow("/a/ringfence.toml", DIGEST)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(TrustedFilesError, match="belongs to another user"):
        trusted.digest_of("/a/ringfence.toml")
    with pytest.raises(TrustedFilesError, match="belongs to another user"):
        trusted.allow("/b/ringfence.toml", DIGEST)


def test_a_symbolic_link_is_no_list(trusted: TrustedFiles, tmp_path: Path) -> None:
    trusted.allow("/a/ringfence.toml", DIGEST)
    moved = trusted.path.rename(tmp_path / "elsewhere.json")
    trusted.path.symlink_to(moved)
    with pytest.raises(TrustedFilesError, match="symbolic link"):
        trusted.digest_of("/a/ringfence.toml")
    folder = trusted.folder.rename(tmp_path / "moved")
    trusted.folder.symlink_to(folder)
    with pytest.raises(TrustedFilesError, match="its folder cannot be opened"):
        trusted.digest_of("/a/ringfence.toml")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "\x00",
        '{"version": 2, "files": {}}',
        '{"version": 1, "files": []}',
        '{"version": 1, "files": {"/a/ringfence.toml": 1}}',
        "[" * 100_000,
    ],
)
def test_a_broken_list_counts_for_nothing_and_is_not_written_over(
    trusted: TrustedFiles, content: str
) -> None:
    trusted.allow("/a/ringfence.toml", DIGEST)
    trusted.path.write_text(content)
    with pytest.raises(TrustedFilesError, match="move it away, and allow your settings files again"):
        trusted.digest_of("/a/ringfence.toml")
    with pytest.raises(TrustedFilesError, match="move it away"):
        trusted.allow("/a/ringfence.toml", DIGEST)
    assert trusted.path.read_text() == content


def test_many_at_once_lose_nothing(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from ringfence.kernel.base.trusted_files import TrustedFiles
for number in range(20):
    TrustedFiles(Path(sys.argv[1])).allow(f"/{sys.argv[2]}/{number}", "ab" * 32)
"""
    folder = tmp_path / "state" / "ringfence"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(folder), str(who)]) for who in range(4)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0, 0]
    assert len(json.loads((folder / "trusted.json").read_text())["files"]) == 80
    assert sorted(file.name for file in folder.iterdir()) == ["trusted.json", "trusted.lock"]


def test_where_the_list_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", "/somewhere")
    assert TrustedFiles.of_user().path == Path("/somewhere/ringfence/trusted.json")
    for ignored in ("", "relative", "./state"):
        monkeypatch.setenv("XDG_STATE_HOME", ignored)
        assert TrustedFiles.of_user().path == tmp_path / ".local/state/ringfence/trusted.json"
    monkeypatch.delenv("XDG_STATE_HOME")
    assert TrustedFiles.of_user().path == tmp_path / ".local/state/ringfence/trusted.json"


@pytest.mark.parametrize("home", [None, "", "relative", "/nonexistent/home"])
def test_without_a_home_directory_there_is_no_list(monkeypatch: pytest.MonkeyPatch, home: str | None) -> None:
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    with pytest.raises(TrustedFilesError, match="no home directory"):
        TrustedFiles.of_user()
