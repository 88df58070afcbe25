"""Runners as issuers of identity tokens: each is one, under its own name, with its keys in the trust bundle.

A runner's name as an issuer is a URL only because that is the form of issuers in selectors and leases: nobody fetches
it. The root cannot add an issuer of that name, as `ringfence.client.admin.trust_setup` refuses it.
"""

from __future__ import annotations

import json
import re
from typing import Final

from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.crypto.jws import compact_jws
from ringfence.kernel.crypto.keys import SigningKey, b64encode
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.messages.enrolment import AttestationSelector, RunRef
from ringfence.messages.trust import OidcIssuer, OidcKey
from ringfence.model.identity.attestation import bound_audience
from ringfence.model.identity.spiffe_ids import spiffe_id

_RUNNER_ISSUER: Final = re.compile(r"https://([a-z0-9._-]{1,255})/runner/([a-z0-9][a-z0-9._-]{0,62})")
_SERVICE: Final = re.compile(r"spiffe://([a-z0-9._-]{1,255})/service/([a-z0-9][a-z0-9._-]{0,62})")
_ALGORITHMS: Final = {"P-256": "ES256", "Ed25519": "EdDSA"}


def runner_issuer(trust_domain: str, name: str) -> str:
    """The name of a runner as an issuer: `https://TRUST-DOMAIN/runner/NAME`."""
    return f"https://{trust_domain}/runner/{name}"


def runner_issuer_of(service: str) -> str | None:
    """The name as an issuer of the runner with this SPIFFE ID. None if it is no service's."""
    found = _SERVICE.fullmatch(service)
    return runner_issuer(found[1], found[2]) if found else None


def runner_name(trust_domain: str, issuer: str) -> str | None:
    """The name of the runner that `issuer` is. None if it is none of this trust domain."""
    found = _RUNNER_ISSUER.fullmatch(issuer)
    return found[2] if found is not None and found[1] == trust_domain else None


def runner_selector(
    trust_domain: str, name: str, agent_id: str, *, max_life_s: int = 3600
) -> AttestationSelector:
    """The selector that lets runs by this runner act as instances of an agent."""
    return AttestationSelector(
        issuer=runner_issuer(trust_domain, name),
        claims={"sub": spiffe_id(trust_domain, "agent", agent_id)},
        key_bound=True,
        max_life_s=max_life_s,
        runner=name,
    )


def issuer_of_instances(trust: TrustStore, issuer: str, at_s: float) -> OidcIssuer | None:
    """The issuer with this name, if its tokens are accepted for instances at `at_s`; else None.

    A runner has the keys that count for its service at `at_s`: where one has ended, no token by it counts any more,
    whenever it was signed.
    """
    name = runner_name(trust.trust_domain, issuer)
    if name is None:
        return trust.oidc_issuer(issuer, "instances", at_s)
    keys = trust.service_keys(spiffe_id(trust.trust_domain, "service", name), "runner", at_s)
    if not keys:
        return None
    return OidcIssuer(
        issuer=issuer,
        uses=("instances",),
        keys=tuple(
            OidcKey.model_validate(
                {
                    "kid": key.kid,
                    "alg": _ALGORITHMS[key.jwk.crv],
                    **key.jwk.model_dump(include={"kty", "crv", "x", "y"}, exclude_none=True),
                }
            )
            for key in keys
            if key.jwk.crv in _ALGORITHMS
        ),
    )


def enrolment_token(
    key: SigningKey, trust_domain: str, agent_id: str, run: RunRef, kid: str, *, now_s: int, deadline_s: int
) -> str:
    """Sign the identity token that enrols the key of a run's instance, as its runner.

    Args:
        key: the runner's key; its `id` is the SPIFFE ID in the trust bundle.
        trust_domain: the trust domain.
        agent_id: the agent whose instance it will be.
        run: the run, and the only task that the instance may act within.
        kid: the thumbprint of the key that was made in the sandbox.
        now_s: the present, in seconds.
        deadline_s: the end of the run at the latest, in seconds. The token does not outlive it.

    Raises ValueError if `key` is no service's.
    """
    issuer = runner_issuer_of(key.id)
    if issuer is None:
        raise ValueError(f"{key.id} is no runner")
    header = {"alg": key.alg, "kid": key.kid, "typ": "JWT"}
    claims = {
        "iss": issuer,
        "sub": spiffe_id(trust_domain, "agent", agent_id),
        "aud": bound_audience(trust_domain, kid),
        "iat": now_s,
        "exp": deadline_s,
        "jti": derived_id("run.token", run.run_id, kid),
        "run_id": run.run_id,
        "task_id": run.task_id,
    }
    text = ".".join(
        b64encode(json.dumps(part, separators=(",", ":")).encode()) for part in (header, claims)
    ).encode()
    return compact_jws(text, key.sign(text))
