"""What is said of the end of a lease to those outside, who may hear it, and what waits for who polls."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import jwt
import pytest

from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.base.errors import SettingsError
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.lease import EndCause, Lease
from ringfence.signals.events import (
    SESSION_REVOKED,
    UnsignedSet,
    has_ended,
    is_removed,
    removed_without,
    session_revoked,
    sign_set,
    subject_of,
)
from ringfence.signals.push import MAX_SETS_PER_POLL, Window
from ringfence.signals.requests import (
    InvalidRequestError,
    PollRequest,
    Receiver,
    SubjectChange,
    parse_request,
    read_receivers,
)
from ringfence.signals.settings import SignalsSettings
from tests.support.leases import lease

TD = "acme.example"
STREAM = "6ba7b811-9dad-41d1-80b4-00c04fd430c8"


def ended(kind: str = "revocation", status: str = "ending", by: str | None = None, **fields: object) -> Lease:
    cause = EndCause(kind=kind, at_ms=1_700_000_000_999, by=by, ref="order", reason="s3cret")  # type: ignore[arg-type]
    return lease(status=status, cause=cause, **fields).claims


def event_of(one: Lease, stream_id: str = STREAM, appended_at_ms: int = 1_700_000_005_000) -> UnsignedSet:
    return session_revoked(
        one,
        stream_id=stream_id,
        issuer="https://signals.acme.example",
        audience="https://billing.example",
        trust_domain=TD,
        appended_at_ms=appended_at_ms,
    )


@pytest.mark.parametrize("status", ["ending", "released", "revoked", "expired"])
def test_every_end_is_one(status: str) -> None:
    assert has_ended(ended(status=status))


@pytest.mark.parametrize("one", [ended("mint_failed", "aborted"), ended("mint_failed", "ending")])
def test_failed_minting_is_no_session_end(one: Lease) -> None:
    assert not has_ended(one)


@pytest.mark.parametrize("status", ["minting", "active"])
def test_live_lease_has_not_ended(status: str) -> None:
    assert not has_ended(lease(status=status).claims)


def test_the_cut_and_what_follows_it_are_one_event_in_each_stream() -> None:
    cut = ended()
    over = cut.model_copy(update={"status": "revoked", "seq": cut.seq + 1})
    assert event_of(cut).jti == event_of(over, appended_at_ms=1_700_000_009_000).jti
    assert event_of(cut).claims == event_of(over).claims
    assert event_of(cut).jti != event_of(cut, stream_id="another").jti
    assert event_of(cut).jti != event_of(ended()).jti
    assert event_of(cut).claims["txn"] == event_of(ended()).claims["txn"]  # one order ended both


def test_an_event_says_who_and_why_and_quotes_nobody() -> None:
    claims = event_of(ended()).claims
    assert "s3cret" not in json.dumps(claims)
    assert {"exp", "sub"}.isdisjoint(claims)
    assert claims["events"] == {
        SESSION_REVOKED: {
            "event_timestamp": 1_700_000_000,
            "initiating_entity": "system",
            "reason_admin": {"en": "it was revoked"},
        }
    }


@pytest.mark.parametrize(
    ("kind", "by", "said"),
    [
        ("deadline", None, "policy"),
        ("revocation", f"spiffe://{TD}/user/maria", "user"),
        ("revocation", f"spiffe://{TD}/user/olga", "admin"),
        ("agent_suspended", f"spiffe://{TD}/user/olga", "admin"),
        ("release", f"spiffe://{TD}/agent/bot", "system"),
        ("revocation", f"spiffe://{TD}/service/audit", "system"),
        ("agent_orphaned", f"spiffe://{TD}/service/revoker", "system"),
        ("task_ended", f"spiffe://{TD}/service/revoker", "admin"),
    ],
)
def test_initiating_entity_follows_the_cause(kind: str, by: str | None, said: str) -> None:
    claims = event_of(ended(kind, by=by, on_behalf_of="maria")).claims
    assert claims["events"][SESSION_REVOKED]["initiating_entity"] == said


@pytest.mark.parametrize("alg", ["ES256", "EdDSA"])
def test_a_set_is_typed_and_the_same_each_time(alg: str) -> None:
    key, event = SigningKey.generate(f"spiffe://{TD}/service/signals", alg), event_of(ended())
    compact = sign_set(event, key)
    assert sign_set(event, key) == compact
    assert jwt.get_unverified_header(compact) == {"alg": alg, "kid": key.kid, "typ": "secevent+jwt"}
    verifier = jwt.PyJWK.from_dict({**key.public.model_dump(exclude_none=True), "alg": alg})
    found = jwt.decode(compact, verifier.key, algorithms=[alg], audience="https://billing.example")
    assert found == event.claims


def test_removed_subject_matches_only_what_it_names() -> None:
    one = ended(agent_id="bot", on_behalf_of="maria")
    subject = subject_of(one, TD)
    bot = {"format": "uri", "uri": f"spiffe://{TD}/agent/bot"}
    maria = {"format": "uri", "uri": f"spiffe://{TD}/user/maria"}
    other = {"format": "uri", "uri": f"spiffe://{TD}/user/other"}
    for fitting in (
        bot,
        maria,
        {"format": "opaque", "id": one.lease_id},
        {"format": "complex", "user": maria},
        {"format": "complex", "application": bot, "user": maria},
        subject,
    ):
        assert is_removed(subject, [other, fitting])
    for passing in (
        other,
        {"format": "complex"},
        {"format": "complex", "user": bot},
        {"format": "complex", "application": bot, "user": other},
        {"format": "complex", "device": bot},
        {"format": "email", "email": "maria@acme.example"},
    ):
        assert not is_removed(subject, [passing])


def test_adding_a_subject_cancels_matching_removals() -> None:
    maria = {"format": "email", "email": "maria@acme.example"}
    other = {"format": "email", "email": "other@acme.example"}
    bot = {"format": "opaque", "id": "bot"}
    both = {"format": "complex", "user": maria, "application": bot}
    for removed, added in (
        (maria, maria),
        (maria, both),  # less than was removed: what is about both has to go out
        (both, maria),
        (both, {"format": "complex", "user": maria}),
        ({"format": "complex", "user": maria}, both),
        ({"format": "complex", "user": maria, "device": bot}, both),
    ):
        assert removed_without([other, removed], added) == [other]
    for removed, added in (
        (maria, other),
        (maria, bot),
        (other, both),
        (both, {"format": "complex", "user": other, "application": bot}),
        ({"format": "complex", "user": maria}, {"format": "complex", "application": bot}),
        ({"format": "complex"}, {"format": "complex"}),
    ):
        assert removed_without([removed], added) == [removed]


def receiver(**fields: object) -> Receiver:
    given = {"name": "billing", "audience": "https://billing.example", "targets": ("billing",), **fields}
    return Receiver.model_validate(given)


def test_receiver_accepts_only_its_targets_and_causes() -> None:
    here, elsewhere = ended(target_id="billing"), ended(target_id="staging")
    assert receiver().accepts(here)
    assert not receiver().accepts(elsewhere)
    assert receiver(targets=("*",)).accepts(elsewhere)
    narrow = receiver(ends=("revocation", "agent_suspended"))
    assert narrow.accepts(here)
    assert not narrow.accepts(ended("deadline", "expired", target_id="billing"))


GOOD = 'name = "b"\naudience = "https://b.example"\ntargets = ["*"]\n'


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[[receiver]", "no TOML"),
        ('[[receiver]]\nname = "b"\naudience = "a"\ntargets = []', "targets"),
        (f'[[receiver]]\n{GOOD}push = "http://b.example/"', "https"),
        (f'[[receiver]]\n{GOOD}push = "https://user:s3cret@b.example/"', "without a user"),
        (f'[[receiver]]\n{GOOD}authorization = "file:/x"', "without push"),
        (
            f'[[receiver]]\n{GOOD}push = "https://b.example/"\nauthorization = "Bearer s3cret"',
            "authorization",
        ),
        (f'[[receiver]]\n{GOOD}target = ["x"]', "target"),
        (f"[[receiver]]\n{GOOD}[[receiver]]\n{GOOD}", "twice"),
        (f'[[receiver]]\n{GOOD}ends = ["whenever"]', "ends"),
    ],
)
def test_a_file_that_is_wrong_says_where(tmp_path: Path, text: str, word: str) -> None:
    file = tmp_path / "receivers.toml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=word) as caught:
        read_receivers(file)
    assert "s3cret" not in str(caught.value)
    assert "RINGFENCE_SIGNALS_RECEIVERS" in str(caught.value)


def test_receivers_by_their_names(tmp_path: Path) -> None:
    file = tmp_path / "receivers.toml"
    file.write_text(f'[[receiver]]\n{GOOD}push = "http://127.0.0.1:1/events"\nends = ["deadline"]')
    assert read_receivers(file)["b"].ends == ("deadline",)
    with pytest.raises(SettingsError, match="cannot read"):
        read_receivers(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "url", ["http://signals.acme.example", "https://a.example/ssf", "https://a.example?x=1"]
)
def test_an_issuer_that_cannot_be_one(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValueError, match="url"):
        SignalsSettings(receivers=tmp_path, tokens=tmp_path, url=url)


def test_requests_that_are_none() -> None:
    for body in (b"", b"[]", b'{"ack": 1}', b'{"ack": [], "ack": []}', b'{"setErrs": {"x": {}}}'):
        with pytest.raises(InvalidRequestError):
            parse_request(PollRequest, body)
    for subject in ({}, {"format": "opaque"}, {"id": "x"}, {"format": "opaque", "id": "x" * 4000}):
        with pytest.raises(InvalidRequestError):
            parse_request(SubjectChange, json.dumps({"stream_id": STREAM, "subject": subject}).encode())


async def test_a_receiver_gets_the_oldest_and_hears_whether_there_are_more() -> None:
    window = Window(SystemClock())
    first, second = event_of(ended()), event_of(ended())
    window.add([first])
    assert await window.next_batch(1, 10) == ([first], False)
    window.add([second])  # of a later batch
    assert await window.next_batch(1, 10) == ([first], True)
    assert await window.next_batch(0, 10) == ([], True)
    assert await window.next_batch(10, 10) == ([first, second], False)
    assert window.settle(first.jti) is first
    assert window.settle(first.jti) is None
    assert await window.next_batch(10, 0) == ([second], False)
    window.settle(second.jti)
    assert await window.next_batch(10, 0) == ([], False)
    assert window.waiting_since_ms is None


async def test_a_poll_that_waits_is_woken_by_what_comes() -> None:
    window = Window(SystemClock())
    polling = asyncio.create_task(window.next_batch(10, 600))
    await asyncio.sleep(0)
    assert not polling.done()
    event = event_of(ended())
    window.add([event])
    assert await asyncio.wait_for(polling, 60) == ([event], False)


async def test_no_answer_empties_a_window_behind_which_nothing_was_looked_at() -> None:
    window = Window(SystemClock())
    while not window.full:
        window.add([event_of(ended())])
    events, more = await window.next_batch(100_000, 0)
    assert (len(events), more) == (MAX_SETS_PER_POLL, True)


async def test_event_handed_over_by_another_replica_is_discarded() -> None:
    window = Window(SystemClock())
    event, other = event_of(ended()), event_of(ended())
    window.add([event, other])
    window.discard([event.jti, "never put"])
    assert await window.next_batch(10, 0) == ([other], False)
    window.discard([other.jti])
    assert window.waiting_since_ms is None
