"""Which member of a consumer group has which partitions, where Kafka's own ways do not do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from aiokafka.cluster import ClusterMetadata
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment, ConsumerProtocolMemberMetadata


class AllToOneAssignor(RangePartitionAssignor):  # type: ignore[misc]
    """All partitions to the first member by name, none to the others, who stand by."""

    name = "all-to-one"

    @classmethod
    def assign(
        cls, cluster: ClusterMetadata, members: Mapping[str, ConsumerProtocolMemberMetadata]
    ) -> dict[str, ConsumerProtocolMemberAssignment]:
        """aiokafka calls it at the member that leads the group. Returns what each member is to have."""
        first = min(members)
        nothing = {member: ConsumerProtocolMemberAssignment(cls.version, [], b"") for member in members}
        return {**nothing, **super().assign(cluster, {first: members[first]})}


class ByInstance:
    """Another assignor, to which members go by the names of their instances, and not by ids that brokers make up.

    So who comes back under its name has what it had. The embedded broker has a leader that comes back assign anew and
    asks nobody else to join: by the new id another order came of it, and then some partitions had two readers, and
    others none for ever.
    """

    def __init__(self, way: type[RangePartitionAssignor], instance: str | None) -> None:
        """`instance`: the `group_instance_id` of this member, which the others are told."""
        self.name = way.name
        self._way = way
        self._instance = (instance or "").encode()

    def metadata(self, topics: Iterable[str]) -> ConsumerProtocolMemberMetadata:
        """What this member says of itself as it joins."""
        return ConsumerProtocolMemberMetadata(self._way.version, list(topics), self._instance)

    def assign(
        self, cluster: ClusterMetadata, members: Mapping[str, ConsumerProtocolMemberMetadata]
    ) -> dict[str, ConsumerProtocolMemberAssignment]:
        """aiokafka calls it at the member that leads the group. Returns what each member is to have, by its id."""
        ids = {f"{(said.user_data or b'').decode(errors='replace')} {id}": id for id, said in members.items()}
        given = self._way.assign(cluster, {name: members[id] for name, id in ids.items()})
        return {ids[name]: what for name, what in given.items()}

    def on_assignment(self, assignment: ConsumerProtocolMemberAssignment) -> None:
        """Called by aiokafka with what this member has been given."""
