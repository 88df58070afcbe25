"""Control groups of version 2, on a made tree: the machine of the tests may have version 1 alone."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from ringfence.runner.sandbox import cgroups
from ringfence.runner.sandbox.backend import ResourceLimits, SandboxUnavailableError
from ringfence.runner.sandbox.cgroups import ControlGroup, Hierarchies, find_hierarchies, find_mounted

FILES = ("cgroup.procs", "cgroup.subtree_control", "cgroup.freeze", "cgroup.kill", "cpu.max", "memory.max",
         "memory.oom.group", "memory.swap.max", "pids.max")  # fmt: skip
ALL = frozenset({"cpu", "memory", "pids"})


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mounted version 2 whose new groups have the kernel's files."""
    mkdir = Path.mkdir

    def make(path: Path, *arguments: object, **named: object) -> None:
        mkdir(path, *arguments, **named)  # type: ignore[arg-type]
        if (path.parent / "cgroup.controllers").exists():
            fill(path)

    root = tmp_path / "cgroup"
    mkdir(root)
    fill(root)
    monkeypatch.setattr(Path, "mkdir", make)
    return root


def fill(path: Path) -> None:
    for name in FILES:
        (path / name).write_text("")
    (path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    (path / "cgroup.events").write_text("populated 0\nfrozen 1\n")


def proc_of(tmp_path: Path, root: Path, own: str) -> Path:
    proc = tmp_path / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text(f"0::{own}\n")
    (proc / "mountinfo").write_text(
        f"31 23 0:26 / {root} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
        "40 23 8:1 / / rw - ext4 /dev/sda1 rw\n"
    )
    return proc


def test_limits_are_written(mounted: Path) -> None:
    group = ControlGroup("ringfence-one", Hierarchies(mounted, ALL))
    limits = ResourceLimits(memory_bytes=64 << 20, cpus=1.5, pids=20)
    assert group.lacking(limits) == []
    group.create(limits)
    made = mounted / "ringfence-one"
    assert {name: (made / name).read_text() for name in FILES if (made / name).read_text()} == {
        "memory.max": str(64 << 20),
        "memory.oom.group": "1",
        "memory.swap.max": "0",
        "cpu.max": "150000 100000",
        "pids.max": "20",
    }


def test_limit_without_a_controller_is_lacking(mounted: Path) -> None:
    group = ControlGroup("ringfence-one", Hierarchies(mounted, frozenset({"pids"})))
    assert group.lacking(ResourceLimits(memory_bytes=64 << 20, cpus=1, pids=20)) == ["memory", "cpu"]
    assert group.lacking(ResourceLimits()) == []
    assert ControlGroup("ringfence-one", Hierarchies()).lacking(ResourceLimits(pids=20)) == ["pids"]


def test_a_limit_that_the_kernel_does_not_take_leaves_no_group(
    mounted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[Path] = []

    def refuse(path: Path, value: object) -> None:
        raise PermissionError(1, "not permitted", str(path))

    monkeypatch.setattr(Path, "rmdir", lambda path: removed.append(path))
    monkeypatch.setattr(cgroups, "_write", refuse)
    group = ControlGroup("ringfence-one", Hierarchies(mounted, ALL))
    with pytest.raises(SandboxUnavailableError) as refused:
        group.create(ResourceLimits(memory_bytes=64 << 20))
    assert "systemd-run" in (refused.value.remedy or "")
    assert removed == [mounted / "ringfence-one"]


async def test_freezing_waits_for_the_kernel(mounted: Path) -> None:
    group = ControlGroup("ringfence-one", Hierarchies(mounted, ALL))
    group.create(ResourceLimits())
    events = mounted / "ringfence-one" / "cgroup.events"
    events.write_text("populated 1\nfrozen 0\n")
    freezing = asyncio.create_task(group.freeze())
    await asyncio.sleep(0)
    assert (mounted / "ringfence-one" / "cgroup.freeze").read_text() == "1"
    assert not freezing.done()
    events.write_text("populated 1\nfrozen 1\n")
    await freezing
    with pytest.raises(SandboxUnavailableError):
        await group.thaw(within_s=0)


def test_the_own_group_is_used_and_its_children_get_controllers(
    tmp_path: Path, mounted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = mounted / "user.slice"
    own.mkdir()
    write = cgroups._write
    monkeypatch.setattr(cgroups, "_write", lambda path, value: write(path, str(value).replace("+", "")))
    assert find_hierarchies(proc=proc_of(tmp_path, mounted, "/user.slice")) == Hierarchies(own, ALL)
    assert (own / "cgroup.subtree_control").read_text() == "cpu memory pids"


def test_a_group_without_controllers_is_used_for_the_rest(tmp_path: Path, mounted: Path) -> None:
    own = mounted / "user.slice"
    own.mkdir()
    for group in (mounted, own):
        (group / "cgroup.controllers").write_text("hugetlb\n")
    assert find_hierarchies(proc=proc_of(tmp_path, mounted, "/user.slice")) == Hierarchies(own, frozenset())


def test_a_group_that_was_set_aside_comes_first(tmp_path: Path, mounted: Path) -> None:
    aside = mounted / "aside"
    aside.mkdir()
    (aside / "cgroup.subtree_control").write_text("cpu memory pids")
    found = find_hierarchies(aside, proc=proc_of(tmp_path, mounted, "/user.slice"))
    assert found == Hierarchies(aside, ALL)
    assert found.controllers == ALL


def test_alone_in_its_group_the_runner_moves_below_it(
    tmp_path: Path, mounted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = mounted / "run.scope"
    own.mkdir()
    (own / "cgroup.procs").write_text(f"{os.getpid()}\n")
    write = cgroups._write

    def busy_until_moved(path: Path, value: object) -> None:
        """Version 2 refuses limited children in a group with processes (EBUSY)."""
        if path.name == "cgroup.subtree_control" and not (own / "ringfence-runner" / "cgroup.procs").exists():
            raise OSError(16, "busy")
        write(path, " ".join(sorted(ALL)) if path.name == "cgroup.subtree_control" else value)

    monkeypatch.setattr(cgroups, "_write", busy_until_moved)
    assert find_hierarchies(own, proc=proc_of(tmp_path, mounted, "/run.scope")) == Hierarchies(own, ALL)
    assert (own / "ringfence-runner" / "cgroup.procs").read_text() == str(os.getpid())


def test_both_versions_are_listed(tmp_path: Path, mounted: Path) -> None:
    proc = proc_of(tmp_path, mounted, "/")
    (mounted / "cgroup.controllers").write_text("hugetlb\n")
    with (proc / "mountinfo").open("a") as file:
        file.write("32 23 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n")
    assert find_mounted(proc=proc) == {"hugetlb": 2, "memory": 1}


def test_a_record_names_groups_of_sandboxes_alone(mounted: Path) -> None:
    for name in ("ringfence-one", "other"):
        (mounted / name).mkdir()
    group = ControlGroup.recorded([str(mounted / "ringfence-one"), str(mounted / "other"), "/sys/fs/cgroup"])
    assert group.paths == [mounted / "ringfence-one"]
