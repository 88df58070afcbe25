"""Policy as a whole, when its engine fails, its bundle is wrong, and its rules lie."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import uuid
from pathlib import Path
from typing import Any

import orjson
import psutil
import pytest

from ringfence.cli.main import main
from ringfence.kernel.base.errors import RingfenceError
from ringfence.messages.credential import CredentialDecision
from ringfence.messages.registry import VerbFloor
from ringfence.messages.topics import CREDENTIAL_DECISION
from ringfence.policy.decision_log import DecisionLog
from ringfence.policy.settings import PolicySettings
from ringfence.rego.bundle import Bundle, load_bundle
from tests.policy.bundles import ALLOWS, EXPLODES, write
from tests.policy.opa_server import running_opa
from tests.support.benches.policy_bench import DEPLOY, READ, PolicyBench, codes
from tests.support.world import WITHIN_S, Party, World, scope

TIMEOUT_MS = 2_000


def policy(**fields: Any) -> dict[Any, Any]:
    return {"policy": PolicySettings(**fields)}


async def denied_with(office: PolicyBench, code: str, **request: Any) -> CredentialDecision:
    decision = await office.final(await office.ask(READ, **request))
    assert (decision.outcome, codes(decision)) == ("denied", {code})
    return decision


async def test_rules_that_explode_deny_and_the_service_lives(world: World, tmp_path: Path):
    # What an agent writes as its reason decides here whether the rules explode.
    rules = EXPLODES.replace("input.explode", "input.request.reason").replace(
        "not input.request.reason", 'not input.request.reason in {"time", "memory", "steps"}'
    )
    own = policy(bundle=write(tmp_path, rules), evaluation_timeout_ms=TIMEOUT_MS)
    async with world.running("registry", "policy", own=own):
        office = await PolicyBench.open(world)
        await denied_with(office, "policy_timeout", reason="time")
        await denied_with(office, "policy_invalid", reason="steps")
        assert (await office.final(await office.ask(READ))).outcome == "allowed"
        assert world.runtimes["policy"].unready() == []


async def test_a_bundle_that_changes_is_in_force_without_a_restart(world: World, tmp_path: Path):
    write(tmp_path, ALLOWS)
    async with world.running("registry", "policy", own=policy(bundle=tmp_path)):
        office = await PolicyBench.open(world)
        first = await office.final(await office.ask(READ))
        assert first.revisions is not None
        assert (first.outcome, first.revisions.policy) == ("allowed", load_bundle(tmp_path).revision)
        before = load_bundle(tmp_path).revision

        write(tmp_path, "decision := {\n")
        finding = await world.event_where(lambda e: e.kind == "finding" and e.subject == "policy bundle")
        assert [reason.code for reason in finding.reasons] == ["bundle_refused"]
        assert "rules.rego:4:1" in finding.reasons[0].message
        still = await office.final(await office.ask(READ))
        assert still.revisions is not None
        assert (still.outcome, still.revisions.policy) == ("allowed", before)

        rules = 'decision := {"allow": false, "deny": [], "approvals": [], "max_ttl_s": 0}\n'
        write(tmp_path, rules)
        while (latest := await office.final(await office.ask(READ))).outcome == "allowed":
            pass
        assert latest.revisions is not None
        assert latest.revisions.policy == load_bundle(tmp_path).revision


@pytest.mark.parametrize(
    ("rules", "tests", "said"),
    [("decision := {\n", "", "rules.rego:4:1"), (ALLOWS, "test_no if false\n", "test_no")],
    ids=["syntax", "test"],
)
async def test_a_service_does_not_start_with_an_unfit_bundle(
    world: World, tmp_path: Path, rules: str, tests: str, said: str
):
    own = policy(bundle=write(tmp_path, rules, tests))
    with pytest.raises(RingfenceError, match=said):
        async with world.running("registry", "policy", own=own):
            pass


async def test_approvals_that_are_no_list_of_classes_are_not_none(world: World, tmp_path: Path):
    """Zero or negative approvers, or anything else that might be read as nobody."""
    rules = 'decision := {"allow": true, "deny": [], "approvals": approvals, "max_ttl_s": 60}\n\n'
    by_reason = {"zero": "0", "minus": "-1", "count": '{"sponsor": 0}', "null": "null", "some": "[-1]"}
    for reason, value in by_reason.items():
        rules += f'approvals := {value} if input.request.reason == "{reason}"\n\n'
    async with world.running("registry", "policy", own=policy(bundle=write(tmp_path, rules))):
        office = await PolicyBench.open(world)
        for reason in by_reason:
            await denied_with(office, "policy_invalid", reason=reason)


async def test_rules_that_allow_everything_allow_a_reader_no_change(world: World, tmp_path: Path):
    """maria may read; her agent may hold everything, her task says everything, and the rules let everything pass."""
    async with world.running("registry", "policy", own=policy(bundle=write(tmp_path, ALLOWS))):
        office = PolicyBench()
        office.world = world
        office.sam = await world.user("sam", roles=("sponsor",))
        reading = scope("platform", ["read"], ["**"])
        office.maria = await world.user("maria", entitlements=reading)
        everything = scope("platform", ["read", "deploy"], ["**"])
        await world.target("platform", verbs=(VerbFloor(verb="read"), VerbFloor(verb="deploy")))
        office.bot = await world.agent("deploy-bot", sponsor=office.sam, ceiling=everything)
        office.task = await world.task(office.bot, by=office.maria, scope=everything)
        production = scope("platform", ["deploy"], ["env/production/web"])
        decision = await office.final(await office.ask(production))
        assert (decision.outcome, codes(decision)) == ("denied", {"beyond_scope"})
        assert {reason.side for reason in decision.reasons} == {"entitlements:maria"}
        assert (await office.final(await office.ask(scope("platform", ["read"], ["x"])))).outcome == "allowed"


async def test_an_explanation_is_whole_also_of_what_policy_does_not_keep(world: World):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        asked = await office.ask(READ)
        decision = await office.final(asked)
        path = f"/v1/decisions/{asked.id}/explanation"
        found = (await world.get("policy", path, office.sam)).json()
        assert (found["outcome"], found["decision_id"], found["agent_id"]) == (
            "allowed", decision.jti, "deploy-bot",
        )  # fmt: skip
        assert found["input"] == decision.input
        assert found["input_digest"] == decision.input_digest
        assert decision.revisions is not None
        assert found["revisions"]["policy"] == decision.revisions.policy == load_bundle().revision
        assert (await world.get("policy", path, office.petra)).status_code == 404
        assert (await world.get("policy", path)).status_code == 401

        refused = await office.ask(scope("platform", ["read"], ["elsewhere"]))
        await office.final(refused)
        path = f"/v1/decisions/{refused.id}/explanation"
        found = (await world.get("policy", path, office.sam)).json()
        assert found["outcome"] == "denied"
        assert {reason["side"] for reason in found["reasons"]} >= {"task", "entitlements:maria"}


async def test_the_command_explains_what_each_side_holds(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        office.sam.key.save(tmp_path / "sam.json")
        monkeypatch.setenv("RINGFENCE_TRUST_DOMAIN", world.td)
        monkeypatch.setenv("RINGFENCE_POLICY_URL", f"http://127.0.0.1:{world.ports['policy']}")
        command = ["--identity", str(tmp_path / "sam.json"), "policy", "explain"]

        asked = await office.ask(scope("platform", ["read"], ["elsewhere"]))
        decision = await office.final(asked)
        assert await asyncio.to_thread(main, [*command, asked.id]) == 0
        out = capsys.readouterr().out
        assert "denied" in out
        assert "beyond_scope [entitlements:maria]" in out
        for side in ("task", "ceiling of deploy-bot", "entitlements of maria"):
            assert side in out
        assert "not platform:read:elsewhere" in out
        assert decision.input_digest
        assert decision.input_digest in out
        assert load_bundle().revision in out
        # Every rule that fired, and what it said; those of the gateway have nothing to do with it.
        for line in ("identity.agent_active +holds", "scope.deny +beyond_scope: ", "limits.max_ttl_s +3[56]"):
            assert re.search(line, out), line
        assert "action." not in out
        assert "approval.required" not in out

        allowed = await office.ask(READ)
        await office.final(allowed)
        assert await asyncio.to_thread(main, [*command, allowed.id, "--json"]) == 0
        found = orjson.loads(capsys.readouterr().out)
        assert (found["outcome"], found["input"]["request"]["reason"]) == ("allowed", "a test")
        assert found["rules"]["identity.sponsor_active"] is True
        assert "scope.deny" not in found["rules"]
        other = str(write(tmp_path / "other", ALLOWS))
        assert await asyncio.to_thread(main, [*command, allowed.id, "--bundle", other]) == 0
        assert "--bundle" in capsys.readouterr().err
        assert await asyncio.to_thread(main, [*command, "unknown"]) == 2
        capsys.readouterr()
        assert await asyncio.to_thread(main, [*command, str(uuid.uuid4())]) == 1
        assert "no decision with this request id" in capsys.readouterr().err


async def test_forgotten_decision_is_explained_from_audit(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    async with world.running("registry", "policy", "audit"):
        office = await PolicyBench.open(world)
        for party in (office.sam, office.petra):
            party.key.save(tmp_path / f"{party.name}.json")
        asked, other = await office.ask(READ), await office.ask(READ)
        decision = await office.final(asked)
        await office.final(other)
        place = await world.consume_until(CREDENTIAL_DECISION, lambda r: office.opened(r).jti == decision.jti)
        monkeypatch.setattr(DecisionLog, "get", lambda self, request_id: None)
        monkeypatch.setenv("RINGFENCE_TRUST_DOMAIN", world.td)
        for role in ("policy", "audit"):
            monkeypatch.setenv(f"RINGFENCE_{role.upper()}_URL", f"http://127.0.0.1:{world.ports[role]}")

        async def explain(who: Party) -> int:
            words = ["--identity", str(tmp_path / f"{who.name}.json"), "policy", "explain", asked.id]
            return await asyncio.to_thread(main, words)

        async with asyncio.timeout(WITHIN_S):
            while await explain(office.sam):
                pass  # until audit has indexed it
        assert decision.jti in capsys.readouterr().out
        assert await explain(office.petra) == 1

        # At another place, at none, and by somebody who may not see it, there is nothing.
        path = f"/v1/decisions/{asked.id}/explanation"
        here = {"partition": str(place.partition), "offset": str(place.offset)}
        assert (await world.get("policy", path, office.sam, **here)).status_code == 200
        theirs = await world.get("policy", path, office.petra, **here)
        none = await world.get("policy", f"/v1/decisions/{uuid.uuid4()}/explanation", office.petra, **here)
        assert theirs.status_code == none.status_code == 404
        assert theirs.text == none.text, "whether one is there is not for them to know"
        for offset in (str(place.offset + 1), "999999"):
            found = await world.get("policy", path, office.sam, **{**here, "offset": offset})
            assert found.status_code in (404, 503), found.text


# --- by OPA ---


@pytest.mark.opa
async def test_policy_by_opa(world: World, opa_url: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RINGFENCE_OPA_URL", opa_url)
    async with world.running("registry", "policy", own=policy(evaluation_timeout_ms=10_000)):
        office = await PolicyBench.open(world)
        allowed = await office.final(await office.ask(READ))
        assert allowed.revisions is not None
        assert (allowed.outcome, allowed.revisions.policy) == ("allowed", bundle.revision)
        waiting = await office.decision(await office.ask(DEPLOY))
        assert (waiting.outcome, waiting.required) == ("approval_required", ("sponsor",))
        beyond = await office.final(await office.ask(scope("platform", ["read"], ["elsewhere"])))
        assert codes(beyond) == {"beyond_scope"}


@pytest.mark.opa
async def test_opa_away_stopped_or_with_other_rules_denies(
    world: World, opa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rules = write(tmp_path / "rules", ALLOWS)
    with running_opa(opa, tmp_path, load_bundle(rules)) as url:
        monkeypatch.setenv("RINGFENCE_OPA_URL", url)
        own = policy(bundle=rules, evaluation_timeout_ms=TIMEOUT_MS)
        async with world.running("registry", "policy", own=own):
            office = await PolicyBench.open(world)
            assert (await office.final(await office.ask(READ))).outcome == "allowed"

            children = psutil.Process().children()
            (server,) = (p for p in children if any(str(tmp_path) in part for part in p.cmdline()))
            os.kill(server.pid, signal.SIGSTOP)
            try:
                await denied_with(office, "policy_timeout")
            finally:
                os.kill(server.pid, signal.SIGCONT)

            # Rules that changed here and not there: neither of the two decides alone.
            write(rules, ALLOWS + "# changed\n")
            async with asyncio.timeout(WITHIN_S):
                while codes(await office.final(await office.ask(READ))) != {"policy_unavailable"}:
                    pass  # it was asleep, and the rules may still be on their way

            server.kill()
            write(rules, ALLOWS)
            await denied_with(office, "policy_unavailable")
