"""What a run leaves in a writable mount and somebody outside executes later."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ringfence.runner.lifecycle.mount_changes import executable_changes


def write(path: Path, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    path.chmod(mode)


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a hook of git": (lambda at: write(at / ".git/hooks/pre-commit"), ".git/hooks/pre-commit"),
    "git's configuration": (lambda at: write(at / "a/.git/config"), "a/.git/config"),
    "a hook of a submodule": (lambda at: write(at / ".git/modules/m/hooks/x"), ".git/modules/m/hooks/x"),
    "direnv": (lambda at: write(at / "deep/er/.envrc"), "deep/er/.envrc"),
    "a shell's start-up file": (lambda at: write(at / ".bashrc"), ".bashrc"),
    "a name in other letters": (lambda at: write(at / "MAKEFILE"), "MAKEFILE"),
    "an editor's tasks": (lambda at: write(at / ".vscode/tasks.json"), ".vscode/tasks.json"),
    "a workflow": (lambda at: write(at / ".github/workflows/ci.yml"), ".github/workflows/ci.yml"),
    "an executable file": (lambda at: write(at / "bin/tool", 0o755), "bin/tool"),
    "executable for others alone": (lambda at: write(at / "tool", 0o601), "tool"),
    "a link out of it": (lambda at: (at / "link").symlink_to("/etc/passwd"), "link"),
    "a link out of it, by ..": (lambda at: (at / "link").symlink_to("a/../../x"), "link"),
    "a pipe": (lambda at: os.mkfifo(at / "pipe"), "pipe"),
    "Python's start-up": (lambda at: write(at / "lib/evil.pth"), "lib/evil.pth"),
}


@pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
def test_what_others_would_execute_is_reported(
    make: tuple[Callable[[Path], object], str], tmp_path: Path
) -> None:
    since = time.time_ns()
    make[0](tmp_path)
    (found,) = executable_changes(tmp_path, since)
    assert found.startswith(f"{make[1]} ("), found


def test_what_nobody_executes_is_not_reported(tmp_path: Path) -> None:
    since = time.time_ns()
    write(tmp_path / "src/main.py")
    write(tmp_path / "README.md")
    (tmp_path / "link").symlink_to("src/main.py")
    assert executable_changes(tmp_path, since) == []


def test_what_was_there_before_is_not_reported_and_a_time_that_was_set_back_hides_nothing(
    tmp_path: Path,
) -> None:
    write(tmp_path / "old", 0o755)
    before = (tmp_path / "old").stat().st_ctime_ns
    since = before + 50_000_000
    assert executable_changes(tmp_path, since) == []
    while time.time_ns() <= since + 20_000_000:
        pass
    write(tmp_path / "new", 0o755)
    os.utime(tmp_path / "new", (0, 0))
    assert [one.partition(" ")[0] for one in executable_changes(tmp_path, since)] == ["new"]


def test_a_name_cannot_write_to_the_terminal_and_many_are_counted(tmp_path: Path) -> None:
    since = time.time_ns()
    write(tmp_path / "\x1b[31mred", 0o755)
    (only,) = executable_changes(tmp_path, since)
    assert "\x1b" not in only
    for number in range(10):
        write(tmp_path / str(number), 0o755)
    found = executable_changes(tmp_path, since, limit=4)
    assert (len(found), found[-1]) == (4, "and 8 more")
