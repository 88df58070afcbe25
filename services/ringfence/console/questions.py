"""What people are asked to sign, and the way of their answers to Kafka.

A question waits here under a random path. The sign page fetches it, and posts back what the person signed. Nothing goes
on that is not exactly what was asked, besides what the page stamps; services verify the signature again.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from ringfence.client.passkeys.questions import STAMPED
from ringfence.client.passkeys.user import LIFE_S
from ringfence.kernel.base.bounded_dict import BoundedDict
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.crypto.webauthn import WEBAUTHN_ALG, VerificationKey
from ringfence.messages.base import Claims, Topic
from ringfence.messages.registry import UserRecord
from ringfence.model.identity.spiffe_ids import spiffe_id
from ringfence.model.records.user_keys import user_key

MAX_ANSWER_BYTES: Final = 512 * 1024
_MOST_WAITING: Final = 2000
_MOST_OF_ONE: Final = 20
"""Questions of one session that wait. The oldest gives way."""


class WrongAnswerError(RingfenceError):
    """Raised when what came back is not what was asked, or is signed by nobody who was."""

    code = "wrong_answer"


@dataclass(slots=True)
class Question:
    """One message that a person is asked to sign."""

    path: str
    title: str
    """What it does, for the person's list."""
    user_id: str
    cookie_digest: str
    """Of the session that asked."""
    claims: Claims
    topic: Topic[Any]
    key: str
    evidence: Mapping[str, Any]
    asked_at: int
    """Seconds since 1970."""
    state: Literal["open", "sending", "sent", "refused"] = "open"
    _fields: dict[str, Any] = field(default_factory=dict)

    def document(self, return_to: str) -> bytes:
        """The question as the sign page takes it."""
        terms = _terms(self.claims)
        message = {"typ": self.claims.typ, "claims": terms}
        question = {
            "user": self.user_id,
            "message": message,
            "evidence": dict(self.evidence),
            "return_to": return_to,
        }
        return json.dumps(question, separators=(",", ":"), ensure_ascii=False).encode()


Publish = Callable[[Topic[Any], str, str, Claims], Awaitable[None]]
"""Publishes a message that a person signed: topic, key, compact JWS, claims."""


class Questions:
    """The questions that wait at this console."""

    def __init__(self, trust: TrustStore, clock: Clock, trust_domain: str, publish: Publish) -> None:
        self._trust = trust
        self._clock = clock
        self._trust_domain = trust_domain
        self._publish = publish
        self._by_path: BoundedDict[str, Question] = BoundedDict(_MOST_WAITING)

    def stamp(self, user_id: str, life_s: int = LIFE_S) -> dict[str, Any]:
        """Claims to be replaced by the sign page, with `exp` where `life_s` is not 0."""
        now_s = self._clock.now_ms() // 1000
        stamped = {
            "iss": spiffe_id(self._trust_domain, "user", user_id),
            "aud": self._trust_domain,
            "iat": now_s,
            "jti": "stamped-by-the-page",
        }
        return stamped | ({"exp": now_s + life_s} if life_s else {})

    def add(
        self,
        *,
        title: str,
        user_id: str,
        cookie_digest: str,
        claims: Claims,
        topic: Topic[Any],
        key: str,
        evidence: Mapping[str, Any],
    ) -> Question:
        """Let a question wait for the sign page."""
        question = Question(
            secrets.token_urlsafe(32), title, user_id, cookie_digest, claims, topic, key, evidence,
            self._clock.now_ms() // 1000,
        )  # fmt: skip
        mine = [one for one in self._by_path.values() if one.cookie_digest == cookie_digest]
        for one in mine[: max(0, len(mine) - _MOST_OF_ONE + 1)]:
            self._by_path.pop(one.path, None)
        self._by_path[question.path] = question
        return question

    def at(self, path: str) -> Question | None:
        """The question at this path; None if there is none, or its time is over."""
        question = self._by_path.get(path)
        if question is None or self._clock.now_ms() // 1000 - question.asked_at >= LIFE_S:
            return None
        return question

    def of_session(self, cookie_digest: str) -> list[Question]:
        """The questions of a session, the latest first."""
        mine = [one for one in self._by_path.values() if one.cookie_digest == cookie_digest]
        return sorted(mine, key=lambda one: -one.asked_at)

    async def answer(self, question: Question, answer: Mapping[str, Any]) -> None:
        """Take what the sign page posts: `{"answer": JWS}` or `{"refused": true}`.

        Raises WrongAnswerError; InvalidMessageError where the signature does not verify; UnavailableError where Kafka
        does not take it.
        """
        if question.state != "open":
            raise WrongAnswerError("this was answered already")
        if answer.get("refused") is True:
            question.state = "refused"
            return
        compact = answer.get("answer")
        if not isinstance(compact, str):
            raise WrongAnswerError("the sign page sent no signature")
        claims = self._verified(question, compact)
        question.state = "sending"
        try:
            await self._publish(question.topic, question.key, compact, claims)
        except BaseException:
            question.state = "open"
            raise
        question.state = "sent"

    def _verified(self, question: Question, compact: str) -> Claims:
        now_ms = self._clock.now_ms()
        jws = parse(compact)
        if jws.header.alg != WEBAUTHN_ALG:
            raise WrongAnswerError("the answer is not signed by a passkey")

        def find(iss: str, kid: str) -> VerificationKey | None:
            # The record came from the registry with the question; services look it up again.
            for record in question.evidence["records"]:
                user = _user_of(record)
                if user is not None and user.state.user_id == question.user_id and iss == question.claims.iss:
                    return user_key(user.state.keys, kid, now_ms / 1000, self._trust)
            return None

        signed = verify(
            jws, type(question.claims), find, audience=self._trust_domain, appended_at_ms=now_ms
        ).claims
        if _terms(signed) != _terms(question.claims) or signed.iss != question.claims.iss:
            raise WrongAnswerError("something else was signed than was asked; nothing was sent")
        return signed


def _user_of(compact: str) -> UserRecord | None:
    try:
        return parse(compact).unverified_claims(UserRecord)
    except InvalidMessageError:
        return None


def _terms(claims: Claims) -> dict[str, Any]:
    return claims.model_dump(mode="json", exclude_none=True, exclude=set(STAMPED))
