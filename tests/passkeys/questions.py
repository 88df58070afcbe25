"""A question as an honest program composes it, and the ways in which somebody else might change it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from ringfence.client.approvals.sponsor import Sponsor
from ringfence.client.passkeys.questions import PasskeyUser, compose, question_link
from ringfence.kernel.crypto.jws import parse, sign_payload
from ringfence.kernel.crypto.keys import SigningKey, b64decode, b64encode
from ringfence.messages.approval import Approval
from ringfence.messages.base import Claims
from tests.passkeys.organisation import Organisation
from tests.support.stack import first_pending

Question = dict[str, Any]


@dataclass
class Asked:
    """A request that waits, and the question whether its sponsor approves it."""

    organisation: Organisation
    sign_origin: str
    user_id: str
    text: str

    def question(self) -> Question:
        """A copy to change."""
        copy: Question = json.loads(self.text)
        return copy

    def link(self, question: Question | str) -> str:
        """The link that opens the page with a question."""
        text = question if isinstance(question, str) else json.dumps(question)
        return question_link(self.sign_origin, text.encode())

    def service_key(self, name: str) -> SigningKey:
        """The private key of a service: of one that was taken over."""
        return SigningKey.load(self.organisation.realm.stack.trust.service_key(name))


@asynccontextmanager
async def open_question(organisation: Organisation, sign_origin: str, user_id: str) -> AsyncIterator[Asked]:
    """While the agent of the realm waits for its sponsor."""
    realm = organisation.realm
    async with (
        realm.as_agent() as agent,
        Sponsor.connect(PasskeyUser(user_id, print), realm.settings) as sponsor,
    ):
        request = asyncio.create_task(
            agent.request(
                task=realm.task, target=realm.target, verbs=["write"], resources=["env/staging/web"],
                reason="to deploy", ttl_s=600, timeout_s=3600,
            )
        )  # fmt: skip
        pending = await first_pending(sponsor)
        connection = sponsor.connection
        approval = Approval(
            **{**connection.stamp(0), "exp": min(int(time.time()) + 900, pending.expires_at)},
            verdict="approved",
            request=pending.request,
            request_id=pending.request_id,
            request_digest=pending.digest,
            ttl_s=pending.ttl_s,
            delivery=pending.delivery,
            revisions=pending.revisions,
        )
        evidence = {"question": sponsor._questions[pending.request_id].compact}
        text = compose(
            user_id, approval, await connection.directory(), connection.trust, evidence=evidence
        ).decode()
        try:
            yield Asked(organisation, sign_origin, user_id, text)
        finally:
            request.cancel()


def claims_of(compact: str) -> dict[str, Any]:
    """The claims of a JWS."""
    claims: dict[str, Any] = json.loads(parse(compact).payload)
    return claims


def signed_by(key: SigningKey, model: type[Claims], claims: dict[str, Any] | str) -> str:
    """Claims as `key` signs them."""
    text = claims if isinstance(claims, str) else json.dumps(claims)
    return sign_payload(model, text.encode(), key)


def altered(compact: str, **changed: Any) -> str:
    """A JWS with other claims, and the signature that it had."""
    head, _, signature = compact.split(".")
    claims = {**claims_of(compact), **changed}
    return f"{head}.{b64encode(json.dumps(claims).encode())}.{signature}"


def broken(compact: str) -> str:
    """A JWS with one bit of its signature changed."""
    head, payload, signature = compact.split(".")
    raw = bytearray(b64decode(signature))
    raw[10] ^= 1
    return f"{head}.{payload}.{b64encode(bytes(raw))}"
