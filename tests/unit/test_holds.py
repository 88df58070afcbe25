"""Holds: what rests on a compromised key, who may report one and review it, and what that takes away."""

from __future__ import annotations

from typing import Any

import pytest

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.ids import digest, message_id
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.codes import Code
from ringfence.messages.registry import (
    AgentRenewKey,
    AgentResume,
    AgentRotateKey,
    AgentSetCeiling,
    AgentSuspend,
    Hold,
    ModelLimits,
    UserEndKey,
    UserReviewCompromise,
)
from ringfence.model.lifecycle import hold_of
from ringfence.model.records.key_compromise import KeyCompromise
from tests.support.in_memory_registry import TD, InMemoryRegistry, permission
from tests.support.user_keys import add_key, end_key

WEB, DB = permission("env/web"), permission("env/db")


class Organisation(InMemoryRegistry):
    """olga, otto and oona are operators by the root; sam and suzy are sponsors by otto."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("olga", "otto", "oona"):
            self.give(self.user_set("root", name, ["operator"]), self.root)
        for name in ("sam", "suzy"):
            self.give(self.user_set("otto", name, ["sponsor"], entitlements=self.entitlements(WEB, DB)))
        self.give(self.register("sam", "bot", "sam", ceiling=(WEB,)))
        self.give(self.target_set("otto", "staging"))
        self.clock.ms += 60_000
        self.since_ms = self.clock.ms

    def resting(self, user: str = "olga") -> dict[tuple[str, str], tuple[str, ...]]:
        found = KeyCompromise(self.directory, user, self.key(user).kid, self.since_ms)
        return {(one.held.kind, one.held.id): one.held.parts for one in found.resting(self.clock.ms / 1000)}

    def report(
        self, by: str = "otto", user: str = "olga", key: SigningKey | None = None, **fields: Any
    ) -> UserEndKey:
        kid = self.key(user).kid
        found = KeyCompromise(self.directory, user, kid, self.since_ms).resting(self.clock.ms / 1000)
        holds = tuple(one.held for one in found) or None
        given = {"compromised": True, "since_ms": self.since_ms, "holds": holds}
        command = end_key(self, by, user, kid, **{**given, **fields})
        self.give(command, self.root if by == "root" else key)
        return command

    def review(self, by: str, report: UserEndKey, outcome: str, key: SigningKey | None = None) -> None:
        command = self.claims(
            UserReviewCompromise, by, user_id=report.user_id, report=message_id(report.iss, report.jti),
            report_digest=digest(self.signed(report, key)), outcome=outcome, reason="looked at it",
        )  # fmt: skip
        self.give(command, self.root if by == "root" else None)

    def held(self, kind: Any, id: str) -> Hold | None:
        entry = self.directory.entry(kind, id)
        assert entry is not None
        return hold_of(entry.state)

    def ceiling(self, by: str, *scope: Any, agent: str = "bot") -> None:
        self.give(self.claims(AgentSetCeiling, by, agent_id=agent, ceiling=scope))


@pytest.fixture
def org() -> Organisation:
    return Organisation()


def refusal(call: Any) -> str | None:
    try:
        call()
    except RingfenceError as error:
        return str(error.code)
    return None


# --- what rests on a key ---


def test_users_made_by_stolen_key_and_what_they_made_rest_on_it(org: Organisation) -> None:
    org.give(org.user_set("olga", "o2", ["operator"]))
    org.give(org.user_set("o2", "o3", ["operator"]))
    org.give(org.target_set("o3", "vault"))
    kinds = org.resting()
    assert set(kinds) == {("user", "o2"), ("user", "o3"), ("target", "vault")}
    assert kinds["user", "o3"] == (f"key:{org.key('o3').kid}", "roles")


def test_first_key_of_directory_user_by_stolen_key_rests_on_it(org: Organisation) -> None:
    org.give(org.user_set("otto", "dora", ["sponsor"], keys=()))
    org.since_ms = org.clock.ms
    key = SigningKey.generate(f"spiffe://{TD}/user/dora")
    org.give(add_key(org, "olga", "dora", key))
    assert org.resting() == {("user", "dora"): (f"key:{key.kid}",)}


def test_key_of_agent_by_stolen_key_of_sponsor_rests_on_it(org: Organisation) -> None:
    key = SigningKey.generate(f"spiffe://{TD}/agent/bot")
    rotate = org.claims(AgentRotateKey, "sam", agent_id="bot", key=org.key_record(key), overlap_s=3600)
    org.give(rotate)
    assert org.resting("sam") == {("agent", "bot"): (f"key:{key.kid}",)}
    org.report("otto", "sam")
    assert org.directory.agent_key(key.id, key.kid, org.clock.ms / 1000) is None
    own = org.key("bot", "agent")
    assert org.directory.agent_key(own.id, own.kid, org.clock.ms / 1000) is not None


def test_renewal_of_key_by_stolen_key_rests_on_it(org: Organisation) -> None:
    key, renewed, last = (SigningKey.generate(f"spiffe://{TD}/agent/bot") for _ in range(3))
    org.give(org.claims(AgentRotateKey, "sam", agent_id="bot", key=org.key_record(key), overlap_s=0))
    org.give(org.claims(AgentRenewKey, "sam", iss=key.id, agent_id="bot", key=renewed.public), key)
    assert f"key:{renewed.kid}" in org.resting("sam")["agent", "bot"]
    org.report("otto", "sam")
    assert org.directory.agent_key(renewed.id, renewed.kid, org.clock.ms / 1000) is None
    org.clock.ms += 86_400_000
    with pytest.raises(RingfenceError):
        org.give(org.claims(AgentRenewKey, "sam", iss=key.id, agent_id="bot", key=last.public), renewed)


def test_permission_of_thief_that_honest_command_repeats_rests_on_thief(org: Organisation) -> None:
    org.ceiling("olga", WEB, DB)
    org.ceiling("sam", DB, WEB, permission("env/cache"))
    assert org.resting() == {("agent", "bot"): ("ceiling",)}


def test_permission_that_thief_only_repeats_or_narrows_rests_on_nobody(org: Organisation) -> None:
    org.ceiling("sam", WEB, DB)
    org.ceiling("olga", WEB, DB)
    org.ceiling("olga", WEB)
    org.give(org.claims(AgentSuspend, "olga", agent_id="bot", reason="x"))
    assert org.resting() == {}


@pytest.mark.parametrize("limits", [None, ModelLimits(tokens=2)], ids=["removed", "raised"])
def test_limits_changed_by_thief_make_the_whole_ceiling_theirs(
    org: Organisation, limits: ModelLimits | None
) -> None:
    org.give(org.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=(WEB,), limits=ModelLimits(tokens=1)))
    org.give(org.claims(AgentSetCeiling, "olga", agent_id="bot", ceiling=(WEB,), limits=limits))
    assert org.resting() == {("agent", "bot"): ("ceiling",)}


def test_permission_given_again_after_it_was_taken_rests_on_its_last_giver(org: Organisation) -> None:
    org.ceiling("sam", WEB, DB)
    org.ceiling("sam", WEB)
    org.ceiling("olga", WEB, DB)
    assert org.resting() == {("agent", "bot"): ("ceiling",)}


def test_command_of_the_root_rests_on_nobody(org: Organisation) -> None:
    org.give(org.user_set("olga", "o2", ["operator"]))
    org.give(org.user_set("root", "o2", ["operator", "auditor"]), org.root)
    assert org.resting() == {}


def test_work_given_before_the_time_rests_on_nobody(org: Organisation) -> None:
    org.give(org.user_set("olga", "o2", ["operator"]))
    org.since_ms = org.clock.ms
    org.give(org.assign("sam", "bot"))
    assert org.resting() == {}
    assert len(org.resting("sam")) == 1


# --- holds ---


def test_held_ceiling_is_refused_until_somebody_entitled_sets_it_anew(org: Organisation) -> None:
    org.ceiling("olga", WEB, DB)
    org.report()
    hold = org.held("agent", "bot")
    assert hold is not None
    assert (hold.parts, hold.status, hold.by) == (("ceiling",), "held", "otto")
    org.ceiling("sam", WEB)
    assert org.held("agent", "bot") is None
    assert org.resting() == {}


@pytest.mark.parametrize(
    ("code", "act"),
    [
        pytest.param(
            Code.RESTS_ON_COMPROMISED, lambda org, own: org.give(org.user_set("o2", "o9"), own), id="grants"
        ),
        pytest.param(Code.RESTS_ON_COMPROMISED, lambda org, own: org.report("o2", "otto", own), id="reports"),
    ],
)
def test_held_operator_is_refused(org: Organisation, code: Code, act: Any) -> None:
    org.give(org.user_set("olga", "o2", ["operator"]))
    own = SigningKey.generate(f"spiffe://{TD}/user/o2")
    org.give(org.user_set("root", "o2", ["operator"], keys=(org.key_record(own),)), org.root)
    org.give(org.user_set("olga", "o2", ["operator", "sponsor"], keys=(org.key_record(own),)))
    org.report()
    assert org.held("user", "o2") is not None
    assert refusal(lambda: act(org, own)) == code


def test_record_that_does_not_rest_on_the_key_is_not_held(org: Organisation) -> None:
    org.ceiling("olga", WEB, DB)
    (bot,) = KeyCompromise(org.directory, "olga", org.key("olga").kid, org.since_ms).resting(0)
    suzy = bot.held.model_copy(update={"kind": "user", "id": "suzy", "parts": ("roles",)})
    org.report(holds=(bot.held, suzy))
    assert org.held("agent", "bot") is not None
    assert org.held("user", "suzy") is None


def test_report_by_no_operator_holds_nothing(org: Organisation) -> None:
    org.ceiling("sam", WEB, DB)
    assert refusal(lambda: org.report("sam", "sam")) == Code.NOT_OPERATOR
    assert org.held("agent", "bot") is None


def test_report_of_the_root_is_confirmed_at_once(org: Organisation) -> None:
    org.ceiling("olga", WEB, DB)
    org.report("root")
    hold = org.held("agent", "bot")
    assert hold is not None
    assert hold.status == "void"


# --- reviews ---


@pytest.mark.parametrize("by", ["otto", "olga", "sam", "o2"])
def test_review_by_reporter_accused_or_who_rests_on_them_is_refused(org: Organisation, by: str) -> None:
    org.give(org.user_set("otto", "o2", ["operator"]))
    org.ceiling("olga", WEB, DB)
    report = org.report()
    assert refusal(lambda: org.review(by, report, "void")) is not None
    hold = org.held("agent", "bot")
    assert hold is not None
    assert hold.status == "held"


def test_review_by_operator_whose_role_alone_rests_on_reporter_is_refused(org: Organisation) -> None:
    org.give(org.user_set("root", "o2", []), org.root)
    org.give(org.user_set("otto", "o2", ["operator"]))
    report = org.report()
    assert refusal(lambda: org.review("o2", report, "void")) == Code.ENDORSEMENT_NOT_APART


def test_review_in_the_second_in_which_the_root_gave_the_key_is_accepted(org: Organisation) -> None:
    org.ceiling("olga", WEB, DB)
    report = org.report()
    org.clock.ms += 1500 - org.clock.ms % 1000
    org.give(org.user_set("root", "o2", ["operator"]), org.root, passing_ms=1)
    org.review("o2", report, "void")
    hold = org.held("agent", "bot")
    assert hold is not None
    assert hold.status == "void"


def test_review_of_unknown_report_is_refused(org: Organisation) -> None:
    report = org.report()
    other = report.model_copy(update={"reason": "another"})
    assert refusal(lambda: org.review("oona", other, "void")) == Code.REPORT_UNKNOWN


def test_void_revives_no_suspension_ceiling_or_key(org: Organisation) -> None:
    org.ceiling("sam", WEB, DB)
    org.give(org.claims(AgentSuspend, "olga", agent_id="bot", reason="x"))
    org.ceiling("olga", DB, permission("env/cache"))
    org.give(org.claims(AgentResume, "olga", agent_id="bot", reason="x"))
    org.give(org.claims(AgentSuspend, "olga", agent_id="bot", reason="x"))
    before = org.directory.agent("bot")
    report = org.report()
    org.review("oona", report, "void")
    after = org.directory.agent("bot")
    assert before is not None
    assert after is not None
    assert after.state.model_copy(update={"holds": ()}) == before.state
    (hold,) = after.state.holds
    assert (hold.status, hold.parts) == ("void", ("ceiling",))
    assert org.directory.user_key(org.key("olga").id, org.key("olga").kid, org.clock.ms / 1000) is None


def test_lift_frees_what_was_held_and_revives_no_key(org: Organisation) -> None:
    org.ceiling("olga", WEB, DB)
    org.give(org.user_set("olga", "o2", ["operator"]))
    report = org.report()
    assert refusal(lambda: org.give(org.user_set("o2", "o9"))) == Code.RESTS_ON_COMPROMISED
    org.review("oona", report, "lift")
    assert org.held("agent", "bot") is None
    org.give(org.user_set("o2", "o9"))
    assert refusal(lambda: org.give(org.user_set("olga", "o8"))) is not None


# --- who may report ---


def test_report_of_more_than_thirty_days_acts_with_the_second_report(org: Organisation) -> None:
    org.ceiling("olga", WEB, DB)
    org.clock.ms += 31 * 86_400_000
    org.report("otto")
    assert org.held("agent", "bot") is None
    org.give(org.user_set("olga", "o9"))  # nothing happened yet
    org.report("otto")  # the same operator is no second one
    assert org.held("agent", "bot") is None
    org.report("oona")
    assert org.held("agent", "bot") is not None
    assert refusal(lambda: org.give(org.user_set("olga", "o8"))) is not None


def test_thief_who_reports_honest_operator_first_is_answered_by_that_key_alone(org: Organisation) -> None:
    org.ceiling("olga", WEB, DB)
    thief = org.report("olga", "otto")
    assert refusal(lambda: org.give(org.user_set("otto", "o9"))) is not None
    assert refusal(lambda: org.report("otto", "oona")) is not None
    honest = org.report("otto", "olga")
    assert org.held("agent", "bot") is not None
    for by, report in (("otto", thief), ("olga", honest)):
        assert refusal(lambda by=by, report=report: org.review(by, report, "lift")) is not None
    org.review("oona", thief, "lift")
    org.review("oona", honest, "void")
    hold = org.held("agent", "bot")
    assert hold is not None
    assert hold.status == "void"


def test_accused_key_answers_no_more_once_the_report_is_confirmed(org: Organisation) -> None:
    report = org.report("otto", "olga")
    org.review("oona", report, "void")
    assert refusal(lambda: org.report("olga", "otto")) is not None


def test_two_keys_added_one_after_the_other_end_with_the_first(org: Organisation) -> None:
    second, third = (SigningKey.generate(f"spiffe://{TD}/user/olga") for _ in range(2))
    org.give(add_key(org, "olga", "olga", second))
    org.give(add_key(org, "olga", "olga", third), second)
    org.give(org.user_set("olga", "o2", ["operator"]), third)
    report = org.report()
    entry = org.directory.user("olga")
    assert entry is not None
    assert set(entry.state.compromised or ()) == {org.key("olga").kid, second.kid, third.kid}
    assert org.held("user", "o2") is not None
    assert report.holds is not None
