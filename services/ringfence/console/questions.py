"""Questions: messages that people are asked to sign, and the publication of their answers on Kafka.

A question's URL path contains it, sealed: who is asked, and by which form. When the sign page fetches it, the console
composes the message anew. The page posts back what the person signed. So no replica must remember a question. An answer
is published only if it is exactly what was asked, except for what the page stamps. Services verify the signature again.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from ringfence.client.passkeys.questions import LIFE_S
from ringfence.client.signed_messages import stamp, topic_of, unstamped
from ringfence.console.security import SealedValues, Session
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError
from ringfence.kernel.base.ids import digest
from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.crypto.webauthn import WEBAUTHN_ALG, VerificationKey
from ringfence.messages.base import Claims, Topic
from ringfence.messages.codes import Code
from ringfence.messages.registry import UserRecord
from ringfence.model.identity.spiffe_ids import spiffe_id
from ringfence.model.records.user_keys import user_key

MAX_ANSWER_BYTES: Final = 512 * 1024
MAX_PATH_CHARS: Final = 6 * 1024
"""Of the sealed part of a question's address, which proxies take in a line of 8 KiB."""
_MOST_REMEMBERED: Final = 10_000
_MAX_TITLE: Final = 200


class WrongFormError(RingfenceError):
    """Raised when a form of the console lacks something, or says more than a question can hold."""

    code = Code.WRONG_FORM


class WrongAnswerError(RingfenceError):
    """Raised when what came back is not what was asked, or is signed by nobody who was."""

    code = Code.WRONG_ANSWER


class ChangedError(RingfenceError):
    """Raised when what a question is about is not any more what it was when the person asked for it."""

    code = Code.QUESTION_CHANGED


@dataclass(frozen=True, slots=True)
class Draft:
    """A message that a person is asked to sign, composed from a form and what services say now."""

    title: str
    """What it does, for the person."""
    claims: Claims
    key: str
    """Of the record on Kafka."""
    evidence: Mapping[str, Any]
    """Further signed messages that the sign page shows it by."""


@dataclass(frozen=True, slots=True)
class Question:
    """One message that a person is asked to sign, as its path has it."""

    kind: str
    """The form that it comes from."""
    form: dict[str, str]
    user_id: str
    statement: str
    """The session statement of who asked for it."""
    cookie_digest: str
    terms: str
    """Digest of what is to be signed, without what the sign page stamps."""
    title: str
    key: str
    asked_at: int
    """Seconds since 1970."""
    back: str
    """The path of the console to go back to."""
    nonce: str = field(default_factory=lambda: secrets.token_urlsafe(9))
    """Tells it from another one in the same words."""


Publish = Callable[[Topic[Any], str, str, Claims], Awaitable[None]]
"""Publishes a message that a person signed: topic, key, compact JWS, claims."""


@dataclass(slots=True, eq=False)
class Questions:
    """Seals questions, opens them, and takes the answers."""

    sealed: SealedValues
    trust: TrustStore
    clock: Clock
    trust_domain: str
    publish: Publish
    _answered: BoundedDict[str, None] = field(
        init=False, default_factory=lambda: BoundedDict(_MOST_REMEMBERED)
    )

    def now_s(self) -> int:
        return self.clock.now_ms() // 1000

    def stamp(self, user_id: str, asked_at: int, life_s: int = LIFE_S) -> dict[str, Any]:
        """Claims to be replaced by the sign page, with `exp` where `life_s` is not 0."""
        iss = spiffe_id(self.trust_domain, "user", user_id)
        return stamp(iss, self.trust_domain, asked_at, life_s)

    def path_of(self, question: Question) -> str:
        """The last part of its path. Raises WrongFormError if its texts are too long for an address."""
        path = self.sealed.seal("question", asdict(question))
        if len(path) > MAX_PATH_CHARS:
            raise WrongFormError("that is too much text for one question; say it in fewer words")
        return path

    def at(self, path: str) -> Question | None:
        """The question at this path; None if there is none, or its time is over."""
        value = self.sealed.open("question", path)
        question = Question(**value) if value else None
        if question is None or not 0 <= self.now_s() - question.asked_at < LIFE_S:
            return None
        return question

    def is_answered(self, question: Question) -> bool:
        """Whether this process took an answer to it. Another one may have: services take each signature once."""
        return question.nonce in self._answered

    def document(self, question: Question, draft: Draft, return_to: str) -> bytes:
        """The question as the sign page takes it. Raises ChangedError."""
        if terms_digest(draft.claims) != question.terms:
            raise ChangedError("what this is about has changed since you were shown it; look at it again")
        message = {"typ": draft.claims.typ, "claims": unstamped(draft.claims)}
        document = {
            "user": question.user_id,
            "message": message,
            "evidence": dict(draft.evidence),
            "return_to": return_to,
        }
        return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()

    def refuse(self, question: Question) -> None:
        """Note that the person signs nothing."""
        self._answered[question.nonce] = None

    async def answer(self, question: Question, model: type[Claims], user: str, compact: object) -> str:
        """Take the signature that the sign page posts, and publish it, unless another message embeds it.

        Args:
            question: what was asked.
            model: the message that its form makes.
            user: the person's record, as the registry signed it.
            compact: what the page posted as the person's signed message.

        Returns the signed message. Raises WrongAnswerError; InvalidMessageError if the signature does not verify;
        UnavailableError if Kafka does not take it.
        """
        if self.is_answered(question):
            raise WrongAnswerError("this was answered already")
        if not isinstance(compact, str):
            raise WrongAnswerError("the sign page sent no signature")
        claims = self._verified(question, model, user, compact)
        self._answered[question.nonce] = None
        try:
            if (topic := topic_of(model)) is not None:
                await self.publish(topic, question.key, compact, claims)
        except BaseException:
            self._answered.pop(question.nonce, None)
            raise
        return compact

    def _verified(self, question: Question, model: type[Claims], record: str, compact: str) -> Claims:
        now_ms = self.clock.now_ms()
        jws = parse(compact)
        if jws.header.alg != WEBAUTHN_ALG:
            raise WrongAnswerError("the answer is not signed by a passkey")
        me = spiffe_id(self.trust_domain, "user", question.user_id)

        def find(iss: str, kid: str) -> VerificationKey | None:
            # The registry gave the record to this console just now; services look it up again.
            user = _user_of(record)
            if user is None or user.state.user_id != question.user_id or iss != me:
                return None
            return user_key(user.state.keys, kid, now_ms / 1000, self.trust)

        signed = verify(jws, model, find, audience=self.trust_domain, appended_at_ms=now_ms).claims
        if terms_digest(signed) != question.terms or signed.iss != me:
            raise WrongAnswerError("something else was signed than was asked; nothing was sent")
        return signed


def new_question(
    kind: str, form: Mapping[str, str], session: Session, draft: Draft, *, asked_at: int, back: str
) -> Question:
    return Question(
        kind=kind,
        form={name: value for name, value in form.items() if value},
        user_id=session.user_id,
        statement=session.statement,
        cookie_digest=session.cookie_digest,
        terms=terms_digest(draft.claims),
        title=draft.title[:_MAX_TITLE],
        key=draft.key,
        asked_at=asked_at,
        back=back,
    )


def terms_digest(claims: Claims) -> str:
    """The digest of what is signed, without what the sign page stamps."""
    return digest(json.dumps([claims.typ, unstamped(claims)], sort_keys=True, separators=(",", ":")))


def _user_of(compact: str) -> UserRecord | None:
    try:
        return parse(compact).unverified_claims(UserRecord)
    except InvalidMessageError:
        return None
