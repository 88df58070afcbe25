"""Runs and orders in containers: an image with Python and Ringfence, and the same identity, way out and end."""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.conftest import needed
from tests.runner.fleet import Fleet
from tests.runner.installation import SCOPE, Installation, installation
from tests.runner.podman import Podman, ringfence_packages


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest) -> Iterator[Podman]:
    if not request.config.getoption("--oci"):
        pytest.skip("--oci podman")
    with tempfile.TemporaryDirectory(prefix="ringfence-podman-", ignore_cleanup_errors=True) as folder:
        engine = Podman(Path(folder), packages=ringfence_packages())
        with needed(request):
            engine.start()
        yield engine
        engine.stop()


@pytest.fixture(scope="module")
async def here(engine: Podman) -> AsyncIterator[Installation]:
    async with installation() as here:
        settings = here.folder / ".ringfence/ringfence.toml"
        # Before the first table of the file.
        settings.write_text(f'runner_oci_socket = "{engine.socket}"\n' + settings.read_text())
        yield here


def test_a_run_in_a_container_goes_the_same_way(here: Installation, engine: Podman) -> None:
    request = f"ringfence request --task $RINGFENCE_TASK --allow '{SCOPE}' --reason look --delivery gateway"
    script = f"id -u; {request} >/dev/null && python3 /mnt/get.py; exit 5"
    folder = here.folder / "work"
    folder.mkdir()
    url = f"http://127.0.0.1:{here.notes.port}/notes/today"
    (folder / "get.py").write_text(
        f"import urllib.request as r\nprint(r.urlopen({url!r}).read().decode().strip())\n"
    )
    script = script.replace("/mnt/get.py", f"{folder}/get.py")
    code, report, out = here.report(
        "--backend", "oci", "--image", engine.image, "--mount", str(folder), "--", "sh", "-c", script
    )
    assert (code, out.decode().split("\n")) == (5, ["1000", "buy milk", ""]), report
    (lease,) = report["allowed"]
    assert (report["backend"], lease["ended_by"]) == ("oci", "run_ended")
    assert report["destroyed"]["complete"] is True
    with engine.client() as client:
        assert client.get("/containers/json", params={"all": "1"}).json() == []


def test_the_end_of_the_runner_ends_the_container(here: Installation, engine: Podman) -> None:
    process = here.start(
        "run", "--backend", "oci", "--image", engine.image, "--task", here.task,
        "--", "sh", "-c", "echo ready; sleep 603",
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.kill()
    process.communicate()
    code, report, _ = here.report("--backend", "oci", "--image", engine.image, "--", "true")
    assert code == 0, report
    with engine.client() as client:
        assert client.get("/containers/json", params={"all": "1"}).json() == []
    records = here.say("run", "list", "--all", who="olga")
    assert "lost" in json.dumps(records)


def test_a_writable_mount_is_refused(here: Installation, engine: Podman, tmp_path: Path) -> None:
    done = here.run(
        "--backend", "oci", "--image", engine.image, "--mount", f"{tmp_path}:rw-as-root", "--", "true"
    )
    assert done.returncode == 1
    assert b"read-only" in done.stderr


# --- orders ---


@pytest.fixture(scope="module")
def fleet(here: Installation, engine: Podman) -> Iterator[Fleet]:
    fleet = Fleet(here)
    fleet.write(
        backend="oci", images=[digest_of(engine)], default_image=digest_of(engine),
        mounts={"sources": {"path": str(fleet.sources)}},
    )  # fmt: skip
    fleet.start(RINGFENCE_RUNNER_OCI_SOCKET=str(engine.socket))
    yield fleet
    fleet.close()


def digest_of(engine: Podman) -> str:
    return engine.image if engine.image.startswith("sha256:") else f"sha256:{engine.image}"


def test_an_order_becomes_a_container_with_an_identity_of_its_own(fleet: Fleet, engine: Podman) -> None:
    (fleet.sources / "a").write_text("read me\n")
    ask = f"ringfence request --task $RINGFENCE_TASK --allow '{SCOPE}' --reason look --delivery gateway"
    run_id = fleet.order(
        "--mount",
        "sources",
        command=f"read said < /workspace/sources/a && test \"$said\" = 'read me' && {ask}",
    )
    found = fleet.ended(run_id)
    assert found["exit"] == {"code": 0}, fleet.logs()
    assert (found["backend"], found["image_digest"]) == ("oci", digest_of(engine))
    trace = str(fleet.here.say("audit", "trace", run_id, who="ali"))
    assert "credential issued" in trace
    with engine.client() as client:
        assert client.get("/containers/json", params={"all": "1"}).json() == []


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--image", f"sha256:{'a' * 64}"), "image_not_in_pool"),
        (("--mount", "sources:rw"), "mount_read_only"),
    ],
    ids=str,
)
def test_order_beyond_the_pool_of_images_is_refused(fleet: Fleet, words: tuple[str, ...], code: str) -> None:
    assert fleet.ended(fleet.order(*words))["refused"]["code"] == code


def test_a_stop_removes_the_container(fleet: Fleet, engine: Podman) -> None:
    run_id = fleet.order(command="sleep 600")
    fleet.started(run_id)
    fleet.here.say("run", "stop", run_id, "--reason", "enough", "--yes", who="sam")
    assert fleet.ended(run_id)["exit"].get("reason") == "stopped by sam: enough"
    with engine.client() as client:
        assert client.get("/containers/json", params={"all": "1"}).json() == []
