"""Tokens as the platforms document them: the claims that each has, for one workload."""

from __future__ import annotations

import uuid
from typing import Any

from ringfence.messages.enrolment import AttestationSelector
from tests.support.oidc_tokens import TokenIssuer

PLATFORMS = ("kubernetes", "github", "gcp", "spiffe")


def claims(platform: str, issuer: TokenIssuer, aud: str, now_s: float | None = None) -> dict[str, Any]:
    """The claims of a token for `aud`."""
    common = issuer.claims(aud, now_s)
    now = common["iat"]
    match platform:
        case "kubernetes":
            # A projected service account token, bound to its pod.
            return {
                **common,
                "aud": [aud],
                "exp": now + 3607,
                "nbf": now,
                "jti": str(uuid.uuid4()),
                "sub": "system:serviceaccount:ci:deployer",
                "kubernetes.io": {
                    "namespace": "ci",
                    "node": {"name": "node-1", "uid": "646e7c5e-32d6-4d42-9dbd-e504e6cbe6b1"},
                    "pod": {"name": "deployer-7d9f", "uid": "5e0bd49b-f040-43b0-99b7-22765a53f7f3"},
                    "serviceaccount": {"name": "deployer", "uid": "14ee3fa4-a7e2-420f-9f9a-dbc4507c3798"},
                    "warnafter": now + 3607,
                },
            }
        case "github":
            return {
                **common,
                "exp": now + 300,
                "nbf": now - 300,
                "jti": str(uuid.uuid4()),
                "sub": "repo:acme/deploy:ref:refs/heads/main",
                "actor": "octocat",
                "actor_id": "12",
                "environment": "prod",
                "event_name": "push",
                "job_workflow_ref": "acme/flows/.github/workflows/release.yml@refs/heads/main",
                "ref": "refs/heads/main",
                "ref_protected": "true",
                "ref_type": "branch",
                "repository": "acme/deploy",
                "repository_id": "74",
                "repository_owner": "acme",
                "repository_visibility": "private",
                "run_attempt": "2",
                "run_id": "15",
                "run_number": "10",
                "runner_environment": "github-hosted",
                "sha": "example-sha",
                "workflow": "release",
            }
        case "gcp":
            return {
                **common,
                "exp": now + 3600,
                "azp": "112233445566778899001",
                "sub": "112233445566778899001",
                "email": "deployer@acme.iam.gserviceaccount.com",
                "email_verified": True,
                "google": {
                    "compute_engine": {
                        "instance_creation_timestamp": now - 86_400,
                        "instance_id": "152986662232938449",
                        "instance_name": "deployer-1",
                        "project_id": "acme-prod",
                        "project_number": 739419398126,
                        "zone": "europe-west1-b",
                    }
                },
            }
        case _:
            # A JWT-SVID of SPIRE with `jwt_issuer`: five minutes, and no more claims than these.
            return {
                **common,
                "aud": [aud],
                "exp": now + 300,
                "sub": "spiffe://acme.example/ns/ci/sa/deployer",
            }


_SELECTED: dict[str, dict[str, str]] = {
    "kubernetes": {
        "sub": "system:serviceaccount:ci:deployer",
        "/kubernetes.io/serviceaccount/uid": "14ee3fa4-a7e2-420f-9f9a-dbc4507c3798",
        "/kubernetes.io/pod/name": "deployer-*",
    },
    "github": {
        "repository_id": "74",
        "sub": "repo:acme/deploy:*",
        "ref": "refs/heads/main",
        "environment": "prod",
    },
    "gcp": {
        "sub": "112233445566778899001",
        "email_verified": "true",
        "/google/compute_engine/project_number": "739419398126",
    },
    "spiffe": {"sub": "spiffe://acme.example/ns/ci/*"},
}


def selector(platform: str, issuer: str, **more: Any) -> AttestationSelector:
    """A selector that lets that workload in."""
    return AttestationSelector(issuer=issuer, claims=_SELECTED[platform], **more)
