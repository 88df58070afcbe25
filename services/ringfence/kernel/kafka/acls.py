"""Kafka ACLs: the least privileges of each party, by the declared writers and readers of the topics.

Integrity does not depend on them: signatures decide, not write access. ACLs keep strangers from reading, and from
filling topics.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Literal, get_args

from ringfence.messages import topics
from ringfence.messages.base import ServiceRole

Outsider = Literal["agents", "users", "operators", "siem"]
Party = ServiceRole | Outsider
"""Who connects to Kafka: each service, and parties outside. Each party is one principal."""
SERVICES: Final[tuple[ServiceRole, ...]] = get_args(ServiceRole)
PARTIES: Final[tuple[Party, ...]] = (*SERVICES, *get_args(Outsider))


class Operation(IntEnum):
    """As in Kafka's protocol (`AclOperation`)."""

    READ = 3
    WRITE = 4
    CREATE = 5
    DESCRIBE = 8
    DESCRIBE_CONFIGS = 10


class ResourceType(IntEnum):
    """As in Kafka's protocol (`ResourceType`)."""

    TOPIC = 2
    GROUP = 3
    TRANSACTIONAL_ID = 5


class PatternType(IntEnum):
    """As in Kafka's protocol (`PatternType`)."""

    LITERAL = 3
    PREFIXED = 4


@dataclass(frozen=True, slots=True)
class Acl:
    """One thing that a party may do, from any host."""

    party: Party
    operation: Operation
    resource_type: ResourceType
    name: str
    pattern: PatternType


_NAMED: Final[Mapping[str, tuple[Party, ...]]] = {
    "anyone": PARTIES,
    "every service": SERVICES,
    "gateways": ("gateway",),
    "runners": ("runner",),
    "sponsors": ("users",),
    "users": ("users", "operators"),
    "root": ("operators",),
    "the SIEM": ("siem",),
}
"""The words by which topics name parties, where these are not their own names."""


def acls(prefix: str) -> list[Acl]:
    """All that is needed, and nothing more, for topics, groups and transactions under this prefix."""
    return [*_of_topics(prefix), *_of_groups(prefix), *_of_transactions(prefix), *_of_operators(prefix)]


def _of_topics(prefix: str) -> Iterator[Acl]:
    for topic in topics.ALL:
        name = topic.name(prefix)
        for operation, words in ((Operation.WRITE, topic.written_by), (Operation.READ, topic.read_by)):
            for party in sorted(_parties(words)):
                if party == "console" and operation is Operation.READ:
                    continue  # it reads by HTTP alone
                yield Acl(party, operation, ResourceType.TOPIC, name, PatternType.LITERAL)


def _of_groups(prefix: str) -> Iterator[Acl]:
    """Groups are named after who is in them: `<prefix>.revoker-fences`, `<prefix>.siem`."""
    members: tuple[Party, ...] = (*(role for role in SERVICES if role != "console"), "siem")
    for party in members:
        yield Acl(party, Operation.READ, ResourceType.GROUP, f"{prefix}.{party}", PatternType.PREFIXED)


def _of_transactions(prefix: str) -> Iterator[Acl]:
    """Audit writes the chain in transactions, under an id that is named like its group."""
    id = f"{prefix}.audit-chain"
    yield Acl("audit", Operation.WRITE, ResourceType.TRANSACTIONAL_ID, id, PatternType.LITERAL)


def _of_operators(prefix: str) -> Iterator[Acl]:
    """They make the topics, compare them, and may look at all of them."""
    for operation in (Operation.CREATE, Operation.DESCRIBE_CONFIGS, Operation.READ):
        yield Acl("operators", operation, ResourceType.TOPIC, f"{prefix}.", PatternType.PREFIXED)


def _parties(words: Iterable[str]) -> set[Party]:
    """The parties that a topic names. Text in parentheses explains them."""
    found: set[Party] = set()
    for word in words:
        name = word.partition(" (")[0]
        found.update(_NAMED.get(name) or (party for party in PARTIES if party == name))
    return found


def commands(wanted: Iterable[Acl], principals: Mapping[Party, str]) -> Iterator[str]:
    """Each as a command of Kafka's `kafka-acls.sh`, without the brokers' addresses."""
    for acl in wanted:
        yield (
            f"kafka-acls.sh --add --allow-principal '{principals[acl.party]}' "
            f"--operation {acl.operation.name.title().replace('_', '')} "
            f"--{acl.resource_type.name.lower().replace('_', '-')} '{acl.name}' "
            f"--resource-pattern-type {acl.pattern.name.lower()}"
        )
