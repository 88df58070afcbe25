"""The queue of a runner: what is claimed and refused in which order, and which offsets are committed when."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ringfence.kernel.base.errors import InvalidMessageError, UnavailableError
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import Received
from ringfence.messages.registry import TaskEnd
from ringfence.messages.run import Run, RunOrder, RunStop
from ringfence.messages.topics import RUN_ORDER
from ringfence.model.records.runs import run_id_of
from ringfence.model.requests.run_orders import order_id_of
from ringfence.runner.active_runs import RunningRuns, StopTable
from ringfence.runner.lifecycle.plan import RunPlan
from ringfence.runner.orders import OrderIntake
from ringfence.runner.pool import read_pool
from tests.support.in_memory_registry import TD
from tests.support.run_place import Place
from tests.support.runs import LIMITS
from tests.unit.test_runner_active_runs import _Execution as Execution
from tests.unit.test_runner_pool import pool_file

POOL = "reviews"
WITHIN_S = 10.0


class Consumer:
    """A consumer group's consumer: what it reads behind a batch is what the test puts there."""

    def __init__(self) -> None:
        self.behind: asyncio.Queue[list[Received]] = asyncio.Queue()
        self.committed: list[int] = []
        self.draining = False
        self.lost = False

    async def read_ahead(self) -> list[Received]:
        """What came, or nothing after a moment, as a fetch that found nothing."""
        try:
            return await asyncio.wait_for(self.behind.get(), 0.02)
        except TimeoutError:
            return []

    async def settle_early(self, records: Iterable[Received]) -> None:
        self.committed += [record.offset for record in records]

    def owns(self, topic_name: str, partition: int) -> bool:
        return not self.lost


class Bench:
    """An intake with a pool for one run at a time, real records and real signatures."""

    def __init__(self, folder: Path, **pool: Any) -> None:
        self.place = Place()
        self.ledger = self.place.ledger
        self.key = self.place.runners.keys["runner-1"]
        self.said: list[Run] = []
        self.letters: list[str] = []
        self.caught_up = True
        self.held: str | None = None
        self.consumer = Consumer()
        self.made: dict[str, Execution] = {}
        given = {"agents": ["bot"], "commands": None, "concurrency": 1, "queue_length": 3, **pool}
        self.pool = read_pool(pool_file(folder, **given))
        self.runs = RunningRuns(self._execution_of, self._is_claimed_here, concurrency=self.pool.concurrency)
        self.stops = StopTable(self.ledger.directory)
        self.intake = OrderIntake(
            cast(Any, self._runtime()), self.ledger.directory, self.pool, self.runs, self.stops,
            hold=lambda: self.held, patience_s=1,
        )  # fmt: skip
        self.intake.read_by(cast(Any, self.consumer))
        self.intake.opened.set()
        self._offset = 0

    def _runtime(self) -> SimpleNamespace:
        async def tables_caught_up(within_s: float) -> bool:
            return self.caught_up

        async def publish_signed(topic: Any, key: str, record: Run, by: SigningKey) -> None:
            self.said.append(record)

        async def dead(record: Received, error: InvalidMessageError) -> None:
            self.letters.append(error.code)

        return SimpleNamespace(
            tables_caught_up=tables_caught_up,
            broker_now_ms=lambda: self.ledger.clock.ms,
            clock=self.ledger.clock,
            believed_key=lambda: self.key,
            settings=SimpleNamespace(trust_domain=TD),
            publisher=SimpleNamespace(publish_signed=publish_signed),
            dead_letters=SimpleNamespace(send=dead),
        )

    def _execution_of(self, plan: RunPlan, on_claimed: Any) -> Any:
        execution = self.made[plan.run_id] = Execution(plan, on_claimed, fails=None)
        return execution

    async def _is_claimed_here(self, plan: RunPlan) -> bool:
        return True

    def order(
        self, who: str = "uma", *, key: str = POOL, by: SigningKey | None = None, **fields: Any
    ) -> Received:
        given = {
            "pool": POOL, "agent_id": "bot", "task_id": self.place.task, "command": ("true",), "limits": LIMITS,
            "ttl_s": 600, **fields,
        }  # fmt: skip
        claims = self.ledger.claims(RunOrder, who, **given)
        self._offset += 1
        record = self.ledger.received(RUN_ORDER, key, sign(claims, by or self.ledger.keys[who]))
        return record._replace(offset=self._offset)

    def again(self, record: Received) -> Received:
        """The same order, delivered at the next offset."""
        self._offset += 1
        return record._replace(offset=self._offset)

    def id_of(self, record: Received) -> str:
        return run_id_of("", order_id=order_id_of(parse(record.value).unverified_claims(RunOrder)))

    def stop(self, record: Received, who: str = "uma") -> None:
        run_id = self.id_of(record)
        claims = self.ledger.claims(RunStop, who, run_id=run_id, reason="enough")
        self.stops.on_records([self.ledger.received(RUN_ORDER, run_id, sign(claims, self.ledger.keys[who]))])

    def end(self, record: Received) -> None:
        """The run of an order ends by itself."""
        self.made[self.id_of(record)].over.set()

    def codes(self) -> dict[str, str]:
        return {run.run_id: run.refused.code for run in self.said if run.refused is not None}

    async def until(self, happened: Any) -> None:
        async with asyncio.timeout(WITHIN_S):
            while not happened():
                await asyncio.sleep(0.01)

    def taking(self, *records: Received) -> asyncio.Task[None]:
        return asyncio.create_task(self.intake(records))


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    await bench.runs.close(wait_s=0)


async def test_orders_start_in_their_order_as_there_is_room(bench: Bench) -> None:
    first, second, third = (bench.order() for _ in range(3))
    taking = bench.taking(first, second, third)
    await bench.until(lambda: len(bench.made) == 1 and bench.intake.waiting == 2)
    assert list(bench.made) == [bench.id_of(first)]
    bench.end(first)
    await bench.until(lambda: len(bench.made) == 2)
    assert bench.consumer.committed[-1] == second.offset, "what is behind is not committed before its turn"
    bench.end(second)
    await asyncio.wait_for(taking, WITHIN_S)
    assert list(bench.made) == [bench.id_of(one) for one in (first, second, third)]
    assert bench.said == []


async def test_an_order_comes_to_nothing_the_second_time(bench: Bench) -> None:
    first = bench.order()
    await asyncio.wait_for(bench.taking(first, bench.again(first)), WITHIN_S)
    await asyncio.wait_for(bench.taking(bench.again(first)), WITHIN_S)
    assert len(bench.made) == 1
    waiting = bench.order()
    taking = bench.taking(waiting, bench.again(waiting))
    await bench.until(lambda: bench.intake.waiting == 1)
    bench.end(first)
    await asyncio.wait_for(taking, WITHIN_S)
    assert list(bench.made) == [bench.id_of(first), bench.id_of(waiting)]


async def test_an_order_whose_run_is_known_starts_nothing(bench: Bench) -> None:
    """Whoever claimed it: this runner reports it as lost if it does not go on here."""
    record = bench.order()
    order = parse(record.value).unverified_claims(RunOrder)
    bench.place.runners.tell(
        bench.place.run.said("claimed", run_id=bench.id_of(record), nonce=None, order_id=order_id_of(order))
    )
    assert bench.ledger.directory.runs.get(bench.id_of(record)) is not None
    await asyncio.wait_for(bench.taking(record), WITHIN_S)
    assert (bench.made, bench.said) == ({}, [])


async def test_order_of_an_unknown_signer_or_other_pool_is_dead_lettered(bench: Bench) -> None:
    stranger = SigningKey.generate(bench.ledger.keys["uma"].id)
    await asyncio.wait_for(bench.taking(bench.order(by=stranger), bench.order(pool="elsewhere")), WITHIN_S)
    assert bench.letters == ["key_unknown", "key_unexpected"]
    await asyncio.wait_for(bench.taking(bench.order(key="elsewhere", pool="elsewhere")), WITHIN_S)
    assert len(bench.letters) == 2, "another pool's is another runner's"
    assert (bench.made, bench.said) == ({}, [])


async def test_order_beyond_pool_or_records_is_refused_by_name(bench: Bench) -> None:
    bench.ledger.give(bench.ledger.user_set("olga", "nobody"))
    refused = {
        "not_entitled": bench.order("nobody"),
        "limit_above_pool": bench.order(ttl_s=86_400),
        "task_other_agent": bench.order(agent_id="other"),
        "agent_not_in_pool": bench.order(agent_id="other", task_id=bench.place.assigned("other")),
    }
    await asyncio.wait_for(bench.taking(*refused.values()), WITHIN_S)
    assert bench.codes() == {bench.id_of(record): code for code, record in refused.items()}
    assert bench.made == {}
    assert all(run.status == "ended" and run.key_thumbprint is None for run in bench.said)


async def test_a_full_queue_refuses_what_comes_then(bench: Bench) -> None:
    records = [bench.order() for _ in range(5)]
    taking = bench.taking(*records)
    await bench.until(lambda: bench.codes())
    assert bench.codes() == {bench.id_of(records[4]): "queue_full"}
    for record in records[:4]:
        await bench.until(lambda record=record: bench.id_of(record) in bench.made)
        bench.end(record)
    await asyncio.wait_for(taking, WITHIN_S)


async def test_a_stop_counts_at_once_wherever_the_order_waits(bench: Bench) -> None:
    first, second, third = (bench.order() for _ in range(3))
    taking = bench.taking(first, second, third)
    await bench.until(lambda: bench.intake.waiting == 2)
    bench.stop(third)
    await bench.until(lambda: bench.codes())
    assert bench.codes() == {bench.id_of(third): "run_stopped"}
    assert (bench.intake.waiting, list(bench.made)) == (1, [bench.id_of(first)])
    assert third.offset not in bench.consumer.committed, "an order before it waits"
    late = bench.order()
    bench.consumer.behind.put_nowait([late])
    await bench.until(lambda: bench.intake.waiting == 2)
    for record in (first, second):
        bench.end(record)
        await bench.until(lambda: len(bench.made) > 1)
    await bench.until(lambda: bench.id_of(late) in bench.made)
    assert bench.id_of(third) not in bench.made
    await asyncio.wait_for(taking, WITHIN_S)


async def test_a_stop_by_somebody_else_counts_for_nothing(bench: Bench) -> None:
    bench.ledger.give(bench.ledger.user_set("olga", "nobody"))
    record = bench.order()
    bench.stop(record, "nobody")
    await asyncio.wait_for(bench.taking(record), WITHIN_S)
    assert list(bench.made) == [bench.id_of(record)]


async def test_an_order_that_waited_for_too_long_is_refused(bench: Bench) -> None:
    first, second = bench.order(), bench.order()
    taking = bench.taking(first, second)
    await bench.until(lambda: bench.intake.waiting == 1)
    bench.ledger.clock.ms += 3_600_000
    await bench.until(lambda: bench.codes())
    assert bench.codes() == {bench.id_of(second): "order_expired"}
    await asyncio.wait_for(taking, WITHIN_S)


async def test_records_count_as_they_are_when_the_turn_comes(bench: Bench) -> None:
    first, second = bench.order(), bench.order(task_id=bench.place.second)
    taking = bench.taking(first, second)
    await bench.until(lambda: bench.intake.waiting == 1)
    bench.ledger.give(bench.ledger.claims(TaskEnd, "uma", task_id=bench.place.second, reason="done"))
    bench.end(first)
    await asyncio.wait_for(taking, WITHIN_S)
    assert bench.codes() == {bench.id_of(second): "task_ended"}


async def test_a_runner_that_is_silent_starts_nothing(bench: Bench) -> None:
    bench.held, record = "Kafka has acknowledged no heartbeat", bench.order()
    taking = bench.taking(record)
    await bench.until(lambda: bench.intake.waiting == 1)
    assert bench.made == {}
    bench.held = None
    await asyncio.wait_for(taking, WITHIN_S)
    assert list(bench.made) == [bench.id_of(record)]


@pytest.mark.parametrize("end", ["draining", "lost"])
async def test_pending_order_is_left_to_another_member(bench: Bench, end: str) -> None:
    first, second = bench.order(), bench.order()
    taking = bench.taking(first, second)
    await bench.until(lambda: bench.intake.waiting == 1)
    setattr(bench.consumer, end, True)
    with pytest.raises(UnavailableError):
        await asyncio.wait_for(taking, WITHIN_S)
    assert (list(bench.made), bench.said) == ([bench.id_of(first)], [])
    assert second.offset not in bench.consumer.committed


async def test_without_its_records_no_order_is_judged(bench: Bench) -> None:
    bench.caught_up = False
    with pytest.raises(UnavailableError):
        await bench.intake([bench.order()])
    assert (bench.made, bench.said, bench.letters) == ({}, [], [])


async def test_runner_reports_leftover_runs_before_it_takes_orders(bench: Bench) -> None:
    bench.intake.opened.clear()
    taking = bench.taking(bench.order())
    await asyncio.sleep(0)
    assert bench.made == {}
    bench.intake.opened.set()
    await asyncio.wait_for(taking, WITHIN_S)
    assert len(bench.made) == 1
