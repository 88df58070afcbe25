"""Replication of the topics: what a Kafka cluster loses with one broker, and the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_ADVISED_REPLICAS, _ADVISED_IN_SYNC = 3, 2
"""Three replicas, of which two acknowledge each record: one broker may be lost, and another may be restarted."""
_PAGE = "docs/operations.md#replication"


@dataclass(frozen=True, slots=True)
class TopicReplication:
    """The replication of one topic: replicas of its least replicated partition, and `min.insync.replicas`."""

    replicas: int
    min_in_sync: int | None
    """None if the broker does not say."""


@dataclass(frozen=True, slots=True)
class Replication:
    """The brokers of a cluster, and the replication of the topics that are there, by name."""

    brokers: int
    topics: Mapping[str, TopicReplication]

    def warnings(self) -> list[str]:
        """Return what the loss of one broker of a cluster loses, with the remedy. Empty on a single broker.

        Producers wait for `acks=all`: for all replicas that are in sync, and for `min.insync.replicas` at least (Apache
        Kafka, topic settings). With 1 the leader alone may be all of them.
        """
        if self.brokers < 2:
            return []
        found = []
        if single := sorted(name for name, topic in self.topics.items() if topic.replicas < 2):
            found.append(
                f"Kafka has {self.brokers} brokers, and {_count(single)} on one of them alone (replication factor 1): "
                "a broker that is lost takes their records with it. Set RINGFENCE_REPLICATION="
                f"{min(self.brokers, _ADVISED_REPLICAS)} for topics that are still to be created, and give those that "
                f"are there more replicas by kafka-reassign-partitions.sh ({_PAGE})"
            )
        weak = sorted(
            name for name, topic in self.topics.items() if topic.replicas > 1 and topic.min_in_sync == 1
        )
        if weak:
            found.append(
                f"{_count(weak)} replicated, and min.insync.replicas is 1: the leader alone may acknowledge a record, "
                f"and take it with it. Set min.insync.replicas={_ADVISED_IN_SYNC} by kafka-configs.sh, with "
                f"{_ADVISED_REPLICAS} replicas ({_PAGE})"
            )
        return found


def _count(names: list[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{len(names)} topics ({names[0]}, ...) are"
