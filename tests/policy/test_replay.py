"""`policy replay`: what another bundle would have decided, by the decisions on a real broker."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from ringfence.cli.main import main
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.credential import CredentialDecision, Reason
from ringfence.messages.topics import CREDENTIAL_DECISION
from ringfence.policy.decisions.replay import RequestOutcome, changes_between, fields_of
from ringfence.policy.domain import INPUT_FIELDS
from ringfence.rego.bundle import OWN_BUNDLE, load_bundle
from tests.policy.bundles import ALLOWS, write
from tests.support.benches.policy_bench import DEPLOY, READ, PolicyBench
from tests.support.world import Party, World, scope

NO = 'decision := {"allow": false, "deny": [{"code": "no", "message": "no"}], "approvals": [], "max_ttl_s": 60}\n'
LONG = 'decision := {"allow": true, "deny": [], "approvals": ["operator"], "max_ttl_s": 3600}\n'


def standing(outcome: Any = "allowed", required: Any = (), ttl_s: int | None = 300) -> RequestOutcome:
    return RequestOutcome(outcome, required, ttl_s, (Reason(code="x", message="x"),))


DENIED, ASKED = standing("denied", ttl_s=None), standing("approval_required", ("sponsor",))


@pytest.mark.parametrize(
    ("before", "after", "changes"),
    [
        (standing(), standing(), ()),
        (DENIED, standing("denied", ("operator",), None), ()),
        (DENIED, standing(), ("denied_to_allowed",)),
        (DENIED, ASKED, ("denied_to_approval",)),
        (ASKED, DENIED, ("allowed_to_denied",)),
        (ASKED, standing(), ("approval_removed",)),
        (standing(), ASKED, ("approval_added",)),
        (ASKED, standing("approval_required", ("operator",)), ("approval_removed", "approval_added")),
        (standing(), standing(ttl_s=301), ("ttl_longer",)),
        (standing(), standing(ttl_s=299), ("ttl_shorter",)),
    ],
)
def test_difference_of_decisions_is_classified(
    before: RequestOutcome, after: RequestOutcome, changes: tuple[str, ...]
):
    assert changes_between(before, after) == changes


def test_fields_read_by_a_bundle_are_found(tmp_path: Path):
    rules = (
        'a := input.held\n\nb := input["floors"]["x"]\n\nc := object.get(input, ["task", "y"], 1)\n\n'
        'd := object.get(input, "user", 1)\n\ne := input.agent.ceiling[0].target\n\nf := input_of(1)\n'
    )
    assert fields_of(load_bundle(write(tmp_path, ALLOWS + rules))) == {
        "held", "floors", "floors.x", "task", "task.y", "user", "agent", "agent.ceiling",
    }  # fmt: skip
    assert fields_of(load_bundle()) >= INPUT_FIELDS - {"floors", "approvals"}


class Shell:
    """The command, as somebody would call it who has the settings of a world."""

    def __init__(
        self, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self._capsys = capsys
        for name, value in {
            "TRUST_DOMAIN": world.td,
            "TRUST_ROOT": world.fingerprint,
            "KAFKA": world.bootstrap,
            "TOPIC_PREFIX": world.prefix,
            "EMBEDDED_BROKER": "true",
        }.items():
            monkeypatch.setenv(f"RINGFENCE_{name}", value)

    async def replay(self, bundle: Path, *more: str) -> tuple[int, str]:
        status = await asyncio.to_thread(main, ["policy", "replay", "--bundle", str(bundle), *more])
        return status, self._capsys.readouterr().out

    async def report(self, bundle: Path, *more: str) -> dict[str, Any]:
        status, text = await self.replay(bundle, "--json", *more)
        assert status == 0
        return dict(json.loads(text))


@pytest.fixture
def shell(world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(world, monkeypatch, capsys)


async def test_replay_lists_decisions_that_another_bundle_would_change(
    world: World, shell: Shell, tmp_path: Path
):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        read = await office.ask(READ)
        long = await office.ask(READ, ttl_s=7200)
        beyond = await office.ask(scope("platform", ["read"], ["elsewhere"]))
        deploy = await office.ask(DEPLOY)
        await office.approve(await office.question(deploy, office.sam), office.sam)
        refused = await office.ask(DEPLOY)
        await office.approve(await office.question(refused, office.sam), office.sam, verdict="denied")
        for request in (read, long, beyond, deploy, refused):
            await office.final(request)
        now = int(time.time())
        late = await office.ask(READ, iat=now - 60, exp=now - 1)
        await office.final(late)

        same = await shell.report(OWN_BUNDLE)
        assert (same["compared"], same["unchanged"], same["changes"]) == (5, 5, {})
        assert same["skipped"] == {"later_decision": 2, "without_input": 1}
        assert same["compared_by_revision"] == {load_bundle().revision: 5}
        status, text = await shell.replay(OWN_BUNDLE, "--fail-on-widen")
        assert (status, "nothing would change" in text) == (0, True)

        strict = await shell.report(write(tmp_path / "strict", NO), "--fail-on-widen")
        assert strict["changes"] == {"allowed_to_denied": 3}
        example = strict["examples"]["allowed_to_denied"][0]
        assert [reason["code"] for reason in example["after"]["reasons"]] == ["no"]

        # Beyond the rule nothing is allowed, whatever a bundle says; the target's floor stays.
        lax = await shell.report(write(tmp_path / "lax", ALLOWS))
        assert lax["changes"] == {"denied_to_allowed": 1, "ttl_shorter": 3}
        assert lax["examples"]["denied_to_allowed"][0]["request_id"] == long.id
        status, text = await shell.replay(tmp_path / "lax", "--fail-on-widen")
        assert status == 1
        assert long.id in text
        assert "ttl_too_long" in text

        other = await shell.report(write(tmp_path / "other", LONG))
        assert other["changes"] == {"denied_to_approval": 1, "approval_added": 3}
        assert other["widens"]

        # Nothing is decided any more: what a second ago was the last decision is left out, and all before it.
        last_ms = (await world.records(CREDENTIAL_DECISION))[-1].appended_at_ms
        await world.until(lambda: time.time() * 1000 > last_ms + 1000 or None, "a second to pass")
        recent = await shell.report(OWN_BUNDLE, "--since", "1s")
        assert (same["read"], recent["read"]) == (8, 0)
        status, _ = await shell.replay(write(tmp_path / "broken", "decision := {\n"))
        assert status == 1


async def test_incomparable_decision_is_skipped_with_the_reason(world: World, shell: Shell, tmp_path: Path):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        asked = [await office.ask(READ) for _ in range(4)]
        decision = await office.final(asked[0])
        assert decision.input is not None
        policy = Party("policy", world.key("policy"))

        async def recorded(by: SigningKey = policy.key, **fields: Any) -> None:
            id = f"{len(await world.records(CREDENTIAL_DECISION)):012d}"
            given = {**decision.model_dump(exclude={"iss", "aud", "iat", "jti"}), **fields}
            given["request_id"] = f"11111111-1111-4111-8111-{id}"
            claims = world.claims(CredentialDecision, policy, **given)
            sent = await world.send(CREDENTIAL_DECISION, office.bot.name, sign(claims, by))
            await world.consume_until(CREDENTIAL_DECISION, lambda r: r.offset >= sent.offset)

        # By an older version, whose input had no floors; by one that wrote them otherwise; by nobody of authority.
        older = {name: value for name, value in decision.input.items() if name != "floors"}
        await recorded(input=older)
        agent = {name: value for name, value in decision.input["agent"].items() if name != "registered_at_s"}
        await recorded(input={**decision.input, "agent": agent})
        await recorded(input={**decision.input, "floors": "none"})
        await recorded(by=SigningKey.generate(policy.id))
        await world.send(CREDENTIAL_DECISION, office.bot.name, b"\x00garbage")
        await recorded(outcome="denied", ttl_s=None, reasons=(Reason(code="policy_timeout", message="late"),))
        await recorded(outcome="denied", ttl_s=None, reasons=(Reason(code="approval_stale", message="old"),))
        await recorded(outcome="denied", ttl_s=None, reasons=(Reason(code="withdrawn", message="given up"),))
        for request in asked:
            await office.final(request)

        rules = '\nfloored if "sponsor" in input.floors\n\nold if input.agent.registered_at_s > 0\n'
        needs = write(tmp_path / "needs", ALLOWS + rules)
        report = await shell.report(needs)
        assert report["skipped"] == {
            "input_incomplete": 2,
            "input_unreadable": 1,
            "signature_not_policys": 2,
            "engine_failed": 1,
            "answered_by_people": 1,
            "withdrawn": 1,
        }
        assert report["missing_fields"] == {"floors": 1, "agent.registered_at_s": 1}
        assert report["compared"] == 4
        _, text = await shell.replay(needs)
        assert "`floors`" in text


async def test_a_bundle_that_explodes_denies_and_the_replay_goes_on(
    world: World, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RINGFENCE_POLICY_EVALUATION_TIMEOUT_MS", "3000")
    rules = ALLOWS.replace("\n", ' if input.request.reason != "time"\n\n') + (
        'decision := {"allow": true, "deny": [], "approvals": [], "max_ttl_s": count(slow)} if {\n'
        '\tinput.request.reason == "time"\n'
        "\tslow := [i | some i in numbers.range(1, 1000); count(numbers.range(i, 10000000)) > 0]\n}\n"
    )
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        for reason in ("time", "fine", "fine"):
            await office.final(await office.ask(READ, reason=reason))
        report = await shell.report(write(tmp_path, rules))
        assert report["changes"] == {"allowed_to_denied": 1, "ttl_shorter": 2}
        (example,) = report["examples"]["allowed_to_denied"]
        assert [reason["code"] for reason in example["after"]["reasons"]] == ["policy_timeout"]


async def test_required_input_fields_are_the_ones_policy_writes(world: World):
    async with world.running("registry", "policy"):
        office = await PolicyBench.open(world)
        decision = await office.final(await office.ask(READ))
        assert decision.input is not None
        parts = {field for field in INPUT_FIELDS if "." not in field}
        assert decision.input.keys() == parts | {"sponsor"}
        for field in INPUT_FIELDS - parts:
            part, name = field.split(".")
            assert name in decision.input[part]
