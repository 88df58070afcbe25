"""Nothing of a sandbox remains, whatever dies first: its command, bwrap, or the runner, at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
from pathlib import Path

import pytest

from ringfence.runner.sandbox.processes import Namespaces, ProcessId
from tests.runner.places import CallError, Place, Runner, running
from tests.runner.test_conformance import DAEMON, Listener

BACKENDS = ("bubblewrap",)
HIDDEN = "import os, time; os.fork() or os.setsid(); os.fork(); [time.sleep(60) for _ in iter(int, 1)]"


def processes_of(run_id: str) -> list[ProcessId]:
    """bwrap outside, and process 1 inside: their name begins so."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(f"ringfence-{run_id}-".encode()):
                found.append(ProcessId.of(int(path.parent.name)))
    return [process for process in found if process is not None and process.runs]


async def gone(run_id: str) -> None:
    """Wait until no process of this sandbox runs. Its first process kills all others before it is gone."""
    async with asyncio.timeout(30):
        while processes_of(run_id):
            await asyncio.sleep(0.01)


def cgroups_of(run_id: str) -> list[Path]:
    return [path for path in Path("/sys/fs/cgroup").rglob(f"ringfence-{run_id}-*") if path.is_dir()]


async def test_the_end_of_bwrap_is_the_end_of_all(runner: Runner, folder: Path) -> None:
    async with Listener(folder / "s.sock", runner.place.uid) as listener:
        spec = runner.spec("python3", "-c", DAEMON, "stay", socket=str(listener.path))
        pid = (await runner.call("start", spec=spec))["pid"]
        (daemon, _), (command, _) = await listener.named("daemon"), await listener.named("command")
        outside = next(one for one in processes_of(spec["run_id"]) if one.pid != pid)
        os.kill(outside.pid, signal.SIGKILL)
        assert (await daemon.read(), await command.read()) == (b"", b"")
        assert (await runner.call("wait", run_id=spec["run_id"]))["reason"] == "killed"
        report = await runner.call("destroy", run_id=spec["run_id"])
        assert report["complete"], report
        assert not cgroups_of(spec["run_id"])


async def test_the_death_of_the_runner_ends_the_sandbox_and_the_next_one_sweeps(
    place: Place, folder: Path, code: Path
) -> None:
    async with Listener(folder / "s.sock", place.uid) as listener:
        async with running(place, folder, code) as first:
            spec = first.spec("python3", "-c", DAEMON, "stay", socket=str(listener.path))
            pid = (await first.call("start", spec=spec))["pid"]
            (daemon, _), (command, _) = await listener.named("daemon"), await listener.named("command")
            namespaces = Namespaces.of(pid)
            await first.kill()
            # No sweep is needed for that.
            assert (await daemon.read(), await command.read()) == (b"", b"")
        assert list((folder / "state").iterdir())
        async with running(place, folder, code) as second:
            (report,) = await second.call("sweep")
            assert report["run_id"] == spec["run_id"]
            assert report["complete"], report
            assert await second.call("sweep") == []
        assert not list((folder / "state").iterdir())
        assert not cgroups_of(spec["run_id"])
        assert namespaces.inodes
        assert not namespaces.members("mnt")
        namespaces.close()


async def test_a_sandbox_that_gets_the_numbers_of_one_that_is_gone_is_not_part_of_it(
    place: Place, folder: Path, code: Path
) -> None:
    """The kernel gives the number of a namespace that is gone to the next one."""
    async with running(place, folder, code) as runner:
        spec = runner.spec("sleep", "600")
        pid = (await runner.call("start", spec=spec))["pid"]
        namespaces = Namespaces.of(pid)
        inodes = set(namespaces.inodes.values())
        assert (await runner.call("destroy", run_id=spec["run_id"]))["complete"]
        others = [runner.spec("sleep", "600") for _ in range(3)]
        for other in others:
            pid = (await runner.call("start", spec=other))["pid"]
            found = Namespaces.of(pid)
            assert not inodes & set(found.inodes.values())
            found.close()
        assert not namespaces.members("pid") + namespaces.members("mnt")
        namespaces.close()
        for other in others:
            assert (await runner.call("destroy", run_id=other["run_id"]))["complete"]


async def test_a_sweep_leaves_the_sandboxes_of_a_living_runner_alone(
    place: Place, folder: Path, code: Path
) -> None:
    async with running(place, folder, code) as first, running(place, folder, code) as second:
        spec = first.spec("sleep", "600")
        await first.call("start", spec=spec)
        assert await second.call("sweep") == []
        await first.call("signal", run_id=spec["run_id"], number=signal.SIGTERM)
        assert await first.call("wait", run_id=spec["run_id"]) == {"code": 143, "reason": "command"}
        assert (await first.call("destroy", run_id=spec["run_id"]))["complete"]


async def test_a_sweep_kills_nobody_who_has_the_pid_of_a_dead_process(
    place: Place, folder: Path, code: Path
) -> None:
    bystander = subprocess.Popen(["sleep", "600"], user=place.uid if os.geteuid() == 0 else None)
    try:
        async with running(place, folder, code) as first:
            await first.call("start", spec=first.spec("sleep", "600", run_id="t-reused"))
            await first.kill()
        await gone("t-reused")
        (record,) = (folder / "state").iterdir()
        text = record.read_text()
        start = text.index('"processes": [{"pid": ') + len('"processes": [{"pid": ')
        record.write_text(text[:start] + str(bystander.pid) + text[text.index(",", start) :])
        async with running(place, folder, code) as second:
            assert (await second.call("sweep"))[0]["complete"]
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.parametrize("seed", range(12))
async def test_a_runner_killed_at_any_moment_leaves_nothing_after_a_sweep(
    place: Place, folder: Path, code: Path, seed: int
) -> None:
    run_id = f"t-any-{place.uid}-{seed}"
    async with running(place, folder, code) as first:
        await first.call("available")  # its modules are loaded: the start itself is what gets interrupted
        start = asyncio.create_task(
            first.call("start", spec=first.spec("python3", "-c", HIDDEN, run_id=run_id))
        )
        await asyncio.wait([start], timeout=random.Random(seed).uniform(0, 0.25))
        await first.kill()
        await asyncio.gather(start, return_exceptions=True)
    async with running(place, folder, code) as second:
        reports = await second.call("sweep")
        assert all(report["complete"] for report in reports), reports
        await gone(run_id)
    state = folder / "state"
    assert not state.exists() or not list(state.glob("*.json"))
    assert not cgroups_of(run_id)


async def test_a_start_that_fails_leaves_nothing(runner: Runner, folder: Path) -> None:
    spec = runner.spec("true", files={"/usr/made": "not there"})
    with pytest.raises(CallError, match="sandbox_unavailable"):
        await runner.call("start", spec=spec)
    await gone(spec["run_id"])
    assert not list(runner.state.iterdir())
    assert not cgroups_of(spec["run_id"])


async def test_two_runners_may_use_one_run_id(place: Place, folder: Path, code: Path) -> None:
    """Their folders of records are their own: neither may take the other's sandbox for a leftover."""
    other = folder / "other"
    other.mkdir()
    os.chown(other, place.uid, place.uid)
    async with running(place, folder, code) as first, running(place, other, code) as second:
        spec = first.spec("sleep", "600")
        await first.call("start", spec=spec)
        assert (await second.run("true", run_id=spec["run_id"])).code == 0
        with pytest.raises(CallError):
            await second.call("start", spec={**spec, "files": {"/usr/made": "not there"}})
        await first.call("signal", run_id=spec["run_id"], number=signal.SIGTERM)
        assert (await first.call("wait", run_id=spec["run_id"]))["reason"] == "command"
        assert (await first.call("destroy", run_id=spec["run_id"]))["complete"]


async def test_records_of_an_earlier_boot_name_no_process(place: Place, folder: Path, code: Path) -> None:
    bystander = subprocess.Popen(["sleep", "600"], user=place.uid if os.geteuid() == 0 else None)
    try:
        async with running(place, folder, code) as first:
            await first.call("start", spec=first.spec("sleep", "600", run_id="t-boot"))
            await first.kill()
        await gone("t-boot")
        (file,) = (folder / "state").iterdir()
        record = json.loads(file.read_text())
        process = ProcessId.of(bystander.pid)
        assert process is not None
        record["processes"] = [{"pid": process.pid, "start": process.start}]
        record["boot_id"] = "another"
        file.write_text(json.dumps(record))
        async with running(place, folder, code) as second:
            assert (await second.call("sweep"))[0]["complete"]
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


async def test_a_frozen_sandbox_of_a_dead_runner_is_swept_up(place: Place, folder: Path, code: Path) -> None:
    """The kernel's freezer keeps it from dying with its runner."""
    async with running(place, folder, code) as first:
        spec = first.spec("python3", "-c", HIDDEN)
        await first.call("start", spec=spec)
        await first.call("freeze", run_id=spec["run_id"])
        await first.kill()
    async with running(place, folder, code) as second:
        (report,) = await second.call("sweep")
        assert report["complete"], report
    await gone(spec["run_id"])
    assert not list((folder / "state").iterdir())
    assert not cgroups_of(spec["run_id"])
