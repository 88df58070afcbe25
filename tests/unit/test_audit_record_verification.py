"""What audit verifies before an event names anybody: signatures, replays, times, and what it cannot read."""

from __future__ import annotations

import base64
import json

import pytest

from ringfence.audit.events import credentials, kinds, ocsf
from ringfence.kernel.base.ids import derived_id, message_id
from ringfence.kernel.crypto.jwe import EncryptionKey, enclose
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import PublicKey, SigningKey
from ringfence.messages.approval import ApprovalRequest
from ringfence.messages.audit import IntakeEntry
from ringfence.messages.base import Permission
from ringfence.messages.lease import EndCause, RevocationAck, RevocationRequest, Selector
from ringfence.messages.topics import (
    APPROVAL_REQUEST,
    AUDITED,
    CREDENTIAL_REPLY,
    CREDENTIAL_REQUEST,
    DEAD_LETTER,
    LEASE,
    REVOCATION_ACK,
    REVOCATION_REQUEST,
)
from tests.support.audit_fixtures import AuditFixtures, steps
from tests.support.audit_records import unbelievable


@pytest.fixture
def office() -> AuditFixtures:
    office = AuditFixtures()
    office.staff()
    return office


# --- seen, not believed ---


async def test_unverified_record_is_attributed_to_its_coordinates_only(
    office: AuditFixtures,
) -> None:
    records = unbelievable(office)
    named = ("deploy-bot", "sam", "maria", "registry/", "service/", "agent/", "user/")
    for name, record in records.items():
        if name.startswith(("garbage", "forged", "record of", "deleted")):
            event = await office.event(record)
            assert steps([event]) == ["record.not_believed"], name
            assert (event["class_uid"], event["status"]) == (3002, "Failure")
            assert event["severity_id"] >= 3, name
            assert event["user"]["name"] == "unknown"
            assert "actor" not in event
            assert event["unmapped"]["verified"] == {"by": None}
            assert not [word for word in named if word in json.dumps(event)], name


async def test_malformed_records_on_followed_topics_are_dead_lettered_by_audit(office: AuditFixtures) -> None:
    for topic in AUDITED:
        await office.audit(office.received(topic, b"\x00\xff", key="deploy-bot"))
    assert {what for what, _ in office.buried} == {
        "trust", "approval.request", "lease", "credential.reply", "revocation.ack", "service.event", "action",
        "run.order",
    }  # fmt: skip
    assert all(code in ("not_a_jws", "not_json", "not_a_jwe") for _, code in office.buried)


async def test_the_word_of_a_gateway_that_is_none_is_buried(office: AuditFixtures) -> None:
    thief = SigningKey.generate(office.key("service", "gateway").id)
    ack = office.claims(RevocationAck, thief, revocation_id="x", cut_at_ms=office.now_ms)
    await office.audit(office.signed(REVOCATION_ACK, ack, thief))
    assert office.buried == [("revocation.ack", "key_unknown")]


async def test_forgeries_are_alerts_and_noise_is_not(office: AuditFixtures) -> None:
    records = unbelievable(office)
    forged = await office.event(records["forged request"])
    noise = await office.event(records["garbage on credential.request"])
    assert (forged["severity"], forged["is_alert"]) == ("High", True)
    assert (noise["severity"], noise.get("is_alert")) == ("Medium", None)
    lie = await office.event(records["record of a lying registry"])
    assert (lie["severity"], lie["status_code"]) == ("High", "chain_broken")


async def test_an_event_quotes_nothing_of_what_a_stranger_wrote(office: AuditFixtures) -> None:
    """A secret pasted into a header or a key must not end in the SIEM."""
    secret = "hunter2-hunter2-hunter2"
    header = base64.urlsafe_b64encode(
        json.dumps({"alg": "ES256", "kid": secret, "typ": secret}).encode()
    ).rstrip(b"=")
    record = office.received(CREDENTIAL_REQUEST, header + b".e30.e30", key=secret)
    event = await office.event(record)
    assert steps([event]) == ["record.not_believed"]
    assert secret not in json.dumps(event)
    assert secret not in office.published.keys[-1]


def test_a_key_of_any_length_makes_an_event_that_can_be_handed_over(office: AuditFixtures) -> None:
    """Whoever may write to a topic chooses the ids that findings are about; a key on `audit.intake` has a bound."""
    record = office.received(DEAD_LETTER, b"")
    told = ocsf.event(record, kinds.DEAD_LETTER, "told", {}, {}, ocsf.EventContext("k" * 5000))
    IntakeEntry(key=told.key, event=told.body)


async def test_an_expired_request_is_its_signers_and_counts_for_nothing(office: AuditFixtures) -> None:
    old = office.request(iat=office.now_ms // 1000 - 900, exp=office.now_ms // 1000 - 600)
    bot = office.key("agent", "deploy-bot")
    event = await office.event(office.signed(CREDENTIAL_REQUEST, old, bot))
    assert steps([event]) == ["message.expired"]
    assert (event["user"]["name"], event["status"], event["status_code"]) == (
        "deploy-bot",
        "Failure",
        "expired",
    )
    assert event["unmapped"]["sponsor"] == "sam"
    assert event["unmapped"]["request"] == message_id(bot.id, old.jti)


async def test_a_request_that_was_verified_where_it_is_embedded_is_not_verified_once_more(
    office: AuditFixtures, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = office.credential(approved=False)
    expected = await office.audit(story.request)
    office.restart()
    await office.audit(story.allowed)
    looked_at: list[bytes] = []
    verifies = PublicKey.verifies

    def counted(key: PublicKey, signature: bytes, data: bytes) -> bool:
        looked_at.append(data)
        return verifies(key, signature, data)

    monkeypatch.setattr(PublicKey, "verifies", counted)
    assert await office.audit(story.request) == expected
    assert looked_at == []
    another = story.request_jws[:-1] + ("A" if story.request_jws[-1] != "A" else "Q")
    event = await office.event(office.received(CREDENTIAL_REQUEST, another))
    assert looked_at, "its text is another one"
    assert steps([event]) == ["record.not_believed"]


async def test_a_key_that_has_ended_signs_no_request_though_it_was_verified_where_it_is_embedded(
    office: AuditFixtures,
) -> None:
    story = office.credential(approved=False)
    await office.audit(story.allowed)
    late = story.request._replace(appended_at_ms=office.now_ms + 2 * 86_400_000)
    event = await office.event(late)
    assert (steps([event]), event["status_code"]) == (["record.not_believed"], "key_unknown")


async def test_a_replay_is_told_and_blamed_on_nobody(office: AuditFixtures) -> None:
    story = office.credential()
    first, again = await office.audit(
        story.request, office.received(CREDENTIAL_REQUEST, story.request_jws, partition=1)
    )
    assert steps([first, again]) == ["credential.requested", "message.replayed"]
    assert again["user"]["name"] == "unknown"
    assert "actor" not in again
    assert again["unmapped"]["first_seen"] == {"partition": 0, "offset": story.request.offset}
    assert (again["unmapped"]["agent"], again["unmapped"]["request"]) == ("deploy-bot", story.request_id)
    assert again["unmapped"]["verified"]["by"] == office.key("agent", "deploy-bot").id


async def test_another_request_with_the_same_jti_is_a_replay_and_takes_nobodys_place(
    office: AuditFixtures,
) -> None:
    bot = office.key("agent", "deploy-bot")
    story = office.credential()
    wider = story.request_claims.model_copy(
        update={"scope": (Permission(target="staging", verbs=("read",), resources=("**",)),)}
    )
    _, other, allowed = await office.audit(
        story.request, office.signed(CREDENTIAL_REQUEST, wider, bot), story.allowed
    )
    assert steps([other]) == ["message.replayed"]
    assert allowed["privileges"] == ["staging:deploy:env/staging/*"]


async def test_a_record_that_a_service_published_twice_is_no_alarm(office: AuditFixtures) -> None:
    story = office.credential()
    await office.audit(*story.all)
    again = await office.event(office.received(LEASE, story.ended.value, key=story.lease_id))
    assert (steps([again]), again["severity"], again["status"]) == (
        ["message.repeated"],
        "Informational",
        "Success",
    )


async def test_another_record_of_a_service_with_the_same_jti_is_an_alarm(office: AuditFixtures) -> None:
    story = office.credential()
    await office.audit(*story.all)
    issuer = office.key("service", "issuer")
    one = story.lease("active", 1, issuer, jti="same")
    two = story.lease("expired", 9, issuer, jti="same")
    assert steps(await office.audit(one, two)) == ["credential.issued", "message.replayed"]


async def test_the_word_of_a_gateway_says_what_it_is_about_where_the_order_was_seen(
    office: AuditFixtures,
) -> None:
    sam, gateway = office.key("user", "sam"), office.key("service", "gateway")
    ask = office.claims(
        RevocationRequest, sam, kind="revocation", selector=Selector(agent_id="deploy-bot"), reason="x"
    )
    id = derived_id("revocation", ask.iss, ask.jti)
    ack = office.claims(RevocationAck, gateway, revocation_id=id, cut_at_ms=office.now_ms)
    word = office.signed(REVOCATION_ACK, ack, gateway)
    early, _, known = await office.audit(
        office.signed(REVOCATION_ACK, ack.model_copy(update={"jti": "other"}), gateway),
        office.signed(REVOCATION_REQUEST, ask, sam),
        word,
    )
    assert steps([early, known]) == ["cut.confirmed", "cut.confirmed"]
    assert "agent" not in early["unmapped"]
    said = {word: known["unmapped"][word] for word in ("agent", "revocation", "confirmed_by", "cut_at_ms")}
    assert said == {
        "agent": "deploy-bot", "revocation": ask.jti, "confirmed_by": gateway.id, "cut_at_ms": ack.cut_at_ms,
    }  # fmt: skip
    assert known["user"]["name"] == "deploy-bot"


async def test_only_a_gateway_gives_the_word_of_a_gateway(office: AuditFixtures) -> None:
    revoker = office.key("service", "revoker")
    ack = office.claims(RevocationAck, revoker, revocation_id="x", cut_at_ms=1)
    assert steps(await office.audit(office.signed(REVOCATION_ACK, ack, revoker))) == ["record.not_believed"]


async def test_an_end_that_came_too_late_is_told_as_void_and_the_one_that_counts_as_the_end(
    office: AuditFixtures,
) -> None:
    story = office.credential()
    await office.audit(*story.all[:-1])
    revoker = office.key("service", "revoker")
    deadline = EndCause(kind="deadline", at_ms=office.now_ms)
    marker = office.epoch("2.bbbbbbbb")
    one = story.lease("ending", 2, revoker, jti="a.2", epoch="1.aaaaaaaa")
    two = story.lease("expired", 2, revoker, jti="a.2", epoch="2.bbbbbbbb", cause=deadline)
    begun, void, end = await office.audit(marker, one, two)
    assert steps([begun, void, end]) == ["lease.epoch", "lease.void", "lease.expired"]
    assert void["unmapped"]["epoch"] == "1.aaaaaaaa"
    # A batch that comes again tells the same.
    assert await office.audit(one) == [void]


async def test_an_end_that_is_said_again_in_a_later_epoch_is_no_other(office: AuditFixtures) -> None:
    story = office.credential()
    await office.audit(*story.all[:-1])
    revoker = office.key("service", "revoker")
    fields = {"jti": "a.2", "iat": 1, "cause": EndCause(kind="deadline", at_ms=office.now_ms)}
    told = await office.audit(
        office.epoch("1.aaaaaaaa"),
        story.lease("expired", 2, revoker, epoch="1.aaaaaaaa", **fields),
        office.epoch("2.bbbbbbbb"),
        story.lease("expired", 2, revoker, epoch="2.bbbbbbbb", **fields),
    )
    assert steps(told) == ["lease.epoch", "lease.expired", "lease.epoch", "message.repeated"]


async def test_a_decision_over_a_request_that_does_not_verify_names_no_agent(office: AuditFixtures) -> None:
    thief = SigningKey.generate(office.key("agent", "deploy-bot").id)
    story = office.credential()
    forged = sign(story.request_claims, thief)
    _, event = await office.audit(story.request, story.decision("allowed", request=forged))
    assert steps([event]) == ["request.allowed"]
    assert "agent" not in event["unmapped"]
    assert event["user"]["name"] == "unknown"
    assert "embedded" not in event["unmapped"]["verified"]


async def test_an_approval_request_is_the_word_of_policy_alone(office: AuditFixtures) -> None:
    story = office.credential()
    event = await office.event(story.asked)
    policy = office.key("service", "policy")
    assert event["unmapped"]["verified"]["by"] == policy.id
    assert event["unmapped"]["verified"]["embedded"] == ["credential.request"]
    assert event["actor"]["user"]["uid"] == policy.id
    assert event["unmapped"]["asked"] == "sam"


async def test_a_request_by_a_key_of_before_is_not_made_one_of_then_by_who_can_write(
    office: AuditFixtures,
) -> None:
    """The time in a question says which key of the agent counted: whoever had an old one would choose it."""
    story = office.credential()
    asked = parse(story.asked.value).unverified_claims(ApprovalRequest)
    early = asked.source.model_copy(update={"appended_at_ms": 1})
    forged = asked.model_copy(update={"source": early, "jti": "another"})
    plain = forged.model_dump_json(exclude_none=True)
    for value in (plain, sign(forged, office.key("agent", "deploy-bot"))):
        event = await office.event(office.received(APPROVAL_REQUEST, value, key="sam"))
        assert steps([event]) == ["record.not_believed"]


async def test_a_reply_is_told_by_its_request_and_never_opened(office: AuditFixtures) -> None:
    story = office.credential()
    await office.audit(story.request)
    event = await office.event(story.reply)
    assert event["unmapped"]["request"] == story.request_id
    assert event["unmapped"]["verified"] == {"by": None}
    for junk in (b"a.b.c.d.e", b"eyJraWQiOiJ4In0.b.c.d.e", b"eyJraWQiOlsxXX0.b.c.d.e"):
        event = await office.event(office.received(CREDENTIAL_REPLY, junk))
        assert steps([event]) == ["record.not_believed"]


async def test_a_delivery_to_gateways_is_told_by_its_request_and_never_opened(office: AuditFixtures) -> None:
    story = office.credential()
    await office.audit(story.request)
    keys = [EncryptionKey.generate(f"spiffe://acme.example/service/{name}") for name in ("b", "a")]
    to = [key.record(2**40) for key in keys]
    event = await office.event(
        office.received(CREDENTIAL_REPLY, enclose(b"a canary", to, about=story.request_id))
    )
    assert steps([event]) == ["delivery.sent"]
    assert event["unmapped"]["request"] == story.request_id
    assert event["unmapped"]["agent"] == "deploy-bot"
    assert event["unmapped"]["sealed_to"] == sorted(key.kid for key in keys)
    for junk in (b"{", b"{}", b'{"recipients": [], "protected": 1}', enclose(b"x", to, about="x").encode()):
        event = await office.event(office.received(CREDENTIAL_REPLY, junk))
        assert steps([event]) == ["record.not_believed"]


async def test_a_record_that_audit_itself_cannot_describe_is_told_and_passed(
    office: AuditFixtures, monkeypatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    story = office.credential()
    with monkeypatch.context() as patch:
        patch.setattr(credentials, "requested", broken)
        event = await office.event(story.request)
    assert (steps([event]), event["status_code"]) == (["record.not_believed"], "unreadable")
    assert steps(await office.audit(story.allowed)) == ["request.allowed"]
