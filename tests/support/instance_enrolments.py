"""Enrolments of instances of runs, by a registry of the moment: for who reads them without verifying them."""

from __future__ import annotations

import uuid

from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey, thumbprint
from ringfence.messages.base import KeyRecord, PublicJwk
from ringfence.messages.enrolment import InstanceEnrolment, RunRef


def enrolment_of(jwk: PublicJwk, agent: str, begins_s: int, ends_s: int) -> str:
    """The signed `instance.enrolment` of a key; `agent` is a SPIFFE ID of the trust domain acme.example."""
    registry = SigningKey.generate("spiffe://acme.example/service/registry")
    claims = InstanceEnrolment(
        iss=registry.id,
        aud="acme.example",
        iat=begins_s,
        jti="one",
        sub=agent,
        instance_id=str(uuid.uuid4()),
        key=KeyRecord(kid=thumbprint(jwk), jwk=jwk, not_before=begins_s, not_after=ends_s),
        issuer="https://acme.example/runner/local",
        subject=agent,
        selector="0" * 64,
        claims={"sub": agent},
        token_digest="1" * 64,
        key_bound=True,
        agent_revision=1,
        run=RunRef(run_id=str(uuid.uuid4()), task_id=str(uuid.uuid4())),
    )
    return sign(claims, registry)
