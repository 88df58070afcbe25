"""The pools of runners that take orders, by their last heartbeats: a list for people who order. It decides nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.messages.operations import Heartbeat, RunnerPool

FRESH_MS: Final = 15_000
"""A runner that was not heard for so long is not listed."""
_MOST: Final = 10_000


@dataclass(frozen=True, slots=True)
class _Heard:
    pool: RunnerPool
    sent_at_ms: int
    appended_at_ms: int


class RunnerPools:
    """The last heartbeat of each runner about each pool."""

    def __init__(self, trust: TrustStore) -> None:
        self._trust = trust
        self._heard: BoundedDict[tuple[str, str], _Heard] = BoundedDict(_MOST)
        """By the runner's SPIFFE ID and the pool's name."""

    def on_heartbeats(self, records: Sequence[Received]) -> None:
        """Take records of `heartbeat`; those of other services are ignored."""
        for record in records:
            if b"pool" not in _payload(record):
                continue
            try:
                heartbeat = verify(
                    parse(record.value), Heartbeat, self._trust.finder("runner", at_s=record.appended_at_ms / 1000),
                    audience=self._trust.trust_domain,
                ).claims  # fmt: skip
            except InvalidMessageError:
                continue
            if heartbeat.pool is None:
                continue
            key = heartbeat.iss, heartbeat.pool.name
            before = self._heard.get(key)
            if before is None or heartbeat.at_ms > before.sent_at_ms:
                self._heard[key] = _Heard(heartbeat.pool, heartbeat.at_ms, record.appended_at_ms)

    def listed(self, now_ms: int, labels: Mapping[str, str]) -> list[dict[str, Any]]:
        """The pools that have these labels and a runner that was heard lately, by name, as JSON values.

        Of several runners of a pool only one takes orders at a time, so `free` is the most that one of them has. A pool
        has the labels that all of its runners have.
        """
        found: dict[str, dict[str, Any]] = {}
        for (runner, name), heard in sorted(self._heard.items()):
            if now_ms - heard.appended_at_ms > FRESH_MS:
                continue
            pool = found.setdefault(
                name, {"name": name, "labels": dict(heard.pool.labels), "free": 0, "runners": []}
            )
            own = heard.pool.labels
            pool["labels"] = {key: value for key, value in pool["labels"].items() if own.get(key) == value}
            pool["free"] = max(pool["free"], heard.pool.free)
            pool["runners"].append(runner.rpartition("/")[2])
        wanted = labels.items()
        return [pool for pool in found.values() if wanted <= pool["labels"].items()]


def _payload(record: Received) -> bytes:
    """The payload of a heartbeat, not verified: most of them name no pool, and need no check."""
    try:
        return parse(record.value).payload
    except InvalidMessageError:
        return b""
