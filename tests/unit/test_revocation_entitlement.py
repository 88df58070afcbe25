"""Whose revocation counts: of whoever was entitled when it was appended, or later, whatever comes after it."""

from __future__ import annotations

import uuid
from typing import Any, get_args

import pytest

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.crypto.jws import Signed, parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import ServiceRole
from ringfence.messages.credential import Coordinates
from ringfence.messages.enrolment import InstanceEnrolment, InstanceRef
from ringfence.messages.lease import Delegator, EndCause, EndKind, Lease, RevocationRequest, Selector
from ringfence.messages.registry import TaskState, UserDisable
from ringfence.messages.topics import REVOCATION_REQUEST
from ringfence.messages.trust import ServiceIdentity, TrustBundle
from ringfence.model.leases.revocations import Revocation, agent_of_task, check_revocation, verify_revocation
from ringfence.model.records.command_chain import ChainError
from ringfence.model.verdict import ALLOWED
from tests.support import leases
from tests.support.in_memory_registry import START_MS, TD, InMemoryRegistry, permission
from tests.support.instance_enrolments import enrolment_of
from tests.support.verdicts import code_of

BOT = "bot"


class Organisation(InMemoryRegistry):
    """olga and otto are operators; sam sponsors the bot, and suzy does not."""

    def __init__(self) -> None:
        super().__init__()
        self.organisation()
        self.give(self.target_set("olga", "staging"))
        self.give(self.register("sam", BOT, "sam", ceiling=(permission("env/**"),)))
        self.lease: Lease = leases.lease(agent_id=BOT, sponsor="sam", on_behalf_of="adam").claims

    def transferred(self, to: str) -> None:
        entry = self.directory.agent(BOT)
        assert entry is not None
        self.give(self.transfer(entry.state.sponsor, BOT, to))

    def revocation(self, by: str, **fields: Any) -> Received:
        given = {"kind": "revocation", "reason": "a test", "lease_id": self.lease.lease_id, **fields}
        claims = self.claims(RevocationRequest, by, **given)
        record = self.received(REVOCATION_REQUEST, BOT, sign(claims, self.key(by)))
        self.clock.ms += 1000
        return record

    def counts(self, record: Received) -> bool:
        """For a reader that reads it now."""
        revocation = verify_revocation(record, self.directory, self.trust)
        code = code_of(check_revocation(revocation, self.lease, self.directory))
        assert code in (None, "not_entitled")
        return code is None


@pytest.fixture
def organisation() -> Organisation:
    return Organisation()


ONE_LEASE: dict[str, Any] = {}
ALL_OF_THE_AGENT = {"lease_id": None, "selector": Selector(agent_id=BOT)}


@pytest.mark.parametrize("what", [ONE_LEASE, ALL_OF_THE_AGENT], ids=["a lease", "an agent"])
def test_a_sponsors_revocation_counts_after_a_transfer_too(
    organisation: Organisation, what: dict[str, Any]
) -> None:
    """A gateway that acknowledged it may start again after the transfer, and a slow revoker may read it then."""
    before = organisation.revocation("sam", **what)
    organisation.transferred("suzy")
    assert organisation.counts(before)
    organisation.transferred("sam")
    organisation.transferred("suzy")
    assert organisation.counts(before)


@pytest.mark.parametrize("what", [ONE_LEASE, ALL_OF_THE_AGENT], ids=["a lease", "an agent"])
def test_after_a_transfer_the_former_sponsor_revokes_nothing(
    organisation: Organisation, what: dict[str, Any]
) -> None:
    organisation.transferred("suzy")
    assert not organisation.counts(organisation.revocation("sam", **what))
    assert organisation.counts(organisation.revocation("suzy", **what))


def test_a_revocation_that_arrives_before_the_transfer_to_its_signer_counts(
    organisation: Organisation,
) -> None:
    """Topics have no common order: the transfer may have been accepted first, for all that the signer knows."""
    early = organisation.revocation("suzy")
    assert not organisation.counts(early)
    organisation.transferred("suzy")
    assert organisation.counts(early)
    organisation.transferred("sam")
    assert organisation.counts(early), "what counted once counts for every reader"


@pytest.mark.parametrize("change", ["disabled", "no operator any more"])
def test_an_operators_revocation_outlives_the_operators_role(organisation: Organisation, change: str) -> None:
    before = organisation.revocation("otto", lease_id=None, selector=Selector(all=True))
    if change == "disabled":
        organisation.give(organisation.claims(UserDisable, "olga", user_id="otto", reason="left"))
        with pytest.raises(InvalidMessageError):
            organisation.counts(organisation.revocation("otto", lease_id=None, selector=Selector(all=True)))
    else:
        organisation.give(organisation.user_set("olga", "otto", ["auditor"]))
        assert not organisation.counts(
            organisation.revocation("otto", lease_id=None, selector=Selector(all=True))
        )
    assert organisation.counts(before)


def test_revocation_by_an_unentitled_user_is_rejected(organisation: Organisation) -> None:
    assert not organisation.counts(organisation.revocation("uma"))
    assert not organisation.counts(organisation.revocation("suzy"))


# --- each signer, kind and target of a revocation ---

LEAD = "lead"
KINDS: frozenset[EndKind] = frozenset(get_args(EndKind))
BY_USERS, BY_AGENTS = {"revocation"}, {"release"}
SERVICE_KINDS = KINDS - {"release", "deadline", "mint_failed"}
STRANGER_RUN = str(uuid.uuid4())


class TeamWithParts(Organisation):
    """lead, sponsored by suzy, handed its task on to the bot. tina assigned the bot's task, and is no sponsor now.

    The lease is on behalf of adam, the task of lead of dora. gone was an operator; gone and dave are disabled.
    """

    def __init__(self) -> None:
        super().__init__()
        for name, roles in (("tina", ["sponsor"]), ("dora", []), ("gone", ["operator"]), ("dave", [])):
            self.give(self.user_set("olga", name, roles))
        self.give(self.register("suzy", LEAD, "suzy", ceiling=(permission("env/**"),)))
        self.give(self.transfer("sam", BOT, "tina"))
        self.task = self.assigned("tina", BOT, "adam")
        self.task_of_lead = self.assigned("suzy", LEAD, "dora")
        self.give(self.transfer("tina", BOT, "sam"))
        self.give(self.user_set("olga", "tina"))
        for name in ("gone", "dave"):
            self.give(self.claims(UserDisable, "olga", user_id=name, reason="left"))
        self.clock.ms += 60_000
        part = Delegator(agent_id=LEAD, task_id=self.task_of_lead, sponsor="suzy")
        self.lease = leases.lease(
            agent_id=BOT, task_id=self.task, sponsor="sam", on_behalf_of="adam", delegators=(part,)
        ).claims

    def assigned(self, by: str, agent: str, on_behalf_of: str) -> str:
        terms = self.terms(agent)
        consent = self.consent(on_behalf_of, terms)
        change = self.give(self.assign(by, agent, terms=terms, on_behalf_of=on_behalf_of, consent=consent))
        assert change is not None
        assert isinstance(change.state, TaskState)
        return change.state.task_id

    def refusal(self, by: str, lease: Lease | None, **fields: Any) -> str | None:
        """The code of the refusal of a verified revocation that is appended now; None if it is followed."""
        given = {"kind": "revocation", "reason": "a test", **fields}
        if "selector" not in given:
            given["lease_id"] = lease.lease_id if lease else str(uuid.uuid4())
        claims = RevocationRequest(
            iss=f"spiffe://{TD}/{by}", aud=TD, iat=self.clock.ms // 1000, jti="r", **given
        )
        at = Coordinates(topic="t", partition=0, offset=1, appended_at_ms=self.clock.ms)
        return code_of(check_revocation(Revocation(Signed(claims, "a.b.c"), at), lease, self.directory))


@pytest.fixture(scope="module")
def team() -> TeamWithParts:
    return TeamWithParts()


@pytest.mark.parametrize(
    ("user", "code"),
    [
        ("olga", None),  # an operator
        ("sam", None),  # the sponsor of the agent
        ("tina", None),  # assigned its task
        ("adam", None),  # the lease is on behalf of adam
        ("suzy", None),  # the sponsor of the agent that handed the task on
        ("dora", None),  # the task that was handed on is on behalf of dora
        ("uma", "not_entitled"),
        ("gone", "not_entitled"),  # a disabled operator
        ("ghost", "not_entitled"),  # there is no such user
    ],
)
def test_a_lease_is_revoked_only_by_users_who_answer_for_it(
    team: TeamWithParts, user: str, code: str | None
) -> None:
    assert team.refusal(f"user/{user}", team.lease) == code


def test_the_user_of_a_lease_revokes_it_whatever_is_known_of_its_task(team: TeamWithParts) -> None:
    alone = team.lease.model_copy(update={"task_id": str(uuid.uuid4()), "delegators": None})
    assert team.refusal("user/adam", alone) is None
    assert team.refusal("user/tina", alone) == "not_entitled"
    disabled = alone.model_copy(update={"on_behalf_of": "dave"})
    assert team.refusal("user/dave", disabled) == "not_entitled"


@pytest.mark.parametrize(
    ("user", "selector", "code"),
    [
        ("olga", {"all": True}, None),
        ("gone", {"all": True}, "not_entitled"),
        ("sam", {"all": True}, "not_entitled"),
        ("sam", {"target_id": "staging"}, "not_entitled"),
        ("sam", {"agent_id": BOT}, None),
        ("uma", {"agent_id": BOT}, "not_entitled"),
        ("sam", {"agent_id": LEAD}, "not_entitled"),
        ("suzy", {"sponsor": "suzy"}, None),
        ("suzy", {"sponsor": "sam"}, "not_entitled"),
        ("adam", {"user_id": "adam"}, None),
        ("uma", {"user_id": "adam"}, "not_entitled"),
        ("dave", {"user_id": "dave"}, "not_entitled"),  # disabled
        ("tina", {"task_id": "the bot's"}, None),  # assigned it
        ("adam", {"task_id": "the bot's"}, None),  # it is on behalf of adam
        ("sam", {"task_id": "the bot's"}, None),  # sponsors its agent
        ("suzy", {"task_id": "the bot's"}, "not_entitled"),
        ("sam", {"task_id": "unknown"}, "not_entitled"),
    ],
)
def test_a_selector_is_followed_only_from_a_user_who_answers_for_all_of_it(
    team: TeamWithParts, user: str, selector: dict[str, Any], code: str | None
) -> None:
    if "task_id" in selector:
        selector = {"task_id": team.task if selector["task_id"] == "the bot's" else str(uuid.uuid4())}
    assert team.refusal(f"user/{user}", None, selector=Selector(**selector)) == code


@pytest.mark.parametrize(
    ("signer", "kind", "code"),
    [
        *(
            (f"user/{user}", kind, "kind_unexpected")
            for user in ("olga", "sam")
            for kind in sorted(KINDS - BY_USERS)
        ),
        *((f"agent/{BOT}", kind, "kind_unexpected") for kind in sorted(KINDS - BY_AGENTS)),
        *(("service/revoker", kind, "kind_unexpected") for kind in sorted(KINDS - SERVICE_KINDS)),
        ("user/olga", "revocation", None),
        (f"agent/{BOT}", "release", None),
        *(("service/revoker", kind, None) for kind in sorted(SERVICE_KINDS)),
    ],
)
def test_a_signer_ends_leases_only_by_the_kinds_of_its_own(
    team: TeamWithParts, signer: str, kind: str, code: str | None
) -> None:
    assert team.refusal(signer, team.lease, kind=kind) == code


@pytest.mark.parametrize(
    ("signer", "kind"),
    [("user/olga", "revocation"), (f"agent/{BOT}", "release"), ("service/revoker", "task_ended")],
)
def test_a_revocation_of_a_lease_that_is_not_known_is_not_followed(
    team: TeamWithParts, signer: str, kind: str
) -> None:
    assert team.refusal(signer, None, kind=kind) == "lease_unknown"


def test_a_service_needs_no_lease_for_a_selector(team: TeamWithParts) -> None:
    assert team.refusal("service/revoker", None, kind="task_ended", selector=Selector(agent_id=BOT)) is None


def test_an_agent_releases_its_own_leases_only_and_none_by_a_selector(team: TeamWithParts) -> None:
    assert team.refusal(f"agent/{BOT}", team.lease, kind="release") is None
    assert team.refusal(f"agent/{LEAD}", team.lease, kind="release") == "not_entitled"
    everything = Selector(agent_id=BOT)
    assert team.refusal(f"agent/{BOT}", None, kind="release", selector=everything) == "not_entitled"


@pytest.mark.parametrize(
    ("run_of_lease", "code"),
    [("its own", None), ("another", "not_entitled"), ("no run", "not_entitled"), (None, "not_entitled")],
)
def test_the_instance_of_a_run_releases_the_leases_of_that_run_only(
    team: TeamWithParts, run_of_lease: str | None, code: str | None
) -> None:
    signed = enrolment_of(
        SigningKey.generate("a").record(60).jwk, f"spiffe://acme.example/agent/{BOT}", 1, 60
    )
    run = parse(signed).unverified_claims(InstanceEnrolment).run
    assert run is not None
    runs = {"its own": run, "another": run.model_copy(update={"run_id": STRANGER_RUN}), "no run": None}
    of_platform = InstanceRef(
        instance_id=STRANGER_RUN, issuer="https://x.example", subject="s", selector="0" * 64, not_after=9
    )
    instance = None if run_of_lease is None else of_platform.model_copy(update={"run": runs[run_of_lease]})
    lease = team.lease.model_copy(update={"instance": instance})
    assert team.refusal(f"agent/{BOT}", lease, kind="release", enrolment=signed) == code


def test_the_instance_of_a_platform_releases_any_lease_of_its_agent(team: TeamWithParts) -> None:
    signed = enrolment_of(
        SigningKey.generate("a").record(60).jwk, f"spiffe://acme.example/agent/{BOT}", 1, 60
    )
    claims = parse(signed).unverified_claims(InstanceEnrolment).model_copy(update={"run": None})
    platform = sign(claims, SigningKey.generate(claims.iss))
    assert team.refusal(f"agent/{BOT}", team.lease, kind="release", enrolment=platform) is None


def test_a_sponsor_is_entitled_by_a_change_in_the_millisecond_of_the_revocation(team: TeamWithParts) -> None:
    record = team.directory.agent(BOT)
    assert record is not None
    transferred_ms = record.record.commands[-1].appended_at_ms
    claims = RevocationRequest(
        iss=f"spiffe://{TD}/user/tina", aud=TD, iat=1, jti="r", kind="revocation", reason="a test",
        selector=Selector(agent_id=BOT),
    )  # fmt: skip
    for at_ms, entitled in ((transferred_ms, True), (transferred_ms + 1, False)):
        at = Coordinates(topic="t", partition=0, offset=1, appended_at_ms=at_ms)
        verdict = check_revocation(Revocation(Signed(claims, "a.b.c"), at), None, team.directory)
        assert (verdict == ALLOWED) is entitled


def test_a_revocation_that_arrives_before_the_record_of_its_signer_counts(organisation: Organisation) -> None:
    early = organisation.revocation("nova")
    with pytest.raises(InvalidMessageError):
        organisation.counts(early)
    organisation.give(organisation.user_set("olga", "nova", ["operator"]))
    assert organisation.counts(early)


def test_a_record_that_no_command_justifies_entitles_to_nothing(organisation: Organisation) -> None:
    entry = organisation.directory.user("uma")
    assert entry is not None
    operator = entry.state.model_copy(update={"roles": ("operator",)})
    forged = organisation.sign_record(operator, entry.record.commands, entry.revision + 1)
    record = organisation.revocation("uma")
    revocation = verify_revocation(record, organisation.directory, organisation.trust)
    organisation.admit(forged)
    with pytest.raises(ChainError):
        organisation.directory.user("uma")
    verdict = check_revocation(revocation, organisation.lease, organisation.directory)
    assert code_of(verdict) == "not_entitled"


def test_the_agent_of_a_task_is_the_one_that_it_was_assigned_to(team: TeamWithParts) -> None:
    assert agent_of_task(team.task, team.directory) == BOT
    assert agent_of_task(str(uuid.uuid4()), team.directory) is None


# --- signatures ---


def test_a_revocation_names_its_cause_and_keeps_its_id_and_trace(organisation: Organisation) -> None:
    record = organisation.revocation("sam")
    found = verify_revocation(record, organisation.directory, organisation.trust)
    again = verify_revocation(
        record._replace(offset=record.offset + 1), organisation.directory, organisation.trust
    )
    claims = found.claims
    assert found.id == again.id == derived_id("revocation", claims.iss, claims.jti)
    assert found.traceparent == record.traceparent
    assert found.cause() == EndCause(
        kind="revocation", at_ms=record.appended_at_ms, by=claims.iss, ref=claims.jti, reason="a test"
    )


def signed_by(organisation: Organisation, key: SigningKey, **fields: Any) -> Received:
    given = {"kind": "release", "reason": "a test", "lease_id": organisation.lease.lease_id, **fields}
    claims = RevocationRequest(
        iss=key.id, aud=TD, iat=organisation.clock.ms // 1000, jti=f"r-{uuid.uuid4()}", **given
    )
    return organisation.received(REVOCATION_REQUEST, BOT, sign(claims, key))


def test_a_known_agents_key_verifies_and_the_key_of_another_does_not(organisation: Organisation) -> None:
    own = organisation.key(BOT, "agent")
    found = verify_revocation(signed_by(organisation, own), organisation.directory, organisation.trust)
    assert found.claims.iss == own.id
    for key in (SigningKey.generate(own.id), organisation.key("ghost", "agent")):
        with pytest.raises(InvalidMessageError):
            verify_revocation(signed_by(organisation, key), organisation.directory, organisation.trust)


def test_a_key_that_had_ended_when_the_revocation_was_appended_verifies_nothing(
    organisation: Organisation,
) -> None:
    key = organisation.key("brief", "agent")
    end_s = organisation.clock.ms // 1000 + 60
    organisation.give(organisation.register("sam", "brief", "sam", keys=(key.record(end_s),)))
    verify_revocation(signed_by(organisation, key), organisation.directory, organisation.trust)
    organisation.clock.ms = end_s * 1000
    with pytest.raises(InvalidMessageError):
        verify_revocation(signed_by(organisation, key), organisation.directory, organisation.trust)


@pytest.mark.parametrize(("role", "counts"), [("revoker", True), ("policy", False)])
@pytest.mark.parametrize("after_s", [0, 366 * 86_400], ids=["bundle valid", "bundle expired"])
def test_a_revokers_key_verifies_also_after_the_bundle_and_no_other_services(
    organisation: Organisation, role: ServiceRole, counts: bool, after_s: int
) -> None:
    key = SigningKey.generate(f"spiffe://{TD}/service/{role}")
    now_s, year_s = START_MS // 1000, 365 * 86_400
    service = ServiceIdentity(id=key.id, roles=(role,), keys=(key.record(now_s + year_s),))
    bundle = TrustBundle(
        iss=organisation.root.id,
        aud=TD,
        iat=now_s,
        exp=now_s + year_s,
        jti="b2",
        version=2,
        services=(service,),
    )
    organisation.trust.load(sign(bundle, organisation.root, header_jwk=True), now_s)
    organisation.clock.ms += after_s * 1000
    record = signed_by(organisation, key, kind="task_ended")
    if counts:
        assert verify_revocation(record, organisation.directory, organisation.trust).claims.iss == key.id
    else:
        with pytest.raises(InvalidMessageError):
            verify_revocation(record, organisation.directory, organisation.trust)
