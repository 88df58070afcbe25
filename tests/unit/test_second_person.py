"""Second person: who may second a widening command, what a reader believes, and what one key alone obtains: nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.codes import Code, ReceivedCode
from ringfence.messages.registry import (
    MAX_PROPOSALS,
    AgentActivate,
    AgentRenewKey,
    AgentResume,
    AgentRotateKey,
    AgentSetCeiling,
    AgentState,
    AgentSuspend,
    Delegation,
    EmbeddedCommand,
    GroupDelegation,
    ProposalStatus,
    ProvisionerSet,
    Provisioning,
    SecondedCommand,
    SecondSignature,
    UserDisable,
    UserSet,
)
from ringfence.messages.trust import SecondPersonMode
from ringfence.model.lifecycle import Actor, CommandRefusedError, Person, Signatures, check_second
from ringfence.model.records.key_compromise import KeyCompromise
from ringfence.model.verdict import ALLOWED, Refused, Verdict
from ringfence.registry.proposals import Proposals, ProposalTable
from tests.support.dual_control import DAY_MS, DualControl, Proposed, waits
from tests.support.in_memory_registry import START_MS, TD, InMemoryRegistry, permission
from tests.support.user_keys import add_key, end_key, new_key, new_passkey

WEB, DB = permission("env/web"), permission("env/db")
WEEK_MS = 7 * DAY_MS


@pytest.fixture
def org() -> DualControl:
    return DualControl()


def ceiling(org: InMemoryRegistry, by: str = "olga", *scope: Any) -> AgentSetCeiling:
    return org.claims(AgentSetCeiling, by, agent_id="bot", ceiling=scope or (WEB, DB))


def code_of(org: DualControl, call: Callable[[], object]) -> str:
    return org.refusal(call) or ""


# --- what waits, and what does not ---


def test_widening_command_of_one_person_changes_nothing(org: DualControl) -> None:
    before = org.directory.version
    for command in (
        ceiling(org, "sam"),
        org.user_set("olga", "uma"),
        org.target_set("olga", "platform"),
        org.register("sam", "robot", "sam"),
        org.claims(AgentRotateKey, "sam", agent_id="bot", key=org.key_record(org.key("bot2", "agent"))),
        add_key(org, "olga", "sam", new_key("sam")),
    ):
        assert waits(partial(org.give, command)), command.typ
    assert org.directory.version == before


def test_command_takes_effect_with_second_signature_and_every_reader_believes_it(org: DualControl) -> None:
    change = org.seconded("otto", ceiling(org))
    assert isinstance(change.state, AgentState)
    assert change.state.ceiling == (WEB, DB)
    assert change.commands[-1].second is not None
    reader = org.reader()
    for kind, id in (("user", "olga"), ("user", "otto"), ("user", "sam"), ("agent", "bot")):
        record = org.directory.entry(kind, id)  # type: ignore[arg-type]
        assert record is not None
        assert org.admit(record.compact.decode(), reader) is None
    entry = reader.agent("bot")
    assert entry is not None
    assert entry.state.ceiling == (WEB, DB)


def test_narrowing_and_work_within_the_limits_land_at_once(org: DualControl) -> None:
    org.seconded("otto", ceiling(org))
    org.give(ceiling(org, "sam", WEB))
    org.give(org.claims(AgentSuspend, "olga", agent_id="bot", reason="x"))
    assert waits(lambda: org.give(org.claims(AgentResume, "olga", agent_id="bot", reason="x")))
    org.seconded("otto", org.claims(AgentResume, "olga", agent_id="bot", reason="x"))
    org.give(org.assign("sam", "bot", on_behalf_of="sam"))
    org.clock.ms += DAY_MS
    renewed = SigningKey.generate(f"spiffe://{TD}/agent/bot")
    org.give(
        org.claims(AgentRenewKey, "sam", iss=renewed.id, agent_id="bot", key=renewed.public),
        org.key("bot", "agent"),
    )
    org.give(add_key(org, "sam", "sam", new_key("sam")))
    org.give(org.claims(UserDisable, "olga", user_id="suzy", reason="x"))


def test_activation_lands_at_once(org: DualControl) -> None:
    org.seconded("otto", org.register("olga", "robot", "sam", inactive=True))
    org.give(org.claims(AgentActivate, "sam", agent_id="robot"))


def test_root_needs_no_second_person(org: DualControl) -> None:
    org.give(org.user_set("root", "uma", ["operator"]))
    org.give(ceiling(org, "root"))


def test_users_of_a_directory_need_no_proposal_each(org: DualControl) -> None:
    delegation = Delegation(
        source="scim", groups=(GroupDelegation(group="Leads", roles=("sponsor",), scope=(WEB,)),)
    )
    hr = org.claims(
        ProvisionerSet, "olga", provisioner_id="hr", name="HR", keys=(org.key_record(org.key("hr")),),
        delegation=delegation,
    )  # fmt: skip
    org.seconded("otto", hr)
    for number in range(10_000):
        org.give(
            org.user_set(
                "hr", f"user{number}", ["sponsor"], keys=(), provisioned=Provisioning(groups=("Leads",)),
                entitlements=org.entitlements(WEB).model_copy(update={"source": "scim"}),
            ),
            passing_ms=1,
        )  # fmt: skip
    assert org.directory.user("user9999") is not None


def directory_of_operators(org: DualControl, by: str) -> ProvisionerSet:
    """The command that lets a directory make operators."""
    return org.claims(
        ProvisionerSet, by, provisioner_id="hr", name="HR", keys=(org.key_record(org.key("hr")),),
        delegation=Delegation(source="scim", groups=(GroupDelegation(group="Ops", roles=("operator",)),)),
    )  # fmt: skip


def test_narrower_delegation_lands_at_once(org: DualControl) -> None:
    """One operator takes groups away from a directory, also if its key is stolen and a second operator is asleep."""
    org.give(directory_of_operators(org, "root"))
    narrower = org.claims(
        ProvisionerSet, "otto", provisioner_id="hr", name="HR", keys=(org.key_record(org.key("hr")),),
        delegation=Delegation(source="scim", groups=()),
    )  # fmt: skip
    assert narrower.iat > START_MS // 1000
    org.give(narrower)
    hr = org.directory.user("hr")
    assert hr is not None
    assert hr.state.delegation is not None
    assert hr.state.delegation.groups == ()


def test_root_lets_a_directory_make_operators(org: DualControl) -> None:
    org.give(directory_of_operators(org, "root"))


# --- the mode ---


class Later(InMemoryRegistry):
    second_person = (
        SecondPersonMode(mode="required", not_before=START_MS // 1000 + 3600),
        SecondPersonMode(mode="reported", not_before=START_MS // 1000 + 7200),
    )


def test_mode_at_the_append_applies() -> None:
    org = Later()
    org.organisation()
    org.clock.ms = START_MS + 3600_000
    assert waits(lambda: org.give(org.user_set("olga", "una")))
    org.clock.ms = START_MS + 7200_000
    org.give(org.user_set("olga", "una"))


def test_without_modes_one_person_is_enough() -> None:
    org = InMemoryRegistry()
    org.organisation()
    assert org.trust.second_person(START_MS / 1000) == "reported"


def test_mode_with_unknown_field_is_read_as_required() -> None:
    class Unknown(InMemoryRegistry):
        second_person = (
            SecondPersonMode.model_validate({"mode": "reported", "not_before": 0, "unless": "x"}),
        )

    assert Unknown().trust.second_person(START_MS / 1000) == "required"


# --- who may second ---


def olgas_puppet(org: DualControl) -> None:
    """A user whom olga and oona made a month ago, and to whom olga alone gave nothing: an operator."""
    org.seconded("oona", org.user_set("olga", "pia", ["operator"]))


def test_author_cannot_second_even_with_another_key(org: DualControl) -> None:
    own = new_key("olga")
    org.give(add_key(org, "olga", "olga", own))
    proposed = org.propose(ceiling(org))
    assert code_of(org, lambda: org.second("olga", proposed)) == Code.SECOND_IS_AUTHOR
    assert code_of(org, lambda: org.second("olga", proposed, own)) == Code.SECOND_IS_AUTHOR


def test_sponsor_seconds_ceilings_of_others_only(org: DualControl) -> None:
    proposed = org.propose(ceiling(org))
    assert code_of(org, lambda: org.second("sam", proposed)) == Code.SECOND_NOT_ENTITLED
    org.second("suzy", proposed)
    user = org.propose(org.user_set("olga", "uma"))
    assert code_of(org, lambda: org.second("suzy", user)) == Code.SECOND_NOT_ENTITLED


def test_former_sponsor_and_user_of_the_agent_cannot_second(org: DualControl) -> None:
    org.seconded("otto", org.transfer("olga", "bot", "suzy"))
    org.give(org.user_set("root", "uma", ["sponsor"]))
    org.give(org.assign("uma", "bot"))
    proposed = org.propose(ceiling(org))
    for by in ("sam", "suzy", "uma"):
        assert code_of(org, partial(org.second, by, proposed)) == Code.SECOND_NOT_ENTITLED
    org.second("otto", proposed)


def test_user_whom_it_is_about_cannot_second(org: DualControl) -> None:
    proposed = org.propose(org.user_set("olga", "otto", ["operator", "sponsor"]))
    assert code_of(org, lambda: org.second("otto", proposed)) == Code.SECOND_NOT_ENTITLED


def test_user_that_two_made_rests_on_both_for_a_week(org: DualControl) -> None:
    olgas_puppet(org)
    org.clock.ms += DAY_MS
    for author in ("olga", "oona"):
        proposed = org.propose(ceiling(org, author))
        assert code_of(org, partial(org.second, "pia", proposed)) == Code.SECOND_NOT_APART
    org.second("pia", org.propose(ceiling(org, "otto", WEB)))
    org.clock.ms += WEEK_MS
    org.second("pia", org.propose(ceiling(org, "olga")))


class Puppets(DualControl):
    """Before two people were required, olga made p1, p1 made p2, p2 made p3, all of them operators; p2 gave a key to
    dora, whom the root had made.
    """

    second_person = (SecondPersonMode(mode="required", not_before=START_MS // 1000 + 3600),)

    def __init__(self) -> None:
        super().__init__()
        for by, name in (("olga", "p1"), ("p1", "p2"), ("p2", "p3")):
            self.give(self.user_set(by, name, ["operator"]))
        self.give(self.user_set("root", "dora", ["operator"]))
        self.lent = new_key("dora")
        self.give(add_key(self, "p2", "dora", self.lent))
        self.clock.ms = START_MS + 30 * DAY_MS


@pytest.mark.parametrize(
    ("author", "second"),
    [
        ("olga", "p1"),
        ("olga", "p2"),
        ("olga", "p3"),
        ("p3", "olga"),
        ("p1", "p3"),
        ("p2", "p3"),
        ("olga", "dora"),
    ],
)
def test_puppets_at_any_depth_cannot_second(author: str, second: str) -> None:
    org = Puppets()
    proposed = org.propose(ceiling(org, author))
    assert code_of(org, lambda: org.second(second, proposed)) == Code.SECOND_NOT_APART
    org.second("otto", proposed)


def test_two_puppets_of_one_person_cannot_second_each_other() -> None:
    org = Puppets()
    org.clock.ms = START_MS + 1_000_000
    org.give(org.user_set("olga", "q1", ["operator"]))
    org.clock.ms = START_MS + 30 * DAY_MS
    proposed = org.propose(ceiling(org, "p1"))
    assert code_of(org, lambda: org.second("q1", proposed)) == Code.SECOND_NOT_APART


def test_users_of_one_directory_cannot_second_each_other(org: DualControl) -> None:
    org.give(directory_of_operators(org, "root"))
    for name in ("ada", "bea"):
        org.give(
            org.user_set(
                "hr", name, ["operator"], keys=(), provisioned=Provisioning(groups=("Ops",)),
                entitlements=org.entitlements().model_copy(update={"source": "scim"}),
            )
        )  # fmt: skip
        org.seconded("otto", add_key(org, "olga", name, org.key(name)))
    org.clock.ms += WEEK_MS + DAY_MS
    proposed = org.propose(ceiling(org, "ada"))
    assert code_of(org, lambda: org.second("bea", proposed)) == Code.SECOND_NOT_APART
    org.second("otto", proposed)


def test_root_makes_a_puppet_independent() -> None:
    org = Puppets()
    org.give(org.user_set("root", "p1", ["operator"], entitlements=org.entitlements(WEB)))
    org.second("p1", org.propose(ceiling(org, "olga")))


def test_key_that_somebody_else_gave_proposes_and_seconds_nothing_for_a_day(org: DualControl) -> None:
    lent = new_key("oona")
    org.seconded("otto", add_key(org, "olga", "oona", lent))
    child = new_key("oona")
    org.give(add_key(org, "oona", "oona", child), lent)
    org.give(org.user_set("root", "omar", ["operator"]))
    proposed = org.propose(ceiling(org, "omar"))
    for key in (lent, child):
        assert code_of(org, partial(org.propose, ceiling(org, "oona"), key)) == Code.KEY_TOO_NEW
        assert code_of(org, partial(org.second, "oona", proposed, key)) == Code.KEY_TOO_NEW
    org.clock.ms += DAY_MS
    org.second("oona", org.propose(ceiling(org, "omar", DB)), child)


def test_passkeys_propose_and_second_a_ceiling(org: DualControl) -> None:
    passkeys = {name: new_passkey(name) for name in ("olga", "otto")}
    for name, passkey in passkeys.items():
        org.give(add_passkey(org, name, passkey))
    org.second("otto", org.propose(ceiling(org, "olga"), passkeys["olga"]), passkeys["otto"])


def test_passkey_seconds_what_a_key_file_proposed_of_users_and_targets(org: DualControl) -> None:
    passkey = new_passkey("otto")
    org.give(add_passkey(org, "otto", passkey))
    key = add_key(org, "olga", "sam", new_key("sam"))
    for command in (org.user_set("olga", "uma"), org.target_set("olga", "platform"), key):
        org.second("otto", org.propose(command), passkey)


def by_passkeys(org: DualControl, command: Any) -> Verdict:
    """The verdict on a command of olga with a second signature of otto, both by passkeys."""
    olga, otto = (Person(Actor(name, frozenset({"operator"}), by_passkey=True)) for name in ("olga", "otto"))
    return check_second(command, Signatures(olga, org.clock.ms, otto, org.clock.ms), ())


def test_two_passkeys_change_agents_only(org: DualControl) -> None:
    """No passkey signs the commands of the others. This holds also for a command that one would sign some day."""
    delegation = directory_of_operators(org, "olga")
    for command in (org.user_set("olga", "uma"), org.target_set("olga", "platform"), delegation):
        verdict = by_passkeys(org, command)
        assert isinstance(verdict, Refused)
        assert verdict.reason.code == Code.SECOND_BY_PASSKEY
        assert type(command).passkey_use is None
    assert by_passkeys(org, ceiling(org)) is ALLOWED


def add_passkey(org: DualControl, user: str, passkey: Any) -> Any:
    record = passkey.record(START_MS // 1000 + 10 * 365 * 86_400)
    return add_key(org, user, user, passkey, key=record)


# --- between proposal and second ---


def test_renewal_of_the_agents_own_key_does_not_count_as_change(org: DualControl) -> None:
    org.clock.ms += DAY_MS
    proposed = org.propose(ceiling(org))
    renewed = SigningKey.generate(f"spiffe://{TD}/agent/bot")
    org.give(
        org.claims(AgentRenewKey, "sam", iss=renewed.id, agent_id="bot", key=renewed.public),
        org.key("bot", "agent"),
    )
    org.second("otto", proposed)


def renamed(org: DualControl, user: str, by: str = "root", **fields: Any) -> UserSet:
    """A user set anew as they are; `fields` differ."""
    entry = org.directory.user(user)
    assert entry is not None
    state = entry.state
    same = {"name": state.name, "roles": state.roles, "keys": state.keys, "entitlements": state.entitlements}
    return org.claims(UserSet, by, user_id=user, **{**same, **fields})


def minor_change(org: DualControl, what: str) -> object:
    """A change of sam that people do not decide on."""
    if what == "key":
        return org.give(add_key(org, "sam", "sam", new_key("sam")))
    if what == "name":
        return org.give(renamed(org, "sam", name="Samuel"))
    return org.give(renamed(org, "sam", entitlements=org.entitlements(as_of=org.clock.ms // 1000)))


@pytest.mark.parametrize("what", ["key", "name", "as_of"])
def test_minor_change_of_the_user_does_not_count_as_change(org: DualControl, what: str) -> None:
    proposed = org.propose(org.user_set("olga", "sam", ["sponsor", "auditor"]))
    minor_change(org, what)
    entry = org.directory.user("sam")
    assert entry is not None
    assert (entry.revision, entry.minor, entry.named_revision) == (2, 1, 1)
    org.second("otto", proposed)
    assert entry is not None
    assert org.admit((org.directory.user("sam") or entry).compact.decode(), org_reader(org)) is None


def org_reader(org: DualControl) -> Any:
    """A reader that knows everybody but sam."""
    reader = org.reader()
    for user in ("olga", "otto", "oona"):
        record = org.directory.user(user)
        assert record is not None
        assert org.admit(record.compact.decode(), reader) is None
    return reader


@pytest.mark.parametrize(
    "fields",
    [{"roles": ("sponsor", "operator")}, {"keys": ()}, {"entitlements": None}],
    ids=lambda f: next(iter(f)),
)
def test_other_change_of_the_user_counts_as_change(org: DualControl, fields: dict[str, Any]) -> None:
    proposed = org.propose(org.user_set("olga", "sam", ["sponsor", "auditor"]))
    if "entitlements" in fields:
        fields = {"entitlements": org.entitlements(WEB)}
    org.give(renamed(org, "sam", **fields))
    assert code_of(org, lambda: org.second("otto", proposed)) == Code.SUBJECT_CHANGED


def test_reader_believes_a_minor_change_of_a_user_whose_rights_were_narrowed_before(org: DualControl) -> None:
    """A directory narrows the entitlements, and then renews their date: without the command before, the second would
    look to readers like the first.
    """
    delegation = Delegation(source="scim", groups=(GroupDelegation(group="Leads", scope=(WEB, DB)),))
    org.seconded(
        "otto",
        org.claims(
            ProvisionerSet, "olga", provisioner_id="hr", name="HR", keys=(org.key_record(org.key("hr")),),
            delegation=delegation,
        ),
    )  # fmt: skip

    def set_by_hr(*scope: Any) -> None:
        entitlements = org.entitlements(*scope, as_of=org.clock.ms // 1000)
        org.give(
            org.user_set(
                "hr", "uma", keys=(), provisioned=Provisioning(groups=("Leads",)),
                entitlements=entitlements.model_copy(update={"source": "scim"}),
            )
        )  # fmt: skip

    set_by_hr(WEB, DB)
    set_by_hr(WEB)
    proposed = org.propose(add_key(org, "olga", "uma", new_key("uma")))
    set_by_hr(WEB)
    entry = org.directory.user("uma")
    assert entry is not None
    assert entry.minor == 1
    org.second("otto", proposed)


def test_reader_refuses_a_record_that_counts_another_change_as_minor(org: DualControl) -> None:
    entry = org.directory.user("sam")
    assert entry is not None
    reader = org_reader(org)
    assert org.admit(entry.compact.decode(), reader) is None
    org.give(renamed(org, "sam", roles=("sponsor", "operator")))
    changed = org.directory.user("sam")
    assert changed is not None
    forged = org.sign_record(changed.state, changed.record.commands, changed.revision, minor=1)
    assert (org.admit(forged, reader) or "").startswith(Code.REVISION_FELL)
    assert org.admit(changed.compact.decode(), reader) is None


def test_two_seconds_at_once_take_effect_once(org: DualControl) -> None:
    proposed = org.propose(ceiling(org))
    org.second("otto", proposed)
    assert code_of(org, lambda: org.second("oona", proposed)) == Code.SUBJECT_CHANGED


def test_second_after_a_day_is_refused(org: DualControl) -> None:
    proposed = org.propose(ceiling(org))
    org.clock.ms = proposed.at_ms + DAY_MS
    assert code_of(org, lambda: org.second("otto", proposed)) == Code.PROPOSAL_LAPSED
    org.clock.ms -= 1
    org.second("otto", proposed)


@pytest.mark.parametrize("whose", ["olga", "otto"])
def test_ended_key_is_refused(org: DualControl, whose: str) -> None:
    proposed = org.propose(ceiling(org))
    org.give(end_key(org, whose, whose, org.key(whose).kid), org.key(whose))
    code = code_of(org, lambda: org.second("otto", proposed))
    assert code == (Code.KEY_ENDED if whose == "olga" else Code.KEY_UNKNOWN)


@pytest.mark.parametrize(("whose", "code"), [("olga", Code.NOT_SPONSOR), ("otto", Code.SECOND_NOT_ENTITLED)])
def test_lost_role_is_refused(org: DualControl, whose: str, code: Code) -> None:
    proposed = org.propose(ceiling(org))
    org.give(org.user_set("oona", whose))
    assert code_of(org, lambda: org.second("otto", proposed)) == code


def test_second_signature_of_another_command_is_refused(org: DualControl) -> None:
    proposed, other = org.propose(ceiling(org)), org.propose(ceiling(org, "olga", DB))
    word = SecondSignature(jws=org.word("otto", other), proposed_at_ms=proposed.at_ms)
    embedded = EmbeddedCommand(jws=proposed.jws, appended_at_ms=org.clock.ms, second=word)
    assert forged(org, embedded) == Code.CHAIN_BROKEN


def test_second_signature_of_another_text_with_the_same_jti_is_refused(org: DualControl) -> None:
    """An author who signs two commands with one `jti` shows one of them, and hands in the other."""
    shown = org.propose(ceiling(org, "olga", WEB))
    other = org.propose(
        org.claims(AgentSetCeiling, "olga", agent_id="bot", ceiling=(DB,), jti=shown.claims.jti)
    )
    word = SecondSignature(jws=org.word("otto", shown), proposed_at_ms=other.at_ms)
    embedded = EmbeddedCommand(jws=other.jws, appended_at_ms=org.clock.ms, second=word)
    assert forged(org, embedded) == Code.CHAIN_BROKEN


def test_ceiling_seconded_by_stolen_key_rests_on_it(org: DualControl) -> None:
    since_ms = org.clock.ms
    org.seconded("otto", ceiling(org))
    found = KeyCompromise(org.directory, "otto", org.key("otto").kid, since_ms).resting(org.clock.ms / 1000)
    assert [(one.held.id, one.held.parts) for one in found] == [("bot", ("ceiling",))]


# --- each refusal, with its code ---


class Desk(DualControl):
    """olga has a proposal, and proposals that were withdrawn and seconded; dora has a key that olga gave her."""

    def __init__(self) -> None:
        super().__init__()
        self.proposed = self.propose(ceiling(self))
        self.lent = new_key("oona")
        self.table = ProposalTable(self.trust)
        self.proposals = Proposals(NO_RUNTIME, self.directory, self.table)

    def word_on(self, status: ProposalStatus, **fields: Any) -> None:
        """otto's word on a proposal with this status."""
        kept = self.proposal(self.proposed).model_copy(update={"status": status})
        self.table.drop(kept)
        self.table.put(kept)
        given = {
            "author": self.proposed.claims.iss,
            "command": self.proposed.claims.jti,
            "proposal": kept.digest,
        }
        named = SecondedCommand(**{**given, "revision": 1, **fields})
        self.proposals.required(named, self.clock.ms)

    def propose_again(self) -> None:
        for number in range(MAX_PROPOSALS):
            command = self.proposal(self.propose(ceiling(self, "olga", permission(f"env/{number}"))))
            self.table.put(command)
        self.proposals.check_limit(ceiling(self, "olga"), "0" * 64)

    def by_pias_makers(self) -> Proposed:
        """A proposal of olga, after she and otto made pia an operator."""
        self.seconded("otto", self.user_set("olga", "pia", ["operator"]))
        self.forward(DAY_MS)
        return self.propose(ceiling(self))

    def second_by_passkeys(self) -> None:
        verdict = by_passkeys(self, self.user_set("olga", "uma"))
        if isinstance(verdict, Refused):
            raise CommandRefusedError(verdict.reason.message, code=ReceivedCode(verdict.reason.code))

    def after(self, act: Callable[[], object]) -> None:
        act()
        self.second("otto", self.proposed)


NO_RUNTIME: Any = None
REFUSALS: dict[Code, Callable[[Desk], object]] = {
    Code.SECOND_MISSING: lambda desk: desk.give(ceiling(desk)),
    Code.SECOND_IS_AUTHOR: lambda desk: desk.second("olga", desk.proposed),
    Code.SECOND_BY_PASSKEY: lambda desk: desk.second_by_passkeys(),
    Code.SECOND_NOT_ENTITLED: lambda desk: desk.second("sam", desk.proposed),
    Code.SECOND_NOT_APART: lambda desk: desk.second("pia", desk.by_pias_makers()),
    Code.KEY_TOO_NEW: lambda desk: (
        desk.seconded("otto", add_key(desk, "olga", "oona", desk.lent)),
        desk.second("oona", desk.proposed, desk.lent),
    ),
    Code.SUBJECT_CHANGED: lambda desk: desk.after(
        lambda: desk.give(desk.claims(AgentSuspend, "sam", agent_id="bot", reason="x"))
    ),
    Code.PROPOSAL_LAPSED: lambda desk: desk.after(lambda: desk.forward(DAY_MS)),
    Code.KEY_ENDED: lambda desk: desk.after(
        lambda: desk.give(end_key(desk, "olga", "olga", desk.key("olga").kid))
    ),
    Code.PROPOSAL_UNKNOWN: lambda desk: desk.word_on("open", command="another"),
    Code.PROPOSAL_CLOSED: lambda desk: desk.word_on("withdrawn"),
    Code.TOO_MANY_PROPOSED: lambda desk: desk.propose_again(),
    Code.SECOND_LISTED: lambda desk: desk.second("otto", desk.proposed, also=desk.proposed),
    Code.OPERATOR_NEEDS_ROOT: lambda desk: desk.give(directory_of_operators(desk, "olga")),
}  # fmt: skip


@pytest.mark.parametrize(("code", "act"), REFUSALS.items(), ids=REFUSALS)
def test_act_is_refused(code: Code, act: Callable[[Desk], object]) -> None:
    desk = Desk()
    assert code_of(desk, lambda: act(desk)) == code


# --- a registry that lies ---


def forged(org: DualControl, embedded: EmbeddedCommand, *, dropping: int = 0) -> str | None:
    """What a reader says of a record of bot to which a lying registry added a command, after it dropped others."""
    entry = org.directory.agent("bot")
    assert entry is not None
    commands = (*entry.record.commands[: len(entry.record.commands) - dropping], embedded)
    state = entry.state.model_copy(update={"ceiling": ceiling_in(embedded)})
    reader = org.reader()
    for user in ("olga", "otto", "oona", "sam", "suzy"):
        record = org.directory.user(user)
        assert record is not None
        org.admit(record.compact.decode(), reader)
    if dropping:
        org.admit(entry.compact.decode(), reader)
    refused = org.admit(org.sign_record(state, commands, entry.revision + 1), reader)
    if refused is not None:
        return refused.partition(":")[0]
    try:
        reader.agent("bot")
    except RingfenceError as error:
        return str(error.code)
    return None


def ceiling_in(embedded: EmbeddedCommand) -> Any:
    from ringfence.model.records.command_chain import unverified_command

    command = unverified_command(embedded)
    assert isinstance(command, AgentSetCeiling)
    return command.ceiling


def test_reader_refuses_what_a_lying_registry_adds(org: DualControl) -> None:
    alone = org.embed(ceiling(org))
    assert forged(org, alone) == Code.CHAIN_BROKEN
    proposed = org.propose(ceiling(org))
    assert forged(org, org.embedded("olga", proposed)) == Code.CHAIN_BROKEN
    assert forged(org, org.embedded("sam", proposed)) == Code.CHAIN_BROKEN
    assert forged(org, org.embedded("otto", proposed, org.key("olga"))) == Code.CHAIN_BROKEN
    assert forged(org, org.embedded("otto", proposed)) is None


def test_reader_refuses_a_list_that_names_a_ceiling(org: DualControl) -> None:
    proposed, user = org.propose(ceiling(org)), org.propose(org.user_set("olga", "uma", []))
    assert forged(org, org.embedded("otto", proposed, also=user)) == Code.CHAIN_BROKEN
    assert forged(org, org.embedded("otto", proposed)) is None


def test_reader_refuses_second_signature_over_a_change_in_between(org: DualControl) -> None:
    proposed = org.propose(ceiling(org))
    stop = org.claims(AgentSuspend, "sam", agent_id="bot", reason="x", iat=proposed.claims.iat)
    org.give(stop)  # not overtaken: it was signed in the same second
    assert forged(org, org.embedded("otto", proposed)) == Code.CHAIN_BROKEN


def test_reader_refuses_a_record_that_drops_a_narrowing_to_widen_unseconded(org: DualControl) -> None:
    org.seconded("otto", ceiling(org, "olga", WEB, DB))
    org.give(ceiling(org, "sam", WEB))
    assert forged(org, org.embed(ceiling(org, "sam", WEB, DB)), dropping=1) == Code.HISTORY_CHANGED


def test_record_stays_believable_after_narrowings_and_seconds(org: DualControl) -> None:
    """What is dropped from a record must not make a later narrowing look like a widening."""
    org.seconded("otto", ceiling(org, "olga", WEB, DB))
    org.give(ceiling(org, "sam", WEB))
    org.seconded("otto", ceiling(org, "olga", WEB, DB, permission("env/cache")))
    org.give(ceiling(org, "sam", DB))
    org.give(org.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=()))
    entry = org.directory.agent("bot")
    assert entry is not None
    reader = org.reader()
    for name in ("olga", "otto", "sam"):
        record = org.directory.user(name)
        assert record is not None
        org.admit(record.compact.decode(), reader)
    assert org.admit(entry.compact.decode(), reader) is None
    assert reader.agent("bot") is not None


# --- the attack ---


def test_one_operators_key_makes_neither_user_nor_sponsor_nor_agent(org: DualControl) -> None:
    """Each step of the way to a lease with one stolen operator's key: user, sponsor, key, agent, ceiling, target."""
    thief = new_key("mole")
    steps: list[Any] = [
        org.user_set("olga", "mole", ["sponsor"], keys=(org.key_record(thief),)),
        org.user_set(
            "olga", "sam", ["sponsor"], keys=(org.key_record(org.key("sam")), org.key_record(thief))
        ),
        add_key(org, "olga", "sam", new_key("sam")),
        org.register("olga", "mule", "sam", ceiling=(permission("env/**"),)),
        ceiling(org, "olga", permission("env/production/web")),
        org.transfer("olga", "bot", "suzy", without_consent=True),
        org.target_set("olga", "platform"),
    ]
    for command in steps:
        proposed = org.propose(command)
        assert code_of(org, partial(org.second, "olga", proposed)) in (
            Code.SECOND_IS_AUTHOR, Code.SECOND_NOT_ENTITLED,
        )  # fmt: skip
    assert org.directory.user("mole") is None
    bot = org.directory.agent("bot")
    assert bot is not None
    assert bot.state.ceiling == ()
