"""Signs messages with a person's passkey: shows a link to the sign page, and verifies what comes back.

The answer has to be exactly what was asked, besides what the page stamps, and by a passkey of that person. The services
verify the same; here it is told at once, and nothing else is published.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from ringfence.client.errors import InvalidCallError
from ringfence.client.passkeys.question_server import QuestionServer
from ringfence.client.passkeys.questions import compose, server_link, sign_origin
from ringfence.client.passkeys.user import PasskeyUser
from ringfence.client.signed_messages import unstamped
from ringfence.kernel.crypto.jws import Signed, parse, verify
from ringfence.kernel.crypto.webauthn import WEBAUTHN_ALG
from ringfence.messages.base import Claims

if TYPE_CHECKING:
    from ringfence.kernel.base.clock import Clock
    from ringfence.model.records.directory import Directory

C = TypeVar("C", bound=Claims)


async def sign_with_passkey(
    person: PasskeyUser, claims: C, evidence: Mapping[str, str], directory: Directory, clock: Clock
) -> Signed[C]:
    """Ask the person to sign a message on the sign page, and wait for the signature.

    Args:
        claims: the message. What the page stamps differs in what is returned.
        evidence: further signed messages that the page shows it by (`questions.compose`).

    Raises NotSignedError; InvalidCallError, UnavailableError if it cannot be asked.
    """
    trust = directory.trust
    origin = sign_origin(trust, clock.now_ms() / 1000)

    def accept(answer: Mapping[str, Any]) -> Signed[C]:
        return check_answer(
            claims,
            answer.get("answer"),
            directory,
            trust_domain=trust.trust_domain,
            now_ms=clock.now_ms(),
        )

    async with QuestionServer(origin, accept) as server:
        server.ask(compose(person.user_id, claims, directory, trust, evidence=evidence, return_to=server.url))
        person.show(server_link(origin, server.url))
        return await server.answer(person.wait_s)


def check_answer(
    asked: C, answer: object, directory: Directory, *, trust_domain: str, now_ms: int
) -> Signed[C]:
    """Verify that `answer` is the compact JWS of `asked` by a passkey of `asked.iss`, as of now.

    Raises InvalidCallError if it says something else; SignatureError and others as `verify` does.
    """
    if not isinstance(answer, str):
        raise InvalidCallError("the sign page sent no signature")
    jws = parse(answer)
    if jws.header.alg != WEBAUTHN_ALG:
        raise InvalidCallError("the answer is not signed by a passkey")
    signed = verify(
        jws,
        type(asked),
        lambda iss, kid: directory.user_key(iss, kid, now_ms / 1000),
        audience=trust_domain,
        appended_at_ms=now_ms,
    )
    if unstamped(signed.claims) != unstamped(asked) or signed.claims.iss != asked.iss:
        raise InvalidCallError("the sign page signed something else than was asked; nothing was sent")
    return signed
