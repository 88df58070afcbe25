"""Private names of libraries that services use, a test for each library: an upgrade that drops one fails here first.

`pyproject.toml` bounds these libraries from above, since no version number promises anything about such names.
"""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.conn import AIOKafkaConnection, create_conn
from aiokafka.consumer.fetcher import Fetcher, FetchResult, PartitionRecords
from faststream.kafka.subscriber.usecase import BatchSubscriber
from packaging.requirements import Requirement
from prometheus_client import CollectorRegistry, Counter, Histogram
from typer import Context
from typer.core import TyperGroup

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [
    Requirement(text) for text in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["server"])
]


def missing(owner: Any, *names: str) -> list[str]:
    return [f"{type(owner).__name__}.{name}" for name in names if not hasattr(owner, name)]


@pytest.mark.parametrize("library", ["aiokafka", "faststream", "httpx", "prometheus-client", "typer"])
def test_a_library_whose_private_names_are_used_has_an_upper_bound(library: str) -> None:
    (found,) = (one for one in REQUIREMENTS if one.name == library)
    assert any(part.operator == "<" for part in found.specifier), found


async def test_private_names_of_aiokafka() -> None:
    consumer, producer = AIOKafkaConsumer(), AIOKafkaProducer(transactional_id="a")
    admin, connection = AIOKafkaAdminClient(), AIOKafkaConnection("localhost", 1)
    fetcher = Fetcher(consumer._client, consumer._subscription)
    records = PartitionRecords(TopicPartition("t", 0), None, [], 0, None, None, True, 0)
    fetched = FetchResult(records._tp, assignment=None, partition_records=records, backoff=0)
    try:
        assert missing(consumer, "_client", "_subscription", "_fetcher") == []
        assert missing(consumer._client, "send", "set_topics", "cluster", "_conns") == []
        assert missing(consumer._subscription, "fetch_context") == []
        assert missing(producer, "_txn_manager") == []
        assert missing(producer._txn_manager, "maybe_add_partition_to_txn") == []
        assert missing(admin, "_send_request_to_node", "_send_to_controller") == []
        assert missing(connection, "_versions", "_client_id", "_writer", "_requests") == []
        assert missing(connection, "_sasl_oauth_token_provider", "_do_sasl_handshake") == []
        assert "AIOKafkaConnection" in create_conn.__code__.co_names
        assert missing(fetcher, "_records") == []
        assert missing(fetched, "_partition_records") == []
        assert (
            missing(records, "_tp", "_records", "_records_iterator", "_check_crcs", "_unpack_records") == []
        )
    finally:
        await fetcher.close()
        await consumer.stop()
        await producer.stop()
        await admin.close()


def test_private_names_of_faststream() -> None:
    assert hasattr(BatchSubscriber, "_post_start")


def test_private_names_of_httpx() -> None:
    assert importlib.util.find_spec("httpx._main") is not None


def test_private_names_of_prometheus_client() -> None:
    histogram = Histogram("a_test", "a test", registry=CollectorRegistry())
    assert missing(histogram, "_metric_init", "_child_samples", "_upper_bounds", "_buckets", "_sum") == []
    assert missing(Counter("another", "a test", registry=CollectorRegistry()), "_child_samples") == []


def test_private_names_of_typer() -> None:
    assert missing(Context(TyperGroup(name="a")), "_protected_args") == []
