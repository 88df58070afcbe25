"""What a runner checks of a plan before it claims the run."""

from __future__ import annotations

from typing import Any

import pytest

from ringfence.messages.codes import Code
from ringfence.messages.enrolment import AttestationSelector
from ringfence.messages.registry import AgentDecommission, AgentSetAttestation, AgentSuspend, TaskEnd
from ringfence.model.identity.runners import runner_selector
from ringfence.runner.lifecycle.plan import RunPlan, RunRefusedError, check_plan
from tests.support.in_memory_registry import TD
from tests.support.run_place import Place
from tests.support.runs import LIMITS

UNKNOWN = "00000000-0000-4000-8000-000000000000"


SELECTOR = runner_selector(TD, "runner-1", "bot")


@pytest.fixture
def place() -> Place:
    return Place()


def planned(place: Place, **fields: Any) -> RunPlan:
    given = {
        "run_id": "r", "agent_id": "bot", "task_id": place.task, "argv": ("true",), "deadline_s": place.now_s + 1800,
        "limits": LIMITS,
    }  # fmt: skip
    return RunPlan(**{**given, **fields})


def check(place: Place, plan: RunPlan, runner: str = "runner-1", *, after_s: float = 0) -> None:
    check_plan(plan, place.ledger.directory, TD, runner, place.now_s + after_s)


def refused(place: Place, plan: RunPlan, runner: str = "runner-1", **more: Any) -> RunRefusedError:
    with pytest.raises(RunRefusedError) as error:
        check(place, plan, runner, **more)
    return error.value


def test_a_plan_within_task_and_selector_is_good(place: Place) -> None:
    check(place, planned(place))
    check(place, planned(place, deadline_s=place.now_s + 3600), after_s=0)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"task_id": UNKNOWN}, "task_unknown"),
        ({"agent_id": "other"}, "task_other_agent"),
        ({"deadline_s": 2**40}, "run_too_long"),
    ],
)
def test_plan_beyond_task_or_selector_is_refused(place: Place, fields: dict[str, Any], code: str) -> None:
    assert refused(place, planned(place, **fields)).code == code


def test_a_task_that_has_ended_has_no_runs(place: Place) -> None:
    plan = planned(place)
    late = refused(place, plan, after_s=10 * 86_400)
    assert (late.code, bool(late.remedy)) == ("task_ended", True)
    place.ledger.give(place.ledger.claims(TaskEnd, "uma", task_id=place.task, reason="done"))
    assert refused(place, plan).code == "task_ended"


@pytest.mark.parametrize(
    ("command", "code"), [(AgentSuspend, "agent_suspended"), (AgentDecommission, "agent_decommissioned")]
)
def test_an_agent_that_is_not_active_has_no_runs(place: Place, command: Any, code: str) -> None:
    place.ledger.give(place.ledger.claims(command, "sam", agent_id="bot", reason="odd"))
    assert refused(place, planned(place)).code == code


@pytest.mark.parametrize(
    ("code", "selectors", "runner"),
    [
        (Code.INSTANCE_UNMATCHED, (SELECTOR,), "runner-2"),
        (Code.INSTANCE_UNMATCHED, (), "runner-1"),
        (Code.INSTANCE_UNMATCHED, (SELECTOR.model_copy(update={"only_on": "mondays"}),), "runner-1"),
    ],
    ids=["another runner", "no selector", "a field that is not known"],
)
def test_runner_that_no_selector_names_is_refused(
    place: Place, code: Code, selectors: tuple[AttestationSelector, ...], runner: str
) -> None:
    claims = place.ledger.claims(AgentSetAttestation, "sam", agent_id="bot", attestation=selectors)
    place.ledger.give_as_before(claims)
    found = refused(place, planned(place), runner)
    assert (found.code, f"runner={runner}" in (found.remedy or "")) == (code, True)


def test_a_run_is_not_longer_than_the_selector_says(place: Place) -> None:
    place.runners.admits("bot", max_life_s=600)
    check(place, planned(place, deadline_s=place.now_s + 600))
    long = refused(place, planned(place, deadline_s=place.now_s + 602))
    assert (long.code, "600" in long.message, "--ttl" in (long.remedy or "")) == ("run_too_long", True, True)
