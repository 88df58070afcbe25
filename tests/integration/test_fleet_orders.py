"""Orders of runs on whatever broker the suite runs on: `ringfence serve runner` as a process, claimed once, stopped."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ringfence.client.errors import ApiError
from ringfence.client.reports.read_api import ReadApi
from ringfence.dev.processes import free_port
from ringfence.dev.stack import Stack, StackOptions, readiness
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.kafka.record import Outbound
from ringfence.messages.run import Run, RunLimits, RunOrder
from ringfence.messages.topics import RUN, RUN_ORDER
from ringfence.model.identity.runners import runner_selector
from ringfence.model.records.runs import run_id_of
from ringfence.model.requests.run_orders import order_id_of
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support.stack import WITHIN_S, RunningStack, realm_in

pytestmark = pytest.mark.apache

LIMITS = RunLimits(memory_bytes=1 << 30, cpu_millis=500, pids=64)
POOL = "reviews"


@dataclass
class Fleet:
    realm: RunningStack
    log: Path
    process: subprocess.Popen[bytes]

    async def order(self, *command: str) -> str:
        async with self.realm.administrator("maria") as maria:
            ordered = await maria.order_run(
                self.realm.task, pool=POOL, command=command, limits=LIMITS, ttl_s=600, labels={"zone": "eu-1"}
            )
        return ordered.run_id

    async def run(self, run_id: str) -> dict[str, Any]:
        async with ReadApi(self.realm.key("user", self.realm.name("maria")), self.realm.settings) as api:
            try:
                found: dict[str, Any] = await api.run(run_id)
                return found
            except ApiError:
                return {"status": "unknown"}

    async def until(self, run_id: str, status: str) -> dict[str, Any]:
        async with asyncio.timeout(WITHIN_S):
            while (found := await self.run(run_id))["status"] != status:
                assert self.process.poll() is None, self.log.read_text()[-3000:]
                await asyncio.sleep(0.1)
            return found


@pytest.fixture
def fleet_stack(kafka: Kafka, redis_server: RedisServer) -> Iterator[Stack]:
    """All services, and the key of a runner, in a folder with a short path, as those of sockets are short."""
    if shutil.which("bwrap") is None:
        pytest.skip("not provable here: there is no bubblewrap")
    with tempfile.TemporaryDirectory(prefix="rf-") as folder:
        options = StackOptions(
            Path(folder) / "state", trust_domain="acme.example", kafka=kafka.bootstrap,
            embedded_broker=kafka.embedded, redis_url=redis_server.url, topic_prefix="fleet", redis_prefix="fleet",
            runner="runner-1",
        )  # fmt: skip
        with Stack(options) as stack:
            yield stack


@pytest.fixture
async def fleet(fleet_stack: Stack, tmp_path: Path) -> AsyncIterator[Fleet]:
    stack, pool, log, port = fleet_stack, tmp_path / "pool.json", tmp_path / "runner.log", free_port()
    given = {"name": POOL, "agents": ["*"], "concurrency": 1, "labels": {"zone": "eu-1"}}
    pool.write_text(json.dumps(given))
    async with realm_in(stack) as realm:
        selector = runner_selector("acme.example", "runner-1", realm.agent)
        async with realm.administrator("sam") as sam:
            await sam.set_attestation(realm.agent, [selector])
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "ringfence.cli.main", "serve", "runner"],
                stdout=file, stderr=subprocess.STDOUT, cwd=tmp_path,
                env={
                    **stack.environment(), "RINGFENCE_RUNNER_POOL_FILE": str(pool),
                    "RINGFENCE_HTTP": f"127.0.0.1:{port}", "RINGFENCE_RUNNER_STATE": str(tmp_path / "runs"),
                    "RINGFENCE_KEY_FILE": str(stack.trust.service_key("runner-1")),
                    "RINGFENCE_GATEWAY_SOCKETS": str(stack.sockets),
                    "RINGFENCE_GATEWAY_CA_FILE": str(stack.gateway_ca),
                },
            )  # fmt: skip
        try:
            async with asyncio.timeout(WITHIN_S):
                while readiness(port) is not None:
                    assert process.poll() is None, log.read_text()[-3000:]
                    await asyncio.sleep(0.1)
            yield Fleet(realm, log, process)
        finally:
            process.terminate()
            process.wait(WITHIN_S)


async def test_orders_run_once_in_their_order_and_stop_where_they_wait(fleet: Fleet) -> None:
    realm = fleet.realm
    async with realm.seen(RUN, RUN_ORDER) as seen:
        first = await fleet.order("sleep", "600")
        await fleet.until(first, "started")
        waiting, stopped = await fleet.order("true"), await fleet.order("true")
        async with realm.administrator("sam") as sam:
            await sam.stop_run(stopped, reason="not needed")
        assert (await fleet.until(stopped, "ended"))["refused"]["code"] == "run_stopped"
        assert (await fleet.run(waiting))["status"] == "unknown"
        # Whoever may write to the topic appends the first order again.
        order = next(record for record in seen.of(RUN_ORDER) if _is_of(record.value, first))
        async with realm.publisher() as publisher:
            await (await publisher.send(RUN_ORDER, "run.order", Outbound(POOL, order.value, id="again")))
        async with realm.administrator("maria") as maria:
            await maria.stop_run(first, reason="room")
        assert (await fleet.until(first, "ended"))["exit"]["reason"].endswith("room")
        assert (await fleet.until(waiting, "ended"))["exit"] == {"code": 0}
        last = await fleet.order("true")
        await fleet.until(last, "ended")
        await seen.up_to_now()
        said = [parse(record.value).unverified_claims(Run) for record in seen.of(RUN)]
        for run_id in (first, waiting, last):
            assert [run.status for run in said if run.run_id == run_id] == ["claimed", "started", "ended"]
        assert [run.status for run in said if run.run_id == stopped] == ["ended"]


def _is_of(value: bytes, run_id: str) -> bool:
    jws = parse(value)
    if not jws.header.typ.startswith("ringfence.run.order"):
        return False
    return run_id_of("", order_id=order_id_of(jws.unverified_claims(RunOrder))) == run_id
