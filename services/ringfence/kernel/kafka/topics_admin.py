"""Creating topics and checking that they are what the contract says.

Replication of the topics: what a Kafka cluster loses with one broker, and the remedy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import (
    CommitFailedError,
    InvalidReplicationFactorError,
    KafkaError,
    TopicAlreadyExistsError,
    for_code,
)
from aiokafka.protocol.admin import CreateAclsRequest
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.protocol.types import Array, Boolean, Int8, Int16, Int32, Schema, String

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.kafka.acls import Acl, Party
from ringfence.kernel.kafka.connection import connection, no_answer
from ringfence.messages.base import Topic
from ringfence.messages.codes import Code
from ringfence.messages.topics import ALL, HEARTBEAT, LEASE

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


_ANY_HOST, _ALLOW = "*", 3
"""In Kafka's protocol: ACLs hold from everywhere, and allow (`AclPermissionType`)."""

_HEARTBEAT_BYTES = 1024 * 1024
"""Kept of them at most, where anything is bounded: some minutes. They come on an idle system too, and only the last of
each service counts; but one record of a stranger's, as large as a broker takes, is not to push out those that audit is
about to look at.
"""


_SEEN_WITHIN_S, _LOOK_EVERY_S = 30.0, 0.05
"""Kafka's brokers learn of a change a moment after its controller acknowledged it, and callers may ask a broker
next."""

_LEFT_WITHIN_S, _TRY_EVERY_S = 30.0, 0.5
"""Three times as long as a member of a group may be silent."""

_TOPIC = "topic"
"""The difference for a topic that does not exist."""
_NO_END = -1
"""`retention.ms` of what is kept for ever."""
_POLICY = "cleanup.policy"
_IN_SYNC = "min.insync.replicas"
_KEPT_LONGER = frozenset({"retention.ms", "min.compaction.lag.ms"})
"""Of these a lower value lets Kafka remove what an organisation chose to keep: that is left to a person."""


class TopicError(RingfenceError):
    """The broker refused to create, describe or alter a topic, or to create an ACL."""

    code = Code.TOPIC_REFUSED


@dataclass(frozen=True, slots=True)
class TopicDifference:
    """One way in which a topic is not what the contract says."""

    topic: str
    what: str
    expected: str
    found: str


@dataclass(frozen=True, slots=True)
class _GroupAhead:
    """A consumer group that has read further than a partition goes."""

    group: str
    at: TopicPartition
    offset: int
    end: int

    @property
    def difference(self) -> TopicDifference:
        what = f"the offset of {self.group} in partition {self.at.partition}"
        return TopicDifference(self.at.topic, what, str(self.end), str(self.offset))


def _removes_more(difference: TopicDifference) -> bool:
    """Whether to set this right would let Kafka remove records that it keeps now."""
    # What is only compacted, or has no policy at all, keeps each key's last for ever.
    if difference.what == _POLICY:
        return difference.expected == "delete" and "delete" not in difference.found
    if difference.what not in _KEPT_LONGER or not difference.found.lstrip("-").isdigit():
        return False
    found = int(difference.found)
    return found == _NO_END or found > int(difference.expected)


def partitions_of(topic: Topic[Any], settings: ServiceSettings) -> int:
    """How many partitions a topic has: one count for all that are keyed by agent (and for leases), else one."""
    return settings.partitions if topic.by_agent or topic is LEASE else 1


def _bounds(topic: Topic[Any], keep_bytes: int | None) -> dict[str, str]:
    """Kafka deletes whole segments: four of them make the bound."""
    if keep_bytes is None or topic.compacted:
        return {}
    if topic is HEARTBEAT:
        keep_bytes = min(keep_bytes, _HEARTBEAT_BYTES)
    return {"retention.bytes": str(keep_bytes), "segment.bytes": str(keep_bytes // 4)}


class TopicsAdmin:
    """Use as an async context manager."""

    def __init__(self, settings: ServiceSettings) -> None:
        self._settings = settings
        self._client = AIOKafkaAdminClient(**connection(settings))

    async def __aenter__(self) -> TopicsAdmin:
        try:
            await self._client.start()
        except KafkaError as error:
            await self._client.close()
            raise await no_answer(self._settings, error) from None
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def apply(self, *, keep_bytes: int | None = None) -> list[str]:
        """Create every topic that is not there. Returns the names of those created, once every broker shows all topics.
        Raises TopicError.

        `keep_bytes` bounds each partition of what is not compacted as well: for a broker that has all in memory.
        """
        present = set(await self._client.list_topics())
        wanted = [t for t in ALL if t.name(self._settings.topic_prefix) not in present]
        if not wanted:
            return []
        answer = await self._client.create_topics(
            [
                NewTopic(
                    name=topic.name(self._settings.topic_prefix),
                    num_partitions=partitions_of(topic, self._settings),
                    replication_factor=self._settings.replication,
                    topic_configs=topic.configs() | _bounds(topic, keep_bytes),
                )
                for topic in wanted
            ]
        )
        created = list[str]()
        for name, code, *rest in answer.topic_errors:
            if not code:
                created.append(name)
            elif for_code(code) is not TopicAlreadyExistsError:
                refused = TopicError(
                    f"the broker refused topic {name}: {for_code(code).__name__} {rest[0] if rest else ''}"
                )
                raise (
                    refused.with_remedy("set RINGFENCE_REPLICATION to no more than there are brokers")
                    if for_code(code) is InvalidReplicationFactorError
                    else refused
                )
        names = {topic.name(self._settings.topic_prefix) for topic in wanted}

        async def missing() -> set[str]:
            # Each broker hears of topics by itself, and the next request may go to any of them.
            brokers = (await self._client.describe_cluster())["brokers"]
            shown = [await self._shown_by(one["node_id"]) for one in brokers]
            return {name for name in names if not all(name in those for those in shown)}

        await _until_none(missing)
        return created

    async def _shown_by(self, node_id: int) -> set[str]:
        """The names of the topics that one broker shows."""
        answer = await self._client._send_request_to_node(node_id, MetadataRequest(None))
        return {one["topic"] for one in answer.to_object()["topics"]}

    async def set_right(self) -> tuple[list[TopicDifference], list[TopicDifference]]:
        """Set what `apply` sets at creation on topics that are there, and consumer groups that are ahead of them back
        to their ends. Returns what was set, and what was left: partitions and replicas, which nobody changes by the
        way, and what keeps records longer than the contract asks.

        Raises TopicError.
        """
        right, left = list[TopicDifference](), list[TopicDifference]()
        settings = {name for topic in ALL for name in topic.configs()}
        for difference in await self._check_topics():
            if difference.what == _TOPIC:
                continue
            may = difference.what in settings and not _removes_more(difference)
            (right if may else left).append(difference)
        for name in dict.fromkeys(one.topic for one in right):
            wanted = {one.what: one.expected for one in right if one.topic == name}
            answer = await self._client._send_to_controller(AlterConfigs(name, wanted))
            for code, message, *_ in answer.responses:
                if code:
                    raise TopicError(
                        f"the broker refused to set {', '.join(wanted)} of topic {name}: {for_code(code).__name__} "
                        f"{message or ''}; whoever asks needs AlterConfigs on it"
                    )

        ahead = await self._groups_ahead()
        for group, some in groupby(ahead, key=lambda one: one.group):
            await self._set_back(group, {one.at: one.end for one in some})
        right += [one.difference for one in ahead]

        async def unchanged() -> list[str]:
            wrong = {(one.topic, one.what) for one in await self.check()}
            return [f"{one.what} of {one.topic}" for one in right if (one.topic, one.what) in wrong]

        if right:
            await _until_none(unchanged)
        return right, left

    async def grant(self, wanted: Iterable[Acl], principals: Mapping[Party, str]) -> int:
        """Create these ACLs; those that are there already stay as they are. Returns how many. Raises TopicError."""
        count = 0
        for acl in wanted:
            request = CreateAclsRequest(
                acl.resource_type,
                acl.name,
                acl.pattern,
                principals[acl.party],
                _ANY_HOST,
                acl.operation,
                _ALLOW,
            )
            answer = await self._client._send_to_controller(request)
            for code, message in answer.creation_responses:
                if code:
                    raise TopicError(
                        f"the broker refused ACLs: {for_code(code).__name__} {message or ''}; it needs an authorizer, "
                        "and whoever asks needs Alter on the cluster"
                    )
            count += 1
        return count

    async def check(self) -> list[TopicDifference]:
        """Compare the broker's topics with the contract, and the offsets of consumer groups with the ends of topics.

        Empty where all is as it should be.
        """
        return [*await self._check_topics(), *(one.difference for one in await self._groups_ahead())]

    async def _groups_ahead(self) -> list[_GroupAhead]:
        """Our consumer groups that have read further than a partition goes: Kafka was restored, and the parts of its
        backup are not of one moment. Such a group would skip the next records, and nobody would notice.

        Groups that whoever asks may not see are left out.
        """
        prefix = f"{self._settings.topic_prefix}."
        names = {topic.name(self._settings.topic_prefix) for topic in ALL} & set(
            await self._client.list_topics()
        )
        committed: list[tuple[str, TopicPartition, int]] = []
        for group, *_ in await self._client.list_consumer_groups():
            if group.startswith(prefix):
                offsets = await self._client.list_consumer_group_offsets(group)
                committed += [(group, at, one.offset) for at, one in offsets.items() if at.topic in names]
        if not committed:
            return []
        # Read after the offsets: a group that is at work is never ahead.
        consumer = AIOKafkaConsumer(**connection(self._settings))
        try:
            await consumer.start()
            ends = await consumer.end_offsets(list({at for _, at, _ in committed}))
        finally:
            await consumer.stop()
        return [
            _GroupAhead(group, at, offset, ends[at]) for group, at, offset in committed if offset > ends[at]
        ]

    async def _set_back(self, group: str, ends: Mapping[TopicPartition, int]) -> None:
        """Commit these offsets for a group without members. Raises TopicError."""
        consumer = AIOKafkaConsumer(**connection(self._settings), group_id=group, enable_auto_commit=False)
        try:
            await consumer.start()
            consumer.assign(list(ends))
            async with asyncio.timeout(_LEFT_WITHIN_S):
                while True:
                    try:
                        await consumer.commit(ends)
                        return
                    except CommitFailedError:
                        # Members that died with the former broker count until their sessions are over.
                        await asyncio.sleep(_TRY_EVERY_S)
        except TimeoutError:
            raise TopicError(
                f"{group} has read further than its topics go, and has members: stop all services, then run this again"
            ) from None
        except KafkaError as error:
            raise TopicError(f"the broker refused to set {group} back: {type(error).__name__}") from None
        finally:
            await consumer.stop()

    async def _check_topics(self) -> list[TopicDifference]:
        found: list[TopicDifference] = []
        names = {topic.name(self._settings.topic_prefix): topic for topic in ALL}
        present = set(await self._client.list_topics())
        found += [
            TopicDifference(name, _TOPIC, "present", "missing") for name in names if name not in present
        ]
        there = [name for name in names if name in present]
        if not there:  # asked for no topic, a broker describes all that it has
            return found
        for description in await self._client.describe_topics(there):
            name = description["topic"]
            expected = partitions_of(names[name], self._settings)
            if len(description["partitions"]) != expected:
                found.append(
                    TopicDifference(name, "partitions", str(expected), str(len(description["partitions"])))
                )
            replicas = min(len(one["replicas"]) for one in description["partitions"])
            if replicas < self._settings.replication:
                found.append(
                    TopicDifference(name, "replicas", str(self._settings.replication), str(replicas))
                )
        resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in there]
        for response in await self._client.describe_configs(resources):
            for code, message, _, name, entries in response.resources:
                if code:
                    raise TopicError(
                        f"the broker does not describe topic {name}: {for_code(code).__name__} {message or ''}; "
                        "whoever asks needs DescribeConfigs on it"
                    )
                actual = {entry[0]: entry[1] for entry in entries}
                for key, value in names[name].configs().items():
                    if actual.get(key) != value:
                        found.append(TopicDifference(name, key, value, str(actual.get(key))))
        return found

    async def replication(self) -> Replication:
        """Read how many brokers there are, and how our topics are replicated.

        Topics that are missing, or that whoever asks may not see, are left out.
        """
        brokers = len((await self._client.describe_cluster())["brokers"])
        names = [topic.name(self._settings.topic_prefix) for topic in ALL]
        present = set(await self._client.list_topics())
        there = [name for name in names if name in present]
        if not there:  # asked for no topic, a broker describes all that it has
            return Replication(brokers, {})
        replicas = {
            one["topic"]: min(len(partition["replicas"]) for partition in one["partitions"])
            for one in await self._client.describe_topics(there)
            if not one["error_code"] and one["partitions"]
        }
        in_sync = dict[str, int]()
        resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in replicas]
        for response in await self._client.describe_configs(resources) if resources else ():
            for code, _, _, name, entries in response.resources:
                found = {entry[0]: entry[1] for entry in entries}.get(_IN_SYNC)
                if not code and found is not None and found.isdigit():
                    in_sync[name] = int(found)
        return Replication(
            brokers, {name: TopicReplication(count, in_sync.get(name)) for name, count in replicas.items()}
        )


async def _until_none(find: Callable[[], Awaitable[Iterable[str]]]) -> None:
    """Return once nothing is found of what the controller has acknowledged and a broker does not show. Raises
    TopicError.
    """
    found = ""
    try:
        async with asyncio.timeout(_SEEN_WITHIN_S):
            while True:
                found = ", ".join(sorted(await find()))
                if not found:
                    return
                await asyncio.sleep(_LOOK_EVERY_S)
    except TimeoutError:
        raise TopicError(
            f"Kafka acknowledged what its broker does not show after {_SEEN_WITHIN_S:g} s: {found}; look at the "
            "broker's log, then run this again"
        ) from None


# What aiokafka lacks of Kafka's protocol: to alter some settings of a topic and leave the others as they are.

_SET = 0
"""What is done to a setting (`AlterConfigOp.OpType`)."""


class _AlteredConfigs(Response):  # type: ignore[misc]
    API_KEY = 44
    API_VERSION = 0
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "responses",
            Array(
                ("error_code", Int16),
                ("error_message", String("utf-8")),
                ("resource_type", Int8),
                ("resource_name", String("utf-8")),
            ),
        ),
    )


class _AlterConfigsV0(RequestStruct):  # type: ignore[misc]
    API_KEY = 44
    API_VERSION = 0
    RESPONSE_TYPE = _AlteredConfigs
    SCHEMA = Schema(
        (
            "resources",
            Array(
                ("resource_type", Int8),
                ("resource_name", String("utf-8")),
                (
                    "configs",
                    Array(("name", String("utf-8")), ("config_operation", Int8), ("value", String("utf-8"))),
                ),
            ),
        ),
        ("validate_only", Boolean),
    )


class AlterConfigs(Request[_AlterConfigsV0]):  # type: ignore[misc]
    """IncrementalAlterConfigs (KIP-339). aiokafka has only AlterConfigs, which resets whatever it does not name."""

    API_KEY = 44

    def __init__(self, topic: str, configs: Mapping[str, str]) -> None:
        self._topic = topic
        self._configs = configs

    def build(self, request_struct_class: type[_AlterConfigsV0]) -> _AlterConfigsV0:
        configs = [(name, _SET, value) for name, value in self._configs.items()]
        return request_struct_class([(ConfigResourceType.TOPIC, self._topic, configs)], False)
