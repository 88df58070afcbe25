"""Bounded dicts, backoff, and periodic work."""

from __future__ import annotations

import asyncio
import itertools
import logging

import pytest

from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.kernel.base.retry import backoff, run_periodically

log = logging.getLogger(__name__)


def test_a_full_dict_evicts_what_was_written_longest_ago():
    kept = BoundedDict[str, int](2)
    kept["a"], kept["b"], kept["a"] = 1, 2, 3
    assert kept.get("b") == 2, "reading makes nothing newer"
    kept["c"] = 4
    assert dict(kept) == {"a": 3, "c": 4}
    kept.update({"d": 5, "e": 6})
    assert list(kept) == ["d", "e"]


def test_delays_double_up_to_a_bound_and_vary_by_half():
    for delay_s, most_s in zip(itertools.islice(backoff(0.5, 3), 5), (0.5, 1, 2, 3, 3), strict=True):
        assert most_s / 2 <= delay_s <= most_s


class Stop(BaseException):
    """Ends a loop that has no end."""


async def failing(*errors: BaseException, **how: object) -> None:
    left = list(errors)

    async def action() -> None:
        raise left.pop(0)

    await asyncio.wait_for(run_periodically(0, action, "it failed", log, **how), 5)  # type: ignore[arg-type]


async def test_periodic_work_goes_on_after_errors(caplog: pytest.LogCaptureFixture):
    with pytest.raises(Stop):
        await failing(ValueError("one"), OSError("two"), Stop())
    assert [(r.levelname, r.getMessage(), bool(r.exc_info)) for r in caplog.records] == [
        ("ERROR", "it failed", True),
        ("ERROR", "it failed", True),
    ]


async def test_periodic_work_logs_expected_errors_and_raises_others(caplog: pytest.LogCaptureFixture):
    with pytest.raises(ValueError, match="other"):
        await failing(OSError("away"), OSError(), ValueError("other"), expected=(OSError,), at_once=True)
    assert [r.getMessage() for r in caplog.records] == ["it failed: away", "it failed: OSError"]
