"""The bundle that comes with Ringfence by its own tests, and what is read from a folder."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from pathlib import Path

import orjson
import pytest
import regorus

from bench.policy import Directory
from ringfence.rego.bundle import BundleError, archive, load_bundle
from ringfence.rego.engine import ISSUANCE, PolicyFailedError, read_result
from ringfence.rego.regorus_programs import Outcome, compiled, run_tests
from tests.policy.bundles import made
from tests.policy.cases import CASES, GOOD, changed
from tests.policy.conftest import Engines

OWN = load_bundle()
TESTED, COVERED = run_tests(OWN.modules, OWN.tests, coverage=True)


@pytest.mark.parametrize("tested", TESTED, ids=lambda tested: tested.name.removeprefix("data.ringfence."))
def test_rego(tested: Outcome):
    assert tested.passed, tested.problem


def test_every_file_of_rules_has_tests_that_reach_all_of_it():
    files = {name.removesuffix(".rego") for name, _ in OWN.modules}
    assert files == {
        "identity", "scope", "approval", "limits", "combinations", "delivery", "history", "ceiling", "decision",
        "action",
    }  # fmt: skip
    assert files <= {name.removesuffix("_test.rego") for name, _ in OWN.tests}
    assert [(c.file, c.missed) for c in COVERED] == [(name, ()) for name, _ in OWN.modules]


def test_coverage_names_what_no_test_reaches(tmp_path: Path):
    rules = "decision := 1 if {\n\tinput.a == 1\n\tinput.b == 2\n}\n"
    found = made(tmp_path, rules, "test_it if not issuance.decision with input as {}\n")
    tested, (covered,) = run_tests(found.modules, found.tests, coverage=True)
    assert [t.passed for t in tested] == [True]
    assert 5 in covered.missed
    assert covered.percent < 100


def test_the_compiled_bundle_answers_as_the_interpreted_one():
    """Services run the compiled program, `ringfence policy test` the interpreter."""
    interpreted = regorus.Engine()
    for name, text in OWN.modules:
        interpreted.add_policy(name, text)
    machines = {}
    for case in CASES:
        if case.entry_point not in machines:
            machines[case.entry_point] = regorus.Rvm()
            machines[case.entry_point].load_program(compiled(OWN.modules, case.entry_point))
        text = orjson.dumps(case.input).decode()
        machines[case.entry_point].set_input_json(text)
        interpreted.set_input_json(text)
        try:
            expected = read_result(interpreted.eval_rule_as_json(case.entry_point))
        except RuntimeError:  # it stops at a wrong type, where a compiled rule is undefined
            assert case.deny
            continue
        assert read_result(machines[case.entry_point].execute()) == expected, case.name


async def test_benchmark_request_is_allowed(engines: Engines):
    (given,) = Directory(1).inputs(1)
    assert (await engines[ISSUANCE].evaluate(given)).result.allow


async def test_a_request_too_large_to_judge_is_not_judged(engines: Engines):
    huge = {"target": "platform", "verbs": ["deploy"], "resources": [f"a/{n}/b/c/d" for n in range(64)]}
    given = orjson.dumps(changed(GOOD, {"request.scope": [huge] * 64}))
    if engines.kind == "opa":  # which has no such limit: there time is all that counts
        assert (await engines[ISSUANCE].evaluate(given)).result.allow
        return
    with pytest.raises(PolicyFailedError, match="instruction limit"):
        await engines[ISSUANCE].evaluate(given)
    assert (await engines[ISSUANCE].evaluate(orjson.dumps(GOOD))).result.allow


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ('"<undefined>"', "undefined"),
        ("{", "not answer in JSON"),
        ("[]", "list, not an object"),
        ('{"allow": 1, "deny": [], "approvals": [], "max_ttl_s": 1}', "`allow`"),
        ('{"deny": [], "approvals": [], "max_ttl_s": 1}', "`allow`.*undefined"),
        ('{"allow": true, "approvals": [], "max_ttl_s": 1}', "`deny`.*undefined"),
        ('{"allow": true, "deny": {}, "approvals": [], "max_ttl_s": 1}', "`deny`"),
        ('{"allow": true, "deny": ["no"], "approvals": [], "max_ttl_s": 1}', "entry of `deny`"),
        ('{"allow": true, "deny": [{"code": "x"}], "approvals": [], "max_ttl_s": 1}', "entry of `deny`"),
        ('{"allow": true, "deny": [], "max_ttl_s": 1}', "`approvals`"),
        ('{"allow": true, "deny": [], "approvals": "sponsor", "max_ttl_s": 1}', "`approvals`"),
        ('{"allow": true, "deny": [], "approvals": ["boss"], "max_ttl_s": 1}', "`approvals`"),
        ('{"allow": true, "deny": [], "approvals": 0, "max_ttl_s": 1}', "`approvals`"),
        ('{"allow": true, "deny": [], "approvals": -1, "max_ttl_s": 1}', "`approvals`"),
        ('{"allow": true, "deny": [], "approvals": [-1], "max_ttl_s": 1}', "`approvals`"),
        ('{"allow": true, "deny": [], "approvals": {"sponsor": 0}, "max_ttl_s": 1}', "`approvals`"),
        ('{"allow": true, "deny": [], "approvals": [null], "max_ttl_s": 1}', "`approvals`"),
        ('{"allow": true, "deny": [], "approvals": []}', "`max_ttl_s`"),
        ('{"allow": true, "deny": [], "approvals": [], "max_ttl_s": 1.5}', "`max_ttl_s`"),
        ('{"allow": true, "deny": [], "approvals": [], "max_ttl_s": true}', "`max_ttl_s`"),
        (
            '{"allow": true, "deny": [], "approvals": [], "max_ttl_s": 1, "denials": []}',
            "unknown field 'denials'",
        ),
    ],
)
def test_an_answer_of_another_shape_is_no_answer(answer: str, said: str):
    with pytest.raises(PolicyFailedError, match=said):
        read_result(answer)


# --- folders ---


def test_a_bundle_that_is_not_there_or_cannot_be_read(tmp_path: Path):
    with pytest.raises(BundleError, match=r"no \.rego file"):
        load_bundle(tmp_path)
    (tmp_path / "x.rego").write_bytes(b"package x\xff")
    with pytest.raises(BundleError, match=r"x\.rego"):
        load_bundle(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("package ringfence.issuance\n\ndecision := {\n", r"rules\.rego:4:1: expecting expression"),
        ("package ringfence.issuance\n\ndecision := sum_up(1)\n", r"rules\.rego:3:\d+: Unknown function"),
        ("package elsewhere\n\ndecision := 1\n", r"no rule data\.ringfence\.issuance\.decision"),
    ],
    ids=["syntax", "unknown function", "no entry point"],
)
def test_a_bundle_that_does_not_compile_says_where(text: str, said: str):
    with pytest.raises(BundleError, match=said):
        compiled([("rules.rego", text)], ISSUANCE)


def test_the_revision_names_what_the_rules_say(tmp_path: Path):
    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.rego").write_text(text)

    write("a", "package a\n")
    write("b", "package b\n")
    revision = load_bundle(tmp_path).revision
    assert re.fullmatch(r"[0-9a-f]{64}", revision)
    os.utime(tmp_path / "a.rego", (1, 1))
    write("a_test", "package a_test\n")
    assert load_bundle(tmp_path).revision == revision
    write("b", "package b\n\nx := 1\n")
    changed_revision = load_bundle(tmp_path).revision
    (tmp_path / "b.rego").rename(tmp_path / "c.rego")
    assert len({revision, changed_revision, load_bundle(tmp_path).revision}) == 3


def test_opa_archive_is_the_rules_and_their_revision():
    packed = archive(OWN)
    assert packed == archive(load_bundle())
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as tar:
        held = {member.name: _text(tar, member) for member in tar}
    assert json.loads(held.pop(".manifest")) == {"revision": OWN.revision, "rego_version": 1}
    assert held == dict(OWN.modules)


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = tar.extractfile(member)
    assert file is not None
    return file.read().decode()
