"""Files and folders for their owner alone: what the command line and the SDK write, under any umask."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringfence.cli.main import main
from ringfence.client import exports
from ringfence.client.reports.auditor import TrailReport, TreeReport
from ringfence.gateway.events.spool import Spool, SpoolError
from ringfence.kernel.base.private_files import (
    NotPrivateError,
    OutputFileError,
    make_folders,
    make_private_folder,
    open_private,
    others_can_access,
    write_private,
    write_public,
)


@pytest.fixture(params=[0, 0o022, 0o277], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    try:
        yield request.param
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_folder_and_all_above_it_that_is_missing(tmp_path: Path, umask: int) -> None:
    before = mode(tmp_path)
    make_folders(tmp_path / "a" / "b" / "c")
    assert [mode(tmp_path / part) for part in ("a", "a/b", "a/b/c")] == [0o700] * 3
    assert mode(tmp_path) == before


def test_a_folder_that_is_there_is_closed_where_it_is_ringfences_own(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o775)
    make_folders(tmp_path / "shared" / "own")
    assert mode(tmp_path / "shared") == 0o775
    make_private_folder(tmp_path / "shared")
    assert mode(tmp_path / "shared") == 0o700


def test_file_in_the_way_of_a_private_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="file"):
            make_private_folder(path)


def test_a_file_is_made_private_and_one_that_is_there_is_closed(tmp_path: Path, umask: int) -> None:
    write_private(tmp_path / "new", "one")
    (tmp_path / "old").write_text("longer than what comes")
    (tmp_path / "old").chmod(0o666)
    write_private(tmp_path / "old", b"two")
    assert [mode(tmp_path / name) for name in ("new", "old")] == [0o600, 0o600]
    assert (tmp_path / "old").read_text() == "two"


@pytest.mark.parametrize("kind", ["link", "dangling link", "fifo", "folder", "device"])
def test_write_to_link_or_special_file_is_refused(tmp_path: Path, kind: str) -> None:
    victim, target = tmp_path / "victim", tmp_path / "target"
    victim.write_text("untouched")
    victim.chmod(0o600)
    match kind:
        case "link":
            target.symlink_to(victim)
        case "dangling link":
            target.symlink_to(tmp_path / "absent")
        case "fifo":
            os.mkfifo(target)
        case "folder":
            target.mkdir()
        case "device":
            target = Path(os.devnull)
    before = sorted(tmp_path.iterdir())
    for write in (write_private, write_public, lambda path, _: open_private(path, os.O_WRONLY | os.O_TRUNC)):
        with pytest.raises((OutputFileError, IsADirectoryError), match=re.escape(str(target))):
            write(target, "new")
    assert sorted(tmp_path.iterdir()) == before
    assert (victim.read_text(), mode(victim)) == ("untouched", 0o600)


def test_link_planted_after_check_is_replaced_and_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, target = tmp_path / "victim", tmp_path / "target"
    victim.write_text("untouched")

    def plant(path: Path) -> None:
        path.symlink_to(victim)

    monkeypatch.setattr("ringfence.kernel.base.private_files.check_output", plant)
    write_private(target, "new")
    assert (victim.read_text(), target.read_text(), target.is_symlink()) == ("untouched", "new", False)


def test_public_file_has_mode_of_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_public(tmp_path / "new", "text")
    finally:
        os.umask(before)
    assert mode(tmp_path / "new") == 0o640


def test_failed_write_keeps_old_file_and_leaves_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no space"):
        write_private(tmp_path / "file", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_open_folder_of_another_owner_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "not permitted")

    (tmp_path / "folder").mkdir()
    (tmp_path / "folder").chmod(0o755)
    (tmp_path / "folder" / "file").touch()
    (tmp_path / "folder" / "file").chmod(0o644)
    monkeypatch.setattr(os, "fchmod", refused)
    monkeypatch.setattr(Path, "chmod", refused)
    with pytest.raises(NotPrivateError, match="name a folder in it, which Ringfence makes"):
        make_private_folder(tmp_path / "folder")
    with pytest.raises(NotPrivateError, match="name another file"):
        open_private(tmp_path / "folder" / "file", os.O_RDWR)
    with pytest.raises(SpoolError, match="RINGFENCE_GATEWAY_SPOOL"):
        Spool(tmp_path / "folder", max_bytes=1024)


def test_an_export_that_stopped_and_goes_on(tmp_path: Path, umask: int) -> None:
    target = tmp_path / "out.ndjson"
    one = exports.begin(target, exports.ExportQuery(format="ocsf", since_ms=0, until_ms=1, filters={}))
    one.state.after = "here"
    one.checkpoint()
    one.abort()
    files = sorted(path for path in tmp_path.iterdir())
    assert [mode(path) for path in files] == [0o600, 0o600]
    for path in files:
        path.chmod(0o666)
    two = exports.resume(target)
    two.checkpoint()
    assert [mode(path) for path in files] == [0o600, 0o600]
    two.finish()
    assert mode(target) == 0o600


@pytest.mark.parametrize("suffix", ["", exports.PART, exports.STATE])
def test_export_beside_link_is_refused(tmp_path: Path, suffix: str) -> None:
    target, victim = tmp_path / "out.ndjson", tmp_path / "victim"
    one = exports.begin(target, exports.ExportQuery(format="ocsf", since_ms=0, until_ms=1, filters={}))
    one.state.after = "here"
    one.checkpoint()
    one.abort()
    link = tmp_path / (target.name + suffix)
    link.unlink(missing_ok=True)
    victim.write_text("untouched")
    link.symlink_to(victim)
    with pytest.raises(OutputFileError, match="symbolic link"):
        exports.resume(target)
    assert victim.read_text() == "untouched"


def test_export_of_another_user_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out.ndjson"
    one = exports.begin(target, exports.ExportQuery(format="ocsf", since_ms=0, until_ms=1, filters={}))
    one.state.after = "here"
    one.checkpoint()
    one.abort()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(exports.ExportError, match="belongs to another user"):
        exports.resume(target)


def test_a_spool_that_is_there_is_closed(tmp_path: Path, umask: int) -> None:
    folder = tmp_path / "spool"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    for name in ("lock", "published"):
        (folder / name).touch()
        (folder / name).chmod(0o666)
    spool = Spool(folder, max_bytes=1024 * 1024)
    spool.append(b"an event")
    spool.close()
    assert [mode(folder), *(mode(path) for path in folder.iterdir())] == [0o700, 0o600, 0o600, 0o600]


def test_heads_that_an_auditor_keeps(tmp_path: Path, umask: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async def good(*_: object, **__: object) -> TrailReport:
        return TrailReport([TreeReport("1", 1, 7, 0, 7, "ab" * 32, ())])

    monkeypatch.setattr("ringfence.client.reports.auditor.verify_trail", good)
    for name in ("new", "of-before"):
        path = tmp_path / name
        if name == "of-before":
            path.write_text("{}")
            path.chmod(0o666)
        assert main(["audit", "verify", "--heads", str(path)]) == 0
        assert "ab" * 32 in path.read_text()
        assert mode(path) == 0o600


@pytest.mark.parametrize("umask", [0, 0o022], ids=oct)
def test_command_line_writes_private_files_under_any_umask(tmp_path: Path, umask: int) -> None:
    cli = [sys.executable, "-m", "ringfence.cli.main"]
    (tmp_path / "tokens").write_text("# of before\n")
    (tmp_path / "tokens").chmod(0o666)
    for argv in (
        ["init", "--folder", "trust", "--operator", "olga"],
        ["key", "new", "bot.json", "--id", "spiffe://acme.example/agent/bot"],
        ["provisioner", "new-token", "tokens", "--name", "acme"],
    ):
        subprocess.run([*cli, *argv], cwd=tmp_path, umask=umask, check=True, capture_output=True)
    found = {path.relative_to(tmp_path): mode(path) for path in tmp_path.rglob("*")}
    assert len(found) > 10
    assert {str(path): oct(bits) for path, bits in found.items() if bits & 0o077} == {}


@pytest.mark.parametrize(
    ("owner", "bits", "open_to_others"),
    [
        (10001, 0o600, False),
        (10001, 0o440, True),  # the user could have closed it
        (0, 0o400, False),
        (0, 0o440, False),  # a secret of Kubernetes, for a pod with `fsGroup`
        (0, 0o640, False),
        (0, 0o460, True),
        (0, 0o444, True),
        (4711, 0o440, True),
    ],
)
def test_a_file_of_root_may_be_readable_for_its_group(
    monkeypatch: pytest.MonkeyPatch, owner: int, bits: int, open_to_others: bool
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 10001)
    status = os.stat_result((stat.S_IFREG | bits, 0, 0, 1, owner, 10001, 0, 0, 0, 0))
    assert others_can_access(status) is open_to_others


def test_root_itself_has_no_such_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert others_can_access(os.stat_result((stat.S_IFREG | 0o440, 0, 0, 1, 0, 0, 0, 0, 0, 0)))
