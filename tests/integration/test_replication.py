"""Replication as Kafka itself describes it: a single broker, and a cluster of two."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringfence.cli.main import main
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.kafka.topics_admin import TopicsAdmin
from ringfence.messages.topics import ALL
from tests.brokers.apache import ApacheKafka
from tests.conftest import needed

pytestmark = pytest.mark.apache


async def test_on_a_single_broker_there_is_nothing_to_warn_of(settings: ServiceSettings) -> None:
    async with TopicsAdmin(settings) as admin:
        found = await admin.replication()
    assert (found.brokers, len(found.topics)) == (1, len(ALL))
    assert {one.replicas for one in found.topics.values()} == {1}
    assert found.warnings() == []


async def test_topics_of_another_prefix_are_left_out(settings: ServiceSettings) -> None:
    async with TopicsAdmin(settings.model_copy(update={"topic_prefix": "nobody-made-this"})) as admin:
        assert (await admin.replication()).topics == {}


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[ApacheKafka]:
    """Two brokers, of which the first is the controller, too."""
    with tempfile.TemporaryDirectory(prefix="ringfence-cluster-") as folder:
        controller = dict[str, str]()

        def first_of_two(properties: dict[str, str]) -> None:
            controller.update(properties)

        def second_of_two(properties: dict[str, str]) -> None:
            listeners = properties["listeners"].partition(",CONTROLLER")[0]
            properties |= {
                "node.id": "2",
                "process.roles": "broker",
                "listeners": listeners,
                "controller.quorum.voters": controller["controller.quorum.voters"],
            }

        first = ApacheKafka(Path(folder, "1"), adapt=first_of_two)
        second = ApacheKafka(Path(folder, "2"), adapt=second_of_two)
        try:
            with needed(request):
                for broker in (first, second):
                    broker.start()
            yield first
        finally:
            for broker in (second, first):
                broker.stop()


@pytest.mark.parametrize(
    ("replication", "warned"),
    [(1, "on one of them alone (replication factor 1)"), (2, "min.insync.replicas is 1")],
)
def test_a_cluster_is_warned_of_what_it_does_not_replicate(
    cluster: ApacheKafka,
    replication: int,
    warned: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RINGFENCE_KAFKA", cluster.bootstrap)
    monkeypatch.setenv("RINGFENCE_TOPIC_PREFIX", f"with-{replication}")
    monkeypatch.setenv("RINGFENCE_REPLICATION", str(replication))
    assert main(["--json", "topics", "apply"]) == 0
    told = capsys.readouterr()
    (warning,) = json.loads(told.out)["warnings"]
    assert warned in warning
    assert f"{len(ALL)} topics" in warning
    assert f"warning: {warning}" in told.err

    async def found() -> set[tuple[int, int | None]]:
        async with TopicsAdmin(ServiceSettings()) as admin:
            read = await admin.replication()
        assert read.brokers == 2
        return {(one.replicas, one.min_in_sync) for one in read.topics.values()}

    assert asyncio.run(found()) == {(replication, 1)}
