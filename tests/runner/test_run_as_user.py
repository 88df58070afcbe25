"""Whole runs where nobody is root: the stack, the runner, `ringfence run` and orders, all as one ordinary user."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.runner.fleet import Fleet
from tests.runner.installation import SCOPE, WITHIN_S, Installation, installation, until
from tests.runner.ordinary_user import obstacle, ordinary_user
from tests.runner.places import ORDINARY_UID

REQUEST = f"ringfence request --task $RINGFENCE_TASK --allow '{SCOPE}' --reason look --delivery gateway"


@pytest.fixture(scope="module")
async def here() -> AsyncIterator[Installation]:
    if (reason := obstacle()) is not None:
        pytest.skip(reason)
    with ordinary_user() as program:
        async with installation(program=program, uid=ORDINARY_UID) as here:
            yield here


@pytest.fixture(scope="module")
def fleet(here: Installation) -> Iterator[Fleet]:
    fleet = Fleet(here)
    fleet.start()
    yield fleet
    fleet.close()


def test_a_run_of_an_ordinary_user_asks_uses_and_loses(here: Installation) -> None:
    url = f"http://127.0.0.1:{here.notes.port}/notes"
    script = f"id -u; {REQUEST} >/dev/null && curl -sS {url}/today; curl -sS -X DELETE {url}/today; exit 5"
    code, report, out = here.report("--", "sh", "-c", script)
    assert code == 5, report
    assert out.startswith(b"1000\nbuy milk\n")
    assert b"beyond_scope" in out
    (lease,) = report["allowed"]
    assert (lease["delivery"], lease["ended_by"]) == ("gateway", "run_ended")
    assert "beyond_scope" in {reason["code"] for one in report["denied"] for reason in one["reasons"]}
    assert report["destroyed"]["complete"] is True, report
    assert report["used"]["memory_peak_bytes"], "a control group of the user's own counts"


def test_limits_hold_for_an_ordinary_user(here: Installation) -> None:
    hog = "b = bytearray(400 << 20); print(len(b))"
    code, report, out = here.report("--memory", "100M", "--", "python3", "-c", hog)
    assert (code != 0, out) == (True, b""), report
    code, report, _ = here.report("--ttl", "8s", "--", "sleep", "600")
    assert (code, report["exit"]["reason"]) == (137, "its time was over")


def test_a_killed_runner_of_an_ordinary_user_leaves_nothing(here: Installation) -> None:
    process = here.start(
        "run", "--task", here.task, "--", "sh", "-c", f"{REQUEST} >/dev/null; echo ready; sleep 605"
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.kill()
    process.communicate(timeout=WITHIN_S)
    assert here.run("--", "true").returncode == 0
    until(lambda: not here.say("lease", "list", who="olga")["leases"], "the end of the leases")
    assert "lost" in json.dumps(here.say("run", "list", "--all", who="olga"))


def test_files_left_in_a_mount_are_reported(here: Installation) -> None:
    folder = here.own_folder("work")
    script = "pwd; mkdir -p .git/hooks; echo 'curl evil' > .git/hooks/pre-commit"
    code, report, out = here.report("--mount", f"{folder}:rw", "--", "sh", "-c", script)
    assert (code, out.decode().strip()) == (0, str(folder)), report
    (left,) = report["destroyed"]["left_in_mounts"]
    assert ".git/hooks/pre-commit" in left
    assert (folder / ".git/hooks/pre-commit").stat().st_uid == ORDINARY_UID


def test_a_folder_that_a_run_closed_is_reported(here: Installation) -> None:
    folder = here.own_folder("closed")
    script = "mkdir -p .git/hooks; echo 'curl evil' > .git/hooks/pre-commit; chmod 0311 .git/hooks"
    code, report, _ = here.report("--mount", f"{folder}:rw", "--", "sh", "-c", script)
    (left,) = report["destroyed"]["left_in_mounts"]
    assert (code, ".git/hooks (unknown: it cannot be listed" in left) == (0, True), report
    refused = here.run("--mount", f"{folder}:rw", "--", "true")
    assert refused.returncode not in (0, 137)
    assert b"cannot be listed" in refused.stderr


def test_a_runner_for_fleets_needs_no_root(fleet: Fleet) -> None:
    (fleet.sources / "a").write_text("read me\n")
    run_id = fleet.order(
        "--mount", "sources", "--mount", "reports:rw",
        command="cat /workspace/sources/a > /workspace/reports/out; id -u >> /workspace/reports/out",
    )  # fmt: skip
    found = fleet.ended(run_id)
    assert found["exit"] == {"code": 0}, fleet.logs()
    assert (fleet.reports / "out").read_text() == "read me\n1000\n"
