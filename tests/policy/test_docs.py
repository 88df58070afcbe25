"""What docs/policy.md tells people to do works."""

from __future__ import annotations

import re
from pathlib import Path

from ringfence.rego.bundle import load_bundle
from ringfence.rego.engine import ISSUANCE
from ringfence.rego.regorus_programs import compiled, run_tests
from tests.policy.cases import CASES

PAGE = (Path(__file__).parents[2] / "docs" / "policy.md").read_text()
RULE, TESTS, PAIR, PAIR_TEST = re.findall(r"```rego[^\n]*\n(.*?)```", PAGE, re.DOTALL)


def test_the_example_step_by_step():
    own = load_bundle()
    modules = [(name, f"{text}\n{RULE}" if name == "limits.rego" else text) for name, text in own.modules]
    tests = [(name, f"{text}\n{TESTS}" if name == "limits_test.rego" else text) for name, text in own.tests]
    compiled(modules, ISSUANCE)
    passed, covered = run_tests(modules, tests, coverage=True)
    assert [outcome.name for outcome in passed if not outcome.passed] == []
    assert f"{len(passed)} passed, 0 failed; 100 % of the lines covered" in PAGE
    assert all(not one.missed for one in covered)

    shorter = [(name, text.replace("longest_s := 3600", "longest_s := 1800")) for name, text in modules]
    outcomes, _ = run_tests(shorter, tests)
    failed = [outcome.name for outcome in outcomes if not outcome.passed]
    assert f"error: {len(failed)} of {len(outcomes)} tests failed" in PAGE
    for name in re.findall(r"^FAILED  (\S+)", PAGE, re.MULTILINE):
        assert name in failed


def test_another_pair_that_must_not_be_held_together():
    own, first = load_bundle(), "never_together := [\n"
    modules = [(name, text.replace(first, first + PAIR)) for name, text in own.modules]
    assert modules != list(own.modules)
    tests = [
        (name, f"{text}\n{PAIR_TEST}" if name == "combinations_test.rego" else text)
        for name, text in own.tests
    ]
    compiled(modules, ISSUANCE)
    passed, covered = run_tests(modules, tests, coverage=True)
    assert [outcome.name for outcome in passed if not outcome.passed] == []
    assert all(not one.missed for one in covered)
    unchanged, _ = run_tests(own.modules, tests)
    assert [outcome.name for outcome in unchanged if not outcome.passed] == [
        "data.ringfence.combinations_test.test_customers_and_mail"
    ]


def test_the_limits_that_can_be_changed_have_these_names():
    rules = dict(load_bundle().modules)["history.rego"]
    for name in ("new_for_s", "compared_after_s", "many_unused", "times_the_used"):
        assert f"`{name}" in PAGE
        assert re.search(rf"^{name} := \d+$", rules, re.MULTILINE)


def test_every_file_and_every_code_is_told():
    for name, _ in load_bundle().modules:
        assert f"`{name}`" in PAGE
    codes = {code for case in CASES for code in case.deny if not code.startswith("agent_")}
    codes |= {code for case in CASES for code in case.notes}
    assert {code for code in codes if f"`{code}`" not in PAGE} == set()
