"""Leases written straight into Valkey, with everything that activation writes, as fast as that goes."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import hiredis
from redis import Redis

from ringfence.kernel.base.ids import derived_id, lease_id
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.credential import Coordinates
from ringfence.messages.lease import Lease
from ringfence.model.lease_store import SignedLease
from ringfence.model.lease_store.codec import pack
from ringfence.model.lease_store.codec.lua import STORED_SHORT
from ringfence.model.lease_store.codec.records import STATE_BYTES, THUMBPRINT_BYTES
from ringfence.model.lease_store.keys import AHEAD_MS, THUMBPRINT, Keys, shard_of, uuid_bytes
from ringfence.model.leases.lifecycle import origin_of, record_id
from tools.schemas.examples import EXAMPLES

PER_AGENT, PER_TASK = 100, 20
SPONSORS, USERS, TARGETS = 500, 1_000, 50
_COMMANDS = 4_000
_NUMBER = b"\1"
"""What stands for the one who signs all of these."""


@dataclass(frozen=True, slots=True)
class _Names:
    """What a lease is found by."""

    agent_id: str
    task_id: str
    sponsor: str
    target_id: str
    on_behalf_of: str


class Valkey:
    """Valkey, filled directly."""

    def __init__(self, settings: ServiceSettings) -> None:
        self.redis = Redis.from_url(settings.redis_url)
        self.keys = [Keys(settings.redis_prefix, shard) for shard in range(settings.redis_shards)]
        self._connection = cast(Any, self.redis.connection_pool.get_connection())
        self._random = random.Random(1)
        self.count = 0

    def at(self, lease_id: str) -> Keys:
        return self.keys[shard_of(lease_id, len(self.keys))]

    def used(self) -> int:
        """Bytes that Valkey has allocated for its data."""
        return int(cast(Any, self.redis.info("memory"))["used_memory"])

    def found(self, pattern: str) -> list[bytes]:
        """The keys of this pattern."""
        return list(cast(Any, self.redis.scan_iter(pattern, count=10_000)))

    def minutes(self, at: Keys) -> list[int]:
        """Those in which leases of a shard are due."""
        return [int(minute) for minute in cast(Any, self.redis.zrange(at.minutes, 0, -1))]

    def settle(self) -> None:
        """Wait until Valkey has nothing to do in the background."""
        while cast(Any, self.redis.info("persistence"))["aof_rewrite_in_progress"]:
            time.sleep(0.5)

    def fill(self, to: int, jws: str) -> str:
        """Live leases up to a number. Returns the id of one."""
        now_s, id, record = int(time.time()), "", pack(jws)

        def commands() -> Iterator[tuple[Any, ...]]:
            nonlocal id
            while self.count < to:
                id = str(uuid.UUID(int=self._random.getrandbits(128)))
                deadline_s = now_s + self._random.randrange(3_600, 80_000)
                yield from self._activation(id, self._names(to), deadline_s, record)
                self.count += 1

        self.send(commands())
        return id

    def _names(self, total: int) -> _Names:
        agent = self._random.randrange(max(1, total // PER_AGENT))
        task = agent * (PER_AGENT // PER_TASK) + self._random.randrange(PER_AGENT // PER_TASK)
        return _Names(
            f"deploy-bot-{agent}",
            str(uuid.UUID(int=task)),
            f"sponsor-{agent % SPONSORS}",
            f"target-{self._random.randrange(TARGETS)}",
            f"user-{agent % USERS}",
        )

    def _activation(self, id: str, names: Any, deadline_s: int, record: bytes) -> Iterator[tuple[Any, ...]]:
        at, raw, ms = self.at(id), uuid_bytes(id), deadline_s * 1000
        signer, thumbprint, kept = _apart(record)
        yield "HSET", at.signers, signer, _NUMBER, _NUMBER, signer
        yield "HSET", at.leases, raw, kept
        yield "SET", at.live(raw), "", "PXAT", ms
        yield "SADD", at.due(deadline_s), raw
        yield "ZADD", at.minutes, deadline_s // 60 * 60_000 - AHEAD_MS, deadline_s // 60
        leases, *agents = at.indexes(names)
        yield "HSET", leases, raw, "", THUMBPRINT, thumbprint
        for key in agents:
            yield "HINCRBY", key, names.agent_id, 1

    def put(self, leases: Iterable[SignedLease]) -> None:
        """Real leases, active."""
        self.send(
            command
            for one in leases
            for command in self._activation(
                one.claims.lease_id, one.claims, one.claims.deadline, pack(one.jws)
            )
        )

    def send(self, commands: Iterable[tuple[Any, ...]]) -> None:
        batch: list[bytes] = []
        for command in commands:
            batch.append(hiredis.pack_command(command))
            if len(batch) == _COMMANDS:
                self._flush(batch)
        self._flush(batch)

    def _flush(self, batch: list[bytes]) -> None:
        self._connection.send_packed_command([b"".join(batch)])
        for _ in batch:
            self._connection.read_response()
        batch.clear()


def _apart(record: bytes) -> tuple[bytes, bytes, bytes]:
    """Who signed what `pack` made of an active record, the thumbprint in it, and the record as scripts keep it."""
    at = 2 + record[1]
    thumbprint = at + STATE_BYTES
    after = thumbprint + THUMBPRINT_BYTES
    kept = bytes((STORED_SHORT,)) + _NUMBER + record[at:thumbprint] + record[after:]
    return record[2:at], record[thumbprint:after], kept


def signed_leases(
    key: SigningKey,
    trust_domain: str,
    count: int,
    deadline_s: Callable[[int], int],
    agent_id: Callable[[int], str],
) -> list[SignedLease]:
    """Active leases of a pure token, signed; of each number, from 0 on, its deadline and its agent are asked."""
    example, now_s = cast(Lease, EXAMPLES[Lease]), int(time.time())
    leases = []
    for number in range(count):
        request_id = str(uuid.uuid4())
        id = lease_id(request_id)
        origin = origin_of(id, Coordinates(topic="bench", partition=0, offset=number, appended_at_ms=0))
        lease = example.model_copy(
            update={
                "iss": key.id,
                "aud": trust_domain,
                "iat": now_s,
                "jti": record_id(origin, 1),
                "lease_id": id,
                "seq": 1,
                "status": "active",
                "request_id": request_id,
                "decision_id": derived_id("decision", request_id, "allowed"),
                "agent_id": agent_id(number),
                "act": (agent_id(number),),
                "deadline": deadline_s(number),
                "cause": None,
            }
        )
        leases.append(SignedLease(lease, sign(lease, key)))
    return leases
