"""What an agent believes of a reply: only what policy and issuer signed about just this request."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from ringfence.client.agent.credentials import IssuedCredential
from ringfence.client.agent.replies import AllowedByPolicy, Denied, PendingRequest, SentRequest, read_reply
from ringfence.kernel.base.errors import InvalidMessageError, SignatureError
from ringfence.kernel.base.ids import digest, lease_id
from ringfence.kernel.crypto.jwe import ReplyKey, seal, unverified_kid
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey, b64encode
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.tracing.api import new_traceparent
from ringfence.messages.base import Permission
from ringfence.messages.credential import (
    Coordinates,
    Credential,
    CredentialDecision,
    CredentialDelivery,
    CredentialRequest,
    IssuerRefusal,
    Reason,
    ReplyContent,
)
from ringfence.messages.lease import Lease
from ringfence.messages.trust import ServiceIdentity, TrustBundle

TD = "acme.example"
NOW = int(time.time())
SCOPE = (Permission(target="staging", verbs=("deploy",), resources=("env/staging/web",)),)
ROOT = SigningKey.generate(f"spiffe://{TD}/root")
POLICY = SigningKey.generate(f"spiffe://{TD}/service/policy")
ISSUER = SigningKey.generate(f"spiffe://{TD}/service/issuer")
AGENT = SigningKey.generate(f"spiffe://{TD}/agent/deploy-bot")
TASK = "5d3c4c1e-9b0a-5f0e-8a49-0e7d6a1c2b3a"


def stamp(by: SigningKey) -> dict[str, Any]:
    return {"iss": by.id, "aud": TD, "iat": NOW, "jti": str(uuid.uuid4())}


@pytest.fixture(scope="module")
def trust() -> TrustStore:
    services = tuple(
        ServiceIdentity(id=key.id, roles=(role,), keys=(key.record(NOW + 3600),))  # type: ignore[arg-type]
        for role, key in (("policy", POLICY), ("issuer", ISSUER))
    )
    bundle = TrustBundle(**stamp(ROOT), exp=NOW + 3600, version=1, services=services)
    store = TrustStore(TD, ROOT.kid)
    store.load(sign(bundle, ROOT, header_jwk=True), NOW)
    return store


@pytest.fixture
def sent() -> SentRequest:
    reply_key = ReplyKey()
    claims = CredentialRequest(
        **stamp(AGENT),
        exp=NOW + 60,
        task_id=TASK,
        scope=SCOPE,
        ttl_s=300,
        reason="release 41",
        reply_key=reply_key.public,
    )
    return SentRequest(claims, sign(claims, AGENT), reply_key, new_traceparent())


def decision(sent: SentRequest, outcome: str = "allowed", by: SigningKey = POLICY, **fields: Any) -> str:
    claims = {
        **stamp(by),
        "request_id": sent.request_id,
        "request": sent.compact,
        "source": Coordinates(topic="t", partition=0, offset=1, appended_at_ms=NOW * 1000),
        "outcome": outcome,
        "delivery": "agent",
        "ttl_s": 300,
        **fields,
    }
    return sign(CredentialDecision(**claims), by)


def lease(sent: SentRequest, decided: str, by: SigningKey = ISSUER, **fields: Any) -> str:
    claims = {
        **stamp(by),
        "lease_id": lease_id(sent.request_id),
        "seq": 1,
        "status": "active",
        "request_id": sent.request_id,
        "decision_id": "d",
        "decision_digest": digest(decided),
        "agent_id": "deploy-bot",
        "act": ("deploy-bot",),
        "sponsor": "sam",
        "on_behalf_of": "maria",
        "task_id": TASK,
        "target_id": "staging",
        "backend": "jwt",
        "delivery": "agent",
        "scope": SCOPE,
        "requested_at_ms": NOW * 1000,
        "deadline": NOW + 300,
        **fields,
    }
    return sign(Lease(**claims), by)


def delivery(sent: SentRequest, by: SigningKey = ISSUER, **fields: Any) -> str:
    credential = {"kind": "jwt", "value": "s3cret-value", "token_type": "Bearer", "expires_at": NOW + 300}
    about: dict[str, Any] = {
        "request_id": sent.request_id,
        "lease_id": lease_id(sent.request_id),
        "target_id": "staging",
    }
    about |= {name: fields.pop(name) for name in (*about, "lease_digest") if name in fields}
    return sign(
        CredentialDelivery(**stamp(by), **about, credential=Credential(**{**credential, **fields})), by
    )


def sealed(sent: SentRequest, **content: Any) -> bytes:
    reply = ReplyContent(request_id=sent.request_id, **content)
    return seal(
        reply.model_dump_json(exclude_none=True).encode(), sent.claims.reply_key, kid=sent.request_id
    ).encode()


def read(value: bytes, sent: SentRequest, trust: TrustStore) -> Any:
    return read_reply(value, sent, trust, NOW * 1000)


def test_an_issued_credential_says_what_it_is_and_hides_its_value(
    sent: SentRequest, trust: TrustStore
) -> None:
    decided = decision(sent)
    answer = read(
        sealed(sent, decision=decided, lease=lease(sent, decided), delivery=delivery(sent)), sent, trust
    )
    assert isinstance(answer, IssuedCredential)
    assert (answer.sponsor, answer.on_behalf_of, answer.target, answer.task_id) == (
        "sam",
        "maria",
        "staging",
        TASK,
    )
    assert answer.scope == SCOPE
    assert answer.headers() == {"Authorization": "Bearer s3cret-value"}
    assert answer.trace_id == sent.traceparent.split("-")[1]
    assert "s3cret" not in repr(answer) + str(answer)


def test_a_lease_is_the_issuers_word_where_the_credential_names_its_digest(
    sent: SentRequest, trust: TrustStore
) -> None:
    decided = decision(sent)
    leased = lease(sent, decided)
    named = {"decision": decided, "lease": leased, "delivery": delivery(sent, lease_digest=digest(leased))}
    assert isinstance(read(sealed(sent, **named), sent, trust), IssuedCredential)
    other = lease(sent, decided, sponsor="mallory")
    with pytest.raises(InvalidMessageError, match="another lease"):
        read(sealed(sent, **{**named, "lease": other}), sent, trust)


def test_a_credential_that_nobody_signed_is_none(sent: SentRequest, trust: TrustStore) -> None:
    """Decision and lease stand on topics for many to read: who can write a reply has these, and no issuer's key."""
    decided = decision(sent)
    own = {"kind": "jwt", "value": "the-attackers-account", "token_type": "Bearer", "expires_at": NOW + 300}
    forged = {
        "request_id": sent.request_id,
        "decision": decided,
        "lease": lease(sent, decided),
        "credential": own,
    }
    reply = seal(json.dumps(forged).encode(), sent.claims.reply_key, kid=sent.request_id)
    with pytest.raises(InvalidMessageError):
        read(reply.encode(), sent, trust)


def test_a_credential_that_is_not_the_one_that_was_signed_is_none(
    sent: SentRequest, trust: TrustStore
) -> None:
    decided = decision(sent)
    signed = {"decision": decided, "lease": lease(sent, decided), "delivery": delivery(sent)}
    same: dict[str, Any] = {
        "kind": "jwt",
        "value": "s3cret-value",
        "token_type": "Bearer",
        "expires_at": NOW + 300,
    }
    assert isinstance(
        read(sealed(sent, **signed, credential=Credential(**same)), sent, trust), IssuedCredential
    )
    for other in ({"value": "the-attackers-account"}, {"expires_at": NOW + 200}, {"token_type": "DPoP"}):
        with pytest.raises(InvalidMessageError, match="another credential"):
            read(sealed(sent, **signed, credential=Credential(**{**same, **other})), sent, trust)


def test_a_denial_carries_every_reason(sent: SentRequest, trust: TrustStore) -> None:
    reasons = (Reason(code="beyond_scope", message="no", permission=SCOPE[0], side="task"),)
    answer = read(sealed(sent, decision=decision(sent, "denied", reasons=reasons)), sent, trust)
    assert answer == Denied(sent.request_id, "policy", reasons)


def test_a_refusal_of_the_issuer_stands_above_an_allowing_decision(
    sent: SentRequest, trust: TrustStore
) -> None:
    reasons = (Reason(code="stale_view", message="later"),)
    refusal = IssuerRefusal(**stamp(ISSUER), request_id=sent.request_id, reasons=reasons, retry_after_s=5)
    answer = read(sealed(sent, decision=decision(sent), refusal=sign(refusal, ISSUER)), sent, trust)
    assert answer == Denied(sent.request_id, "issuer", reasons, 5)


def test_a_pending_request_says_whose_approval_is_missing(sent: SentRequest, trust: TrustStore) -> None:
    decided = decision(sent, "approval_required", required=("sponsor", "operator"), expires_at=NOW + 900)
    answer = read(sealed(sent, decision=decided), sent, trust)
    assert isinstance(answer, PendingRequest)
    assert str(answer) == (
        "waiting for the approval of the agent's sponsor and an operator "
        "(neither the agent's sponsor nor the user it acts for)"
    )
    assert answer.expires_at == NOW + 900


def test_an_allowing_decision_alone_is_not_a_credential(sent: SentRequest, trust: TrustStore) -> None:
    assert read(sealed(sent, decision=decision(sent)), sent, trust) == AllowedByPolicy(sent.request_id)


FORGERIES: dict[str, Callable[[SentRequest, str], dict[str, Any]]] = {
    "decided by the issuer": lambda sent, decided: {"decision": decision(sent, "denied", by=ISSUER)},
    "decided by the agent itself": lambda sent, decided: {"decision": decision(sent, by=AGENT)},
    "decided about another request": lambda sent, decided: {
        "decision": decision(sent, "denied", request=decided, request_id=sent.request_id)
    },
    "decided under another id": lambda sent, decided: {
        "decision": decision(sent, "denied", request_id=str(uuid.uuid4()))
    },
    "leased by policy": lambda sent, decided: {"lease": lease(sent, decided, by=POLICY)},
    "a lease of another request": lambda sent, decided: {
        "lease": lease(sent, decided, request_id=str(uuid.uuid4()))
    },
    "a lease with another id": lambda sent, decided: {
        "lease": lease(sent, decided, lease_id=str(uuid.uuid4()))
    },
    "a lease on another decision": lambda sent, decided: {
        "lease": lease(sent, decided, decision_digest=digest("other"))
    },
    "a lease for another agent": lambda sent, decided: {"lease": lease(sent, decided, agent_id="other-bot")},
    "a lease in another task": lambda sent, decided: {
        "lease": lease(sent, decided, task_id=str(uuid.uuid4()))
    },
    "a narrower lease": lambda sent, decided: {
        "lease": lease(
            sent,
            decided,
            scope=(Permission(target="staging", verbs=("read",), resources=("env/staging/web",)),),
        )
    },
    "a lease that has ended": lambda sent, decided: {"lease": lease(sent, decided, status="revoked")},
    "no credential": lambda sent, decided: {"delivery": None},
    "a credential beyond its lease": lambda sent, decided: {"delivery": delivery(sent, expires_at=NOW + 301)},
    "a credential of the attacker's own": lambda sent, decided: {"delivery": delivery(sent, by=AGENT)},
    "a credential by policy": lambda sent, decided: {"delivery": delivery(sent, by=POLICY)},
    "a credential with a signature that is another's": lambda sent, decided: {
        "delivery": ".".join(
            [*delivery(sent, value="attacker").split(".")[:2], delivery(sent).rpartition(".")[2]]
        )
    },
    "the credential of another lease": lambda sent, decided: {
        "delivery": delivery(sent, lease_id=str(uuid.uuid4()))
    },
    "the credential of another request": lambda sent, decided: {
        "delivery": delivery(sent, request_id=str(uuid.uuid4()))
    },
    "a credential for another target": lambda sent, decided: {
        "delivery": delivery(sent, target_id="production")
    },
    "a credential of another kind": lambda sent, decided: {"delivery": delivery(sent, kind="postgres")},
    "a credential that was delivered with another lease": lambda sent, decided: {
        "delivery": delivery(sent, lease_digest=digest("other"))
    },
    "a lease by policy that only policy vouches for": lambda sent, decided: {
        "lease": (leased := lease(sent, decided, by=POLICY)),
        "delivery": delivery(sent, by=POLICY, lease_digest=digest(leased)),
    },
    "a lease that is named in another's name": lambda sent, decided: {
        "lease": (leased := lease(sent, decided, by=POLICY)),
        "delivery": delivery(sent, lease_digest=digest(leased)),
    },
    "a lease that is named and of another task": lambda sent, decided: {
        "lease": (leased := lease(sent, decided, task_id=str(uuid.uuid4()))),
        "delivery": delivery(sent, lease_digest=digest(leased)),
    },
    "a lease with a signature that is another's": lambda sent, decided: {
        "lease": ".".join([*lease(sent, decided).split(".")[:2], delivery(sent).rpartition(".")[2]])
    },
    "the lease in place of the credential": lambda sent, decided: {"delivery": lease(sent, decided)},
    "a refusal by policy": lambda sent, decided: {
        "refusal": sign(IssuerRefusal(**stamp(POLICY), request_id=sent.request_id, reasons=()), POLICY)
    },
    "a refusal of another request": lambda sent, decided: {
        "refusal": sign(IssuerRefusal(**stamp(ISSUER), request_id=str(uuid.uuid4()), reasons=()), ISSUER)
    },
}


@pytest.mark.parametrize("forged", FORGERIES.values(), ids=list(FORGERIES))
def test_forged_reply_is_rejected(
    forged: Callable[[SentRequest, str], dict[str, Any]], sent: SentRequest, trust: TrustStore
) -> None:
    decided = decision(sent)
    honest = {"decision": decided, "lease": lease(sent, decided), "delivery": delivery(sent)}
    assert isinstance(read(sealed(sent, **honest), sent, trust), IssuedCredential)
    with pytest.raises(InvalidMessageError):
        read(sealed(sent, **{**honest, **forged(sent, decided)}), sent, trust)


def test_a_reply_to_another_key_cannot_be_opened(sent: SentRequest, trust: TrustStore) -> None:
    content = ReplyContent(request_id=sent.request_id, decision=decision(sent)).model_dump_json().encode()
    elsewhere = seal(content, ReplyKey().public, kid=sent.request_id).encode()
    with pytest.raises(InvalidMessageError):
        read(elsewhere, sent, trust)


def test_a_service_key_past_its_end_signs_no_answer(sent: SentRequest, trust: TrustStore) -> None:
    with pytest.raises(SignatureError):
        read_reply(sealed(sent, decision=decision(sent)), sent, trust, (NOW + 7200) * 1000)


@pytest.mark.parametrize(
    "value", [None, 1, 1.5, True, "x", [], {}, ["x"], {"kty": "EC", "crv": "P-257", "x": 1}], ids=str
)
@pytest.mark.parametrize("name", ["alg", "enc", "epk", "zip", "crit", "apu", "kid", "p2c"])
def test_headers_that_strangers_made_up_break_nothing(
    name: str, value: Any, sent: SentRequest, trust: TrustStore
) -> None:
    header: dict[str, Any] = {"alg": "ECDH-ES", "enc": "A256GCM", "kid": sent.request_id}
    header |= {"epk": sent.claims.reply_key.model_dump(exclude_none=True), name: value}
    parts = [json.dumps(header).encode(), b"", b"n" * 12, b"text", b"t" * 16]
    made_up = ".".join(b64encode(part) for part in parts).encode()
    unverified_kid(made_up)
    with pytest.raises(InvalidMessageError):
        read(made_up, sent, trust)


NESTED = b64encode(b"[" * 100_000).encode() + b"...."
"""JSON that is deeper than a parser's stack."""
GARBAGE = [b"", b"\xff", b"....", b"a.b.c.d.e", b"{}", b"e30....", b"null", NESTED]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_no_answer(garbage: bytes, sent: SentRequest, trust: TrustStore) -> None:
    assert unverified_kid(garbage) is None
    with pytest.raises(InvalidMessageError):
        read(garbage, sent, trust)


@pytest.mark.parametrize(
    "plaintext", [b"", b"\xff", b"[]", b"{}", b'{"request_id": 1, "decision": 2}'], ids=str
)
def test_sealed_garbage_is_no_answer(plaintext: bytes, sent: SentRequest, trust: TrustStore) -> None:
    with pytest.raises(InvalidMessageError):
        read(seal(plaintext, sent.claims.reply_key, kid=sent.request_id).encode(), sent, trust)
