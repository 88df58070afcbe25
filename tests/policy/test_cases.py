"""The table of what the bundle must answer, on every engine."""

from __future__ import annotations

import orjson
import pytest

from ringfence.rego.bundle import Bundle
from ringfence.rego.engine import ACTION, CEILING, ISSUANCE
from tests.policy.cases import CASES, Case
from tests.policy.conftest import Engines


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_case(engines: Engines, bundle: Bundle, case: Case):
    answer = await engines[case.entry_point].evaluate(orjson.dumps(case.input))
    assert answer.revision == bundle.revision
    assert case.agrees(answer.result), answer.result


def test_cases_are_numerous_and_have_distinct_names():
    assert len(CASES) >= 200
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.entry_point for case in CASES} == {ISSUANCE, ACTION, CEILING}


@pytest.fixture(scope="session")
def answers() -> dict[str, dict[str, object]]:
    """By kind of engine, then by case: everything that was answered."""
    return {}


async def test_all_answers_are_the_same_to_the_word(engines: Engines, answers: dict[str, dict[str, object]]):
    answers[engines.kind] = {
        case.name: (await engines[case.entry_point].evaluate(orjson.dumps(case.input))).result
        for case in CASES
    }
    assert answers[engines.kind] == answers["embedded"]
