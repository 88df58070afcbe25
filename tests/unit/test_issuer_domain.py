"""Whether a decision becomes a lease: all that the issuer holds it against, and what it says where it does not hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, cast

import pytest

from ringfence.issuer.domain import (
    APPROVALS_MS,
    DECISION_LIFE_S,
    ENDED_KEY_MS,
    FULL,
    FULL_RETRY_S,
    LATE,
    OVER,
    REQUEST_LIFE_MS,
    RETRY_AFTER_S,
    SKEW_MS,
    Decision,
    Issue,
    Refusal,
    StaleView,
    Terms,
    cannot,
    fenced,
    weigh,
)
from ringfence.kernel.base.ids import digest, lease_id, message_id
from ringfence.kernel.crypto.jwe import ReplyKey
from ringfence.kernel.crypto.jws import Signed, parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.webauthn import MAX_AGE_S
from ringfence.messages.approval import Approval, Grant
from ringfence.messages.credential import (
    Coordinates,
    CredentialDecision,
    CredentialRequest,
    DelegatorRevisions,
    Reason,
    Revisions,
)
from ringfence.messages.enrolment import AttestationSelector, InstanceEnrolment
from ringfence.messages.oidc import OidcIssuer
from ringfence.messages.registry import (
    AgentRotateKey,
    AgentSetAttestation,
    AgentSetCeiling,
    AgentSuspend,
    BackendSettings,
    TargetRemove,
    TaskDelegate,
    TaskEnd,
    UserDisable,
    VerbFloor,
)
from ringfence.model.identity.attestation import selector_id
from ringfence.model.leases.lifecycle import origin_of, record_id
from ringfence.model.lifecycle import subject_key
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.records.instances import instance_id
from ringfence.model.requests.approvals import APPROVAL_SLACK_MS, BREAK_GLASS_TTL_S
from ringfence.model.requests.grants import id_of
from tests.support.in_memory_registry import TD, InMemoryRegistry, permission
from tests.support.passkeys import ORIGINS, SoftwarePasskey
from tests.support.user_keys import add_key, end_key, new_key, new_passkey

POLICY = SigningKey.generate(f"spiffe://{TD}/service/policy")
ISSUER = f"spiffe://{TD}/service/issuer"
VERBS = ("read", "deploy", "wipe")
EVERYTHING = permission("**", verbs=VERBS)
READ = permission("env/staging/web", verbs=("read",))
DEPLOY = permission("env/staging/web", verbs=("deploy",))
WIPE = permission("env/staging/web", verbs=("wipe",))
MAX_TTL_S = 1800


class Place:
    """sam sponsors bot and other; uma assigned bot a task. `staging` has read, deploy (sponsor) and wipe (operator)."""

    def __init__(self) -> None:
        self.ledger = ledger = InMemoryRegistry()
        ledger.organisation()
        ledger.give(ledger.user_set("olga", "uma", entitlements=ledger.entitlements(EVERYTHING)))
        self.set_target()
        for agent in ("bot", "other"):
            ledger.give(ledger.register("sam", agent, "sam", ceiling=(EVERYTHING,)))
        terms = ledger.terms("bot", scope=(EVERYTHING,), not_after=ledger.clock.ms // 1000 + 7200)
        self.task = self.made(ledger.assign("uma", "bot", terms=terms))
        self.terms = Terms(ISSUER, TD, 30 * 86_400, ("jwt", "static"), ("static",))
        self.reply_key = ReplyKey()
        self.requests = 0

    def set_target(self, **fields: Any) -> None:
        verbs = (
            VerbFloor(verb="read"),
            VerbFloor(verb="deploy", floor="sponsor"),
            VerbFloor(verb="wipe", floor="operator"),
        )
        given = {"verbs": verbs, "max_ttl_s": MAX_TTL_S, **fields}
        self.ledger.give(self.ledger.target_set("olga", "staging", **given))

    def made(self, claims: Any) -> str:
        """The id of a task that the registry takes."""
        change = self.ledger.give(claims)
        assert change is not None
        return subject_key(change.state)[1]

    @property
    def now_ms(self) -> int:
        return self.ledger.clock.ms

    def revisions(self, **fields: Any) -> Revisions:
        """What an honest policy saw: all that there is."""
        directory = self.ledger.directory
        task = directory.task(self.task)
        entries = (directory.agent("bot"), directory.user("uma"), task, directory.target("staging"))
        agent, user, task_, target = (entry.revision if entry else 0 for entry in entries)
        return Revisions(
            **{"agent": agent, "user": user, "task": task_, "target": target, "policy": "p" * 64, **fields}
        )

    def request(self, key: SigningKey | None = None, agent: str = "bot", **fields: Any) -> str:
        ledger = self.ledger
        given = {
            "iss": ledger.key(agent, "agent").id,
            "task_id": self.task,
            "scope": (READ,),
            "ttl_s": 600,
            "reason": "a test",
            "reply_key": self.reply_key.public,
        }
        return sign(
            ledger.claims(CredentialRequest, agent, **{**given, **fields}), key or ledger.key(agent, "agent")
        )

    def decision(
        self,
        request: str | None = None,
        *,
        source_ms: int | None = None,
        at_ms: int | None = None,
        traceparent: str | None = None,
        **fields: Any,
    ) -> Decision:
        """An honest `allowed`, but for what is named."""
        request = self.request() if request is None else request
        claims = parse(request).unverified_claims(CredentialRequest)
        self.requests += 1
        source_ms = self.now_ms if source_ms is None else source_ms
        given = {
            "request_id": message_id(claims.iss, claims.jti),
            "request": request,
            "source": Coordinates(
                topic="credential.request", partition=0, offset=self.requests, appended_at_ms=source_ms
            ),
            "outcome": "allowed",
            "ttl_s": claims.ttl_s,
            "delivery": claims.delivery,
            "revisions": self.revisions(),
        }
        decided = CredentialDecision(
            iss=POLICY.id, aud=TD, jti=f"d{self.requests}", **{"iat": source_ms // 1000, **given, **fields}
        )
        at = Coordinates(
            topic="credential.decision", partition=3, offset=self.requests,
            appended_at_ms=source_ms + 5 if at_ms is None else at_ms,
        )  # fmt: skip
        return Decision(Signed(decided, sign(decided, POLICY)), at, traceparent)

    def weigh(
        self, decision: Decision | None = None, directory: Directory | None = None, **how: Any
    ) -> Issue | Refusal | StaleView:
        return weigh(decision or self.decision(**how), directory or self.ledger.directory, self.terms)

    def issued(self, decision: Decision | None = None, **how: Any) -> Issue:
        found = self.weigh(decision, **how)
        assert isinstance(found, Issue), found
        return found

    def refused(self, decision: Decision | None = None, **how: Any) -> tuple[list[str], bool]:
        """Why, and whether no honest policy decides so."""
        found = self.weigh(decision, **how)
        assert isinstance(found, Refusal), found
        return [reason.code for reason in found.reasons], found.finding

    def approval(self, request: str, by: str = "sam", key: SigningKey | None = None, **fields: Any) -> str:
        claims = parse(request).unverified_claims(CredentialRequest)
        given = {
            "verdict": "approved",
            "request": request,
            "request_id": message_id(claims.iss, claims.jti),
            "request_digest": digest(request),
            "ttl_s": claims.ttl_s,
            "delivery": claims.delivery,
            "revisions": self.revisions(),
        }
        ledger = self.ledger
        return sign(ledger.claims(Approval, by, **{**given, **fields}), key or ledger.key(by))

    def grant(self, by: str = "sam", **fields: Any) -> str:
        given = {
            "agent_id": "bot", "task_id": self.task, "scope": (DEPLOY,), "count": 3, "ttl_s": 600,
            "delivery": "agent", "revisions": self.revisions(),
        }  # fmt: skip
        return sign(self.ledger.claims(Grant, by, **{**given, **fields}), self.ledger.key(by))

    def handed_on(self) -> str:
        """The id of a part of the task, which bot hands to other."""
        ledger = self.ledger
        terms = ledger.terms("other", scope=(EVERYTHING,))
        return self.made(
            ledger.claims(
                TaskDelegate, "bot", iss=ledger.key("bot", "agent").id, parent=self.task, terms=terms
            )
        )

    def without(self, *names: str, grace_ms: int | None = None) -> Directory:
        """A reader that has not seen some of the records yet."""
        reader = self.ledger.reader(grace_ms=grace_ms)
        for kind in ("user", "target", "agent", "task"):
            for entry in self.ledger.directory.entries(kind):
                if entry.record.sub.rpartition("/")[2] not in names:
                    record = self.ledger.sign_record(
                        entry.record.state, entry.record.commands, entry.record.revision
                    )
                    assert self.ledger.admit(record, reader) is None
        return reader


@pytest.fixture
def place() -> Place:
    return Place()


# --- what holds -----------------------------------------------------------------------------------------------------


def test_the_lease_says_what_was_asked_decided_and_recorded(place: Place) -> None:
    decision = place.decision(traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01")
    issue = place.issued(decision)
    lease, claims = issue.lease, decision.claims
    request = parse(claims.request).unverified_claims(CredentialRequest)
    at = decision.at
    id = lease_id(claims.request_id)
    assert (lease.lease_id, lease.request_id, lease.seq, lease.status) == (id, claims.request_id, 1, "active")
    assert (lease.iss, lease.aud, lease.iat) == (ISSUER, TD, at.appended_at_ms // 1000)
    assert issue.origin == origin_of(id, at)
    assert lease.jti == record_id(issue.origin, 1)
    assert (lease.decision_id, lease.decision_digest) == (claims.jti, digest(decision.signed.compact))
    assert (lease.agent_id, lease.act, lease.delegators) == ("bot", ("bot",), None)
    assert (lease.sponsor, lease.on_behalf_of, lease.task_id) == ("sam", "uma", place.task)
    assert (lease.target_id, lease.backend, lease.delivery) == ("staging", "jwt", "agent")
    assert (lease.scope, lease.requested_at_ms) == ((READ,), claims.source.appended_at_ms)
    assert lease.deadline == at.appended_at_ms // 1000 + 600
    assert lease.key_thumbprint == place.ledger.key("bot", "agent").kid
    assert (lease.grants, lease.instance, lease.break_glass) == (None, None, None)
    assert lease.traceparent == decision.traceparent
    assert (issue.request, issue.grants) == (request, ())
    assert issue.target.target_id == "staging"


def test_a_redelivery_gives_the_same_lease_and_another_place_another_origin(place: Place) -> None:
    decision = place.decision()
    first = place.issued(decision)
    place.ledger.clock.ms += 60_000
    assert place.issued(decision) == first
    moved = replace(decision, at=decision.at.model_copy(update={"offset": 99}))
    assert place.issued(moved).origin != first.origin
    assert place.issued(moved).lease.lease_id == first.lease.lease_id


def test_a_shorter_ttl_than_asked_for_is_the_leases(place: Place) -> None:
    at_ms = place.now_ms + 5
    assert place.issued(ttl_s=60, at_ms=at_ms).lease.deadline == at_ms // 1000 + 60


def test_a_lease_ends_with_its_task(place: Place) -> None:
    task = place.ledger.directory.task(place.task)
    assert task is not None
    source_ms = (task.state.not_after - 100) * 1000
    request = place.request(iat=source_ms // 1000, exp=source_ms // 1000 + 60)
    assert place.issued(place.decision(request, source_ms=source_ms)).lease.deadline == task.state.not_after
    late = place.decision(request, source_ms=source_ms, at_ms=(task.state.not_after - 1) * 1000 + 1)
    assert place.refused(late) == (["deadline_too_close"], False)


@pytest.mark.parametrize("delivery", ["agent", "gateway"])
def test_delivery_is_what_was_asked_for(place: Place, delivery: str) -> None:
    assert place.issued(place.decision(place.request(delivery=delivery))).lease.delivery == delivery


def test_of_a_part_of_a_task_the_lease_names_who_handed_it_on(place: Place) -> None:
    for _ in range(3):  # so that the revisions of the chain differ
        place.ledger.give(place.ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=()))
        place.ledger.give(place.ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=(EVERYTHING,)))
    part = place.handed_on()
    directory = place.ledger.directory
    agent, parent, task = directory.agent("other"), directory.task(place.task), directory.task(part)
    bot = directory.agent("bot")
    assert agent is not None
    assert bot is not None
    assert parent is not None
    assert task is not None
    revisions = place.revisions(
        agent=agent.revision,
        task=task.revision,
        delegators=(DelegatorRevisions(agent=bot.revision, task=parent.revision),),
    )
    request = place.request(agent="other", task_id=part)
    lease = place.issued(place.decision(request, revisions=revisions)).lease
    assert (lease.act, lease.agent_id, lease.task_id) == (("other", "bot"), "other", part)
    assert [(one.agent_id, one.task_id) for one in lease.delegators or ()] == [("bot", place.task)]

    # Each record of the chain may be ahead of the issuer's.
    for ahead, name in (
        ({"agent": bot.revision + 1}, "agent bot"),
        ({"task": parent.revision + 1}, place.task),
    ):
        seen = revisions.model_copy(
            update={"delegators": (revisions.delegators[0].model_copy(update=ahead),)}  # type: ignore[index]
        )
        found = place.weigh(place.decision(request, revisions=seen))
        assert isinstance(found, StaleView)
        assert name in found.reason
    found = place.weigh(place.decision(request, revisions=revisions), place.without(part))
    assert isinstance(found, StaleView)
    assert part in found.reason
    # More steps than the task has are no honest policy's, and no reason to wait.
    longer = revisions.model_copy(update={"delegators": (*revisions.delegators, *revisions.delegators)})  # type: ignore[misc]
    assert isinstance(place.weigh(place.decision(request, revisions=longer)), Issue)
    # A refusal that has nothing to do with the chain is one, and nothing is waited for.
    for seen in (revisions, longer):
        assert place.refused(place.decision(request, revisions=seen, ttl_s=601)) == (["ttl_too_long"], True)
    ahead_of_all = revisions.model_copy(update={"target": revisions.target + 1})
    found = place.weigh(place.decision(request, revisions=ahead_of_all))
    assert isinstance(found, StaleView)
    assert "target staging" in found.reason


def enrolled(place: Place, key: SigningKey, end_s: int) -> str:
    """The registry's word that `key` is that of an instance of bot, which bot's sponsor lets in."""
    ledger, issuer = place.ledger, "https://platform.example"
    bundle = ledger.trust.require()
    following = bundle.model_copy(
        update={
            "version": bundle.version + 1,
            "oidc_issuers": (OidcIssuer(issuer=issuer, uses=("instances",), discovery=True),),
        }
    )
    ledger.trust.load(sign(following, ledger.root, header_jwk=True), place.now_ms / 1000)
    let_in = AttestationSelector(issuer=issuer, claims={"sub": "pod-1"})
    ledger.give(ledger.claims(AgentSetAttestation, "sam", agent_id="bot", attestation=(let_in,)))
    claims = InstanceEnrolment(
        iss=ledger.registry.id, aud=TD, iat=place.now_ms // 1000, jti="e1", sub=key.id,
        instance_id=instance_id("0" * 64, key.kid), key=key.record(end_s), issuer=issuer, subject="pod-1",
        selector=selector_id(let_in), claims={"sub": "pod-1"}, token_digest="0" * 64, agent_revision=1,
    )  # fmt: skip
    return sign(claims, ledger.registry)


def test_an_instances_lease_names_it_and_ends_with_its_key(place: Place) -> None:
    key = SigningKey.generate(place.ledger.key("bot", "agent").id)
    end_s = place.now_ms // 1000 + 300
    request = place.request(key, enrolment=enrolled(place, key, end_s))
    lease = place.issued(place.decision(request)).lease
    assert lease.instance is not None
    assert (lease.instance.subject, lease.instance.not_after) == ("pod-1", end_s)
    assert (lease.deadline, lease.key_thumbprint) == (end_s, key.kid)
    place.ledger.give(place.ledger.claims(AgentSetAttestation, "sam", agent_id="bot", attestation=()))
    assert place.refused(place.decision(request)) == (["instance_void"], True)


# --- the request ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ahead_ms", "holds"), [(SKEW_MS, True), (SKEW_MS + 1, False)])
def test_a_request_does_not_come_after_its_decision(place: Place, ahead_ms: int, holds: bool) -> None:
    source_ms = place.now_ms
    decision = place.decision(at_ms=source_ms - ahead_ms)
    if holds:
        assert place.issued(decision).lease.requested_at_ms == source_ms
    else:
        assert place.refused(decision) == (["source_later"], True)
        found = place.weigh(decision)
        assert isinstance(found, Refusal)
        assert found.request is None, "nobody is told whose signature was not looked at"


def test_a_request_by_another_key_or_for_another_domain_is_no_honest_policys(place: Place) -> None:
    stranger = SigningKey.generate(place.ledger.key("bot", "agent").id)
    assert place.refused(place.decision(place.request(stranger))) == (["key_unknown"], True)
    elsewhere = place.decision(place.request(aud="elsewhere.example"), revisions=None)
    assert place.refused(elsewhere) == (["aud_unexpected"], True)
    late = place.request(exp=place.now_ms // 1000 - 1)
    assert place.refused(place.decision(late)) == (["expired"], True)


def test_a_decision_names_the_request_that_it_embeds(place: Place) -> None:
    other = message_id(place.ledger.key("bot", "agent").id, "another")
    assert place.refused(request_id=other) == (["request_mismatch"], True)


def rotated(place: Place) -> tuple[SigningKey, int]:
    """bot's key, replaced, and the second in which it ended."""
    ledger = place.ledger
    old, new = ledger.key("bot", "agent"), SigningKey.generate(ledger.key("bot", "agent").id)
    ledger.keys["agent/bot"] = new
    ledger.give(ledger.claims(AgentRotateKey, "sam", agent_id="bot", key=ledger.key_record(new)))
    agent = ledger.directory.agent("bot")
    assert agent is not None
    return old, next(key.not_after for key in agent.state.keys if key.kid == old.kid)


def test_a_key_that_ended_in_the_second_of_the_request_is_nobodys_fault(place: Place) -> None:
    old, end_s = rotated(place)
    request = place.request(old, iat=end_s - 5, exp=end_s + 300)
    before, within = end_s * 1000 - 1, end_s * 1000 + 999
    now_ms = place.now_ms
    lease = place.issued(place.decision(request, source_ms=before, at_ms=now_ms)).lease
    assert lease.key_thumbprint == old.kid
    assert place.refused(place.decision(request, source_ms=within, at_ms=now_ms)) == (["key_unknown"], False)
    after = place.decision(request, source_ms=within + 1, at_ms=within + 10)
    assert place.refused(after) == (["key_unknown"], True)


def test_another_key_in_that_second_is_somebodys_fault(place: Place) -> None:
    old, end_s = rotated(place)
    stranger = SigningKey.generate(old.id)
    request = place.request(stranger, iat=end_s - 5, exp=end_s + 300)
    decision = place.decision(request, source_ms=end_s * 1000 + 1, at_ms=place.now_ms)
    assert place.refused(decision) == (["key_unknown"], True)
    nobodys = place.request(agent="nobody", iat=end_s - 5, exp=end_s + 300)
    decision = place.decision(nobodys, source_ms=end_s * 1000 + 1, at_ms=place.now_ms, revisions=None)
    assert place.refused(decision) == (["key_unknown"], True)


def test_a_key_that_merely_ran_out_is_somebodys_fault(place: Place) -> None:
    ledger = place.ledger
    key, end_s = SigningKey.generate(f"spiffe://{TD}/agent/brief"), place.now_ms // 1000 + 60
    ledger.keys["agent/brief"] = key
    ledger.give(ledger.register("sam", "brief", "sam", ceiling=(EVERYTHING,), keys=(key.record(end_s),)))
    request = place.request(agent="brief", iat=end_s - 5, exp=end_s + 300)
    decision = place.decision(request, source_ms=end_s * 1000 + 1, revisions=None)
    assert place.refused(decision) == (["key_unknown"], True)


def test_an_embedded_text_that_is_no_request_is_refused(place: Place) -> None:
    decision = place.decision()
    claims = decision.claims.model_copy(update={"request": "a.b.c"})
    found = place.weigh(replace(decision, signed=Signed(claims, decision.signed.compact)))
    assert isinstance(found, Refusal)
    assert ([reason.code for reason in found.reasons], found.finding, found.request) == (
        ["not_a_jws"],
        True,
        None,
    )


# --- times ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("late_ms", "holds"), [(0, True), (1, False)])
def test_a_decision_reaches_kafka_within_an_hour(place: Place, late_ms: int, holds: bool) -> None:
    source_ms = place.now_ms
    at_ms = (source_ms // 1000 + DECISION_LIFE_S) * 1000 + late_ms
    assert DECISION_LIFE_S == 3600
    decision = place.decision(at_ms=at_ms)
    if holds:
        assert place.issued(decision).lease.iat == at_ms // 1000
    else:
        assert place.refused(decision) == (["decision_too_old"], False)


@pytest.mark.parametrize("late_ms", [0, 1])
def test_a_key_that_ended_is_good_for_a_decision_within_an_hour(place: Place, late_ms: int) -> None:
    """When the request came is policy's word, which puts it back into the time of the key no longer than that."""
    assert ENDED_KEY_MS == 3_600_000
    old, end_s = rotated(place)
    request = place.request(old, iat=end_s - 5, exp=end_s + 300)
    source_ms = end_s * 1000 - 1
    at_ms = source_ms + ENDED_KEY_MS + late_ms
    decision = place.decision(request, source_ms=source_ms, at_ms=at_ms, iat=at_ms // 1000)
    if late_ms:
        assert place.refused(decision) == (["key_ended"], False)
    else:
        assert place.issued(decision).lease.key_thumbprint == old.kid


@pytest.mark.parametrize(("late_ms", "code"), [(0, "deadline_too_close"), (1, "key_ended")])
def test_the_key_of_an_instance_that_ended_is_good_no_longer(place: Place, late_ms: int, code: str) -> None:
    """And within that hour for a refusal alone: no lease outlives the enrolment."""
    key = SigningKey.generate(place.ledger.key("bot", "agent").id)
    end_s = place.now_ms // 1000 + 300
    request = place.request(key, enrolment=enrolled(place, key, end_s))
    source_ms = end_s * 1000 - 1
    at_ms = source_ms + ENDED_KEY_MS + late_ms
    decision = place.decision(request, source_ms=source_ms, at_ms=at_ms, iat=at_ms // 1000)
    assert place.refused(decision) == ([code], False)


@pytest.mark.parametrize("late_ms", [0, 1])
def test_where_people_were_asked_it_is_good_for_a_day_more(place: Place, late_ms: int) -> None:
    assert APPROVALS_MS == 86_400_000
    old, end_s = rotated(place)
    request = place.request(old, iat=end_s - 5, exp=end_s + 300, scope=(DEPLOY,))
    approval = place.approval(request)
    source_ms = end_s * 1000 - 1
    at_ms = source_ms + ENDED_KEY_MS + APPROVALS_MS + late_ms
    decision = place.decision(
        request, source_ms=source_ms, at_ms=at_ms, iat=at_ms // 1000, approvals=(approval,)
    )
    codes, finding = place.refused(decision)
    assert ("key_ended" in codes, "task_ended" in codes, finding) == (bool(late_ms), not late_ms, False)


def test_an_instances_key_that_ended_is_good_for_no_longer(place: Place) -> None:
    key, end_s = SigningKey.generate(place.ledger.key("bot", "agent").id), place.now_ms // 1000 + 300
    enrolment = enrolled(place, key, end_s)
    request = place.request(key, iat=end_s - 5, exp=end_s + 300, enrolment=enrolment)
    source_ms = end_s * 1000 - 1
    at_ms = source_ms + ENDED_KEY_MS + 1
    decision = place.decision(request, source_ms=source_ms, at_ms=at_ms, iat=at_ms // 1000)
    assert place.refused(decision) == (["key_ended"], False)


def test_a_key_that_counts_is_good_for_as_long_as_the_request(place: Place) -> None:
    at_ms = place.now_ms + ENDED_KEY_MS + 1
    assert place.issued(at_ms=at_ms, iat=at_ms // 1000).lease.iat == at_ms // 1000


@pytest.mark.parametrize(("late_ms", "codes"), [(0, {"task_ended"}), (1, {"request_too_old"})])
def test_a_request_is_decided_within_days(place: Place, late_ms: int, codes: set[str]) -> None:
    assert REQUEST_LIFE_MS == 518_400_000
    at_ms = place.now_ms + REQUEST_LIFE_MS + late_ms
    found, finding = place.refused(at_ms=at_ms, iat=at_ms // 1000)
    assert (codes <= set(found), finding) == (True, False)
    assert ("request_too_old" in found) == bool(late_ms)


# --- the records that policy saw --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["agent", "user", "task", "target"])
def test_what_policy_saw_and_is_not_here_is_waited_for(place: Place, name: str) -> None:
    seen = place.revisions()
    ahead = seen.model_copy(update={name: getattr(seen, name) + 1})
    decision = place.decision(revisions=ahead)
    found = place.weigh(decision)
    assert isinstance(found, StaleView)
    subject = {
        "agent": "agent bot",
        "user": "user",
        "task": f"task {place.task}",
        "target": "target staging",
    }[name]
    assert f"revision {getattr(ahead, name)} of" in found.reason
    assert subject in found.reason
    assert found.request == parse(decision.claims.request).unverified_claims(CredentialRequest)
    refusal = found.refusal()
    assert [(reason.code, reason.message) for reason in refusal.reasons] == [("stale_view", found.reason)]
    assert (refusal.request, refusal.retry_after_s, refusal.finding) == (found.request, RETRY_AFTER_S, False)
    behind = seen.model_copy(update={name: getattr(seen, name) - 1})
    assert isinstance(place.weigh(place.decision(revisions=behind)), Issue), (
        "an older view of policy's is no harm"
    )


@pytest.mark.parametrize(
    ("missing", "subject"), [("bot", "agent bot"), ("staging", "target staging"), ("uma", "user")]
)
def test_a_record_that_is_not_here_yet_is_waited_for(place: Place, missing: str, subject: str) -> None:
    reader = place.ledger.reader()
    whole = place.ledger.directory
    for kind in ("user", "target", "agent", "task"):
        for entry in whole.entries(kind):
            if entry.record.sub.rpartition("/")[2] != missing:
                place.ledger.admit(
                    place.ledger.sign_record(
                        entry.record.state, entry.record.commands, entry.record.revision
                    ),
                    reader,
                )
    found = place.weigh(directory=reader)
    assert isinstance(found, StaleView)
    if missing != "uma":  # without whom the task's own chain does not hold
        assert subject in found.reason


def test_a_table_that_is_too_old_weighs_nothing(place: Place) -> None:
    stale = place.without(grace_ms=1000)
    reason = stale.stale()
    decision = place.decision()
    found = place.weigh(decision, stale)
    assert reason
    assert found == StaleView(reason, parse(decision.claims.request).unverified_claims(CredentialRequest))
    found = place.weigh(place.decision(place.request(SigningKey.generate(POLICY.id))), stale)
    assert found == StaleView(reason, None)


def test_an_allowed_decision_says_what_it_was_made_on(place: Place) -> None:
    assert place.refused(revisions=None) == (["decision_incomplete"], True)


def test_the_agent_is_told_where_its_own_signature_holds(place: Place) -> None:
    decision = place.decision(ttl_s=601)
    found = place.weigh(decision)
    assert isinstance(found, Refusal)
    assert found.request == parse(decision.claims.request).unverified_claims(CredentialRequest)
    assert found.retry_after_s is None
    assert isinstance(place.weigh(place.decision(place.request(SigningKey.generate(POLICY.id)))), Refusal)


# --- the rule -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "by", "fields", "code"),
    [
        (AgentSuspend, "sam", {"agent_id": "bot", "reason": "x"}, "agent_suspended"),
        (UserDisable, "olga", {"user_id": "uma", "reason": "x"}, "user_disabled"),
        (TargetRemove, "olga", {"target_id": "staging", "reason": "x"}, "target_removed"),
        (AgentSetCeiling, "sam", {"agent_id": "bot", "ceiling": ()}, "beyond_scope"),
    ],
)
def test_what_the_records_say_by_now_counts_and_accuses_who_saw_them(
    place: Place, model: Any, by: str, fields: dict[str, Any], code: str
) -> None:
    before = place.revisions()
    place.ledger.give(place.ledger.claims(model, by, **fields))
    assert place.refused(revisions=before) == ([code], False), "they changed since policy decided"
    assert place.refused() == ([code], True)


def test_an_agent_whose_sponsor_is_disabled_gets_nothing(place: Place) -> None:
    place.ledger.give(place.ledger.claims(UserDisable, "olga", user_id="sam", reason="x"))
    assert place.refused()[0] == ["agent_orphaned"]


def test_the_end_of_the_task_between_request_and_decision_accuses_nobody(place: Place) -> None:
    task = place.ledger.directory.task(place.task)
    assert task is not None
    end_ms = task.state.not_after * 1000
    request = place.request(iat=end_ms // 1000 - 10, exp=end_ms // 1000 + 100)
    codes, finding = place.refused(place.decision(request, source_ms=end_ms - 1, at_ms=end_ms))
    assert (codes, finding) == (["task_ended"], False)
    codes, finding = place.refused(place.decision(request, source_ms=end_ms, at_ms=end_ms))
    assert (codes, finding) == (["task_ended"], True)
    place.ledger.give(place.ledger.claims(TaskEnd, "uma", task_id=place.task, reason="done"))
    assert place.refused() == (["task_ended"], True)


def test_entitlements_past_their_age_count_for_nothing(place: Place) -> None:
    place.terms = replace(place.terms, entitlements_max_age_s=1)
    codes, finding = place.refused()
    assert (codes, finding) == (["beyond_scope"], True)


def test_a_request_for_several_targets_is_none(place: Place) -> None:
    wanted = (READ, permission("x", target="other", verbs=("read",)))
    assert place.refused(place.decision(place.request(scope=wanted))) == (["several_targets"], False)


# --- the terms ------------------------------------------------------------------------------------------------------


def test_a_decision_gives_a_ttl_and_no_more_than_asked_for(place: Place) -> None:
    assert place.refused(ttl_s=None) == (["decision_incomplete"], True)
    assert place.refused(ttl_s=601) == (["ttl_too_long"], True)
    assert place.issued(ttl_s=600).lease.status == "active"


def test_no_lease_outlives_what_the_target_allows(place: Place) -> None:
    place.ledger.clock.ms += 1000
    exact, longer = place.request(ttl_s=MAX_TTL_S), place.request(ttl_s=MAX_TTL_S + 1)
    assert place.issued(place.decision(exact)).lease.deadline == place.now_ms // 1000 + MAX_TTL_S
    assert place.refused(place.decision(longer)) == (["ttl_too_long"], True)
    before = place.revisions()
    place.set_target(max_ttl_s=60)
    assert place.refused(place.decision(exact, revisions=before)) == (["ttl_too_long"], False)


def test_delivery_is_not_changed(place: Place) -> None:
    assert place.refused(delivery="gateway") == (["delivery_changed"], True)


def test_a_reply_goes_to_no_key_that_everybody_has(place: Place) -> None:
    zero = place.reply_key.public.model_copy(update={"kty": "OKP", "crv": "X25519", "x": "A" * 43, "y": None})
    found = place.weigh(place.decision(place.request(reply_key=zero)))
    assert isinstance(found, Refusal)
    (reason,) = found.reasons
    assert (reason.code, found.finding) == ("reply_key_invalid", False)
    assert "X25519" in reason.message


def test_a_kind_of_credential_that_this_issuer_does_not_make(place: Place) -> None:
    place.set_target(backend=BackendSettings(kind="postgres"))
    found = place.weigh()
    assert isinstance(found, Refusal)
    (reason,) = found.reasons
    assert (reason.code, found.finding) == ("backend_unknown", False)
    for part in ("staging", "postgres", "jwt, static"):
        assert part in reason.message


def test_where_no_secret_is_kept_back_all_are_handed_out(place: Place) -> None:
    place.terms = Terms(ISSUER, TD, 30 * 86_400, ("jwt",))
    assert place.issued().lease.delivery == "agent"


def test_a_secret_that_only_gateways_have_is_never_handed_out(place: Place) -> None:
    place.set_target(backend=BackendSettings(kind="static"))
    assert place.refused() == (["delivery_gateway_only"], False)
    assert place.issued(place.decision(place.request(delivery="gateway"))).lease.backend == "static"


# --- approvals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "required", "approvers", "lacks"),
    [
        (READ, (), (), False),
        (DEPLOY, (), (), True),
        (DEPLOY, (), ("sam",), False),
        (DEPLOY, (), ("suzy",), True),
        (WIPE, (), ("olga",), False),
        (WIPE, (), ("sam",), True),
        (READ, ("second_person",), (), True),
        (READ, ("second_person",), ("suzy",), False),
        (DEPLOY, ("operator",), ("sam",), True),
        (DEPLOY, ("operator",), ("sam", "otto"), False),
    ],
)
def test_the_targets_floor_and_what_policy_asked_for_are_met(
    place: Place, wanted: Any, required: tuple[str, ...], approvers: tuple[str, ...], lacks: bool
) -> None:
    request = place.request(scope=(wanted,))
    approvals = tuple(place.approval(request, by) for by in approvers)
    decision = place.decision(request, required=required, approvals=approvals)
    if lacks:
        assert place.refused(decision) == (["approval_lacking"], True)
    else:
        assert place.issued(decision).lease.scope == (wanted,)


def test_a_floor_that_came_since_accuses_nobody(place: Place) -> None:
    before = place.revisions()
    place.set_target(verbs=(VerbFloor(verb="read", floor="sponsor"),))
    assert place.refused(revisions=before) == (["approval_lacking"], False)


def test_what_is_lacking_is_named(place: Place) -> None:
    found = place.weigh(required=("operator", "second_person"))
    assert isinstance(found, Refusal)
    assert "second_person, operator" in found.reasons[0].message


Change = Callable[[Place, str], str]


@pytest.mark.parametrize(
    ("change", "code", "finding"),
    [
        (lambda place, request: place.approval(place.request(scope=(DEPLOY,))), "approval_other_request", True),
        (lambda place, request: place.approval(request, verdict="denied"), "approval_denied", True),
        (lambda place, request: place.approval(request, ttl_s=60), "approval_other_terms", True),
        (lambda place, request: place.approval(request, delivery="gateway"), "approval_other_terms", True),
        (
            lambda place, request: place.approval(request, revisions=place.revisions(policy="q")),
            "approval_stale", True,
        ),
        (
            lambda place, request: place.approval(
                request, iat=place.now_ms // 1000 - 400, exp=place.now_ms // 1000 - APPROVAL_SLACK_MS // 1000 - 1
            ),
            "approval_expired", False,
        ),
        (
            lambda place, request: place.approval(request, key=SigningKey.generate(place.ledger.key("sam").id)),
            "approval_invalid", True,
        ),
        (lambda place, request: place.approval(request, aud="elsewhere.example"), "approval_invalid", True),
        (lambda place, request: request, "approval_invalid", True),
    ],
)  # fmt: skip
def test_an_approval_that_does_not_stand(place: Place, change: Change, code: str, finding: bool) -> None:
    request = place.request(scope=(DEPLOY,))
    decision = place.decision(request, approvals=(change(place, request),))
    assert place.refused(decision) == ([code], finding)


def test_all_problems_are_named_and_one_that_is_no_end_accuses(place: Place) -> None:
    request = place.request(scope=(DEPLOY,))
    ended = place.approval(
        request, iat=place.now_ms // 1000 - 400, exp=place.now_ms // 1000 - APPROVAL_SLACK_MS // 1000 - 1
    )
    denied = place.approval(request, "suzy", verdict="denied")
    decision = place.decision(request, approvals=(ended, denied, place.approval(request)))
    assert place.refused(decision) == (["approval_expired", "approval_denied"], True)
    before = place.revisions()
    place.set_target(description="another")
    decision = place.decision(request, approvals=(denied,), revisions=before)
    assert place.refused(decision) == (["approval_denied"], False), "the records changed since"


def test_an_approval_by_a_key_that_counts_no_more_is_none(place: Place) -> None:
    request = place.request(scope=(DEPLOY,))
    approval = place.approval(request)
    at_ms = place.now_ms
    before = place.issued(place.decision(request, source_ms=at_ms, approvals=(approval,)))
    assert before.lease.scope == (DEPLOY,)
    ledger = place.ledger
    ledger.give(
        ledger.user_set(
            "olga",
            "sam",
            ["sponsor"],
            keys=(ledger.key_record(SigningKey.generate(f"spiffe://{TD}/user/sam")),),
        )
    )
    assert place.refused(place.decision(request, source_ms=at_ms, approvals=(approval,)))[0] == [
        "approval_invalid"
    ]


# --- passkeys -------------------------------------------------------------------------------------------------------


@pytest.fixture
def passkey(place: Place) -> SoftwarePasskey:
    """A passkey that sam has added by their key file."""
    made = new_passkey("sam")
    place.ledger.give(add_key(place.ledger, "sam", "sam", made))
    return made


def by_passkey(place: Place, passkey: SoftwarePasskey, *, answered_ms: int | None, **fields: Any) -> Decision:
    """A decision by an approval that was appended at `answered_ms`, as policy says; None: policy does not say."""
    request = place.request(scope=(DEPLOY,))
    approval = place.approval(request, key=passkey, exp=place.now_ms // 1000 + 7200)
    times = None if answered_ms is None else {digest(approval): answered_ms}
    return place.decision(request, approvals=(approval,), answers_at_ms=times, **fields)


def test_an_approval_by_a_passkey_is_judged_by_its_own_append_time(
    place: Place, passkey: SoftwarePasskey
) -> None:
    """The decision may come later: another person was asked too."""
    signed_ms = place.now_ms // 1000 * 1000
    for answered_ms in (signed_ms, signed_ms + MAX_AGE_S * 1000):
        decision = by_passkey(
            place,
            passkey,
            answered_ms=answered_ms,
            at_ms=signed_ms + 2 * MAX_AGE_S * 1000,
            iat=signed_ms // 1000,
        )
        assert place.issued(decision).lease.scope == (DEPLOY,)


@pytest.mark.parametrize(
    ("after_ms", "says"),
    [
        (None, "does not say when the passkey's answer was appended"),
        (MAX_AGE_S * 1000 + 1, "after the passkey signed it"),
        (-31_000, "ahead of the broker"),
    ],
)
def test_an_approval_by_a_passkey_that_came_at_another_time_is_none(
    place: Place, passkey: SoftwarePasskey, after_ms: int | None, says: str
) -> None:
    signed_ms = place.now_ms // 1000 * 1000
    answered_ms = None if after_ms is None else signed_ms + after_ms
    decision = by_passkey(place, passkey, answered_ms=answered_ms, at_ms=signed_ms + 3_000_000)
    refused = place.weigh(decision)
    assert isinstance(refused, Refusal)
    assert refused.finding
    assert refused.reasons[0].code == "approval_invalid"
    assert says in refused.reasons[0].message


def test_an_approval_does_not_come_after_its_decision(place: Place, passkey: SoftwarePasskey) -> None:
    for ahead_ms, holds in ((SKEW_MS, True), (SKEW_MS + 1, False)):
        at_ms = place.now_ms + 5
        decision = by_passkey(place, passkey, answered_ms=at_ms + ahead_ms, at_ms=at_ms)
        found = place.weigh(decision)
        assert isinstance(found, Issue) == holds, found


def test_policy_cannot_give_a_key_file_another_time(place: Place, passkey: SoftwarePasskey) -> None:
    """Only passkeys are judged by it: an ended key file is not brought back into its time."""
    request = place.request(scope=(DEPLOY,))
    approval = place.approval(request)
    before_ms = place.now_ms
    place.ledger.give(end_key(place.ledger, "olga", "sam", place.ledger.key("sam").kid))
    times = {digest(approval): before_ms}
    decision = place.decision(
        request, source_ms=before_ms, at_ms=place.now_ms, approvals=(approval,), answers_at_ms=times
    )
    assert place.refused(decision)[0] == ["approval_invalid"]


def test_an_ended_passkey_is_good_for_no_decision(place: Place, passkey: SoftwarePasskey) -> None:
    request = place.request(scope=(DEPLOY,))
    approval, answered_ms = place.approval(request, key=passkey), place.now_ms
    times = {digest(approval): answered_ms}
    how: dict[str, Any] = {"source_ms": answered_ms, "approvals": (approval,), "answers_at_ms": times}
    assert place.issued(place.decision(request, **how)).lease.scope == (DEPLOY,)
    place.ledger.give(end_key(place.ledger, "sam", "sam", passkey.kid))
    assert place.refused(place.decision(request, at_ms=place.now_ms, **how))[0] == ["approval_invalid"]


def test_an_origin_that_ended_after_the_approval_does_not_matter(
    place: Place, passkey: SoftwarePasskey
) -> None:
    at_ms = place.now_ms
    before = by_passkey(place, passkey, answered_ms=at_ms, at_ms=at_ms + 5000)
    after = by_passkey(place, passkey, answered_ms=at_ms + 2000, at_ms=at_ms + 5000)
    sign_origin = ORIGINS[0].model_copy(update={"not_after": at_ms // 1000 + 1})
    bundle = place.ledger.trust.require().model_copy(update={"version": 2, "origins": (sign_origin,)})
    place.ledger.trust.load(sign(bundle, place.ledger.root, header_jwk=True), at_ms / 1000)
    assert place.issued(before).lease.scope == (DEPLOY,)
    assert place.refused(after)[0] == ["approval_invalid"]


def test_a_plain_approval_by_a_passkeys_key_is_none(place: Place, passkey: SoftwarePasskey) -> None:
    request = place.request(scope=(DEPLOY,))
    approval = place.approval(request, key=passkey.plain())
    for times in (None, {digest(approval): place.now_ms}):
        decision = place.decision(request, approvals=(approval,), answers_at_ms=times)
        assert place.refused(decision) == (["approval_invalid"], True)


# --- keys that somebody else added ------------------------------------------------------------------------------------


def test_a_key_that_waits_opens_nothing_by_approval_or_grant(place: Place) -> None:
    """Honest policy may have decided before it knew of the key; never after."""
    lent = new_key("sam")
    place.ledger.give(add_key(place.ledger, "olga", "sam", lent))
    added_ms = place.ledger.directory.key_history("sam").origins[lent.kid].added_ms
    request = place.request(scope=(DEPLOY,))
    for source_ms, finding in ((added_ms, False), (added_ms + 1, True)):
        decision = place.decision(
            request, source_ms=source_ms, approvals=(place.approval(request, key=lent),)
        )
        assert place.refused(decision) == (["key_too_new"], finding)
    before = place.revisions(target=0)
    decision = place.decision(request, approvals=(place.approval(request, key=lent),), revisions=before)
    assert place.refused(decision) == (["key_too_new"], False), "records changed, so policy saw others"
    grant = sign(parse(place.grant()).unverified_claims(Grant), lent)
    assert place.refused(place.decision(request, grants=(grant,))) == (["key_too_new"], True)
    assert place.issued(place.decision(request, approvals=(place.approval(request),))).lease.scope == (
        DEPLOY,
    )


def test_a_key_whose_voucher_was_compromised_since_is_no_fault_of_policys(place: Place) -> None:
    lent = new_key("sam")
    place.ledger.give(add_key(place.ledger, "otto", "sam", lent, cosigned="olga"))
    request = place.request(scope=(DEPLOY,))
    how: dict[str, Any] = {"approvals": (place.approval(request, key=lent),)}
    assert place.issued(place.decision(request, **how)).lease.scope == (DEPLOY,)
    kid = place.ledger.key("otto").kid
    place.ledger.give(end_key(place.ledger, "otto", "otto", kid, compromised=True))
    assert place.refused(place.decision(request, **how)) == (["key_voucher_compromised"], False)


def test_a_floor_for_a_kind_of_key_holds_whatever_policy_says(place: Place, passkey: SoftwarePasskey) -> None:
    kinds: tuple[tuple[Literal["attested", "file"], SigningKey], ...] = (
        ("attested", passkey), ("attested", place.ledger.key("sam")), ("file", passkey),
    )  # fmt: skip
    for kind, key in kinds:
        place.set_target(verbs=(VerbFloor(verb="read"), VerbFloor(verb="deploy", floor="sponsor", key=kind)))
        request = place.request(scope=(DEPLOY,))
        approval = place.approval(request, key=key)
        times = {digest(approval): place.now_ms} if key is passkey else None
        decision = place.decision(request, approvals=(approval,), answers_at_ms=times)
        assert place.refused(decision) == ([f"key_not_{kind}"], True)


def test_a_grant_by_a_passkey_outlasts_the_ten_minutes(place: Place, passkey: SoftwarePasskey) -> None:
    claims = (
        parse(place.grant()).unverified_claims(Grant).model_copy(update={"exp": place.now_ms // 1000 + 7200})
    )
    grant, given_ms = sign(claims, passkey), place.now_ms
    later_ms = given_ms + 2 * MAX_AGE_S * 1000
    place.ledger.clock.ms = later_ms
    request = place.request(scope=(DEPLOY,))
    decision = place.decision(request, grants=(grant,), answers_at_ms={digest(grant): given_ms})
    assert place.issued(decision).grants == (claims,)
    late = place.decision(request, grants=(grant,), answers_at_ms={digest(grant): later_ms})
    assert place.refused(late)[0] == ["approval_invalid"]


def test_a_grant_stands_in_for_the_approval_and_the_lease_names_it(place: Place) -> None:
    grant = place.grant()
    issue = place.issued(place.decision(place.request(scope=(DEPLOY,)), grants=(grant,)))
    claims = parse(grant).unverified_claims(Grant)
    assert issue.grants == (claims,)
    assert issue.lease.grants == (id_of(claims),)


@pytest.mark.parametrize(
    ("fields", "code", "finding"),
    [
        ({"task_id": "00000000-0000-5000-8000-000000000000"}, "grant_other_task", True),
        ({"ttl_s": 599}, "grant_other_terms", True),
        ({"delivery": "gateway"}, "grant_other_terms", True),
        ({"scope": (READ,)}, "grant_other_scope", True),
        ({"ended": True}, "grant_ended", False),
        ({"policy": "q"}, "grant_stale", True),
    ],
)
def test_a_grant_that_does_not_stand(place: Place, fields: dict[str, Any], code: str, finding: bool) -> None:
    now_s = place.now_ms // 1000
    if fields.pop("ended", False):
        fields = {"iat": now_s - 100, "exp": now_s}
    if policy := fields.pop("policy", None):
        fields = {"revisions": place.revisions(policy=policy)}
    decision = place.decision(place.request(scope=(DEPLOY,)), grants=(place.grant(**fields),))
    assert place.refused(decision) == ([code], finding)


def test_break_glass_takes_two_operators_and_ends_soon(place: Place) -> None:
    def decided(ttl_s: int, *approvers: str) -> Decision:
        request = place.request(break_glass=True, ttl_s=ttl_s)
        return place.decision(request, approvals=tuple(place.approval(request, by) for by in approvers))

    assert BREAK_GLASS_TTL_S < MAX_TTL_S
    lease = place.issued(decided(BREAK_GLASS_TTL_S, "olga", "otto")).lease
    assert lease.break_glass is True
    assert place.refused(decided(BREAK_GLASS_TTL_S + 1, "olga", "otto")) == (["ttl_too_long"], True)
    assert place.refused(decided(60, "olga")) == (["approval_lacking"], True)
    assert place.refused(decided(60, "olga", "sam")) == (["approval_lacking"], True)


# --- records that do not hold, and codes ------------------------------------------------------------------------------


class Distrusting:
    """A directory in which a record of one kind does not hold."""

    def __init__(self, directory: Directory, *kinds: str) -> None:
        self._directory, self._kinds = directory, kinds

    def __getattr__(self, name: str) -> Any:
        if name in self._kinds:
            return self._fail
        return getattr(self._directory, name)

    def _fail(self, *_: Any, **__: Any) -> Any:
        raise ChainError("the chain of x does not hold")


def distrusted(place: Place, decision: Decision, *kinds: str) -> Refusal:
    found = weigh(decision, cast(Directory, Distrusting(place.ledger.directory, *kinds)), place.terms)
    assert isinstance(found, Refusal)
    assert not found.finding, "a registry may lie, or a record be on its way"
    return found


def test_a_record_that_does_not_hold_refuses_whichever_it_is(place: Place) -> None:
    request = place.request(scope=(DEPLOY,))
    decision = place.decision(request, approvals=(place.approval(request),))
    # The agent's key, the approver's key, the approver's roles: each rests on a record of its own.
    for kinds in (("agent_key",), ("user_key",)):
        (reason,) = distrusted(place, decision, *kinds).reasons
        assert (reason.code, reason.message) == ("record_untrusted", "the chain of x does not hold")


def test_a_record_that_does_not_hold_yet_is_waited_for(place: Place) -> None:
    directory = cast(Directory, Distrusting(place.ledger.directory, "task"))
    found = weigh(place.decision(), directory, place.terms)
    assert isinstance(found, StaleView)
    assert found.reason == "the chain of x does not hold"


def test_a_key_of_an_agent_whose_record_does_not_hold_was_not_replaced(place: Place) -> None:
    stranger = SigningKey.generate(place.ledger.key("bot", "agent").id)
    decision = place.decision(place.request(stranger), revisions=None)
    found = weigh(decision, cast(Directory, Distrusting(place.ledger.directory, "agent")), place.terms)
    assert isinstance(found, Refusal)
    assert ([reason.code for reason in found.reasons], found.finding) == (["key_unknown"], True)


def test_a_refusal_says_what_the_task_leaves(place: Place) -> None:
    task = place.ledger.directory.task(place.task)
    assert task is not None
    late_ms = (task.state.not_after - 1) * 1000 + 1
    request = place.request(iat=late_ms // 1000 - 5, exp=late_ms // 1000 + 100)
    found = place.weigh(place.decision(request, source_ms=late_ms - 1000, at_ms=late_ms))
    assert isinstance(found, Refusal)
    assert found.reasons[0].code == "deadline_too_close"
    assert "task" in found.reasons[0].message


# --- what the issuer says of the rest -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mark", "what"),
    [("agent:bot", "agent bot was"), ("all", "all was"), ("task:a:b", "task a:b was")],
)
def test_what_was_revoked_before_the_lease_was_there_is_named(mark: str, what: str) -> None:
    (reason,) = fenced(mark)
    assert reason.code == "fenced"
    assert reason.message.startswith(what)


def test_a_backend_that_cannot_says_why_to_the_agent(place: Place) -> None:
    request = place.issued().request
    refusal = cannot("no such role " + "x" * 4000, request)
    assert refusal.request is request
    (reason,) = refusal.reasons
    assert reason.code == "backend_cannot"
    assert reason.message.startswith("no such role xxx")
    assert len(reason.message) == 2048
    assert (refusal.finding, refusal.retry_after_s) == (False, None)


def test_while_it_is_halted_nothing_is_issued_and_no_forged_request_is_answered(place: Place) -> None:
    halted = Reason(code="revoker_halted", message="a revoker stands still")
    decision = place.decision()
    found = weigh(decision, place.ledger.directory, place.terms, halted)
    request = parse(decision.claims.request).unverified_claims(CredentialRequest)
    assert found == Refusal((halted,), request, finding=False, retry_after_s=30)
    stranger = SigningKey.generate(place.ledger.key("bot", "agent").id)
    forged = weigh(place.decision(place.request(stranger)), place.ledger.directory, place.terms, halted)
    assert isinstance(forged, Refusal)
    assert ([reason.code for reason in forged.reasons], forged.request) == (["key_unknown"], None)


def test_codes_that_agents_know() -> None:
    assert [reason.code for reason in (*LATE, *FULL, *OVER)] == [
        "deadline_passed",
        "overloaded",
        "lease_ended",
    ]
    assert (RETRY_AFTER_S, FULL_RETRY_S) == (1, 5)
    assert SKEW_MS == 1000
