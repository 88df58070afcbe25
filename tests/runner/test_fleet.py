"""`ringfence serve runner` on a real stack: signed orders become runs in fresh sandboxes, or are refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.runner.fleet import POOL, Fleet
from tests.runner.installation import Installation


@pytest.fixture(scope="module")
def fleet(here: Installation) -> Iterator[Fleet]:
    fleet = Fleet(here)
    fleet.start()
    yield fleet
    fleet.close()


def test_an_order_becomes_a_run_with_what_the_pool_gives(fleet: Fleet) -> None:
    (fleet.sources / "a").write_text("read me\n")
    run_id = fleet.order(
        "--mount", "sources", "--mount", "reports:rw",
        command="cat /workspace/sources/a > /workspace/reports/out; echo $POOL_SAYS >> /workspace/reports/out",
    )  # fmt: skip
    found = fleet.ended(run_id)
    assert found["exit"] == {"code": 0}, fleet.logs()
    assert (found["runner"], found["agent_id"], found["ordered_by"].rpartition("/")[2]) == (
        "runner-1", "reader-bot", "maria",
    )  # fmt: skip
    assert found["mounts"] == [
        {"name": "sources", "read_write": False},
        {"name": "reports", "read_write": True},
    ]
    assert (fleet.reports / "out").read_text() == "read me\nhello\n"
    assert len(found["policy_digest"]) == 64
    assert str(fleet.folder) not in json.dumps(found)


def test_labels_select_the_pool_of_an_order(here: Installation, fleet: Fleet) -> None:
    fleet.until(lambda: here.say("run", "pools", who="maria")["pools"], "the pool in the list")
    (pool,) = here.say("run", "pools", "--label", "zone=eu-1", who="maria")["pools"]
    assert (pool["name"], pool["runners"], pool["labels"]["zone"]) == (POOL, ["runner-1"], "eu-1")
    words = ("--task", here.task, "--", "true")
    ordered = here.say("run", "order", "--label", "zone=eu-1", *words, who="maria")
    assert ordered["pool"] == POOL
    assert fleet.ended(ordered["run_id"])["exit"] == {"code": 0}
    nowhere = here.call("run", "order", "--label", "zone=us-1", *words, who="maria")
    assert (nowhere.returncode, b"no pool with zone=us-1" in nowhere.stderr) == (1, True), nowhere.stderr
    forced = here.say("run", "order", "--pool", POOL, "--label", "zone=us-1", *words, who="maria")
    assert fleet.ended(forced["run_id"])["refused"]["code"] == "label_not_in_pool"


# --- orders that start nothing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--mount", "secrets"), "mount_not_in_pool"),
        (("--mount", "sources:rw"), "mount_read_only"),
        (("--mount", "sources", "--mount", "sources"), "mount_repeated"),
        (("--image", f"sha256:{'a' * 64}"), "image_not_in_pool"),
        (("--memory", "64G"), "limit_above_pool"),
        (("--cpus", "64"), "limit_above_pool"),
        (("--pids", "100000"), "limit_above_pool"),
        (("--ttl", "12h"), "limit_above_pool"),
    ],
    ids=str,
)
def test_order_beyond_the_pool_is_refused_and_shown(fleet: Fleet, words: tuple[str, ...], code: str) -> None:
    found = fleet.ended(fleet.order(*words))
    assert found["refused"]["code"] == code
    assert "key_thumbprint" not in found
    shown = fleet.here.call("run", "show", found["id"], who="maria")
    assert code in shown.stdout.decode()


def test_an_order_for_another_pool_starts_nothing(fleet: Fleet) -> None:
    done = fleet.here.say(
        "run", "order", "--pool", "elsewhere", "--task", fleet.here.task, "--", "true", who="maria"
    )
    fleet.ended(fleet.order())
    assert fleet.run(done["run_id"]) is None


def test_a_host_path_is_no_mount(fleet: Fleet) -> None:
    done = fleet.here.call(
        "run",
        "order",
        "--pool",
        POOL,
        "--task",
        fleet.here.task,
        "--mount",
        "/etc",
        "--",
        "true",
        who="maria",
    )
    assert done.returncode == 2, done.stderr


def test_unentitled_user_orders_and_stops_no_run(fleet: Fleet) -> None:
    done = fleet.here.call(
        "run", "order", "--pool", POOL, "--task", fleet.here.task, "--", "true", who="olga"
    )
    assert (done.returncode, b"assigner" in done.stderr) == (1, True), done.stderr
    run_id = fleet.order(command="sleep 30")
    fleet.started(run_id)
    refused = fleet.here.call("run", "stop", run_id, "--reason", "x", "--yes", who="olga")
    assert (refused.returncode, b"assigner" in refused.stderr) == (1, True), refused.stderr
    fleet.here.say("run", "stop", run_id, "--reason", "enough", "--yes", who="sam")
    found = fleet.ended(run_id)
    assert found["exit"].get("reason") == "stopped by sam: enough", fleet.logs()


def test_an_order_of_a_task_that_ended_between_is_refused(fleet: Fleet) -> None:
    task = fleet.here.assign()
    blockers = [fleet.order(command="sleep 60") for _ in range(2)]
    for run_id in blockers:
        fleet.started(run_id)
    waiting = fleet.order(task=task, command="true")
    stopped = fleet.order(command="true")
    fleet.here.say("task", "end", task, "--reason", "done", who="maria")
    fleet.here.say("run", "stop", stopped, "--reason", "not needed", "--yes", who="maria")
    # At once, though an order before it waits for its turn.
    assert fleet.ended(stopped)["refused"]["code"] == "run_stopped"
    assert fleet.run(waiting) is None
    assert {fleet.status(run_id) for run_id in blockers} == {"started"}
    for run_id in blockers:
        fleet.here.say("run", "stop", run_id, "--reason", "room", "--yes", who="maria")
    assert fleet.ended(waiting)["refused"]["code"] == "task_ended"


def test_a_full_queue_refuses_further_orders_and_keeps_its_order(fleet: Fleet) -> None:
    (fleet.reports / "order").unlink(missing_ok=True)
    blockers = [fleet.order(command="sleep 60") for _ in range(2)]
    for run_id in blockers:
        fleet.started(run_id)
    queued = [
        fleet.order("--mount", "reports:rw", command=f"echo {number} >> /workspace/reports/order")
        for number in range(3)
    ]
    one_more = fleet.order()
    assert fleet.ended(one_more)["refused"]["code"] == "queue_full"
    fleet.here.say("run", "stop", blockers[0], "--reason", "room", "--yes", who="maria")
    for run_id in queued:
        assert fleet.ended(run_id)["exit"] == {"code": 0}
    assert (fleet.reports / "order").read_text().split() == ["0", "1", "2"]
    fleet.here.say("run", "stop", blockers[1], "--reason", "room", "--yes", who="maria")
    listed = fleet.here.say("run", "list", "--all", "--agent", "reader-bot", who="maria")["runs"]
    assert {*queued, one_more} <= {one["id"] for one in listed}
