"""Orders that become containers: a pool with images, and what it refuses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.runner.fleet import Fleet
from tests.runner.installation import SCOPE, Installation, installation
from tests.runner.podman import Podman
from tests.runner.test_run_oci import engine

__all__ = ["engine"]


@pytest.fixture(scope="module")
async def here(engine: Podman) -> AsyncIterator[Installation]:
    async with installation() as here:
        yield here


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
