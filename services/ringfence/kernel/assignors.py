"""Which member of a consumer group has which partitions, where Kafka's own ways do not do."""

from __future__ import annotations

from collections.abc import Mapping

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
