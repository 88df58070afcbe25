"""What is special about containers: the engine outlives the runner, and may provide less than it was asked for."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ringfence.runner.sandbox.backend import ResourceLimits, SandboxSpec, SandboxUnavailableError
from ringfence.runner.sandbox.oci import OciBackend
from ringfence.runner.sandbox.oci_client import ContainerEngine
from tests.runner.places import CallError, Place, Runner, running
from tests.runner.podman import Podman

BACKENDS = ("oci",)


def containers(podman: Podman) -> list[str]:
    with podman.client() as client:
        return [one["Names"][0] for one in client.get("/containers/json", params={"all": "1"}).json()]


async def test_a_dead_runners_container_is_swept_up(
    place: Place, podman: Podman, folder: Path, code: Path
) -> None:
    async with running(place, folder, code) as first:
        spec = first.spec("sleep", "600")
        pid = (await first.call("start", spec=spec))["pid"]
        await first.kill()
    (name,) = containers(podman)
    assert name.startswith(f"/ringfence-{spec['run_id']}-")
    assert Path(f"/proc/{pid}").exists()
    async with running(place, folder, code) as second:
        (report,) = await second.call("sweep")
    assert (report["run_id"], report["complete"]) == (spec["run_id"], True), report
    assert containers(podman) == []
    assert not list((folder / "state").iterdir())
    async with asyncio.timeout(10):
        while Path(f"/proc/{pid}").exists():
            await asyncio.sleep(0.01)


async def test_an_unknown_image_is_refused_and_leaves_nothing(
    runner: Runner, folder: Path, podman: Podman
) -> None:
    with pytest.raises(CallError, match="sandbox_unavailable"):
        await runner.run("true", image="localhost/not-there:latest")
    assert containers(podman) == []
    assert not list(runner.state.iterdir())


async def test_a_runtime_that_the_engine_does_not_use_is_refused(
    place: Place, folder: Path, podman: Podman
) -> None:
    backend = OciBackend(folder / "state", socket=podman.socket, runtime="runsc")
    with pytest.raises(SandboxUnavailableError, match="runsc"):
        await backend.start(SandboxSpec("t-runtime", ("true",), image=place.image))
    assert containers(podman) == []


async def test_an_engine_that_ignores_a_limit_is_refused(
    place: Place, folder: Path, podman: Podman, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = OciBackend(folder / "state", socket=podman.socket)
    create = ContainerEngine.create

    async def forgetful(engine: ContainerEngine, name: str, body: dict) -> str:
        del body["HostConfig"]["Memory"], body["HostConfig"]["MemorySwap"]
        return await create(engine, name, body)

    monkeypatch.setattr(ContainerEngine, "create", forgetful)
    with pytest.raises(SandboxUnavailableError, match="memory limit"):
        await backend.start(
            SandboxSpec("t-limit", ("true",), image=place.image, limits=ResourceLimits(memory_bytes=64 << 20))
        )
    assert containers(podman) == []


async def test_no_engine_is_a_reason(tmp_path: Path) -> None:
    (reason,) = await OciBackend(tmp_path, socket=tmp_path / "none.sock").available()
    assert "podman.socket" in reason
