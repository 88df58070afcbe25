"""`ringfence policy test` and `build`; `explain` is in the flows of the service."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ringfence.cli.main import main
from ringfence.rego.bundle import archive, load_bundle
from tests.policy.bundles import ALLOWS, write

DENIED = "test_denied if not issuance.decision.allow\n"
ALLOWED = "test_allowed if issuance.decision.allow\n"


def test_the_own_bundle_passes(capsys: pytest.CaptureFixture[str]):
    assert main(["policy", "test", "--coverage", "100"]) == 0
    out = capsys.readouterr().out
    assert "0 failed; 100 % of the lines covered" in out
    assert load_bundle().revision in out


def test_a_failing_test_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write(tmp_path, ALLOWS, ALLOWED + "\n" + DENIED)
    assert main(["policy", "test", "--bundle", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "FAILED  data.ringfence.issuance_test.test_denied" in said.out
    assert "1 of 2 tests failed" in said.err

    assert main(["policy", "test", "--bundle", str(tmp_path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["passed"], found["failed"]) == (1, 1)
    assert [test["passed"] for test in found["tests"]] == [True, False]


def test_lines_that_no_test_evaluates_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rules = ALLOWS + "\nunused if {\n\tinput.a == 1\n\tinput.b == 2\n}\n"
    write(tmp_path, rules, ALLOWED)
    assert main(["policy", "test", "--bundle", str(tmp_path)]) == 0
    assert main(["policy", "test", "--bundle", str(tmp_path), "--coverage", "90", "--json"]) == 1
    said = capsys.readouterr()
    assert "less than 90 %" in said.err
    assert "rules.rego" in said.out


@pytest.mark.parametrize(
    ("rules", "tests", "said"),
    [
        ("decision := {\n", "", "rules.rego:4:1"),
        (ALLOWS, "test_it if {\n", "rules_test.rego"),
        (ALLOWS, "", "no tests"),
        ("other := 1\n", ALLOWED, "no rule data.ringfence.issuance.decision"),
    ],
)
def test_bundle_that_cannot_be_tested_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rules: str, tests: str, said: str
):
    write(tmp_path, rules, tests)
    assert main(["policy", "test", "--bundle", str(tmp_path)]) == 1
    assert said in capsys.readouterr().err


def test_policy_build_writes_the_archive_that_opa_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "policy.tar.gz"
    assert main(["policy", "build", str(file)]) == 0
    assert file.read_bytes() == archive(load_bundle())
    assert load_bundle().revision in capsys.readouterr().out
    assert main(["policy", "build", str(tmp_path / "nowhere" / "x")]) == 1


@pytest.mark.parametrize(
    ("rules", "tests", "said"),
    [
        ("decision := {\n", "", "rules.rego:4:1"),
        ("other := 1\n", "", "no rule data.ringfence.issuance.decision"),
        (ALLOWS, DENIED, "data.ringfence.issuance_test.test_denied"),
    ],
)
def test_a_bundle_that_does_not_compile_or_fails_its_tests_is_not_packed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rules: str, tests: str, said: str
):
    file = tmp_path / "policy.tar.gz"
    write(tmp_path / "rules", rules, tests)
    assert main(["policy", "build", str(file), "--bundle", str(tmp_path / "rules")]) == 1
    assert said in capsys.readouterr().err
    assert not file.exists()
