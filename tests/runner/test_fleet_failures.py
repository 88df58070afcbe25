"""Runners that are killed, stopped, cut off or dead: no order is lost, none starts twice, and leases end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
import tomllib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from ringfence.client.connection import Connection
from ringfence.client.errors import ApiError
from ringfence.client.reports.read_api import ReadApi
from ringfence.client.settings import ClientSettings
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import Outbound
from ringfence.messages.run import Mount, Run, RunLimits, RunOrder
from ringfence.messages.topics import RUN, RUN_ORDER
from ringfence.model.records.runs import run_id_of
from ringfence.model.requests.run_orders import order_id_of
from tests.runner.fleet import OVER, Fleet
from tests.runner.installation import SCOPE, WITHIN_S, Installation, installation

GRACE_S = 8.0
LIMITS = RunLimits(memory_bytes=1 << 30, cpu_millis=1000, pids=64)


@pytest.fixture(scope="module")
async def here() -> AsyncIterator[Installation]:
    async with installation(RINGFENCE_RUN_GRACE_S=str(GRACE_S)) as here:
        yield here


@pytest.fixture
def fleet(here: Installation, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    """A pool of its own for each test."""
    fleet = Fleet(here, f"pool-{abs(hash(request.node.name)) % 10**9}")
    fleet.write(concurrency=1)
    yield fleet
    fleet.close()


def settings(here: Installation) -> ClientSettings:
    known = ClientSettings.model_fields
    file = tomllib.loads((here.folder / ".ringfence/ringfence.toml").read_text())
    return ClientSettings(**{name: value for name, value in file.items() if name in known})


def key(here: Installation, who: str) -> SigningKey:
    return SigningKey.load(here.folder / f".ringfence/users/{who}.json")


def start(fleet: Fleet, **environment: str) -> subprocess.Popen[bytes]:
    return fleet.start(RINGFENCE_RUN_GRACE_S=str(GRACE_S), **environment)


COUNTED = "echo started >> /workspace/reports/starts"
"""A command that leaves a line each time it starts."""
WRITABLE = ("--mount", "reports:rw")


def starts(fleet: Fleet) -> int:
    file = fleet.reports / "starts"
    return len(file.read_text().split()) if file.exists() else 0


async def status_of(here: Installation, run_id: str, *wanted: str) -> str:
    """Ask until a run has one of these statuses."""
    async with ReadApi(key(here, "olga"), settings(here)) as api:
        over = time.monotonic() + WITHIN_S
        while time.monotonic() < over:
            try:
                status = str((await api.run(run_id))["status"])
            except ApiError:  # there is none yet
                status = ""
            if status in wanted:
                return status
            await asyncio.sleep(0.002)
    raise AssertionError(f"run {run_id} is not {wanted}")


def sandboxes(run_id: str) -> list[str]:
    """Processes of this machine whose command line names a run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if run_id in line:
            found.append(line)
    return found


@pytest.mark.parametrize("step", ["claimed", "started"])
async def test_a_runner_that_is_killed_reports_its_run_as_lost_and_never_starts_it_again(
    here: Installation, fleet: Fleet, step: str
) -> None:
    process = start(fleet)
    seen = run_id = ""
    before = 0
    for _ in range(10):
        run_id = fleet.order(*WRITABLE, command=f"{COUNTED}; sleep 60")
        seen = await status_of(here, run_id, step, *OVER)
        fleet.stop(process, signal.SIGKILL)
        before = starts(fleet)
        process = start(fleet)
        assert await status_of(here, run_id, *OVER) == "lost", seen
        if seen == step:
            break
    assert seen == step
    after = fleet.order(command="true")
    assert fleet.ended(after)["exit"] == {"code": 0}
    assert starts(fleet) == before
    assert sandboxes(run_id) == []


async def test_orders_that_wait_survive_the_runner_and_start_once(here: Installation, fleet: Fleet) -> None:
    process = start(fleet)
    blocker = fleet.order(command="sleep 600")
    await status_of(here, blocker, "started")
    waiting = [fleet.order(*WRITABLE, command=COUNTED) for _ in range(2)]
    assert all(fleet.run(run_id) is None for run_id in waiting)
    fleet.stop(process, signal.SIGKILL)
    start(fleet)
    assert await status_of(here, blocker, *OVER) == "lost"
    for run_id in waiting:
        assert fleet.ended(run_id)["exit"] == {"code": 0}
    assert starts(fleet) == 2


async def test_sigterm_ends_runs_with_a_reason_and_leaves_what_waits(
    here: Installation, fleet: Fleet
) -> None:
    process = start(fleet)
    going = fleet.order(command="sleep 600")
    await status_of(here, going, "started")
    waiting = fleet.order(command="true")
    fleet.stop(process)
    assert process.returncode == 0, fleet.logs()
    found = fleet.ended(going)
    assert (found["status"], found["exit"]["reason"]) == ("ended", "its runner was stopped")
    assert fleet.run(waiting) is None
    start(fleet)
    assert fleet.ended(waiting)["exit"] == {"code": 0}


async def test_sigterm_waits_for_runs_where_it_is_set(here: Installation, fleet: Fleet) -> None:
    process = start(fleet, RINGFENCE_RUNNER_DRAIN_S="60")
    going = fleet.order(command="sleep 4")
    await status_of(here, going, "started")
    fleet.stop(process)
    assert fleet.ended(going)["exit"] == {"code": 0}


async def test_an_order_that_is_delivered_twice_starts_once(here: Installation, fleet: Fleet) -> None:
    start(fleet)
    own = settings(here)
    async with Connection(key(here, "maria"), own) as maria:
        command = ("sh", "-c", "echo started >> /workspace/reports/starts")
        order = RunOrder(
            **maria.stamp(600), pool=fleet.name, agent_id="reader-bot", task_id=here.task, command=command,
            limits=LIMITS, ttl_s=60, mounts=(Mount(name="reports", read_write=True),),
        )  # fmt: skip
        compact = sign(order, maria.key)
        for _ in range(3):
            await maria.publish(RUN_ORDER, fleet.name, order, compact=compact)
        run_id = run_id_of("", order_id=order_id_of(order))
        assert fleet.ended(run_id)["exit"] == {"code": 0}
        await maria.publish(RUN_ORDER, fleet.name, order, compact=compact)
        assert fleet.ended(fleet.order())["exit"] == {"code": 0}
        said: list[str] = []
        await maria.follow(
            [RUN],
            lambda records: said.extend(
                parse(one.value).unverified_claims(Run).status for one in records if one.key == run_id
            ),
        )
    assert starts(fleet) == 1
    assert said == ["claimed", "started", "ended"], "it was not even claimed again"


async def test_strangers_and_tampered_orders_start_nothing_and_hold_nothing_up(
    here: Installation, fleet: Fleet
) -> None:
    start(fleet)
    own = settings(here)
    ordered = []
    stranger = SigningKey.generate(f"spiffe://{own.trust_domain}/user/maria")
    for signer in (stranger, key(here, "olga"), SigningKey.load(here.folder / ".ringfence/keys/policy.json")):
        async with Connection(signer, own) as who:
            order = RunOrder(
                **who.stamp(600), pool=fleet.name, agent_id="reader-bot", task_id=here.task, command=("true",),
                limits=LIMITS, ttl_s=60,
            )  # fmt: skip
            await who.publish(RUN_ORDER, fleet.name, order)
            ordered.append(run_id_of("", order_id=order_id_of(order)))
            elsewhere = order.model_copy(update={"jti": "x", "pool": "elsewhere"})
            await who._publisher.send(
                RUN_ORDER, "run.order", Outbound(fleet.name, sign(elsewhere, signer), id="x")
            )
    assert fleet.ended(fleet.order())["exit"] == {"code": 0}
    assert fleet.run(ordered[0]) is None
    assert fleet.ended(ordered[1])["refused"]["code"] == "not_entitled"
    assert fleet.run(ordered[2]) is None


async def test_a_dead_runner_loses_the_leases_of_its_runs_after_the_grace(
    here: Installation, fleet: Fleet
) -> None:
    process = start(fleet)
    ask = f"ringfence request --task $RINGFENCE_TASK --allow '{SCOPE}' --reason look --delivery gateway --ttl 20m"
    run_id = fleet.order(command=f"{ask} && sleep 600")
    async with ReadApi(key(here, "olga"), settings(here)) as api:

        async def leases() -> list[dict[str, Any]]:
            found = (await api.leases(agent="reader-bot", status="active"))["leases"]
            return [one for one in found if one["instance"]["run"]["run_id"] == run_id]

        over = time.monotonic() + WITHIN_S
        while not (held := await leases()):
            assert time.monotonic() < over, (fleet.logs(), fleet.run(run_id))
            await asyncio.sleep(0.1)
        await asyncio.sleep(GRACE_S + 2)
        assert await leases(), "a runner that lives keeps them"
        fleet.stop(process, signal.SIGKILL)
        died = time.monotonic()
        while await leases():
            assert time.monotonic() < died + GRACE_S + 30
            await asyncio.sleep(0.1)
        assert time.monotonic() - died > GRACE_S - 2
        lease = await api.lease(held[0]["id"])
        assert lease["cause"]["kind"] == "run_ended"
        assert "silent" in lease["cause"]["reason"]
    assert fleet.status(run_id) == "started", "nobody but its runner says something of it"
    start(fleet)
    assert await status_of(here, run_id, *OVER) == "lost"


def broker_pid(here: Installation) -> int:
    """The process of the embedded broker, a child of `ringfence dev`."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            line = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == here.pid and b"noida" in line:
            return int(path.name)
    raise AssertionError("no broker")


async def test_a_runner_without_kafka_freezes_its_runs_and_goes_on_in_time(
    here: Installation, fleet: Fleet
) -> None:
    start(fleet)
    run_id = fleet.order(
        "--mount", "reports:rw", command="while :; do echo x >> /workspace/reports/ticks; sleep 0.1; done"
    )
    ticks = fleet.reports / "ticks"
    fleet.until(ticks.exists, "the first tick")
    broker = broker_pid(here)
    os.kill(broker, signal.SIGSTOP)
    try:
        fleet.until(lambda: "frozen" in fleet.logs(), "the freeze")
        size = ticks.stat().st_size
        await asyncio.sleep(0.6)
        assert ticks.stat().st_size == size
    finally:
        os.kill(broker, signal.SIGCONT)
    fleet.until(lambda: ticks.stat().st_size > size, "a tick after the thaw")
    assert await status_of(here, run_id, "started") == "started"
    fleet.here.say("run", "stop", run_id, "--reason", "over", "--yes", who="maria")
    fleet.ended(run_id)


async def test_a_runner_without_kafka_destroys_its_runs_at_the_end_of_the_grace(
    here: Installation, fleet: Fleet
) -> None:
    start(fleet)
    run_id = fleet.order(
        "--mount", "reports:rw", command="while :; do echo x >> /workspace/reports/ticks; sleep 0.1; done"
    )
    ticks = fleet.reports / "ticks"
    fleet.until(ticks.exists, "the first tick")
    broker = broker_pid(here)
    os.kill(broker, signal.SIGSTOP)
    try:
        fleet.until(lambda: not sandboxes(run_id), "the destruction")
    finally:
        os.kill(broker, signal.SIGCONT)
    size = ticks.stat().st_size
    found = fleet.ended(run_id)
    assert found["status"] in OVER
    if found["status"] == "ended":
        assert "heartbeat" in found["exit"]["reason"]
    assert ticks.stat().st_size == size
    assert fleet.ended(fleet.order())["exit"] == {"code": 0}


async def test_another_runner_of_the_pool_takes_over_what_waits_and_leaves_what_was_claimed(
    here: Installation, fleet: Fleet
) -> None:
    added = await asyncio.to_thread(here.call, "init", "--add-runner", "runner-2", "--publish", who="olga")
    assert added.returncode == 0, added.stderr
    here.say(
        "agent", "set-attestation", "reader-bot", "--yes",
        "--selector", "runner=runner-1 life=1h", "--selector", "runner=runner-2 life=1h",
    )  # fmt: skip
    first = start(fleet)
    blocker = fleet.order(command="sleep 600")
    await status_of(here, blocker, "started")
    waiting = [fleet.order(*WRITABLE, command=COUNTED) for _ in range(2)]
    fleet.stop(first, signal.SIGKILL)
    # The embedded broker never forgets a dead member of a group. Apache Kafka does after ten seconds.
    second = str(here.folder / ".ringfence/keys/runner-2.json")
    start(fleet, RINGFENCE_KEY_FILE=second, RINGFENCE_INSTANCE="runner-1")
    for run_id in waiting:
        found = fleet.ended(run_id)
        assert (found["exit"], found["runner"]) == ({"code": 0}, "runner-2")
    assert starts(fleet) == 2
    assert fleet.status(blocker) == "started"
    start(fleet, RINGFENCE_INSTANCE="another")
    assert await status_of(here, blocker, *OVER) == "lost"


async def test_two_processes_with_one_key_do_not_start(here: Installation, fleet: Fleet) -> None:
    start(fleet)
    with pytest.raises(AssertionError, match="give each runner a key of its own"):
        start(fleet)


async def test_the_trail_has_the_person_the_run_and_its_stop(here: Installation, fleet: Fleet) -> None:
    start(fleet)
    run_id = fleet.order(command="sleep 600")
    await status_of(here, run_id, "started")
    fleet.here.say("run", "stop", run_id, "--reason", "enough", "--yes", who="sam")
    fleet.ended(run_id)
    refused = fleet.order("--mount", "secrets")
    fleet.ended(refused)

    def story(id: str) -> str:
        return here.call("audit", "trace", id, who="olga").stdout.decode()

    fleet.until(
        lambda: f"run {run_id} of agent reader-bot is ended" in story(run_id).replace("\\\n", ""), "the end"
    )
    told = story(run_id)
    assert "maria ordered a run" in told
    assert "sam ordered the end" in told
    fleet.until(lambda: "refused to start" in story(refused), "the refusal")
