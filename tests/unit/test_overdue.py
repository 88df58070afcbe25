"""What a revoker remembers of leases that it could not undo: no longer than they fail."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from ringfence.revoker.lease_end import expiry
from ringfence.revoker.lease_end.expiry import Overdue
from tests.support.leases import lease


async def test_lease_undone_by_another_revoker_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(expiry, "time", SimpleNamespace(monotonic=lambda: now))
    one = Overdue(cast(Any, None), cast(Any, None), after_ms=0, forget_ms=60_000)
    reported = one._reported

    async def report(leases: Any) -> None:
        reported.update(lease.lease_id for lease in leases)

    monkeypatch.setattr(one, "_report", report)
    first, second = (lease(status="ending", iat=1).claims for _ in range(2))
    await one.failed([first], 2_000)
    now += 61
    await one.failed([second], 2_000)
    assert reported == {second.lease_id}
    assert one._count() == 1
