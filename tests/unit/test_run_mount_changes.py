"""What a run changes in a writable mount, by surveys before and after it."""

from __future__ import annotations

import itertools
import mmap
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from ringfence.runner.lifecycle import mount_changes
from ringfence.runner.lifecycle.mount_changes import MountChanges, changes_of
from ringfence.runner.sandbox.backend import Mount, SandboxSpecError, open_host, survey_mount
from ringfence.runner.sandbox.mount_points import Survey, survey


def write(path: Path, mode: int = 0o644, text: str = "x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def look(folder: Path, *, max_entries: int = 1000, within_s: float = 20) -> Survey:
    descriptor = open_host(folder)
    try:
        return survey(descriptor, {}, max_entries=max_entries, within_s=within_s)
    finally:
        os.close(descriptor)


def changes(folder: Path, make: Callable[[Path], object], *hidden: str) -> MountChanges:
    before = survey_mount(Mount(folder, "/work", hidden=hidden))
    make(folder)
    return changes_of(Mount(folder, "/work", hidden=hidden), before)


def repository(at: Path) -> None:
    """A clone with files that nobody executes."""
    for name in (
        ".git/HEAD",
        ".git/config",
        ".git/objects/ab/cd",
        ".git/refs/heads/main",
        ".git/hooks/sample",
    ):
        write(at / name)
    for name in ("docs/samples/pre-commit", "docs/settings.txt", "lib/pkg/readme", "src/main.py"):
        write(at / name)


def rename_folder(at: Path) -> None:
    (at / ".git/hooks/sample").unlink()
    (at / ".git/hooks").rmdir()
    (at / "docs/samples").rename(at / ".git/hooks")


def replace_configuration(at: Path) -> None:
    (at / ".git/config").unlink()
    (at / ".git/config").symlink_to("../docs/settings.txt")


def bare_repository(at: Path) -> None:
    for name in ("HEAD", "objects/x", "refs/x", "config"):
        write(at / "lib/store" / name)


def link_to_link(at: Path) -> None:
    (at / "a").symlink_to("docs")
    (at / ".husky").symlink_to("a")


def link_in_linked_folder(at: Path) -> None:
    (at / "store").mkdir()
    (at / "store/hooks").symlink_to("../docs")
    (at / "x").mkdir()
    (at / "x/.git").symlink_to("../store")


DANGEROUS: dict[str, tuple[Callable[[Path], object], str]] = {
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
    "a link out of it, by ..": (lambda at: (at / "link").symlink_to("docs/../../x"), "link"),
    "a link in a circle": (lambda at: (at / "link").symlink_to("link"), "link"),
    "a pipe": (lambda at: os.mkfifo(at / "pipe"), "pipe"),
    "Python's start-up": (lambda at: write(at / "lib/evil.pth"), "lib/evil.pth"),
    "Python's compiled files": (
        lambda at: write(at / "a/__pycache__/b.pyc"), "a/__pycache__/b.pyc"),
    "a folder that is renamed": (
        rename_folder, ".git/hooks/pre-commit"),
    "a link at a name that programs read": (
        lambda at: (at / ".envrc").symlink_to("docs/settings.txt"), ".envrc"),
    "a link in place of git's configuration": (
        replace_configuration, ".git/config"),
    "a file of git that names another repository": (
        lambda at: write(at / "lib/pkg/.git", text="gitdir: ../store"), "lib/pkg/.git"),
    "a repository without a work tree": (
        bare_repository, "lib/store/config"),
    "content of the same size": (lambda at: write(at / ".git/hooks/sample", text="y"), ".git/hooks/sample"),
}  # fmt: skip
for _name in (".cargo/config.toml", ".ssh/config", ".gitlab-ci.yml", ".circleci/config.yml", "Jenkinsfile", ".gdbinit",
              ".lldbinit", "pyproject.toml", "CMakeLists.txt", "pom.xml", "Gemfile", ".eslintrc.js", "x.code-workspace",
              ".bazelrc", ".mise.toml", ".tmux.conf", ".husky/pre-push", ".pre-commit-config.yaml"):  # fmt: skip
    DANGEROUS[_name] = (lambda at, name=_name: write(at / name), _name)  # type: ignore[misc]


@pytest.mark.parametrize(("make", "path"), DANGEROUS.values(), ids=DANGEROUS.keys())
def test_a_change_that_others_may_execute_is_reported_as_dangerous(
    make: Callable[[Path], object], path: str, tmp_path: Path
) -> None:
    repository(tmp_path)
    found = changes(tmp_path, make).dangerous
    assert [one for one in found if one.startswith(f"{path} (")], found


LINKED: dict[str, Callable[[Path], object]] = {
    "a link to the file": lambda at: (at / ".envrc").symlink_to("docs/settings.txt"),
    "a link to its folder": lambda at: (at / ".vscode").symlink_to("docs"),
    "a link to a link": link_to_link,
    "an absolute link": lambda at: (at / ".envrc").symlink_to(at / "docs/settings.txt"),
    "a link in a linked folder": link_in_linked_folder,
}


@pytest.mark.parametrize("link", LINKED.values(), ids=LINKED.keys())
def test_a_file_that_a_link_of_before_leads_to_is_judged_by_the_link(
    link: Callable[[Path], object], tmp_path: Path
) -> None:
    repository(tmp_path)
    link(tmp_path)
    (found,) = changes(tmp_path, lambda at: write(at / "docs/settings.txt", text="y")).dangerous
    assert found.startswith("docs/settings.txt (changed: program"), found


def test_further_links_do_not_hide_a_dangerous_name(tmp_path: Path) -> None:
    repository(tmp_path)
    for number in range(100):
        (tmp_path / f"lib/a{number}").symlink_to("pkg/readme")
    (tmp_path / "lib/.envrc").symlink_to("pkg/readme")
    for number in range(100):
        (tmp_path / f"lib/b{number}").symlink_to("pkg/readme")
        (tmp_path / f"docs/{number}").symlink_to("settings.txt")

    def make(at: Path) -> None:
        write(at / "lib/pkg/readme", text="y")
        write(at / "docs/settings.txt", text="y")

    assert changes(tmp_path, make).dangerous == (
        "docs/settings.txt (changed: it has too many names to judge all)",
        "lib/pkg/readme (changed: programs read settings there)",
    )


def test_links_in_a_circle_make_no_further_names(tmp_path: Path) -> None:
    repository(tmp_path)
    for one, other in itertools.permutations("abcde", 2):
        write(tmp_path / one / "text")
        (tmp_path / one / f"to-{other}").symlink_to(f"../{other}")
    found = changes(tmp_path, lambda at: write(at / "a/text", text="y"))
    assert found == MountChanges((), ("a/text (changed)",))


def test_every_other_change_is_reported_too(tmp_path: Path) -> None:
    repository(tmp_path)

    def make(at: Path) -> None:
        write(at / "src/main.py", text="y")
        write(at / "src/new.py")
        (at / "docs/settings.txt").rename(at / "docs/moved.txt")
        (at / "link").symlink_to("src/main.py")
        (at / "lib").chmod(0o700)
        write(at / ".git/objects/ef/01")

    found = changes(tmp_path, make)
    assert found.dangerous == ()
    assert sorted(found.others) == [
        ".git/objects/ef (new)", ".git/objects/ef/01 (new)", "docs/moved.txt (new)", "docs/settings.txt (removed)",
        "lib (changed)", "link (new)", "src/main.py (changed)", "src/new.py (new)",
    ]  # fmt: skip


def test_without_a_change_nothing_is_reported_and_a_time_that_was_set_back_hides_nothing(
    tmp_path: Path,
) -> None:
    write(tmp_path / "old", 0o755)
    status = (tmp_path / "old").stat()
    assert changes(tmp_path, lambda at: None) == MountChanges()

    def make(at: Path) -> None:
        write(at / "old", 0o755, "y")
        os.utime(at / "old", ns=(status.st_atime_ns, status.st_mtime_ns))

    assert changes(tmp_path, make).dangerous == ("old (changed: executable)",)


def test_a_name_cannot_write_to_the_terminal_and_many_are_summarised(tmp_path: Path) -> None:
    (only,) = changes(tmp_path, lambda at: write(at / "\x1b[31mred", 0o755)).dangerous
    assert "\x1b" not in only

    def many(at: Path) -> None:
        for number in range(200):
            write(at / f"bin/{number}", 0o755)
            write(at / f"{number % 40}/text")
        write(at / ".envrc")

    found = changes(tmp_path, many)
    assert len(found.dangerous) <= 64
    assert found.dangerous[0].startswith(".envrc (new")
    assert found.dangerous[-1] == "and more in bin/ (153 new)"
    assert len(found.others) <= 64
    assert found.others[-1].startswith("and more in elsewhere (")


# --- set-user-id ------------------------------------------------------------------------------------------------------


def test_set_id_bits_of_new_and_changed_files_are_reported_first_and_removed(tmp_path: Path) -> None:
    write(tmp_path / "before", 0o4755)
    write(tmp_path / "grows", 0o4755)
    write(tmp_path / "same", 0o4755)

    def make(at: Path) -> None:
        write(at / ".envrc")
        write(at / "lib.so.1", 0o6755)
        write(at / "closed", 0o4111)
        (at / "grows").chmod(0o6755)
        with (at / "before").open("r+b") as file, mmap.mmap(file.fileno(), 0) as shared:
            shared[0] = ord("y")  # not by write(2), which removes the bit
        (at / "shared").mkdir()
        (at / "shared").chmod(0o2777)
        (at / "shared/below").mkdir()

    found = changes(tmp_path, make).dangerous
    assert found[:6] == (
        "before (changed: set-user-id, now removed)",
        "closed (new: set-user-id, now removed)",
        "grows (changed: set-user-id and set-group-id, now removed)",
        "lib.so.1 (new: set-user-id and set-group-id, now removed)",
        "shared (new: set-group-id, now removed)",
        "shared/below (new: set-group-id, now removed)",
    )
    modes = {path.name: path.stat().st_mode & 0o7777 for path in tmp_path.rglob("*")}
    assert modes == {
        "before": 0o755, "grows": 0o755, "same": 0o4755, "lib.so.1": 0o755, "closed": 0o111, "shared": 0o777,
        "below": 0o755, ".envrc": 0o644,
    }  # fmt: skip


def test_a_new_folder_keeps_the_group_bit_of_the_folder_that_it_is_in(tmp_path: Path) -> None:
    (tmp_path / "team").mkdir()
    (tmp_path / "team").chmod(0o2775)
    found = changes(tmp_path, lambda at: (at / "team/new").mkdir())
    assert found == MountChanges((), ("team/new (new)",))
    assert (tmp_path / "team/new").stat().st_mode & 0o2000


def test_a_bit_is_not_removed_through_a_link(tmp_path: Path) -> None:
    outside, mounted = tmp_path / "outside", tmp_path / "mounted"
    write(outside / "tool", 0o4755)
    write(mounted / "a/tool", 0o4755)
    after = look(mounted)
    (mounted / "a/tool").unlink()
    (mounted / "a").rmdir()
    (mounted / "a").symlink_to(outside)
    found = mount_changes.changes(mounted, Survey(), after).dangerous
    assert any(one.startswith("a/tool (new: set-user-id, which is still set") for one in found), found
    assert (outside / "tool").stat().st_mode & 0o4000


# --- what cannot be looked at -----------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_listed_afterwards_is_reported(tmp_path: Path) -> None:
    repository(tmp_path)
    before = look(tmp_path)
    after = look(tmp_path)
    after.unlisted[".git/hooks"] = "Permission denied"
    del after.entries[".git/hooks/sample"]
    assert mount_changes.changes(tmp_path, before, after) == MountChanges(
        (".git/hooks (unknown: it cannot be listed: Permission denied)",)
    )


def test_a_mount_that_is_gone_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (found,) = changes(folder, lambda at: at.rename(tmp_path / "n")).dangerous
    assert found.startswith(". (unknown: "), found


def test_changes_that_take_too_long_are_reported_without_a_judgement(tmp_path: Path) -> None:
    repository(tmp_path)
    before = look(tmp_path)
    write(tmp_path / "src/main.py", text="y")
    (tmp_path / "link").symlink_to("src/main.py")
    assert mount_changes.changes(tmp_path, before, look(tmp_path), within_s=0).dangerous == (
        "link (new: it was not judged within 0 s)",
        "src/main.py (changed: it was not judged within 0 s)",
    )


@pytest.mark.parametrize(("max_entries", "within_s"), [(5, 20), (1000, 0)])
def test_a_folder_beyond_the_limits_is_cut_off(tmp_path: Path, max_entries: int, within_s: float) -> None:
    repository(tmp_path)
    found = look(tmp_path, max_entries=max_entries, within_s=within_s)
    assert found.cut_off
    before = look(tmp_path)
    assert mount_changes.changes(tmp_path, before, found).dangerous[0].startswith(". (unknown: it")


def test_a_folder_beyond_the_limits_is_not_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository(tmp_path)
    monkeypatch.setattr(survey, "__kwdefaults__", {"max_entries": 5, "within_s": 20})
    with pytest.raises(SandboxSpecError, match="more than 5 files") as refused:
        survey_mount(Mount(tmp_path, "/work"))
    assert "--hide" in (refused.value.remedy or "")


def test_a_socket_is_refused_and_a_hidden_one_is_not_seen(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / "a/s"))
    with pytest.raises(SandboxSpecError, match="a/s is a socket"):
        survey_mount(Mount(tmp_path, "/work"))
    for hidden in ("a", "a/s"):
        assert not [*survey_mount(Mount(tmp_path, "/work", hidden=(hidden,))).endpoints]


def test_hidden_paths_are_not_compared(tmp_path: Path) -> None:
    write(tmp_path / "web/node_modules/.bin/old", 0o755)
    write(tmp_path / ".env")

    def make(at: Path) -> None:
        write(at / "web/node_modules/.bin/tool", 0o755)
        write(at / ".env", text="y")

    assert changes(tmp_path, make, "web/node_modules", ".env") == MountChanges()


def test_replacement_of_a_hidden_path_is_compared(tmp_path: Path) -> None:
    write(tmp_path / "web/node_modules/.bin/old", 0o755)
    write(tmp_path / "web/.env")

    def make(at: Path) -> None:
        (at / "web").rename(at / "old")
        write(at / "web/node_modules/.bin/tool", 0o755)
        write(at / "web/.env")

    found = changes(tmp_path, make, "web/node_modules", "web/.env")
    assert "web/.env (new: programs read settings there)" in found.dangerous
    assert "web/node_modules/.bin/tool (new: programs read settings there)" in found.dangerous
    assert {"web (changed)", "web/node_modules (new)"} <= {*found.others}
