"""What the console takes for an answer, what its cookie is good for, and what it makes of text."""

from __future__ import annotations

import json
import secrets
from typing import Any

import pytest

from ringfence.client.errors import ApiError
from ringfence.console.offers import Offer, Offers
from ringfence.console.page_templates import render
from ringfence.console.questions import (
    ChangedError,
    Draft,
    Question,
    Questions,
    WrongAnswerError,
    WrongFormError,
    new_question,
)
from ringfence.console.security import SealedValues, Session, Sessions
from ringfence.kernel.base.errors import InvalidMessageError, UnavailableError
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.base import Claims, Topic
from ringfence.messages.registry import AgentSuspend
from tests.support.in_memory_registry import TD, InMemoryRegistry
from tests.support.passkeys import SESSION_ORIGIN, SoftwarePasskey
from tests.support.user_keys import add_key

LIFE_S = 900


class Bench:
    """sam is asked at a console to suspend an agent."""

    def __init__(self) -> None:
        self.ledger = InMemoryRegistry()
        self.ledger.organisation()
        self.passkey = SoftwarePasskey.make(self.ledger.key("sam").id)
        self.ledger.give(add_key(self.ledger, "olga", "sam", self.passkey))
        self.sent: list[tuple[str, str, str]] = []
        self.broken = False
        self.key = SigningKey.generate(f"spiffe://{TD}/service/console")
        self.questions = self.replica()

    def replica(self, key: SigningKey | None = None) -> Questions:
        """One process of the console."""
        sealed = SealedValues(lambda: key or self.key)
        return Questions(sealed, self.ledger.trust, self.ledger.clock, TD, self._publish)

    async def _publish(self, topic: Topic[Any], key: str, compact: str, claims: Claims) -> None:
        if self.broken:
            raise UnavailableError("no broker")
        self.sent.append((topic.what, key, compact))

    def draft(self, reason: str = "it behaves oddly", asked_at: int | None = None) -> Draft:
        stamp = self.questions.stamp("sam", asked_at or self.questions.now_s())
        claims = AgentSuspend(**stamp, agent_id="bot", reason=reason)
        return Draft("suspend agent bot", claims, "bot", {"trust": "t", "records": []})

    def ask(self) -> Question:
        now_s, form = self.questions.now_s(), {"id": "bot", "reason": "it behaves oddly"}
        session = Session("sam", "a.b.c", ends_at=now_s + 60, cookie_digest="c")
        return new_question("suspend", form, session, self.draft(), asked_at=now_s, back="/agents")

    def signed(self, question: Question, by: SigningKey | None = None, **changed: Any) -> str:
        """What the sign page posts: it stamps `iat` and `jti`."""
        document = self.questions.document(question, self.draft(asked_at=question.asked_at), "http://x")
        terms = json.loads(document)["message"]["claims"]
        now_s = self.ledger.clock.ms // 1000
        claims = AgentSuspend(
            **{**terms, "iss": (by or self.passkey).id, "aud": TD, "iat": now_s, "jti": "fresh", **changed}
        )
        return sign(claims, by or self.passkey)

    async def answer(self, question: Question, compact: object, at: Questions | None = None) -> None:
        entry = self.ledger.directory.entry("user", "sam")
        assert entry is not None
        me = entry.compact.decode()
        await (at or self.questions).answer(question, AgentSuspend, me, compact)


@pytest.fixture
def bench() -> Bench:
    return Bench()


async def test_exactly_what_was_asked_goes_on_once(bench: Bench) -> None:
    question = bench.ask()
    answer = bench.signed(question)
    await bench.answer(question, answer)
    assert bench.sent == [("registry.command", "bot", answer)]
    assert bench.questions.is_answered(question)
    with pytest.raises(WrongAnswerError):
        await bench.answer(question, answer)


@pytest.mark.parametrize("changed", [{"agent_id": "other"}, {"reason": "another"}, {"exp": 2_000_000_000}])
async def test_something_else_is_not_sent(bench: Bench, changed: dict[str, Any]) -> None:
    question = bench.ask()
    if "exp" in changed:
        changed = {"exp": bench.ledger.clock.ms // 1000 + 80_000}
    with pytest.raises(WrongAnswerError):
        await bench.answer(question, bench.signed(question, **changed))
    assert bench.sent == []
    assert not bench.questions.is_answered(question)


async def test_only_a_passkey_of_who_was_asked_answers(bench: Bench) -> None:
    question = bench.ask()
    stranger = SoftwarePasskey.make(bench.passkey.id)
    olga = SoftwarePasskey.make(bench.ledger.key("olga").id)
    for by in (stranger, olga, bench.passkey.but(origin=SESSION_ORIGIN)):
        with pytest.raises(InvalidMessageError):
            await bench.answer(question, bench.signed(question, by))
    with pytest.raises(WrongAnswerError):
        await bench.answer(question, bench.signed(question, bench.ledger.key("sam")))
    for nothing in (None, 1, True):
        with pytest.raises(WrongAnswerError):
            await bench.answer(question, nothing)
    assert bench.sent == []


async def test_refused_question_cannot_be_answered(bench: Bench) -> None:
    question = bench.ask()
    answer = bench.signed(question)
    bench.questions.refuse(question)
    assert bench.questions.is_answered(question)
    with pytest.raises(WrongAnswerError):
        await bench.answer(question, answer)


async def test_an_answer_that_kafka_did_not_take_may_be_sent_again(bench: Bench) -> None:
    question = bench.ask()
    answer, bench.broken = bench.signed(question), True
    with pytest.raises(UnavailableError):
        await bench.answer(question, answer)
    bench.broken = False
    await bench.answer(question, answer)
    assert len(bench.sent) == 1


async def test_a_question_waits_fifteen_minutes_at_its_path(bench: Bench) -> None:
    question = bench.ask()
    path = bench.questions.path_of(question)
    assert bench.questions.at(path) == question
    assert bench.questions.at(path[:-1]) is None
    assert bench.questions.at(path[:-2] + ("AA" if path[-2:] != "AA" else "BA")) is None
    bench.ledger.clock.ms += LIFE_S * 1000
    assert bench.questions.at(path) is None


async def test_another_replica_takes_the_answer_to_a_question_of_the_first(bench: Bench) -> None:
    asked = bench.ask()
    other = bench.replica()
    question = other.at(bench.questions.path_of(asked))
    assert question == asked
    await bench.answer(question, bench.signed(question), at=other)
    assert len(bench.sent) == 1
    assert bench.replica(SigningKey.generate(bench.key.id)).at(bench.questions.path_of(asked)) is None


def test_changed_draft_is_not_shown_for_signature(bench: Bench) -> None:
    question = bench.ask()
    with pytest.raises(ChangedError):
        bench.questions.document(question, bench.draft("another", question.asked_at), "http://x")


def test_a_sealed_value_is_of_one_purpose(bench: Bench) -> None:
    sealed = SealedValues(lambda: bench.key)
    text = sealed.seal("notice", {"text": "signed"})
    assert sealed.open("notice", text) == {"text": "signed"}
    assert sealed.open("question", text) is None
    assert "signed" not in text
    assert sealed.open("notice", "") is None
    assert sealed.open("notice", "é" * 40) is None


def test_a_question_of_too_many_words_is_none(bench: Bench) -> None:
    question = bench.ask()
    question.form["reason"] = secrets.token_urlsafe(5 * 1024)
    with pytest.raises(WrongFormError):
        bench.questions.path_of(question)


# --- sessions ---------------------------------------------------------------------------------------------------------


def session_of(bench: Bench, key: SigningKey, **changed: Any) -> tuple[Sessions, str | None]:
    sessions = Sessions(lambda: key, bench.ledger.clock, TD, 3600)
    secret, statement = sessions.begin("sam")
    claims = statement.model_copy(update=changed)
    session = sessions.proposed(secret, sign(claims, bench.passkey.but(origin=SESSION_ORIGIN)))
    return sessions, sessions.cookie(secret, session) if session else None


def test_a_cookie_is_a_session_until_its_end(bench: Bench) -> None:
    sessions, cookie = session_of(bench, SigningKey.generate(f"spiffe://{TD}/service/console"))
    session = sessions.of(cookie)
    assert session is not None
    assert session.user_id == "sam"
    bench.ledger.clock.ms += 3600 * 1000
    assert sessions.of(cookie) is None


def test_a_statement_for_another_cookie_or_console_begins_nothing(bench: Bench) -> None:
    key = SigningKey.generate(f"spiffe://{TD}/service/console")
    assert session_of(bench, key, cookie_digest="0" * 64)[1] is None
    assert session_of(bench, key, console_kid="another")[1] is None
    sessions, cookie = session_of(bench, key)
    other = Sessions(lambda: SigningKey.generate(key.id), bench.ledger.clock, TD, 3600)
    assert sessions.of(cookie) is not None
    assert other.of(cookie) is None


@pytest.mark.parametrize(
    "cookie", [None, "", ".", "x.y.z", "a" * 86, "a" * 86 + ".a.b.c", "a" * 86 + "." + "é" * 9]
)
def test_malformed_cookie_gives_no_session(bench: Bench, cookie: str | None) -> None:
    sessions, _ = session_of(bench, SigningKey.generate(f"spiffe://{TD}/service/console"))
    assert sessions.of(cookie) is None


def test_statement_that_no_console_accepted_is_no_session(bench: Bench) -> None:
    """A stranger makes secret and statement alike, and the signature does not verify."""
    sessions, cookie = session_of(bench, SigningKey.generate(f"spiffe://{TD}/service/console"))
    assert cookie is not None
    head, _, statement = cookie.partition(".")
    secret, mac = head[:43], head[43:]
    own, said = sessions.begin("sam")
    forged = sign(said, SoftwarePasskey.make(bench.ledger.key("sam").id).but(origin=SESSION_ORIGIN))
    assert sessions.proposed(own, forged) is not None  # the registry would say no
    for value in (
        f"{own}.{forged}",
        f"{own}{mac}.{forged}",
        f"{secret}.{statement}",
        f"{own}{mac}.{statement}",
    ):
        assert sessions.of(value) is None
    assert sessions.of(cookie) is not None


def test_offer_is_over_once_its_maker_signed_out(bench: Bench) -> None:
    sessions, cookie = session_of(bench, bench.key)
    session = sessions.of(cookie)
    assert session is not None
    offers = Offers(SealedValues(lambda: bench.key), sessions, lambda statement: pytest.fail("not asked"))
    offer = Offer("deploy-bot", "sam", session.statement, session.cookie_digest)
    sealed = offers.sealed(offer)
    assert offers.opened(sealed) == offer
    sessions.end(session)
    with pytest.raises(ApiError, match="it is over"):
        offers.opened(sealed)


# --- text -------------------------------------------------------------------------------------------------------------


def test_templates_cannot_forget_to_escape_or_to_show_what_is_hidden() -> None:
    html = render(
        "problem.html", session=Session("u", "s", 0, "d"), trust_domain="t", sections={}, section="", notice="",
        title="<b>\u202e", message="<script>\x00\u2066</script>",
    )  # fmt: skip
    assert "<script>\x00" not in html
    assert "&lt;script&gt;‹U+0000›‹U+2066›&lt;/script&gt;" in html
    assert "&lt;b&gt;‹U+202E›" in html


def test_moment_beyond_the_calendar_is_shown_as_the_end_of_time() -> None:
    html = render(
        "problem.html", session=Session("u", "s", 2**53 - 1, "d"), trust_domain="t", sections={}, section="",
        notice="", title="t", message="m",
    )  # fmt: skip
    assert "signed in, ends <span>the end of time</span>" in html
