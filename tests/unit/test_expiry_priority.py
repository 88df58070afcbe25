"""Expiry lets revocations go first: while one is carried out, it claims nothing, but never waits for long."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, cast

import pytest

from ringfence.kernel.base.clock import SystemClock
from ringfence.messages.lease import Lease
from ringfence.model.lease_store import ClaimedLeases, LeaseStore, StoredLease
from ringfence.revoker.lease_end import lease_ender
from ringfence.revoker.lease_end.expiry import Expiry
from ringfence.revoker.lease_end.lease_ender import EndRequest, LeaseEnder
from ringfence.revoker.settings import RevokerSettings


class Store:
    """One lease of one shard is due."""

    shards = range(1)

    async def claim(self, shards: Sequence[int], **_: Any) -> list[ClaimedLeases]:
        return [ClaimedLeases(0, 0, None, {"lease": None})]


class Ender(LeaseEnder):
    """Only notes which leases expiry hands over."""

    def __init__(self) -> None:
        super().__init__(
            cast(Any, None), cast(Any, None), [], lambda _: None, lambda *_: None, visibility_ms=1
        )
        self.given: list[str] = []

    async def read(self, stored: Mapping[str, StoredLease | None]) -> dict[str, Lease]:
        self.given += stored
        return {}

    async def end(self, requests: Sequence[EndRequest]) -> dict[str, Lease]:
        return {}


async def given_meanwhile(ender: Ender) -> list[str]:
    """What expiry handed over while two revocations were carried out, one after the other."""
    expiry = Expiry(cast(LeaseStore, Store()), ender, RevokerSettings(), SystemClock())
    async with asyncio.TaskGroup() as tasks:
        with ender.revoking():
            with ender.revoking():
                tasks.create_task(expiry._end_due([0], 0.0, tasks))
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.05)
            given = list(ender.given)
    return given


async def test_expiry_starts_no_batch_while_a_revocation_is_carried_out() -> None:
    ender = Ender()
    assert await given_meanwhile(ender) == []
    assert ender.given == ["lease"]


async def test_expiry_does_not_wait_for_revocations_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_ender, "_YIELD_S", 0.0)
    assert await given_meanwhile(Ender()) == ["lease"]
