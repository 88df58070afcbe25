"""How long a new task may last. Records that were made under another limit stay valid."""

from __future__ import annotations

import pytest

from ringfence.kernel.base.settings import ServiceSettings
from ringfence.messages.registry import TaskEnd, TaskState
from ringfence.model.lifecycle import CommandRefusedError
from ringfence.registry.domain import TASK_MAX_S
from tests.support.in_memory_registry import InMemoryRegistry
from tests.unit.test_delegation import ledger, made, part, refused  # noqa: F401 - a fixture

DAY_S = 86_400


def start_s(ledger: InMemoryRegistry) -> int:  # noqa: F811
    return ledger.clock.ms // 1000


def test_the_limit_is_that_of_the_settings() -> None:
    assert ServiceSettings.model_fields["task_max_s"].default == TASK_MAX_S == 30 * DAY_S


def test_a_new_task_lasts_no_longer_than_the_limit(ledger: InMemoryRegistry) -> None:  # noqa: F811
    at_s = start_s(ledger)
    assert made(ledger, ledger.assign("uma", "bot", terms=ledger.terms("bot", not_after=at_s + 30 * DAY_S)))
    too_long = ledger.assign("uma", "bot", terms=ledger.terms("bot", not_after=at_s + 31 * DAY_S))
    with pytest.raises(CommandRefusedError, match="RINGFENCE_TASK_MAX_S") as error:
        ledger.give(too_long)
    assert error.value.code == "task_too_long"


def test_an_older_task_stays_valid_and_can_be_handed_on_and_ended(ledger: InMemoryRegistry) -> None:  # noqa: F811
    ledger.task_max_s = 3650 * DAY_S
    not_after = start_s(ledger) + 365 * DAY_S
    task = made(ledger, ledger.assign("uma", "bot", terms=ledger.terms("bot", not_after=not_after)))
    ledger.task_max_s = TASK_MAX_S
    # Every reader folds the old record as before: the limit is no rule of the lifecycle.
    reader = ledger.reader()
    entry = ledger.directory.entry("task", task)
    assert entry is not None
    for kind in ("user", "agent", "target"):
        for one in ledger.directory.entries(kind):
            assert ledger.admit(one.compact.decode(), reader) is None
    assert ledger.admit(entry.compact.decode(), reader) is None
    again = reader.entry("task", task)
    assert again is not None
    assert again.state == entry.state
    assert isinstance(entry.state, TaskState)
    assert entry.state.not_after == not_after
    # A part of it is a new task, with the limit of new ones.
    assert refused(ledger, part(ledger, "bot", task, "second", not_after=not_after)) == "task_too_long"
    assert made(ledger, part(ledger, "bot", task, "second", not_after=start_s(ledger) + DAY_S))
    end = ledger.give(ledger.claims(TaskEnd, "uma", task_id=task, reason="done"))
    assert end is not None
    assert end.state.status == "ended"
